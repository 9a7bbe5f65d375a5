"""Calls as HTTP requests and answers as values, pure."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import numpy as np

from headrace.client.answers import Health
from headrace.client.errors import InferenceError, InvalidRequestError, ProtocolError, of_http
from headrace.client.events import EventReader
from headrace.client.operations import Operation, Value, model_path
from headrace.client.result import InferResult, array_of, datatype_named
from headrace.core.errors import InvalidRequest
from headrace.core.request import InferRequest
from headrace.core.tensor import NUMPY_DTYPES, Array, DataType, to_wire
from headrace.wire.elements import pack_nested

HEADER_LENGTH = "Inference-Header-Content-Length"
EVENT_STREAM = "text/event-stream"
_SHOWN_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """What is sent."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """What came back; ``headers`` has lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes | bytearray


class _OutputJson(msgspec.Struct):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, Any] | None = None
    data: Any = msgspec.UNSET


class _ResponseJson(msgspec.Struct):
    outputs: tuple[_OutputJson, ...] = ()
    model_name: str = ""
    model_version: str | None = None
    id: str | None = None
    parameters: dict[str, Any] | None = None


def encode_operation(operation: Operation[Any]) -> HttpRequest:
    """The request for anything but inference."""
    if operation.body is None:
        return HttpRequest("GET", operation.path, b"", {})
    return HttpRequest(
        "POST", operation.path, _encode(operation.body, operation.path), {"content-type": "application/json"}
    )


def encode_infer(request: InferRequest, timeout_us: int, *, stream: bool = False) -> HttpRequest:
    """An inference request, whose tensors are binary behind the JSON.

    Outputs are asked for as binary too, but not those of a stream, whose events are text.
    """
    parameters = dict(request.parameters)
    if timeout_us:
        parameters.setdefault("timeout", timeout_us)
    if not stream and not request.outputs:
        parameters.setdefault("binary_data_output", True)
    binary = {} if stream else {"binary_data": True}
    header: dict[str, Any] = {
        "inputs": [
            {
                "name": tensor.name,
                "shape": tensor.shape,
                "datatype": tensor.datatype,
                "parameters": {"binary_data_size": len(tensor.data)},
            }
            for tensor in request.inputs
        ]
    }
    if request.id:
        header["id"] = request.id
    if parameters:
        header["parameters"] = parameters
    if request.outputs:
        header["outputs"] = [
            {"name": output.name, "parameters": {**binary, **output.parameters}} for output in request.outputs
        ]
    text = _encode(header, f"model '{request.model}'")
    action = "infer_stream" if stream else "infer"
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(text))}
    if stream:
        headers["accept"] = EVENT_STREAM
    body = b"".join((text, *(tensor.data for tensor in request.inputs)))
    return HttpRequest("POST", f"{model_path(request.model, request.version)}/{action}", body, headers)


def decode_operation(operation: Operation[Value], answer: HttpAnswer) -> Value:
    """The answer's value.

    Raises:
        InferenceError: the server refused.
        ProtocolError: the answer is not that of this operation.
    """
    check_status(answer)
    if operation.answer is Health:  # the status has said it, and bodies differ from server to server
        return cast("Value", Health())
    value = _parse(answer.body, object) if answer.body.strip() else {}
    if operation.http_key:
        value = cast("dict[str, Any]", value).get(operation.http_key) if isinstance(value, dict) else None
    try:
        return cast("Value", msgspec.convert(value, operation.answer))
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the answer to {operation.path} is not what the protocol says: {error}") from None


def decode_infer(answer: HttpAnswer) -> InferResult:
    """The result in an answer.

    Raises:
        InferenceError: the server refused.
        ProtocolError: the answer breaks the protocol.
    """
    check_status(answer)
    total_bytes = len(answer.body)
    given = answer.headers.get(HEADER_LENGTH.lower())
    length = total_bytes
    if given is not None:
        length = int(given) if given.isascii() and given.isdigit() else -1
        if not 0 <= length <= total_bytes:
            raise ProtocolError(f"the header {HEADER_LENGTH} is {given!r}, and the answer has {total_bytes} bytes")
    view = memoryview(answer.body)
    return _result(_parse(view[:length], _ResponseJson), view[length:])


def decode_event(data: bytes) -> InferResult:
    """The result in one event of a stream.

    Raises:
        InferenceError: the event says that the request failed.
        ProtocolError: the event breaks the protocol.
    """
    message = _error_in(data)
    if message is not None:
        raise InferenceError(None, message)
    return _result(_parse(data, _ResponseJson), memoryview(b""))


def check_status(answer: HttpAnswer) -> None:
    """Raise the InferenceError that the status stands for, unless it is a success."""
    if 200 <= answer.status < 300:
        return
    body: bytes | bytearray = answer.body
    if answer.headers.get("content-type", "").startswith(EVENT_STREAM):  # a stream that failed at once is one event
        body = next(iter(EventReader(len(body)).feed(bytes(body))), body)
    message = _error_in(body)
    if message is None:
        text = bytes(answer.body[:_SHOWN_CHARACTERS]).decode(errors="replace").strip()
        message = f"HTTP status {answer.status}" + (f": {text}" if text else "")
    raise of_http(answer.status, message)


def _encode(value: object, where: str) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(None, f"{where}: the request cannot be written as JSON: {error}") from error


def _parse(text: bytes | bytearray | memoryview, kind: Any) -> Any:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the answer is not what the protocol says: {error}") from None
    except (ValueError, RecursionError):
        pass
    try:  # ten times slower, but it takes the bare NaN and Infinity that servers write though JSON has none
        return msgspec.convert(json.loads(bytes(text)), kind)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the answer is not what the protocol says: {error}") from None


def _error_in(body: bytes | bytearray) -> str | None:
    try:
        value = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return None
    message = value.get("error", value.get("detail")) if isinstance(value, dict) else None
    if message is None:
        return None
    return message if isinstance(message, str) else json.dumps(message)


def _result(response: _ResponseJson, blobs: memoryview) -> InferResult:
    outputs: dict[str, Array] = {}
    position = 0
    for output in response.outputs:
        datatype = datatype_named(output.datatype, output.name)
        size = (output.parameters or {}).get("binary_data_size")
        if size is None:
            data = _from_json(output, datatype)
        elif type(size) is int and 0 <= size <= len(blobs) - position:
            data = bytearray(blobs[position : position + size])  # a copy is aligned, can be written to and kept
            position += size
        else:
            raise ProtocolError(
                f"output '{output.name}' has binary_data_size {size!r}, and {len(blobs) - position} bytes follow"
            )
        outputs[output.name] = array_of(data, datatype, output.shape, output.name)
    if position != len(blobs):
        raise ProtocolError(f"{len(blobs) - position} bytes follow the last output's data, expected none")
    return InferResult(
        response.model_name, response.model_version or "", response.id or "", response.parameters or {}, outputs
    )


def _from_json(output: _OutputJson, datatype: DataType) -> bytearray:
    if output.data is msgspec.UNSET:
        raise ProtocolError(f"output '{output.name}' has neither data nor binary_data_size")
    binary_only = datatype in (DataType.FP16, DataType.BF16)  # yet some servers write them as numbers
    try:
        raw = pack_nested(output.data, DataType.FP64 if binary_only else datatype, output.shape)
    except InvalidRequest as error:
        raise ProtocolError(f"output '{output.name}' {error}") from None
    return bytearray(to_wire(np.frombuffer(raw, np.float64).astype(NUMPY_DTYPES[datatype])) if binary_only else raw)
