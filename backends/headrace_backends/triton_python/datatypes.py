"""Datatypes as Triton's Python API numbers and names them, and BYTES elements laid end to end."""

from typing import Any

import numpy as np

from headrace.core.tensor import DATATYPE_BY_NAME, NUMPY_DTYPES, Array, DataType, datatype_of, pack_bytes

_NUMBERS: dict[DataType, int] = {
    DataType.BOOL: 1,
    DataType.UINT8: 2,
    DataType.UINT16: 3,
    DataType.UINT32: 4,
    DataType.UINT64: 5,
    DataType.INT8: 6,
    DataType.INT16: 7,
    DataType.INT32: 8,
    DataType.INT64: 9,
    DataType.FP16: 10,
    DataType.FP32: 11,
    DataType.FP64: 12,
    DataType.BYTES: 13,
    DataType.BF16: 14,
}
_BY_NUMBER = {number: datatype for datatype, number in _NUMBERS.items()}
_LENGTH_BYTES = 4


def config_name(datatype: DataType) -> str:
    """What a model configuration calls a datatype: ``TYPE_FP32``, and ``TYPE_STRING`` for BYTES."""
    return "TYPE_STRING" if datatype is DataType.BYTES else f"TYPE_{datatype}"


def config_datatype(name: object) -> DataType | None:
    """The datatype that a model configuration means by ``name``, None where it means none."""
    if not isinstance(name, str) or not name.startswith("TYPE_"):
        return None
    return DataType.BYTES if name == "TYPE_STRING" else DATATYPE_BY_NAME.get(name.removeprefix("TYPE_"))


TRITON_STRING_TO_NUMPY: dict[str, type[np.generic]] = {
    config_name(datatype): dtype.type for datatype, dtype in NUMPY_DTYPES.items()
}


def number_of(array: Array) -> int:
    """Triton's number for an array's datatype, 0 where it has none."""
    datatype = datatype_of(array)
    return 0 if datatype is None else _NUMBERS[datatype]


def triton_to_numpy_type(data_type: int) -> type[np.generic] | None:
    """The numpy type of a datatype's number."""
    datatype = _BY_NUMBER.get(data_type)
    return None if datatype is None else NUMPY_DTYPES[datatype].type


def numpy_to_triton_type(data_type: Any) -> int | None:
    """The number of a numpy type or dtype."""
    return number_of(np.empty(0, dtype=data_type)) or None


def triton_string_to_numpy(triton_type_string: str) -> type[np.generic]:
    """The numpy type of a datatype as configurations name it."""
    return TRITON_STRING_TO_NUMPY[triton_type_string]


def as_bytes(array: Array) -> Array:
    """An array of text as objects of type bytes; what is neither str nor bytes becomes the text that str() gives."""
    elements = [
        element if isinstance(element, bytes) else str(element).encode() for element in array.reshape(-1).tolist()
    ]
    objects = np.empty(len(elements), dtype=np.object_)
    objects[:] = elements
    return objects.reshape(array.shape)


def serialize_byte_tensor(input_tensor: Array) -> bytes:
    """An array of text in wire form: each element's length in four bytes, then its bytes."""
    return pack_bytes(as_bytes(input_tensor).reshape(-1).tolist())


def deserialize_bytes_tensor(encoded_tensor: bytes) -> Array:
    """The elements of a BYTES tensor in wire form, as an array of one dimension.

    Raises:
        ValueError: it ends inside an element.
    """
    view = memoryview(encoded_tensor)
    elements: list[bytes] = []
    position = 0
    while position < len(view):
        start = position + _LENGTH_BYTES
        position = start + int.from_bytes(view[start - _LENGTH_BYTES : start], "little")
        if start > len(view) or position > len(view):
            raise ValueError(f"the BYTES tensor ends inside its element {len(elements)}")
        elements.append(bytes(view[start:position]))
    array = np.empty(len(elements), dtype=np.object_)
    array[:] = elements
    return array
