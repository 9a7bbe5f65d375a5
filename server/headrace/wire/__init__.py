"""Bytes to core objects and back; pure."""
