"""The types of tensors: the library's and the protocol's."""

from typing import Any

from headrace.core.tensor import DataType
from headrace_backends.base import LoadError

# By the names that the library's own have.
_DATATYPES = {
    "FLOAT": DataType.FP32,
    "HALF": DataType.FP16,
    "BF16": DataType.BF16,
    "INT8": DataType.INT8,
    "UINT8": DataType.UINT8,
    "INT32": DataType.INT32,
    "INT64": DataType.INT64,
    "BOOL": DataType.BOOL,
}


def datatype_of(kind: Any, whose: str) -> DataType:
    """The protocol's datatype.

    Raises:
        LoadError: it has none for it.
    """
    datatype = _DATATYPES.get(kind.name)
    if datatype is None:
        raise LoadError(
            f"{whose} is {kind.name}, which the protocol has no datatype for; expected {', '.join(_DATATYPES)}"
        )
    return datatype
