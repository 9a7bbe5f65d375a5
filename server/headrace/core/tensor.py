"""A tensor on the move: a name, a datatype, a shape and its bytes in wire form."""

from collections import deque
from collections.abc import Iterator
from enum import StrEnum
from itertools import pairwise
from math import prod
from struct import Struct

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt

from headrace.core.errors import InvalidRequest

MAX_DIMENSIONS = 32  # as many as every numpy has

_length_at = Struct("<I").unpack_from

Buffer = bytes | bytearray | memoryview
Array = npt.NDArray[np.generic]


class DataType(StrEnum):
    """The datatypes of the Open Inference Protocol, with BF16 as Triton has it."""

    BOOL = "BOOL"
    UINT8 = "UINT8"
    UINT16 = "UINT16"
    UINT32 = "UINT32"
    UINT64 = "UINT64"
    INT8 = "INT8"
    INT16 = "INT16"
    INT32 = "INT32"
    INT64 = "INT64"
    FP16 = "FP16"
    BF16 = "BF16"
    FP32 = "FP32"
    FP64 = "FP64"
    BYTES = "BYTES"


NUMPY_DTYPES: dict[DataType, np.dtype[np.generic]] = {
    DataType.BOOL: np.dtype(np.bool_),
    DataType.UINT8: np.dtype("<u1"),
    DataType.UINT16: np.dtype("<u2"),
    DataType.UINT32: np.dtype("<u4"),
    DataType.UINT64: np.dtype("<u8"),
    DataType.INT8: np.dtype("<i1"),
    DataType.INT16: np.dtype("<i2"),
    DataType.INT32: np.dtype("<i4"),
    DataType.INT64: np.dtype("<i8"),
    DataType.FP16: np.dtype("<f2"),
    DataType.BF16: np.dtype(ml_dtypes.bfloat16),
    DataType.FP32: np.dtype("<f4"),
    DataType.FP64: np.dtype("<f8"),
    DataType.BYTES: np.dtype(np.object_),
}
_DATATYPES = {dtype: datatype for datatype, dtype in NUMPY_DTYPES.items()}

# Bytes an element; BYTES elements have a length of their own, so 0 stands for "variable".
ITEM_BYTES: dict[DataType, int] = {
    datatype: 0 if datatype is DataType.BYTES else dtype.itemsize for datatype, dtype in NUMPY_DTYPES.items()
}

DATATYPE_BY_NAME: dict[str, DataType] = {str(datatype): datatype for datatype in DataType}


class Tensor(msgspec.Struct, frozen=True, gc=False):
    """One named tensor, its elements in raw wire form: row-major, little-endian, BYTES length-prefixed.

    A msgspec struct rather than a dataclass because two to four are made for each request, and making one
    costs a tenth of what a frozen dataclass does. ``data`` belongs to whoever made the tensor and must stay
    unchanged for as long as the tensor lives.
    """

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    data: Buffer


def datatype_of(array: Array) -> DataType | None:
    """The protocol's datatype of a numpy array, or None when the protocol has none for it."""
    if array.dtype.kind in "OSU":
        return DataType.BYTES
    return _DATATYPES.get(array.dtype.newbyteorder("<"))


def to_wire(array: Array) -> Buffer:
    """An array's raw wire form. Shares memory with ``array`` where its layout allows."""
    if array.dtype.kind in "OSU":
        return pack_bytes(array.reshape(-1).tolist())
    dtype = array.dtype.newbyteorder("<")
    contiguous = np.ascontiguousarray(array, dtype=dtype)
    if not contiguous.size:
        return b""
    return contiguous.reshape(-1).view(np.uint8).data


def from_wire(data: Buffer, datatype: DataType, shape: tuple[int, ...]) -> Array:
    """The array that ``data`` holds. A view of it, so valid as long as ``data``; BYTES elements are copies."""
    if datatype is DataType.BYTES:
        array = np.empty(prod(shape), dtype=np.object_)
        array[:] = unpack_bytes(data, len(array))
        return array.reshape(shape)
    if not len(data):
        return np.empty(shape, dtype=NUMPY_DTYPES[datatype])
    return np.frombuffer(data, dtype=NUMPY_DTYPES[datatype]).reshape(shape)


def pack_bytes(elements: list[bytes | str]) -> bytes:
    """BYTES elements in wire form: each a little-endian uint32 length and then its bytes.

    Raises:
        TypeError: one is neither text nor bytes. Of a number ``bytes()`` would make so many zeros.
    """
    parts: list[bytes] = []
    for element in elements:
        if isinstance(element, str):
            raw = element.encode()
        elif isinstance(element, bytes | bytearray | memoryview):
            raw = bytes(element)
        else:
            raise TypeError(f"has an element of type {type(element).__name__}, expected str or bytes")
        parts.append(len(raw).to_bytes(4, "little"))
        parts.append(raw)
    return b"".join(parts)


def unpack_bytes(data: Buffer, count: int) -> list[bytes]:
    """The ``count`` elements of a BYTES tensor in wire form.

    Raises:
        InvalidRequest: ``data`` does not hold exactly that many whole elements.
    """
    offsets = bytes_offsets(data, count)
    view = memoryview(data)
    return [bytes(view[start + 4 : end]) for start, end in pairwise(offsets)]


def bytes_offsets(data: Buffer, count: int) -> list[int]:
    """Where each of ``count`` length-prefixed elements starts, and where the last ends.

    Raises:
        InvalidRequest: ``data`` does not hold exactly that many whole elements.
    """
    return [0, *_ends(data, count)]


def check_bytes(data: Buffer, count: int) -> None:
    """See that ``data`` is ``count`` length-prefixed elements; takes no memory, however many they are.

    Raises:
        InvalidRequest: as ``bytes_offsets``.
    """
    deque(_ends(data, count), maxlen=0)


def _ends(data: Buffer, count: int) -> Iterator[int]:
    """Where each element ends."""
    size = len(data)
    if count * 4 > size:
        raise InvalidRequest(f"has {size} bytes of BYTES data, too few for its {count} elements")
    position = 0
    for index in range(count):
        if position + 4 > size:
            raise InvalidRequest(f"ends inside the length of BYTES element {index} of {count}")
        position += 4 + _length_at(data, position)[0]
        if position > size:
            raise InvalidRequest(f"ends inside BYTES element {index} of {count}")
        yield position
    if position != size:
        raise InvalidRequest(f"has {size - position} bytes after the last of its {count} BYTES elements")
