"""The receiving half of an HTTP/1 connection: bytes in, requests out, each bounded; what comes too soon is put off."""

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from headrace.core.errors import HeadraceError, InvalidRequest, TooLarge
from headrace.frontends.arrivals import Arrivals
from headrace.frontends.http_exchange import Exchange
from headrace.frontends.infer import HttpInfer, InferReply
from headrace.frontends.known_heads import KnownHead, KnownHeads
from headrace.frontends.upgrade_offer import head_without_offer

MAX_HEAD_BYTES = 64 * 1024  # of a request's line and headers
SLICE_BYTES = 16 * 1024  # of what comes at once, before it is seen whether too many requests wait
MAX_WAITING = 16  # requests that are parsed before their turns; objects of them take fifty times their bytes
MAX_UNPARSED_BYTES = 1024 * 1024


class Incoming(HttpToolsProtocol):
    """uvicorn's protocol class as far as it reads: cuts what comes into requests, by the parser or by known heads."""

    reader: HttpInfer | None  # None: no inference here, everything goes to the application
    heads: KnownHeads
    max_request_bytes: int
    arrivals: Arrivals

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to count the time that the client takes for its request."""
        super().connection_made(transport)
        self.began_at: float | None = self.loop.time()  # the request that is being read; None: it is the server's turn
        self._discarding = False  # what comes is thrown away: the connection ends
        self._between = True  # requests: the parser has seen the last one whole, and nothing of the next
        self._ended_here = False  # whether a request has ended within what was received last
        self._in_head = True  # whether that of the request that is being read is still to end, or the first is to begin
        self._head_bytes = 0
        self._body_bytes = 0
        self._held_bytes = 0  # that count among the arrivals
        self._offers_upgrade = False  # whether the request that is being parsed does
        self._unparsed = b""  # what came behind many requests that wait for their turns

    # -- the parser's callbacks ---------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins; uvicorn's scope is made later, if the application is to see it."""
        self._between = False
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._body_bytes = 0
        self._in_head = True
        self._head_bytes = 0
        self.began_at = self.loop.time()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; behind a chunked body, where nobody looks at them, they are only counted."""
        if self._in_head:
            super().on_header(name, value)
            return
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.close_with(InvalidRequest(f"the request's trailers have more than {MAX_HEAD_BYTES} bytes"))

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        if self._discarding:
            return
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._offers_upgrade = True  # the head comes again, without the offer
        else:
            self._take_head()

    def on_body(self, body: bytes) -> None:
        """A piece of a request's body, kept as it came."""
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete or self._discarding:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self.max_request_bytes:
            self._refuse_body(self._body_bytes)
        elif isinstance(cycle, Exchange):
            cycle.body.append(body)
            if self._body_bytes > HIGH_WATER_LIMIT and self.pipeline:
                self.flow.pause_reading()
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self._offers_upgrade:
            return
        self._between = self._ended_here = True
        self.began_at = None
        cycle: Any = self.cycle
        if cycle is None or self._discarding:
            return
        if not isinstance(cycle, Exchange):
            super().on_message_complete()
        elif not cycle.response_complete:
            cycle.more_body = False
            if not self.pipeline and not self.transport.is_closing():
                self._begin(cycle)

    def _leave_to_application(self) -> None:
        """Have uvicorn do with the request what it would have done from its beginning."""
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers.extend(headers)
        super().on_headers_complete()

    # -- bytes --------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._discarding:
            return
        if self._unparsed:
            self._put_off(data)
            return
        before: Any = self.cycle
        begins = self._between and (before is None or before.response_complete)
        if begins:
            known = self.heads.find(data)
            if known is not None:
                self._take_known(*known, data)
                return
        self._ended_here = False
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.close_with(InvalidRequest("Invalid HTTP request received."))
        if self._in_head and not self._ended_here:  # else it began somewhere in the middle of the data
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.close_with(InvalidRequest(f"the request's headers have more than {MAX_HEAD_BYTES} bytes"))
        arrived_bytes = 0 if self._between or self._in_head or self._discarding else self._body_bytes
        if arrived_bytes != self._held_bytes:
            self._hold(arrived_bytes)
        exchange: Any = self.cycle
        if begins and self._between and exchange is not before and isinstance(exchange, Exchange):
            exchange.remember(self.heads, data)

    def _take_known(self, head: KnownHead, start: int, data: bytes) -> None:
        """A whole request whose head was seen before: the parser need not see it."""
        self.began_at = None
        self.cycle = exchange = Exchange(self, head.model, head.version, head.headers, keep_alive=True)  # type: ignore[assignment]
        exchange.more_body = False
        exchange.body.append(data[start:])
        self._begin(exchange)

    def _parse(self, data: bytes) -> None:
        """Go through the data, a slice at a time where it may hold many requests; some may have to wait as bytes."""
        view: bytes | memoryview = data if len(data) <= SLICE_BYTES else memoryview(data)
        position = 0
        while position < len(data) and not self._discarding:
            if len(self.pipeline) > MAX_WAITING:
                self._put_off(data[position:])
                return
            rest = len(data) - position
            at_once = rest <= SLICE_BYTES or self._body_left() >= rest
            end = position + (rest if at_once else SLICE_BYTES)
            try:
                self.parser.feed_data(view[position:end])
                position = end
            except httptools.HttpParserUpgrade as found:
                if not self._offers_upgrade:
                    if self.cycle is not None:
                        self.cycle.keep_alive = False  # what follows CONNECT is no HTTP
                    return
                position += found.args[0]
                self._parse_without_offer()

    def _parse_without_offer(self) -> None:
        """The head that was parsed last offers another protocol: have a new parser see it as if it did not."""
        self._offers_upgrade = False
        method, version = self.parser.get_method(), self.parser.get_http_version()
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
        self.parser.feed_data(head_without_offer(method, self.url, version, self.headers))

    def _body_left(self) -> int:
        """How much of the body of the request that is being read is still to come, where that is known."""
        cycle: Any = self.cycle
        if self._in_head or self._between or not isinstance(cycle, Exchange):
            return 0
        return cycle.headers.content_length - self._body_bytes

    def _put_off(self, data: bytes) -> None:
        """So many requests wait that this is not even parsed, and what comes next waits behind it."""
        self._unparsed += data
        self.flow.pause_reading()
        if len(self._unparsed) > MAX_UNPARSED_BYTES:
            self._unparsed = b""
            self.close_with(InvalidRequest(f"more than {MAX_UNPARSED_BYTES} bytes of requests wait for answers"))

    def _take_up(self) -> None:
        """No request waits any more: go on with what was put off."""
        data, self._unparsed = self._unparsed, b""
        if data:
            self.data_received(data)

    def _hold(self, size: int) -> None:
        """Count so many bytes of a request that is not whole yet, and no others, among the arrivals."""
        refusal = self.arrivals.change(self._held_bytes, size)
        self._held_bytes = size
        if refusal is not None:
            self.close_with(refusal)

    def _refuse_body(self, size: int) -> None:
        """Answer 413 and close, without keeping the rest."""
        self.close_with(
            TooLarge(
                f"the request's body has {size} bytes or more, and this server takes at most "
                f"{self.max_request_bytes} (--max-request-bytes)"
            )
        )

    # -- for the class that is made of this one -----------------------------------------------------------

    def _take_head(self) -> None:
        """A request's head is there, in ``url`` and ``headers``: make the cycle that it and its body belong to."""
        raise NotImplementedError

    def _begin(self, exchange: Exchange) -> None:
        """A request of the lane is whole, and nothing before it is unanswered."""
        raise NotImplementedError

    def respond(self, exchange: Exchange, status: int, reply: InferReply) -> None:
        """Write one whole response."""
        raise NotImplementedError

    def close_with(self, error: HeadraceError) -> None:
        """Answer the request that is being read with an error and end the connection."""
        raise NotImplementedError
