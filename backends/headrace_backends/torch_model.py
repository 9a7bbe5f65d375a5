"""What a PyTorch file is read into, and how tensors become arrays; for every kind of file alike."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from headrace.core.tensor import NUMPY_DTYPES, DataType
from headrace_backends.base import DEFAULT_MAX_BATCH_SIZE, Array
from headrace_backends.specs import FoundTensor
from headrace_backends.torch_flow import BufferFlow

TORCH_DTYPES: dict[DataType, torch.dtype] = {
    DataType.BOOL: torch.bool,
    DataType.UINT8: torch.uint8,
    DataType.UINT16: torch.uint16,
    DataType.UINT32: torch.uint32,
    DataType.UINT64: torch.uint64,
    DataType.INT8: torch.int8,
    DataType.INT16: torch.int16,
    DataType.INT32: torch.int32,
    DataType.INT64: torch.int64,
    DataType.FP16: torch.float16,
    DataType.BF16: torch.bfloat16,
    DataType.FP32: torch.float32,
    DataType.FP64: torch.float64,
}
DATATYPES = {dtype: datatype for datatype, dtype in TORCH_DTYPES.items()}
_TRITON_NAME = re.compile(r"(?:INPUT|OUTPUT)__(\d+)")

# How a module is called: tensors in the order of the signature's inputs, tensors in the order of its outputs.
Call = Callable[[Any, list[torch.Tensor]], list[Any]]


@dataclass(frozen=True, slots=True)
class TorchModel:
    """A model that was read: its module, how to call that, what it takes and gives, how many rows a batch could have.

    ``call`` is given the module anew each time, because a compiled one may take its place.
    """

    module: Any
    call: Call
    inputs: list[FoundTensor]
    outputs: list[FoundTensor]
    most_rows: int = DEFAULT_MAX_BATCH_SIZE
    unmergeable: str | None = None  # why there is no point in finding out whether rows may be merged
    least_rows: int = 1  # that the module takes where rows are merged; a smaller batch is filled up to that
    compiled_threads: int = 1  # that its code starts, whatever it is allowed
    indexes: bool = True  # whether an input's numbers may be places in another tensor
    flow: Callable[[], BufferFlow] | None = None  # what its buffers have to do with its answers, where that can be told


def tensor_of(array: Array) -> torch.Tensor:
    """A tensor that shares the array's memory, or holds a copy of memory that torch could not promise not to write."""
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()
    if array.dtype == NUMPY_DTYPES[DataType.BF16]:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_of(tensor: torch.Tensor) -> Array:
    """The tensor's values in the CPU's memory, copied only where they are not there already, one after the other."""
    tensor = tensor.detach().to("cpu").resolve_neg().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(NUMPY_DTYPES[DataType.BF16])
    array: Array = tensor.numpy()
    return array


def gist(message: str) -> str:
    """The lines of a message that say what happened: of a TorchScript error, which is mostly source code, the last."""
    if "TorchScript interpreter" in message:
        return message.strip().splitlines()[-1].removeprefix("RuntimeError: ")
    return " ".join(message.strip().splitlines()[:2])


def positions(names: list[str]) -> list[int]:
    """Where each name stands: as its number says in Triton's INPUT__0 convention, else in the order given."""
    matches = [_TRITON_NAME.fullmatch(name) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    return numbers if sorted(numbers) == list(range(len(names))) else list(range(len(names)))
