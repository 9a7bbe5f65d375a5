"""A named array, as models for Triton's Python backend take and give them."""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.core.tensor import NUMPY_DTYPES, Array, DataType, datatype_of
from headrace_backends.triton_python.datatypes import number_of
from headrace_backends.triton_python.errors import TritonModelException

_CPU = (1, 0)  # DLPack's device type and number
_BF16 = NUMPY_DTYPES[DataType.BF16]


class Tensor:
    """An array in the CPU's memory, and a name. The arrays of a request's tensors are the model's to keep."""

    __slots__ = ("_array", "_name")

    def __init__(self, name: str, data: Array) -> None:
        if not isinstance(data, np.ndarray):
            raise TypeError(f"tensor '{name}' is made of {type(data).__name__}, expected a numpy array")
        if datatype_of(data) is None:
            raise TritonModelException(f"tensor '{name}' is an array of {data.dtype}, which the protocol does not have")
        self._name = name
        self._array = data

    def name(self) -> str:
        """What the model's configuration calls it."""
        return self._name

    def as_numpy(self) -> Array:
        """The array itself, not a copy; BYTES are objects of type bytes, BF16 is ml_dtypes.bfloat16."""
        return self._array

    def shape(self) -> list[int]:
        """The size of each dimension."""
        return list(self._array.shape)

    def triton_dtype(self) -> int:
        """The datatype's number."""
        return number_of(self._array)

    def is_cpu(self) -> bool:
        """Always: every tensor is in the CPU's memory."""
        return True

    def to_dlpack(self) -> Any:
        """A DLPack capsule that shares the array's memory."""
        return self.__dlpack__()

    def __dlpack__(self, *, stream: object = None, **_: object) -> Any:
        if stream not in (None, -1):
            raise BufferError(f"tensor '{self._name}' is in the CPU's memory, where there is no stream {stream!r}")
        array: Any = np.ascontiguousarray(self._array).reshape(self._array.shape)  # which makes a list of a number
        if array.dtype.kind in "OSU":
            raise TritonModelException(f"tensor '{self._name}' is BYTES, which DLPack does not have")
        if array.dtype == _BF16:
            torch = _torch(f"tensor '{self._name}' is BF16")
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16).__dlpack__()
        if not array.flags.writeable:
            array = array.copy()  # DLPack cannot say that memory must not be written
        return array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> "Tensor":
        """A tensor of what DLPack can pass on: a capsule, or an object that makes one.

        Shares its memory where that is the CPU's; what is on a GPU is copied, which takes PyTorch.
        """
        source = tensor if hasattr(tensor, "__dlpack__") else _Capsule(tensor)
        try:
            if source.__dlpack_device__()[0] == _CPU[0]:
                return Tensor(name, np.from_dlpack(source))
        except (BufferError, RuntimeError, TypeError, ValueError):
            # Memory of another device or BF16, which numpy does not take; a capsule is still whole then.
            pass
        torch = _torch(f"tensor '{name}' is BF16 or not in the CPU's memory")
        values = torch.utils.dlpack.from_dlpack(tensor).detach().cpu().contiguous()
        if values.dtype is torch.bfloat16:
            return Tensor(name, values.view(torch.uint16).numpy().view(_BF16))
        return Tensor(name, values.numpy())


class _Capsule:
    """A bare DLPack capsule as numpy wants it handed over: it tells by itself whether it is the CPU's."""

    def __init__(self, capsule: Any) -> None:
        if type(capsule).__name__ != "PyCapsule":
            raise TypeError(f"expected a DLPack capsule or an object with __dlpack__, got {type(capsule).__name__}")
        self._capsule = capsule

    def __dlpack__(self, **_: object) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU


def tensor_named(tensors: Sequence[Tensor], name: str) -> Tensor | None:
    """The first tensor of that name, None where there is none."""
    return next((tensor for tensor in tensors if tensor.name() == name), None)


def _torch(why: str) -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise TritonModelException(f"{why}, and its DLPack form needs PyTorch, which is not installed") from error
