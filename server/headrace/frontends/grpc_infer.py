"""One gRPC inference request from message to message: what the unary and the streaming RPC share."""

from collections.abc import Iterable
from typing import Any

import msgspec

from headrace.core.errors import InvalidRequest
from headrace.core.regions import Regions
from headrace.core.request import InferRequest, InferResponse
from headrace.frontends.forwarding import HeaderForwarding, with_forwarded
from headrace.wire.binary_v2 import RESERVED_PREFIX
from headrace.wire.grpc_v2 import decode_request, encode_response

EMPTY_FINAL = "triton_enable_empty_final_response"

Metadata = Iterable[tuple[str, str | bytes]]


class GrpcInfer:
    """Reads inference requests and writes their responses. One for a server; without ``regions`` no shared memory."""

    def __init__(self, *, regions: Regions | None = None, forwarding: HeaderForwarding | None = None) -> None:
        self._regions = regions
        self._forwarding = forwarding if forwarding is not None and forwarding.active else None

    def read(self, message: Any, deadline_ns: int, metadata: Metadata) -> tuple[InferRequest, bool]:
        """The request, and whether its client wants to be told of the end by a response of its own.

        Raises:
            HeadraceError: it is not one; the message says why.
        """
        request = decode_request(message, deadline_ns, self._regions)
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

    def write(self, response: InferResponse, request: InferRequest) -> Any:
        """The response as a ModelInferResponse.

        Raises:
            HeadraceError: an output does not fit where the client wants it.
        """
        return encode_response(response, request, self._regions)
