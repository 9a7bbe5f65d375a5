"""The protocol-neutral ground: tensors, requests, signatures, errors, counters."""
