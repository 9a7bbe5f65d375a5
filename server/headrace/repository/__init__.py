"""What lies on disk, what is served of it, and the way from one to the other."""
