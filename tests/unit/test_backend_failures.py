"""Whose fault a framework's refusal is, told by its words."""

import pytest

from headrace.core.errors import InternalError
from headrace_backends.base import DeviceLost, InputError
from headrace_backends.failures import blamed, device_lost
from headrace_backends.tensorrt.cuda import context_is_well


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", InputError),
        ("an input says: illegal instruction", InputError),
        ("CUDA out of memory. Tried to allocate 2 GiB", MemoryError),
        ("CUDNN_STATUS_NOT_SUPPORTED", RuntimeError),
        ("CUDA error: an illegal memory access was encountered", DeviceLost),
        ("CUDA error: device-side assert triggered", DeviceLost),
        ("CUDA failure 719: unspecified launch failure ; GPU=0", DeviceLost),
        ("CUDA error: uncorrectable ECC error encountered", DeviceLost),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", DeviceLost),
        ("CUDA error: operation not supported on global/shared address space", DeviceLost),
        ("CUDA error: uncorrectable NVLink error detected during the execution", DeviceLost),
        ("CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error", DeviceLost),
        ("CUDA error: unknown error", RuntimeError),
        ("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnSgetrf`", RuntimeError),
    ],
)
def test_blame(text, kind):
    error = blamed(text, "what is told")
    assert type(error) is kind
    assert "what is told" in str(error)


ILLEGAL = "CUDA error: an illegal memory access was encountered"
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"


class CUDARuntimeError(RuntimeError):
    """As cupy has it."""


@pytest.mark.parametrize(
    ("error", "well", "lost"),
    [
        (RuntimeError(ILLEGAL), None, True),
        (RuntimeError(ILLEGAL), False, True),
        (RuntimeError(ILLEGAL), True, False),  # said of something else
        (CUDARuntimeError("cudaErrorLaunchFailure: unspecified launch failure"), None, True),
        (Exception("cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS"), None, True),
        (CUDARuntimeError("cudaErrorContained: an error that the GPU has contained"), None, True),
        (MemoryError(FULL), None, False),
        (RuntimeError(FULL), True, False),
        (RuntimeError(FULL), False, True),  # the GPU was lost before
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False, True),
        (RuntimeError("CUDA error: unknown error"), False, True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"), False, True),
        (RuntimeError("weights are missing"), False, False),
        (ValueError(f"unknown word '{ILLEGAL}'"), False, False),
        (InputError(ILLEGAL), False, False),
        (InternalError(ILLEGAL), False, True),  # what a model makes of what it has caught
        (InternalError(ILLEGAL), None, False),
        (InternalError(FULL), True, False),
        (DeviceLost("gone"), True, True),
    ],
)
def test_a_loss_in_a_model_s_own_code(error, well, lost):
    found = device_lost(error, str(error), lambda: well)
    assert (type(found) is DeviceLost) == lost
    assert found is None or str(error) in str(found)


def test_the_driver_is_asked_only_where_the_words_are_of_cuda():
    def never():
        raise AssertionError("it was asked")

    assert device_lost(RuntimeError(), "shapes do not fit", never) is None


def test_words_are_not_believed_where_there_is_no_driver():
    told = RuntimeError(f"unknown word '{ILLEGAL}'")
    assert device_lost(told, str(told), lambda: context_is_well("libcuda-that-is-not-here.so")) is None
