"""What callers give as inputs, made into tensors: arrays as they are, lists and scalars as the model declares."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from headrace.client.answers import ModelMetadata
from headrace.client.errors import InvalidRequestError
from headrace.core.errors import InvalidRequest
from headrace.core.tensor import DATATYPE_BY_NAME, NUMPY_DTYPES, Array, DataType, Tensor, datatype_of, to_wire
from headrace.wire.elements import pack_nested

_SCALARS = frozenset({bool, int, float, str, bytes})


def needs_metadata(inputs: Mapping[str, Any]) -> bool:
    """Whether an input is a list or a scalar, whose datatype only the model can tell.

    Raises:
        InvalidRequestError: the inputs have no names.
    """
    if not isinstance(inputs, Mapping):
        raise InvalidRequestError(
            None, f"the inputs are a {type(inputs).__name__}, expected a dict of arrays by the inputs' names"
        )
    return not all(hasattr(value, "__array__") for value in inputs.values())


def to_tensors(model: str, inputs: Mapping[str, Any], metadata: ModelMetadata | None) -> tuple[Tensor, ...]:
    """Tensors that share memory with the arrays they come from, where these are contiguous.

    Raises:
        InvalidRequestError: an input is nothing that the protocol has a datatype for, or does not fit the declared one.
    """
    tensors = []
    for name, value in inputs.items():
        try:
            if hasattr(value, "__array__"):
                tensors.append(_of_array(name, np.asarray(value)))
            else:
                assert metadata is not None  # needs_metadata has said so
                tensors.append(_of_plain(name, value, _declared(name, metadata)))
        except (InvalidRequest, TypeError, ValueError, OverflowError) as error:
            raise InvalidRequestError(None, f"model '{model}': input '{name}' {error}") from error
    return tuple(tensors)


def _of_array(name: str, array: Array) -> Tensor:
    datatype = datatype_of(array)
    if datatype is None:
        raise TypeError(f"is an array of {array.dtype}, which the protocol has no datatype for")
    if array.dtype.kind == "O":
        _check_texts(array)
    return Tensor(name, datatype, array.shape, to_wire(array))


def _of_plain(name: str, value: Any, datatype: DataType) -> Tensor:
    plain = _without_numpy(value)
    shape = _shape(plain)
    if datatype is DataType.BYTES:
        texts = np.empty(shape, np.object_)
        texts[...] = plain if shape == () else np.array(plain, np.object_).reshape(shape)
        return _of_array(name, texts)
    if datatype in (DataType.FP16, DataType.BF16):
        return Tensor(name, datatype, shape, _narrow_floats(plain, datatype, shape))
    return Tensor(name, datatype, shape, pack_nested(plain, datatype, shape))


def _narrow_floats(plain: Any, datatype: DataType, shape: tuple[int, ...]) -> Any:
    # Checked as FP64 first: it tells what is no number, and what the narrower type cannot hold shows as infinite.
    wide = np.frombuffer(pack_nested(plain, DataType.FP64, shape), np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(NUMPY_DTYPES[datatype])
    lost = np.isfinite(wide) & ~np.isfinite(narrow.astype(np.float64))
    if lost.any():
        raise ValueError(f"has {wide[lost][0]} among its data, expected numbers within the range of {datatype}")
    return to_wire(narrow)


def _declared(name: str, metadata: ModelMetadata) -> DataType:
    for spec in metadata.inputs:
        if spec.name == name:
            datatype = DATATYPE_BY_NAME.get(spec.datatype)
            if datatype is None:
                raise ValueError(f"has the unknown datatype '{spec.datatype}' by the model's metadata; give an array")
            return datatype
    known = ", ".join(f"'{spec.name}'" for spec in metadata.inputs)
    raise ValueError(f"is not among the model's inputs ({known})")


def _without_numpy(value: Any) -> Any:
    """``value`` with every tuple, array and numpy scalar in it made a list or a Python scalar."""
    if hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    if isinstance(value, list | tuple):
        plain = set(map(type, value)) <= _SCALARS  # as the innermost lists are, which are most of the work
        return list(value) if plain else [_without_numpy(element) for element in value]
    if type(value) not in _SCALARS:
        raise TypeError(f"holds a {type(value).__name__}, expected an array, or numbers, strings or lists of them")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        return ()
    if list not in set(map(type, value)):
        return (len(value),)
    shapes = {_shape(element) for element in value}
    if len(shapes) > 1:
        raise ValueError("is ragged: its lists differ in length or depth")
    return (len(value), *shapes.pop())


def _check_texts(array: Array) -> None:
    for element in array.reshape(-1).tolist():
        if not isinstance(element, str | bytes):
            raise TypeError(f"has an element of type {type(element).__name__}, expected str or bytes for BYTES")
