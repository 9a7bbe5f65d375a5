"""The transports over HTTP: httpx's connection pools and nothing of the protocol."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn

import httpx

from headrace.client.address import Address
from headrace.client.errors import ClientError, ConnectionFailed, DeadlineError, ProtocolError
from headrace.client.events import EventReader
from headrace.client.http_form import (
    EVENT_STREAM,
    HttpAnswer,
    HttpRequest,
    check_status,
    decode_event,
    decode_infer,
    decode_operation,
    encode_infer,
    encode_operation,
)
from headrace.client.http_pool import KEEP_IDLE_S, ConnectionPool
from headrace.client.operations import Operation, Value
from headrace.client.result import InferResult
from headrace.client.terms import Terms
from headrace.client.transport import AsyncTransport, Limits, Transport
from headrace.core.request import InferRequest

# Tensors hardly shrink, and compressing them costs the server more than sending them; a caller's header may ask for it.
_HEADERS = {"accept-encoding": "identity", "user-agent": "headrace-client"}


class HttpTransport(Transport):
    """A connection for each call under way; ``wire`` stands in for the network where there is to be none."""

    def __init__(self, address: Address, limits: Limits, wire: httpx.BaseTransport | None = None) -> None:
        self._url = address.url
        self._max_answer_bytes = limits.max_answer_bytes
        certificates = httpx.create_ssl_context()  # read once: it takes longer than many a call

        def connect() -> httpx.Client:
            return httpx.Client(
                base_url=address.target, headers=_HEADERS, limits=_limits(1), verify=certificates, transport=wire
            )

        self._pool = ConnectionPool(connect, limits.max_connections)
        with _as_client_errors(self._url, Terms()), self._pool.taken(None):
            pass  # so that an address that is none is refused here

    def call(self, operation: Operation[Value], terms: Terms) -> Value:
        """The answer to anything but inference."""
        return decode_operation(operation, self._exchange(encode_operation(operation), terms))

    def infer(self, request: InferRequest, terms: Terms) -> InferResult:
        """The one answer to an inference request."""
        return decode_infer(self._exchange(encode_infer(request, terms.timeout_us), terms))

    def stream(self, request: InferRequest, terms: Terms) -> Generator[InferResult, None, None]:
        """The events of ``infer_stream``."""
        asked = encode_infer(request, terms.timeout_us, stream=True)
        with _as_client_errors(self._url, terms), self._sent(asked, terms) as response:
            if not _is_event_stream(response):
                _refuse_stream(HttpAnswer(response.status_code, response.headers, self._read(response, terms)))
            reader = EventReader(self._max_answer_bytes)
            for piece in response.iter_bytes():
                _check_time(terms)
                for event in reader.feed(piece):
                    yield decode_event(event)
            reader.finish()

    def close(self) -> None:
        """End every connection."""
        self._pool.close()

    def _exchange(self, request: HttpRequest, terms: Terms) -> HttpAnswer:
        with _as_client_errors(self._url, terms), self._sent(request, terms) as response:
            return HttpAnswer(response.status_code, response.headers, self._read(response, terms))

    @contextmanager
    def _sent(self, request: HttpRequest, terms: Terms) -> Iterator[httpx.Response]:
        with self._pool.taken(terms.remaining_s) as client:
            response = client.send(_built(client, request, terms, _TimeLeft(terms)), stream=True)
            try:
                yield response
            finally:
                response.close()

    def _read(self, response: httpx.Response, terms: Terms) -> bytearray:
        body = bytearray()
        for piece in response.iter_bytes():
            body += piece
            _check_size(body, self._max_answer_bytes)
            _check_time(terms)
        return body


class AsyncHttpTransport(AsyncTransport):
    """The same for one event loop, where httpx's own pool will do."""

    def __init__(self, address: Address, limits: Limits, wire: httpx.AsyncBaseTransport | None = None) -> None:
        self._url = address.url
        self._max_answer_bytes = limits.max_answer_bytes
        with _as_client_errors(self._url, Terms()):
            self._client = httpx.AsyncClient(
                base_url=address.target, headers=_HEADERS, limits=_limits(limits.max_connections), transport=wire
            )

    async def call(self, operation: Operation[Value], terms: Terms) -> Value:
        """The answer to anything but inference."""
        return decode_operation(operation, await self._exchange(encode_operation(operation), terms))

    async def infer(self, request: InferRequest, terms: Terms) -> InferResult:
        """The one answer to an inference request."""
        return decode_infer(await self._exchange(encode_infer(request, terms.timeout_us), terms))

    async def stream(self, request: InferRequest, terms: Terms) -> AsyncGenerator[InferResult, None]:
        """The events of ``infer_stream``."""
        asked = encode_infer(request, terms.timeout_us, stream=True)
        with _as_client_errors(self._url, terms):
            async with self._sent(asked, terms) as response:
                if not _is_event_stream(response):
                    async with asyncio.timeout(terms.remaining_s):
                        _refuse_stream(HttpAnswer(response.status_code, response.headers, await self._read(response)))
                reader = EventReader(self._max_answer_bytes)
                pieces = aiter(response.aiter_bytes())
                while True:
                    # For each wait anew: a block around a yield would count the caller's own time in its own task.
                    async with asyncio.timeout(terms.remaining_s):
                        piece = await anext(pieces, None)
                    if piece is None:
                        break
                    for event in reader.feed(piece):
                        yield decode_event(event)
                reader.finish()

    async def close(self) -> None:
        """End every connection."""
        await self._client.aclose()

    async def _exchange(self, request: HttpRequest, terms: Terms) -> HttpAnswer:
        with _as_client_errors(self._url, terms):
            async with asyncio.timeout(terms.remaining_s), self._sent(request, terms) as response:
                return HttpAnswer(response.status_code, response.headers, await self._read(response))

    @asynccontextmanager
    async def _sent(self, request: HttpRequest, terms: Terms) -> AsyncIterator[httpx.Response]:
        async with asyncio.timeout(terms.remaining_s):
            response = await self._client.send(_built(self._client, request, terms, {}), stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    async def _read(self, response: httpx.Response) -> bytearray:
        body = bytearray()
        async for piece in response.aiter_bytes():
            body += piece
            _check_size(body, self._max_answer_bytes)
        return body


class _TimeLeft(dict[str, Any]):
    """Time limits for one request's steps, each asked for when the step begins: what is left of the whole."""

    def __init__(self, terms: Terms) -> None:
        super().__init__()
        self._terms = terms

    def get(self, _: str, __: Any = None) -> float | None:
        """Whatever the step is called."""
        return self._terms.remaining_s


def _limits(connections: int) -> httpx.Limits:
    return httpx.Limits(
        max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=KEEP_IDLE_S
    )


def _built(
    client: httpx.Client | httpx.AsyncClient, request: HttpRequest, terms: Terms, time_left: Mapping[str, Any]
) -> httpx.Request:
    return client.build_request(
        request.method,
        request.path,
        content=request.body,
        headers={**request.headers, **terms.headers},
        extensions={"timeout": time_left},
    )


def _is_event_stream(response: httpx.Response) -> bool:
    return response.status_code == 200 and response.headers.get("content-type", "").startswith(EVENT_STREAM)


def _refuse_stream(answer: HttpAnswer) -> NoReturn:
    check_status(answer)
    content_type = answer.headers.get("content-type", "no content type")
    raise ProtocolError(f"the answer to a stream's request is {content_type}, expected {EVENT_STREAM}")


def _check_size(body: bytearray, max_bytes: int) -> None:
    if len(body) > max_bytes:
        raise ProtocolError(f"the answer is over {max_bytes} bytes, the client's bound max_answer_bytes")


def _check_time(terms: Terms) -> None:
    if terms.over:
        raise TimeoutError


@contextmanager
def _as_client_errors(url: str, terms: Terms) -> Iterator[None]:
    """Whatever httpx raises as the client's own errors."""
    try:
        yield
    except ClientError:
        raise
    except (TimeoutError, httpx.TimeoutException) as error:
        waited = "too long" if terms.timeout_s is None else f"{terms.timeout_s:g} s"
        raise DeadlineError(None, f"{url} did not answer within {waited}") from error
    except httpx.DecodingError as error:
        raise ProtocolError(f"the answer of {url} does not decompress: {error}") from error
    except (httpx.TransportError, OSError) as error:
        raise ConnectionFailed(f"{url}: {error or type(error).__name__}") from error
    except httpx.InvalidURL as error:
        raise ClientError(f"'{url}' is no server's address: {error}") from error
