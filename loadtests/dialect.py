"""How a server is asked, in the open protocol or in one of its own: requests as bytes, and the check of an answer."""

import json
from collections.abc import Callable, Sequence
from enum import StrEnum

import numpy as np

from headrace.core.tensor import Tensor, from_wire
from loadtests import grpc_message, http_message
from loadtests.answer import BadResponse, Outputs, check_outputs


class Wire(StrEnum):
    """How requests travel."""

    HTTP_BINARY = "http-binary"
    HTTP_JSON = "http-json"
    GRPC = "grpc"


class Dialect(StrEnum):
    """What they say. ``PLAIN`` is what people make up: tensors' bytes as the body, or an object of nested lists."""

    V2 = "v2"
    PLAIN = "plain"


HttpCheck = Callable[[bytes, bytes], None]  # of an answer's head and body; raises BadResponse
GrpcCheck = Callable[[bytes], None]


def http_request(
    dialect: Dialect, wire: Wire, host: str, path: str | None, model: str, tensors: Sequence[Tensor]
) -> bytes:
    """Head and body of one inference request.

    Raises:
        ValueError: the dialect has no path by itself, and none was given.
    """
    binary = wire is Wire.HTTP_BINARY
    if dialect is Dialect.V2:
        return http_message.encode_request(host, model, tensors, binary=binary, path=path)
    if path is None:
        raise ValueError(f"the dialect '{dialect}' was given no path; expected one, as /inference")
    return http_message.post(host, path, _plain_bytes(tensors) if binary else _plain_json(tensors), binary=binary)


def http_check(dialect: Dialect, wire: Wire, expected: Outputs) -> HttpCheck:
    """What the first answer has to pass: well formed, and with the ``expected`` outputs where there are any."""

    def check(head: bytes, body: bytes) -> None:
        if dialect is Dialect.V2:
            outputs = http_message.check_response(head, body)
        elif wire is Wire.HTTP_BINARY:
            outputs = _outputs_of_bytes(body, expected)
        else:
            outputs = _outputs_of_json(body, expected)
        check_outputs(outputs, expected)

    return check


def grpc_check(expected: Outputs) -> GrpcCheck:
    """The same for a ModelInferResponse."""
    return lambda message: check_outputs(grpc_message.check_response(message), expected)


def _plain_bytes(tensors: Sequence[Tensor]) -> bytes:
    return b"".join(bytes(tensor.data) for tensor in tensors)


def _plain_json(tensors: Sequence[Tensor]) -> bytes:
    lists = {tensor.name: from_wire(tensor.data, tensor.datatype, tensor.shape).tolist() for tensor in tensors}
    return json.dumps(lists, separators=(",", ":")).encode()


def _outputs_of_bytes(body: bytes, expected: Outputs) -> Outputs:
    """Bytes alone tell neither name nor datatype: they are those of the one expected output."""
    if not body:
        raise BadResponse("the answer has no bytes; expected those of an output")
    if len(expected) != 1:
        return {}
    ((name, right),) = expected.items()
    if len(body) != right.nbytes:
        raise BadResponse(f"the answer has {len(body)} bytes, expected {right.nbytes} for output '{name}'")
    return {name: np.frombuffer(body, right.dtype)}


def _outputs_of_json(body: bytes, expected: Outputs) -> Outputs:
    """An object of lists by name; or a list alone, which is the one expected output."""
    try:
        document = json.loads(body)
        if isinstance(document, dict):
            return {name: np.array(lists) for name, lists in document.items()}
        if isinstance(document, list) and document:
            return {next(iter(expected), "output"): np.array(document)}
    except ValueError as error:
        raise BadResponse(f"the answer is neither an object of lists nor a list: {body[:200]!r}") from error
    raise BadResponse(f"the answer is neither an object of lists nor a list: {body[:200]!r}")
