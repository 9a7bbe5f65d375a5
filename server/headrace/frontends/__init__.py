"""HTTP and gRPC over the engine."""
