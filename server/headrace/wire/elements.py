"""The elements of one tensor: JSON values on one side, raw bytes on the other.

The errors raised here start with a verb ("has ..."): the caller puts model and tensor in front.
"""

import json
import struct
from itertools import chain
from math import prod
from typing import Any

import msgspec
import numpy as np

from headrace.core.errors import InvalidRequest
from headrace.core.tensor import ITEM_BYTES, NUMPY_DTYPES, Buffer, DataType, pack_bytes, unpack_bytes

# struct rather than numpy: for 784 values pack takes 8 us, numpy.array 19 us, and pack refuses by itself
# what does not fit: a float for an integer, a value out of range, a number too large for FP32.
_FORMATS = {
    DataType.UINT8: "B",
    DataType.UINT16: "H",
    DataType.UINT32: "I",
    DataType.UINT64: "Q",
    DataType.INT8: "b",
    DataType.INT16: "h",
    DataType.INT32: "i",
    DataType.INT64: "q",
    DataType.FP32: "f",
    DataType.FP64: "d",
}
_FLOATS = frozenset({DataType.FP32, DataType.FP64})
_BINARY_ONLY = frozenset({DataType.FP16, DataType.BF16})
_SHOWN_CHARACTERS = 60


def pack_flat(values: list[Any], datatype: DataType, shape: tuple[int, ...]) -> bytes:
    """The raw form of ``values``, which hold int, float and str only.

    Raises:
        InvalidRequest: their number does not fit the shape, or one of them the datatype.
    """
    _check_count(len(values), datatype, shape)
    return _pack(values, datatype)


def pack_nested(data: object, datatype: DataType, shape: tuple[int, ...]) -> bytes:
    """The raw form of any JSON ``data``: nested as ``shape`` is (dimensions of 1 do not count), or flat.

    Raises:
        InvalidRequest: ``data`` is ragged, has another shape, or has an element that does not fit the datatype.
    """
    if datatype in _BINARY_ONLY:
        raise _binary_only(datatype)
    if type(data) is list:
        dimensions, values = _flatten(data)
    elif shape == ():
        dimensions, values = (), [data]  # what a nested array of no dimensions is
    else:
        raise InvalidRequest(f"has {_shown(data)} as its data, expected an array of {datatype} values")
    _check_count(len(values), datatype, shape)
    if len(dimensions) > 1 and _essential(dimensions) != _essential(shape):
        raise InvalidRequest(f"has data nested as {list(dimensions)}, expected {list(shape)} or a flat array")
    if not set(map(type, values)) <= _accepted_types(datatype):
        raise _refusal(values, datatype)
    return _pack(values, datatype)


def to_json(data: Buffer, datatype: DataType, shape: tuple[int, ...]) -> bytes:
    """A tensor's elements as a flat JSON array.

    A float is written so that reading it as a double and rounding to the datatype gives the same bits.
    NaN and infinities are the bare tokens NaN, Infinity and -Infinity, as Triton and Python write them.

    Raises:
        InvalidRequest: JSON cannot carry these elements.
    """
    if datatype in _BINARY_ONLY:
        raise InvalidRequest(f"is {datatype}, which JSON cannot carry; ask for it with the parameter binary_data: true")
    if datatype is DataType.BYTES:
        return msgspec.json.encode(_texts(data, prod(shape)))
    if datatype is DataType.BOOL:
        return msgspec.json.encode((np.frombuffer(data, dtype=np.uint8) != 0).tolist())
    values = np.frombuffer(data, dtype=NUMPY_DTYPES[datatype]).tolist()
    text = msgspec.json.encode(values)
    # msgspec writes what is not finite as null, so looking for that is cheaper than numpy.isfinite
    if datatype in _FLOATS and b"null" in text:
        return json.dumps(values, separators=(",", ":")).encode()
    return text


def _pack(values: list[Any], datatype: DataType) -> bytes:
    code = _FORMATS.get(datatype)
    if code is not None:
        try:
            return struct.pack(f"<{len(values)}{code}", *values)
        except (struct.error, OverflowError):
            raise _refusal(values, datatype) from None
    if datatype in _BINARY_ONLY:
        raise _binary_only(datatype)
    if not set(map(type, values)) <= _accepted_types(datatype):
        raise _refusal(values, datatype)
    if datatype is DataType.BOOL:
        return bytes(values)
    try:
        return pack_bytes(values)
    except UnicodeEncodeError:
        raise InvalidRequest("has a string with half of a surrogate pair, expected valid Unicode") from None


def _binary_only(datatype: DataType) -> InvalidRequest:
    return InvalidRequest(f"is {datatype}, which JSON cannot carry; send it as binary_data, with binary_data_size")


def _flatten(data: list[Any]) -> tuple[tuple[int, ...], list[Any]]:
    """The shape in which ``data`` is nested, and its elements in row-major order, of any kind."""
    dimensions = [len(data)]
    level = data
    while level and type(level[0]) is list:
        lengths = set(map(len, level)) if set(map(type, level)) == {list} else set()
        if len(lengths) != 1:
            raise InvalidRequest(f"has ragged data: the arrays at depth {len(dimensions)} differ in length or kind")
        dimensions.append(lengths.pop())
        level = list(chain.from_iterable(level))
    return tuple(dimensions), level


def _essential(dimensions: tuple[int, ...]) -> list[int]:
    """Dimensions that nesting shows: those of 1 left out, and nothing after a 0."""
    kept = [size for size in dimensions if size != 1]
    return kept[: kept.index(0) + 1] if 0 in kept else kept


def _check_count(count: int, datatype: DataType, shape: tuple[int, ...]) -> None:
    expected = prod(shape)
    if count != expected:
        raise InvalidRequest(f"has {count} elements in its data, expected {expected} for {datatype}{list(shape)}")


def _accepted_types(datatype: DataType) -> set[type]:
    if datatype is DataType.BOOL:
        return {bool}
    if datatype is DataType.BYTES:
        return {str}
    return {int, float} if datatype in _FLOATS else {int}


def _refusal(values: list[Any], datatype: DataType) -> InvalidRequest:
    """The error about the first of ``values`` that does not fit ``datatype``."""
    accepted = _accepted_types(datatype)
    code = _FORMATS.get(datatype)
    for index, value in enumerate(values):
        fits = type(value) in accepted
        if fits and code is not None:
            try:
                struct.pack("<" + code, value)
            except (struct.error, OverflowError):
                fits = False
        if not fits:
            return InvalidRequest(f"has {_shown(value)} as element {index} of its data, expected {_wanted(datatype)}")
    raise AssertionError(f"every one of {len(values)} values fits {datatype}")


def _wanted(datatype: DataType) -> str:
    if datatype is DataType.BOOL:
        return "true or false for BOOL"
    if datatype is DataType.BYTES:
        return "a string for BYTES"
    if datatype in _FLOATS:
        return f"a number within the range of {datatype}"
    bits = 8 * ITEM_BYTES[datatype]
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if _FORMATS[datatype].islower() else (0, (1 << bits) - 1)
    return f"an integer from {low} to {high} for {datatype}"


def _shown(value: object) -> str:
    """A JSON value for a message, cut where it is long."""
    if type(value) is list:
        return "an array"
    if type(value) is dict:
        return "an object"
    if type(value) is int and value.bit_length() > 4 * _SHOWN_CHARACTERS:
        return f"an integer of {value.bit_length()} bits"
    if type(value) is str and len(value) > _SHOWN_CHARACTERS:
        return json.dumps(value[:_SHOWN_CHARACTERS] + "...")
    return json.dumps(value)


def _texts(data: Buffer, count: int) -> list[str]:
    texts: list[str] = []
    for index, element in enumerate(unpack_bytes(data, count)):
        try:
            texts.append(element.decode())
        except UnicodeDecodeError:
            raise InvalidRequest(
                f"has bytes that are not valid UTF-8 in element {index}, which JSON cannot carry; "
                "ask for it with the parameter binary_data: true"
            ) from None
    return texts
