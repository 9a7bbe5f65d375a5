"""Headrace: a deep-learning inference server."""

__version__ = "0.1.0"
