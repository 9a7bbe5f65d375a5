"""Models written for Triton's Python backend, served as they are: the API that they import and the backend itself."""
