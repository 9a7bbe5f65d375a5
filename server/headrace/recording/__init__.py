"""Recording of real inputs, where their owner asks for it."""
