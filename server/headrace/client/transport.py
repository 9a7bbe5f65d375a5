"""What carries calls to a server: one such interface for callers that wait, and its twin for asyncio."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass

from headrace.client.address import Address
from headrace.client.operations import Operation, Value
from headrace.client.result import InferResult
from headrace.client.terms import Terms
from headrace.core.request import InferRequest


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a client: its connections (HTTP only; gRPC has one for all calls), and the bytes of one answer."""

    max_connections: int
    max_answer_bytes: int


class Transport(ABC):
    """Any thread may call it, several at once. Every error is a ClientError."""

    @abstractmethod
    def call(self, operation: Operation[Value], terms: Terms) -> Value:
        """The answer to anything but inference."""

    @abstractmethod
    def infer(self, request: InferRequest, terms: Terms) -> InferResult:
        """The one answer to an inference request."""

    @abstractmethod
    def stream(self, request: InferRequest, terms: Terms) -> Generator[InferResult, None, None]:
        """The answers as they come; a caller that stops early cancels the request."""

    @abstractmethod
    def close(self) -> None:
        """End every connection."""


class AsyncTransport(ABC):
    """The same for one event loop; a call whose task is cancelled takes its request back."""

    @abstractmethod
    async def call(self, operation: Operation[Value], terms: Terms) -> Value:
        """The answer to anything but inference."""

    @abstractmethod
    async def infer(self, request: InferRequest, terms: Terms) -> InferResult:
        """The one answer to an inference request."""

    @abstractmethod
    def stream(self, request: InferRequest, terms: Terms) -> AsyncGenerator[InferResult, None]:
        """The answers as they come; a caller that stops early cancels the request."""

    @abstractmethod
    async def close(self) -> None:
        """End every connection."""


def open_transport(address: Address, limits: Limits) -> Transport:
    """The transport for an address. Only its own protocol's library is imported."""
    if address.protocol == "grpc":
        from headrace.client.grpc_transport import GrpcTransport

        return GrpcTransport(address, limits)
    from headrace.client.http_transport import HttpTransport

    return HttpTransport(address, limits)


def open_async_transport(address: Address, limits: Limits) -> AsyncTransport:
    """The same for asyncio."""
    if address.protocol == "grpc":
        from headrace.client.grpc_transport import AsyncGrpcTransport

        return AsyncGrpcTransport(address, limits)
    from headrace.client.http_transport import AsyncHttpTransport

    return AsyncHttpTransport(address, limits)
