"""Load tests: drive a running server, measure the in-process limit beside it, write the numbers down."""
