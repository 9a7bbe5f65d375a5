"""Tensors of the protocol written and read by the book, without the server's own code."""

import struct
from dataclasses import dataclass
from math import prod
from typing import Any

DATATYPES = (
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "BF16",
    "FP32",
    "FP64",
    "BYTES",
)
FORMATS = {
    "BOOL": "?",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
BINARY_ONLY = ("FP16", "BF16")


@dataclass(frozen=True)
class Given:
    """One tensor: its elements as Python values, row-major; bytes for BYTES."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: tuple[Any, ...]

    @property
    def raw(self) -> bytes:
        """The elements in raw form."""
        return pack(self.datatype, self.values)

    def renamed(self, name: str) -> "Given":
        return Given(name, self.datatype, self.shape, self.values)


def pack(datatype: str, values: tuple[Any, ...]) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in values)
    if datatype == "BF16":  # the upper half of an FP32
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return struct.pack(f"<{len(values)}{FORMATS[datatype]}", *values)


def unpack(datatype: str, shape: tuple[int, ...], raw: bytes) -> tuple[Any, ...]:
    count = prod(shape)
    if datatype == "BYTES":
        values, position = [], 0
        for _ in range(count):
            (length,) = struct.unpack_from("<I", raw, position)
            values.append(raw[position + 4 : position + 4 + length])
            position += 4 + length
        assert position == len(raw)
        return tuple(values)
    if datatype == "BF16":
        assert len(raw) == 2 * count
        return tuple(struct.unpack("<f", b"\0\0" + raw[at : at + 2])[0] for at in range(0, len(raw), 2))
    return struct.unpack(f"<{count}{FORMATS[datatype]}", raw)
