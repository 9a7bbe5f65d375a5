"""Whose fault a framework's refusal is, told by its words."""

import pytest

from headrace_backends.base import DeviceLost, InputError
from headrace_backends.failures import blamed


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
    ],
)
def test_blame(text, kind):
    error = blamed(text, "what is told")
    assert type(error) is kind
    assert "what is told" in str(error)
