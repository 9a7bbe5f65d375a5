"""Worker processes and the instances in them."""
