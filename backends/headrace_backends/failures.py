"""Whose fault it was that a framework refused to run a model that had loaded, told by its message."""

import re

from headrace_backends.base import DeviceLost, InputError

_OUT_OF_MEMORY = re.compile(
    r"allocate (?:memory|\d+ bytes)|out of memory|bad_alloc|ALLOC_FAILED|bad allocation", re.IGNORECASE
)
# After these CUDA refuses every further call of the process. The words are CUDA's own, whoever passes them on.
_DEVICE_LOST = re.compile(
    r"illegal memory access|unspecified launch failure|device-side assert|uncorrectable ECC|launch timed out|"
    r"misaligned address|illegal instruction|invalid program counter|hardware stack error|"
    r"CUDA-capable device\(s\) is/are busy or unavailable"
)
_DEVICE_FAILURE = re.compile(r"\bCUDA|\bcuDNN|\bCUDNN|\bCUBLAS|\bCUFFT")


def blamed(text: str, message: str) -> Exception:
    """The exception to raise with ``message``: the input's fault, unless ``text`` speaks of memory or the device."""
    if "CUDA" in text and _DEVICE_LOST.search(text):
        return DeviceLost(f"the GPU is lost to this process: {message}")
    if _OUT_OF_MEMORY.search(text):
        return MemoryError(message)
    if _DEVICE_FAILURE.search(text):
        return RuntimeError(message)
    return InputError(message)
