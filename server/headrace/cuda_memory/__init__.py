"""Memory of GPUs that clients share: a process of its own holds it, so that CUDA cannot take the server down."""
