"""Clients over HTTP: a connection each, driven by callbacks, which cost a tenth of an HTTP library's calls."""

import asyncio
import ssl
from time import monotonic_ns
from typing import cast
from urllib.parse import urlsplit

import httptools
import msgspec

from headrace.bench.tally import Tally
from headrace.bench.traffic import PROBLEM_CHARACTERS, Traffic
from headrace.client.address import Address
from headrace.client.http_form import HttpRequest

_RECONNECT_S = 0.05  # so that a server that refuses connections is not asked in a busy loop


class HttpTraffic(Traffic):
    """Connections last for one step."""

    def __init__(self, address: Address, request: HttpRequest) -> None:
        parts = urlsplit(address.target)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if address.tls else 80)
        self._tls = ssl.create_default_context() if address.tls else None
        self._request = _written(parts.netloc.rpartition("@")[2], parts.path, request)

    async def run(self, clients: int, tally: Tally) -> None:
        """See Traffic."""
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._client(tally))

    async def close(self) -> None:
        """Nothing is kept."""

    async def _client(self, tally: Tally) -> None:
        loop = asyncio.get_running_loop()
        go_on = True
        while go_on:
            started_ns = monotonic_ns()
            try:
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._request, tally, loop.create_future()),
                    self._host,
                    self._port,
                    ssl=self._tls,
                )
            except OSError as error:
                go_on = tally.add(started_ns, monotonic_ns(), f"cannot connect: {error.strerror or error}")
            else:
                try:
                    go_on = await connection.over
                finally:
                    connection.close()
            if go_on:
                await asyncio.sleep(_RECONNECT_S)


class _Connection(asyncio.Protocol):
    """Sends, counts the answer, sends again. ``over`` tells whether the client is to connect anew."""

    def __init__(self, request: bytes, tally: Tally, over: asyncio.Future[bool]) -> None:
        self.over = over
        self._request = request
        self._tally = tally
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._body: list[bytes] = []
        self._started_ns = 0
        self._waiting = False

    def close(self) -> None:
        """Drop it, whatever is under way."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        """Feed the parser, which calls the two methods below."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not an HTTP response: {error}")

    def on_body(self, body: bytes) -> None:
        """Only that of an error is looked at; the parser has checked that an answer is whole."""
        if self._parser.get_status_code() != 200:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """An answer is there."""
        status = self._parser.get_status_code()
        problem = None if status == 200 else f"{status}: {_message(b''.join(self._body))}"
        self._body.clear()
        self._waiting = False
        if not self._tally.add(self._started_ns, monotonic_ns(), problem):
            self._finish(False)
        elif self._parser.should_keep_alive() and self._transport is not None and not self._transport.is_closing():
            # A response's parser is done after a response that ends its connection only; this one goes on.
            self._send()
        else:
            self._finish(True)

    def connection_lost(self, exc: Exception | None) -> None:
        """The server has ended it."""
        self._transport = None
        self._end(f"connection lost: {exc or 'closed by the server'}")

    def _send(self) -> None:
        assert self._transport is not None
        self._waiting = True
        self._started_ns = monotonic_ns()
        self._transport.write(self._request)

    def _end(self, problem: str) -> None:
        if self._waiting:
            self._waiting = False
            self._finish(self._tally.add(self._started_ns, monotonic_ns(), problem))
        else:
            self._finish(True)

    def _finish(self, go_on: bool) -> None:
        if not self.over.done():
            self.over.set_result(go_on)


def _written(host: str, prefix: str, request: HttpRequest) -> bytes:
    lines = [
        f"{request.method} {prefix}{request.path} HTTP/1.1",
        f"host: {host}",
        *(f"{name}: {value}" for name, value in request.headers.items()),
        f"content-length: {len(request.body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + request.body


def _message(body: bytes) -> str:
    try:
        value = msgspec.json.decode(body)
    except ValueError:
        value = None
    text = (
        value["error"]
        if isinstance(value, dict) and isinstance(value.get("error"), str)
        else body.decode(errors="replace")
    )
    return text[:PROBLEM_CHARACTERS]
