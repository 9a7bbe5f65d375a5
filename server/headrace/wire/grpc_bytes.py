"""ModelInfer from bytes and to bytes, without message objects where there is no need of them.

Making protobuf objects of a request and walking through them takes longer than all that the server does with a small
one. But what a client says of its tensors is the same from one request to the next; only their data, and sometimes
the id, are not. So the bytes before the data are looked up, and the data is used where it lies. Everything that is
less plain (typed contents, shared memory, fields in another order) is left to ``grpc_v2``.
"""

from functools import lru_cache

from google.protobuf.message import DecodeError

from headrace.core.errors import HeadraceError
from headrace.core.regions import REGION
from headrace.core.request import InferRequest, InferResponse, Parameters, RequestedOutput
from headrace.core.tensor import DataType, Tensor
from headrace.wire import pb
from headrace.wire.grpc_v2 import decode_request as decode_message

REMEMBERED_BYTES = 1024  # in front of a request's data, for it to be remembered

# Tags of ModelInferRequest's fields: number << 3 | 2, since all of them have a length.
_ID = 0x1A
_RAW_INPUT = 0x3A
_BEFORE_DATA = frozenset((0x0A, 0x12, 0x22, 0x2A, 0x32))  # model_name, model_version, parameters, inputs, outputs
_RESPONSE_ID = b"\x1a"
_RAW_OUTPUT = b"\x32"

_Spec = tuple[str, DataType, tuple[int, ...]]
_Layout = tuple[str, str, tuple[_Spec, ...], tuple[RequestedOutput, ...], Parameters]


class _NotPlain(Exception):
    """The request has to be looked at as a message."""


def decode_request(data: bytes, start: int, deadline_ns: int) -> InferRequest | None:
    """The ModelInferRequest in ``data`` from ``start`` on, if it is a plain one; its tensors are slices of ``data``."""
    try:
        position, before, request_id = _before_data(data, start)
        model, version, specs, outputs, parameters = _layout(before)
        view = memoryview(data)
        inputs: list[Tensor] = []
        for name, datatype, shape in specs:
            if position >= len(data) or data[position] != _RAW_INPUT:
                return None
            begin, position = _span(data, position + 1)
            inputs.append(Tensor(name, datatype, shape, view[begin:position]))
        if position != len(data):
            return None
        return InferRequest(model, version, request_id.decode(), tuple(inputs), outputs, parameters, deadline_ns)
    except (_NotPlain, UnicodeDecodeError):
        return None


def _before_data(data: bytes, start: int) -> tuple[int, bytes, bytes]:
    """Where the first raw data begins, what stands before it without the id, and the id."""
    end = len(data)
    position = start
    id_start = id_end = -1
    request_id = b""
    while position < end and data[position] != _RAW_INPUT:
        tag = data[position]
        begin, after = _span(data, position + 1)
        if tag == _ID and id_start < 0:
            id_start, id_end = position, after
            request_id = data[begin:after]
        elif tag not in _BEFORE_DATA:
            raise _NotPlain
        position = after
    if position - start > REMEMBERED_BYTES:
        raise _NotPlain
    if id_start < 0:
        return position, data[start:position], request_id
    return position, data[start:id_start] + data[id_end:position], request_id


def encode_response(response: InferResponse) -> tuple[list[bytes | bytearray | memoryview], int]:
    """A ModelInferResponse without parameters, in pieces, and the size of them all. Every output's data is raw."""
    outputs = response.outputs
    head = _response_head(
        response.model, response.version, tuple([(tensor.name, tensor.datatype, tensor.shape) for tensor in outputs])
    )
    pieces: list[bytes | bytearray | memoryview] = [head]
    size = len(head)
    if response.id:
        encoded = response.id.encode()
        piece = _RESPONSE_ID + _varint(len(encoded)) + encoded
        pieces.append(piece)
        size += len(piece)
    for tensor in outputs:
        data = tensor.data
        length = len(data)
        piece = _RAW_OUTPUT + _varint(length)
        pieces += (piece, data)
        size += len(piece) + length
    return pieces, size


def _layout(before: bytes) -> _Layout:
    layout = _remembered_layout(before)
    if layout is None:
        raise _NotPlain
    return layout


@lru_cache(maxsize=512)
def _remembered_layout(before: bytes) -> _Layout | None:
    """What is said of a request's tensors in front of their data; None where that has to be looked at each time."""
    try:
        message = pb.ModelInferRequest.FromString(before)
        if any(tensor.HasField("contents") or REGION in tensor.parameters for tensor in message.inputs):
            return None
        if any(REGION in output.parameters for output in message.outputs):
            return None
        message.raw_input_contents.extend(b"" for _ in message.inputs)
        request = decode_message(message)
    except (DecodeError, HeadraceError):
        return None
    specs = tuple((tensor.name, tensor.datatype, tensor.shape) for tensor in request.inputs)
    return request.model, request.version, specs, request.outputs, request.parameters


@lru_cache(maxsize=512)
def _response_head(model: str, version: str, specs: tuple[_Spec, ...]) -> bytes:
    message = pb.ModelInferResponse(model_name=model, model_version=version)
    for name, datatype, shape in specs:
        message.outputs.add(name=name, datatype=datatype, shape=shape)
    encoded: bytes = message.SerializeToString()
    return encoded


def _span(data: bytes, position: int) -> tuple[int, int]:
    """Where a field with a length begins and ends; its length is what stands at ``position``."""
    value = shift = 0
    while position < len(data) and shift < 35:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if position + value > len(data):
                break
            return position, position + value
        shift += 7
    raise _NotPlain


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
