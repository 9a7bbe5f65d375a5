"""Whose fault it was that a framework refused to run a model that had loaded, told by its message."""

import re

from headrace_backends.base import InputError

_OUT_OF_MEMORY = re.compile(
    r"allocate (?:memory|\d+ bytes)|out of memory|bad_alloc|ALLOC_FAILED|bad allocation", re.IGNORECASE
)
_DEVICE_FAILURE = re.compile(r"\bCUDA|\bcuDNN|\bCUDNN|\bCUBLAS|\bCUFFT")


def blamed(text: str, message: str) -> Exception:
    """The exception to raise with ``message``: the input's fault, unless ``text`` speaks of memory or the device."""
    if _OUT_OF_MEMORY.search(text):
        return MemoryError(message)
    if _DEVICE_FAILURE.search(text):
        return RuntimeError(message)
    return InputError(message)
