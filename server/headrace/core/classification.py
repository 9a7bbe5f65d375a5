"""The classification extension: an output's highest values, each with its index and label, instead of its data."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.core.errors import InvalidRequest
from headrace.core.request import RequestedOutput
from headrace.core.tensor import DataType, Tensor, from_wire, pack_bytes

CLASSIFICATION = "classification"
MAX_ELEMENTS = 1_000_000  # of an output that is classified, as Triton has it

_WITHOUT_ORDER = frozenset({DataType.FP16, DataType.BF16, DataType.BYTES})  # those that the extension leaves out
_FLOATS = frozenset({DataType.FP32, DataType.FP64})

_Keys = npt.NDArray[np.integer[Any]]
_Columns = npt.NDArray[np.intp]


def classification_count(output: RequestedOutput, model: str) -> int:
    """How many classes of an output the client asks for; 0 when it wants the data.

    Raises:
        InvalidRequest: the parameter is not a positive integer.
    """
    count = output.parameters.get(CLASSIFICATION)
    if count is None:
        return 0
    if type(count) is not int or count < 1:  # an exact type, because True is an int too
        raise InvalidRequest(
            f"model '{model}': output '{output.name}' has {CLASSIFICATION} {count!r}, expected a positive integer"
        )
    return count


def classify(tensor: Tensor, count: int, batched: bool, labels: Sequence[str], model: str) -> Tensor:
    """The ``count`` highest elements of ``tensor``, or of each of its rows when ``batched``, as BYTES.

    Each is "value:index" or, where ``labels`` has a label for that index that is not empty, "value:index:label".
    The highest comes first, the lower index of equal ones, and NaN last.

    Raises:
        InvalidRequest: the tensor's datatype cannot be classified, or it has too many elements.
    """
    if tensor.datatype in _WITHOUT_ORDER:
        raise _invalid(tensor, model, f"is {tensor.datatype}, of which there is no classification")
    elements = prod(tensor.shape)
    if elements > MAX_ELEMENTS:
        raise _invalid(tensor, model, f"has {elements} elements, of which at most {MAX_ELEMENTS} can be classified")
    rows, row_shape = (tensor.shape[0], tensor.shape[1:]) if batched else (1, tensor.shape)
    classes = prod(row_shape)
    chosen = min(count, classes)
    values = from_wire(tensor.data, tensor.datatype, (rows, classes))
    columns = _highest(_keys(values), chosen)
    texts = _texts(np.take_along_axis(values, columns, axis=1), columns, tensor.datatype, labels)
    return Tensor(tensor.name, DataType.BYTES, (rows, chosen) if batched else (chosen,), pack_bytes(texts))


def _keys(values: npt.NDArray[Any]) -> _Keys:
    """Integers in the reverse order of ``values``, equal where these are equal, the greatest for NaN.

    So one way of choosing serves every datatype, and NaN needs no care in it.
    """
    match values.dtype.kind:
        case "b":
            return ~values.view(np.uint8).astype(bool).view(np.uint8)
        case "f":
            signed = np.dtype(f"i{values.dtype.itemsize}")
            bits = values.view(signed)
            magnitudes = bits & np.iinfo(signed).max
            infinity = np.array(np.inf, values.dtype).view(signed)
            finite = np.where(bits < 0, magnitudes, -magnitudes)  # the two zeros are one
            return np.where(magnitudes > infinity, np.iinfo(signed).max, finite)
        case _:
            return ~values


def _highest(keys: _Keys, count: int) -> _Columns:
    """The columns of the ``count`` least keys of each row, in their order, the lower column of equal ones first."""
    rows, classes = keys.shape
    if 0 < count < classes:
        last = np.partition(keys, count - 1, axis=1)[:, count - 1 : count]
        taken = keys <= last
        if np.count_nonzero(taken) > rows * count:  # some row has more that are equal to its last than it has room for
            before = keys < last
            equal = taken & ~before
            room = count - before.sum(axis=1, keepdims=True)
            taken = before | (equal & (equal.cumsum(axis=1) <= room))
        columns = np.nonzero(taken)[1].reshape(rows, count)
    else:
        columns = np.broadcast_to(np.arange(count), (rows, count))
    order = np.argsort(np.take_along_axis(keys, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def _texts(values: npt.NDArray[Any], columns: _Columns, datatype: DataType, labels: Sequence[str]) -> list[bytes | str]:
    form = "{:.6f}:{}" if datatype in _FLOATS else "{:d}:{}"
    texts: list[bytes | str] = []
    for value, index in zip(values.ravel().tolist(), columns.ravel().tolist(), strict=True):
        text = form.format(value, index)
        label = labels[index] if index < len(labels) else ""
        texts.append(f"{text}:{label}" if label else text)
    return texts


def _invalid(tensor: Tensor, model: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"model '{model}': output '{tensor.name}' {problem}")
