"""Whose fault it was that a framework refused to run a model that had loaded, told by its message."""

import re
from collections.abc import Callable

from headrace.core.errors import HeadraceError, InternalError
from headrace_backends.base import DeviceLost, InputError
from headrace_backends.tensorrt.cuda import context_is_well

_OUT_OF_MEMORY = re.compile(
    r"allocate (?:memory|\d+ bytes)|out of memory|bad_alloc|ALLOC_FAILED|bad allocation", re.IGNORECASE
)
# After these CUDA refuses every further call of the process. The words are CUDA's own, whoever passes them on.
_DEVICE_LOST = re.compile(
    r"illegal memory access|unspecified launch failure|device-side assert|uncorrectable (?:ECC|NVLink)|"
    r"launch timed out|misaligned address|illegal instruction|invalid program counter|hardware stack error|"
    r"global/shared address space|peer GPU memory over nvlink|"
    r"CUDA-capable device\(s\) is/are busy or unavailable|"
    r"cudaError(?:IllegalAddress|LaunchFailure|LaunchTimeout|Assert|ECCUncorrectable|HardwareStackError|"
    r"IllegalInstruction|MisalignedAddress|InvalidAddressSpace|InvalidPc|NvlinkUncorrectable|Contained|"
    r"TensorMemoryLeak|MpsClientTerminated)|"
    r"CUDA_ERROR_(?:ILLEGAL_ADDRESS|LAUNCH_FAILED|LAUNCH_TIMEOUT|ASSERT|ECC_UNCORRECTABLE|HARDWARE_STACK_ERROR|"
    r"ILLEGAL_INSTRUCTION|MISALIGNED_ADDRESS|INVALID_ADDRESS_SPACE|INVALID_PC|CONTEXT_IS_DESTROYED|"
    r"NVLINK_UNCORRECTABLE|CONTAINED|TENSOR_MEMORY_LEAK|MPS_CLIENT_TERMINATED)"
)
_DEVICE_FAILURE = re.compile(r"\b(?:cuda|cudnn|cublas|cufft|cusolver|cusparse|curand|nvrtc)", re.IGNORECASE)
# What code says of its input, and may quote that.
_OF_INPUT = (HeadraceError, ValueError, LookupError, TypeError)


def blamed(text: str, message: str) -> Exception:
    """The exception to raise with ``message``: the input's fault, unless ``text`` speaks of memory or the device."""
    if _speaks_of_loss(text):
        return DeviceLost(f"the GPU is lost to this process: {message}")
    if _OUT_OF_MEMORY.search(text):
        return MemoryError(message)
    if _DEVICE_FAILURE.search(text):
        return RuntimeError(message)
    return InputError(message)


def device_lost(
    error: BaseException, text: str, is_well: Callable[[], bool | None] = context_is_well
) -> DeviceLost | None:
    """What a model's own code raised, as a loss of the GPU, if it is one. ``text`` is the error's.

    Where it speaks of CUDA the driver is asked: a GPU whose memory was full, for one, is none the worse for it. Where
    the driver cannot tell, the words count, unless the model chose them itself: they may be its client's.
    """
    if isinstance(error, DeviceLost):
        return error
    told = isinstance(error, InternalError)  # as an answer, say
    if isinstance(error, _OF_INPUT) and not told:
        return None
    if not _DEVICE_FAILURE.search(f"{type(error).__name__} {text}"):
        return None
    well = is_well()
    if well or (well is None and (told or not _speaks_of_loss(text))):
        return None
    return DeviceLost(f"the GPU is lost to this process: {text}")


def _speaks_of_loss(text: str) -> bool:
    return "cuda" in text.lower() and _DEVICE_LOST.search(text) is not None
