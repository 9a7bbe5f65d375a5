"""The transports over gRPC: channels and calls, and nothing of the messages."""

from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from headrace.client.address import Address
from headrace.client.errors import ConnectionFailed, DeadlineError, of_grpc
from headrace.client.grpc_form import decode_infer, decode_operation, decode_part, encode_infer, encode_operation
from headrace.client.operations import Operation, Value
from headrace.client.result import InferResult
from headrace.client.terms import Terms
from headrace.client.transport import AsyncTransport, Limits, Transport
from headrace.core.request import InferRequest
from headrace.wire import pb

# Asks for a failing stream to end with a status, which tells more than the text inside of a response.
_STREAM_ERRORS = ("triton_grpc_error", "true")
_LARGEST_BYTES = (1 << 31) - 1


class GrpcTransport(Transport):
    """One connection for all threads; ``channel`` stands in for the network where there is to be none."""

    def __init__(self, address: Address, limits: Limits, channel: Any = None) -> None:
        self._url = address.url
        if channel is not None:
            self._channel = channel
        elif address.tls:
            credentials = grpc.ssl_channel_credentials()
            self._channel = grpc.secure_channel(address.target, credentials, options=_options(limits))
        else:
            self._channel = grpc.insecure_channel(address.target, options=_options(limits))

    def call(self, operation: Operation[Value], terms: Terms) -> Value:
        """The answer to anything but inference."""
        return decode_operation(operation, self._unary(operation.rpc, encode_operation(operation), terms))

    def infer(self, request: InferRequest, terms: Terms) -> InferResult:
        """The one answer to an inference request."""
        return decode_infer(self._unary("ModelInfer", encode_infer(request), terms))

    def stream(self, request: InferRequest, terms: Terms) -> Generator[InferResult, None, None]:
        """The answers to the one request of a ModelStreamInfer, which ends with the last of them."""
        path, request_class, response_class = _rpc("ModelStreamInfer")
        method = self._channel.stream_stream(path, request_class.SerializeToString, response_class.FromString)
        metadata = (*_metadata(terms), _STREAM_ERRORS)
        with _as_client_errors(self._url, terms):
            call = method(iter((encode_infer(request),)), timeout=terms.remaining_s, metadata=metadata)
            try:
                for message in call:
                    yield decode_part(message)
            finally:
                call.cancel()

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def _unary(self, rpc: str, message: Message, terms: Terms) -> Any:
        path, request_class, response_class = _rpc(rpc)
        method = self._channel.unary_unary(path, request_class.SerializeToString, response_class.FromString)
        with _as_client_errors(self._url, terms):
            return method(message, timeout=terms.remaining_s, metadata=_metadata(terms))


class AsyncGrpcTransport(AsyncTransport):
    """The same for one event loop, whose first call opens the channel: one made outside would have no loop."""

    def __init__(self, address: Address, limits: Limits, channel: Any = None) -> None:
        self._url = address.url
        self._address = address
        self._limits = limits
        self._channel = channel

    async def call(self, operation: Operation[Value], terms: Terms) -> Value:
        """The answer to anything but inference."""
        return decode_operation(operation, await self._unary(operation.rpc, encode_operation(operation), terms))

    async def infer(self, request: InferRequest, terms: Terms) -> InferResult:
        """The one answer to an inference request."""
        return decode_infer(await self._unary("ModelInfer", encode_infer(request), terms))

    async def stream(self, request: InferRequest, terms: Terms) -> AsyncGenerator[InferResult, None]:
        """The answers to the one request of a ModelStreamInfer, which ends with the last of them."""
        path, request_class, response_class = _rpc("ModelStreamInfer")
        method = self._opened().stream_stream(path, request_class.SerializeToString, response_class.FromString)
        metadata = (*_metadata(terms), _STREAM_ERRORS)
        with _as_client_errors(self._url, terms):
            call = method(iter((encode_infer(request),)), timeout=terms.remaining_s, metadata=metadata)
            try:
                async for message in call:
                    yield decode_part(message)
            finally:
                call.cancel()

    async def close(self) -> None:
        """End the connection."""
        if self._channel is not None:
            await self._channel.close()

    async def _unary(self, rpc: str, message: Message, terms: Terms) -> Any:
        path, request_class, response_class = _rpc(rpc)
        method = self._opened().unary_unary(path, request_class.SerializeToString, response_class.FromString)
        with _as_client_errors(self._url, terms):
            return await method(message, timeout=terms.remaining_s, metadata=_metadata(terms))

    def _opened(self) -> Any:
        if self._channel is None:
            target, options = self._address.target, _options(self._limits)
            self._channel = (
                grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(), options=options)
                if self._address.tls
                else grpc.aio.insecure_channel(target, options=options)
            )
        return self._channel


def _options(limits: Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", min(limits.max_answer_bytes, _LARGEST_BYTES)),
        ("grpc.max_send_message_length", -1),
        ("grpc.enable_retries", 0),  # whether to ask twice is the caller's to say
        ("grpc.use_local_subchannel_pool", 1),  # so that closing a client ends its connection
        # The library's own waits grow to two minutes, long after a restarted server is back.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]


def _rpc(name: str) -> tuple[str, type[Message], type[Message]]:
    rpc = pb.RPCS[name]
    return f"/{pb.SERVICE}/{name}", rpc.request, rpc.response


def _metadata(terms: Terms) -> tuple[tuple[str, str], ...]:
    return tuple((name.lower(), value) for name, value in terms.headers.items())


@contextmanager
def _as_client_errors(url: str, terms: Terms) -> Iterator[None]:
    """A call's status as the client's own errors."""
    try:
        yield
    except grpc.RpcError as failed:
        error: Any = failed  # the type that calls raise; the declared one has neither code nor details
        code, details = error.code().name, error.details() or ""
        if code == "DEADLINE_EXCEEDED" and terms.over:
            waited = f"{terms.timeout_s:g} s"
            raise DeadlineError(code, f"{url} did not answer within {waited}") from failed
        converted = of_grpc(code, details or f"gRPC status {code}")
        if isinstance(converted, ConnectionFailed):
            raise ConnectionFailed(f"{url}: {details}") from failed
        raise converted from failed
