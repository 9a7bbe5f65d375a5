"""Datatypes by the names that Triton's configurations give them."""

from headrace.core.tensor import DataType
from headrace.wire import pb


def data_type(datatype: DataType) -> str:
    """Triton's name for a datatype."""
    return "TYPE_STRING" if datatype is DataType.BYTES else f"TYPE_{datatype}"


def datatype_name(number: int) -> str:
    """Our name for one of Triton's numbers, or for one that is not Triton's the number itself."""
    value = pb.DataType.DESCRIPTOR.values_by_number.get(number)  # enums are open: any number may come in
    name = value.name.removeprefix("TYPE_") if value is not None else str(number)
    return "BYTES" if name == "STRING" else name
