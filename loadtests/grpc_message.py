"""ModelInfer as bytes: the few protobuf fields that one inference takes, written and read by hand.

The driver brings its own so that a mistake in the server's generated messages cannot hide in both ends.
"""

from collections.abc import Iterator, Sequence
from math import prod

from headrace.core.errors import InvalidRequest
from headrace.core.tensor import DATATYPE_BY_NAME, ITEM_BYTES, Array, Tensor, from_wire
from loadtests.answer import BadResponse, Outputs

METHOD = "/inference.GRPCInferenceService/ModelInfer"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def encode_request(model: str, tensors: Sequence[Tensor]) -> bytes:
    """A ModelInferRequest with the tensors as raw_input_contents."""
    parts = [_field(1, model.encode())]
    for tensor in tensors:
        shape = b"".join(map(_varint, tensor.shape))
        fields = [_field(1, tensor.name.encode()), _field(2, tensor.datatype.encode())]
        if shape:
            fields.append(_field(3, shape))
        parts.append(_field(5, b"".join(fields)))
    parts.extend(_field(7, bytes(tensor.data)) for tensor in tensors)
    return b"".join(parts)


def check_response(message: bytes) -> Outputs:
    """Decode a whole ModelInferResponse.

    Raises:
        BadResponse: it has no outputs, or an output's raw data does not fit its shape.
    """
    try:
        fields = list(_fields(message))
        outputs = [_output(value) for number, value in fields if number == 5 and isinstance(value, bytes)]
    except (IndexError, ValueError) as error:
        raise BadResponse(f"the answer of {len(message)} bytes is not a ModelInferResponse") from error
    contents = [value for number, value in fields if number == 6 and isinstance(value, bytes)]
    if not outputs or len(outputs) != len(contents):
        raise BadResponse(f"the answer has {len(outputs)} outputs and {len(contents)} raw_output_contents")
    arrays: dict[str, Array] = {}
    for (name, datatype_name, shape), raw in zip(outputs, contents, strict=True):
        datatype = DATATYPE_BY_NAME.get(datatype_name)
        if datatype is None:
            raise BadResponse(f"output '{name}' has datatype '{datatype_name}', which the protocol does not know")
        item_bytes = ITEM_BYTES[datatype]
        if item_bytes and len(raw) != prod(shape) * item_bytes:
            raise BadResponse(f"output '{name}' has {len(raw)} bytes, expected those of {datatype}{shape}")
        try:
            arrays[name] = from_wire(raw, datatype, tuple(shape))
        except (ValueError, InvalidRequest) as error:
            raise BadResponse(f"output '{name}' of {datatype}{shape} cannot be read: {error}") from error
    return arrays


def _output(message: bytes) -> tuple[str, str, list[int]]:
    """Name, datatype and shape of one InferOutputTensor."""
    name, datatype, shape = "", "", []
    for number, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            name = value.decode()
        elif number == 2 and isinstance(value, bytes):
            datatype = value.decode()
        elif number == 3:
            shape.extend(_varints(value) if isinstance(value, bytes) else [value])
    return name, datatype, shape


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _varints(data: bytes) -> list[int]:
    values, position = [], 0
    while position < len(data):
        value, position = _read_varint(data, position)
        values.append(value)
    return values


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Every field's number and value; fixed-width ones as their bytes."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        wire_type = key & 7
        if wire_type == _VARINT:
            value, position = _read_varint(data, position)
            yield key >> 3, value
            continue
        if wire_type == _BYTES:
            size, position = _read_varint(data, position)
        elif wire_type in (_FIXED64, _FIXED32):
            size = 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire_type} is none of protobuf's")
        if position + size > len(data):
            raise ValueError("the message ends inside a field")
        yield key >> 3, data[position : position + size]
        position += size
