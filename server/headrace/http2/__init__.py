"""HTTP/2 (RFC 9113), the server's side of it and no more than gRPC needs. Knows nothing of gRPC or of models."""
