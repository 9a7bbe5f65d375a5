"""One gRPC inference request from bytes to bytes: what the unary and the streaming RPC share."""

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from google.protobuf.message import DecodeError

from headrace.core.errors import HeadraceError, InvalidRequest
from headrace.core.regions import Regions
from headrace.core.request import InferRequest, InferResponse
from headrace.frontends.forwarding import HeaderForwarding, with_forwarded
from headrace.wire import grpc_bytes, pb
from headrace.wire.binary_v2 import RESERVED_PREFIX
from headrace.wire.grpc_v2 import decode_request, encode_response

EMPTY_FINAL = "triton_enable_empty_final_response"

Metadata = Iterable[tuple[str, str | bytes]]
Pieces = list[bytes | bytearray | memoryview]


class GrpcInfer:
    """Reads inference requests and writes their responses. One for a server; without ``regions`` no shared memory.

    ``on_unreadable`` is told the model and version of a request that could not be read.
    """

    def __init__(
        self,
        on_unreadable: Callable[[str, str], None],
        *,
        regions: Regions | None = None,
        forwarding: HeaderForwarding | None = None,
    ) -> None:
        self._on_unreadable = on_unreadable
        self._regions = regions
        self._forwarding = forwarding if forwarding is not None and forwarding.active else None

    def decode(self, data: bytes, start: int, deadline_ns: int, metadata: Metadata) -> tuple[InferRequest, bool]:
        """The request in ``data`` from ``start`` on, and whether its client wants to be told of the end.

        ``data`` must stay unchanged for as long as the request's tensors are used.

        Raises:
            HeadraceError: it is not one; the message says why.
        """
        request = grpc_bytes.decode_request(data, start, deadline_ns)
        if request is not None and not request.parameters and self._forwarding is None:
            return request, False
        message = None
        try:
            if request is None:
                message = _parsed(data[start:])
                request = decode_request(message, deadline_ns, self._regions)
            return self._accepted(request, metadata)
        except HeadraceError:
            if request is not None:
                self._on_unreadable(request.model, request.version)
            elif message is not None:
                self._on_unreadable(message.model_name, message.model_version)
            raise

    def encode(self, response: InferResponse, request: InferRequest) -> tuple[Pieces, int]:
        """The response as a ModelInferResponse, in pieces, and the size of them all.

        Raises:
            HeadraceError: an output does not fit where the client wants it.
        """
        if not response.parameters and (self._regions is None or not request.outputs):
            return grpc_bytes.encode_response(response)
        data = encode_response(response, request, self._regions).SerializeToString()
        return [data], len(data)

    def message(self, response: InferResponse, request: InferRequest) -> Any:
        """The response as a message.

        Raises:
            HeadraceError: an output does not fit where the client wants it.
        """
        return encode_response(response, request, self._regions)

    def _accepted(self, request: InferRequest, metadata: Metadata) -> tuple[InferRequest, bool]:
        wants_final = False
        if request.parameters:
            parameters = dict(request.parameters)
            wants_final = parameters.pop(EMPTY_FINAL, False) is True
            reserved = next((name for name in parameters if name.startswith(RESERVED_PREFIX)), None)
            if reserved is not None:
                raise InvalidRequest(
                    f"model '{request.model}': parameter '{reserved}': names that start with '{RESERVED_PREFIX}' "
                    f"are reserved, but for {EMPTY_FINAL}"
                )
            if len(parameters) != len(request.parameters):
                request = msgspec.structs.replace(request, parameters=parameters)
        if self._forwarding is not None:
            request = with_forwarded(request, self._forwarding.metadata_parameters(metadata))
        return request, wants_final


def request_id(data: bytes) -> str:
    """The id of a request that could not be read otherwise; empty when it has none."""
    try:
        found: str = pb.ModelInferRequest.FromString(data).id
    except DecodeError:
        return ""
    return found


def _parsed(data: bytes) -> Any:
    try:
        return pb.ModelInferRequest.FromString(data)
    except DecodeError as error:
        raise InvalidRequest(f"the request is no ModelInferRequest message: {error}") from None
