"""The fast lane: inference requests are parsed, queued and answered here, without an ASGI cycle.

uvicorn takes its protocol class as a parameter. This one answers ``POST .../infer`` by callback, as the bytes
come in and as the answers come back; everything else goes to the application as ever. An ASGI cycle costs a
task, an event and several awaits for each request, about as much as all the rest of the front process's work.
The same conformance cases run over the lane and over the ordinary route.
"""

import asyncio
import logging
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from headrace.core.errors import HeadraceError, InvalidRequest, NotReady, TooLarge
from headrace.frontends.arrivals import Arrivals
from headrace.frontends.http_exchange import Exchange
from headrace.frontends.http_response import last_response, response_head
from headrace.frontends.infer import HttpInfer, InferReply
from headrace.frontends.infer_target import infer_target
from headrace.frontends.known_heads import KnownHead, KnownHeads
from headrace.frontends.restrictions import Restrictions
from headrace.frontends.upgrade_offer import head_without_offer

log = logging.getLogger(__name__)

LINGER_S = 5.0
MAX_HEAD_BYTES = 64 * 1024  # of a request's line and headers
SLICE_BYTES = 16 * 1024  # of what comes at once, before it is seen whether too many requests wait
MAX_WAITING = 16  # requests that are parsed before their turns; objects of them take fifty times their bytes
MAX_UNPARSED_BYTES = 1024 * 1024
JOIN_BYTES = 16 * 1024  # copying so little costs less than a second buffer on its way through the transport


class LaneProtocol(HttpToolsProtocol):
    """uvicorn's httptools protocol with the lane in front, bounded bodies, and a drain that resets nobody."""

    reader: HttpInfer | None  # None: no inference here, everything goes to the application
    heads: KnownHeads
    max_request_bytes: int
    arrivals: Arrivals
    restrictions: Restrictions | None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to count the time that the client takes for its request."""
        super().connection_made(transport)
        self.began_at: float | None = self.loop.time()
        self.idle_since = self.began_at
        self._running: Exchange | None = None
        self._served: RequestResponseCycle | None = None  # by the application, now
        self._body_bytes = 0
        self._held_bytes = 0  # that count among the arrivals
        self._leaving = False
        self._discarding = False
        self._last_words: HeadraceError | None = None
        self._in_head = True
        self._head_bytes = 0
        self._closing_since = 0.0
        self._between = True  # requests: the parser has seen the last one whole, and nothing of the next
        self._ended_here = False  # whether a request has ended within what was received last
        self._offers_upgrade = False  # whether the request that is being parsed does
        self._unparsed = b""  # what came behind many requests that wait for their turns

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left: what it waited for need not be computed."""
        running = self._running
        if running is not None:
            running.disconnected = True
            if running.future is not None:
                running.future.cancel()
        served = self._served
        if served is not None and not served.response_complete:  # uvicorn tells only the one that was read last
            served.disconnected = True
            served.message_event.set()
        self._hold(0)
        super().connection_lost(exc)

    # -- parser callbacks ---------------------------------------------------------------------------------

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
        """Decide who answers: the lane or the application."""
        self._in_head = False
        if self._discarding:
            return
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._offers_upgrade = True
            return
        reader = self.reader
        infers = reader is not None and self.parser.get_method() == b"POST"
        target = infer_target(self.url) if infers else None
        if target is None or reader is None or (self.restrictions is not None and self._is_restricted()):
            length = _content_length(self.headers)
            if length > self.max_request_bytes:
                self._refuse_body(length)
            else:
                self._leave_to_application()
            return
        headers = reader.headers(self.headers)
        if headers.content_length > self.max_request_bytes:
            self._refuse_body(headers.content_length)
            return
        modern = self.parser.get_http_version() != "1.0"  # such a client would have to be told that it may go on
        keep_alive = modern and self.parser.should_keep_alive() and not self._leaving
        exchange = Exchange(self, *target, headers, keep_alive)
        exchange.expects_100 = self.expect_100_continue
        before = self.cycle
        self.cycle = exchange  # type: ignore[assignment]
        if before is None or before.response_complete:
            self._continue(exchange)
        else:
            # Pipelined: its turn comes when the one before is answered.
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def _is_restricted(self) -> bool:
        """Whether the request may not pass: the application says so to the client."""
        restrictions = self.restrictions
        return restrictions is not None and restrictions.group_problem("inference", self.headers) is not None

    def _leave_to_application(self) -> None:
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers.extend(headers)
        super().on_headers_complete()
        self.cycle.keep_alive = self.cycle.keep_alive and not self._leaving

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
            if self._body_bytes > HIGH_WATER_LIMIT and cycle is not self._first():
                self.flow.pause_reading()
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self._offers_upgrade:
            return  # it comes again, without the offer
        self._between = self._ended_here = True
        self.began_at = None
        cycle: Any = self.cycle
        if self._discarding:
            return
        if not isinstance(cycle, Exchange):
            if cycle is not None:
                super().on_message_complete()
            return
        if cycle.response_complete:
            return
        cycle.more_body = False
        if cycle is self._first() and not self.transport.is_closing():
            self._begin(cycle)

    # -- responses ----------------------------------------------------------------------------------------

    def respond(self, exchange: Exchange, status: int, reply: InferReply) -> None:
        """Write one whole response and go on to what waits behind it."""
        if exchange.disconnected or self.transport.is_closing():
            return
        self._running = None
        exchange.response_complete = True
        exchange.request = exchange.future = None  # an idle connection keeps its last exchange, but not its tensors
        keep_alive = exchange.keep_alive and not self._leaving
        head = response_head(status, reply.headers, keep_alive)
        if reply.size <= JOIN_BYTES:
            self.transport.write(b"".join((head, *reply.chunks)))
        else:
            self.transport.writelines((head, *reply.chunks))
        if not keep_alive:
            self.transport.close()
        self.on_response_complete()
        if self.flow.write_paused:
            self.flow.pause_reading()  # a client that does not read its answers may not ask for more

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """A response is written. As uvicorn's, but the watch looks after idle connections instead of a timer each."""
        self.idle_since = self.loop.time()
        self._served = None
        if self.transport.is_closing():
            return
        if self.pipeline:
            # By way of the loop: a long row of requests that are refused at once must not become a deep stack.
            self.loop.call_soon(self._start_next)
            return
        self.flow.resume_reading()
        if self._last_words is not None:
            self._say_last_words(self._last_words)

    def _start_next(self) -> None:
        """What was pipelined has its turn. Until now it has waited: its rest, if that came first, begins nothing."""
        if not self.pipeline:
            return
        cycle, app = self.pipeline.pop()
        rest = b""
        if not self.pipeline and not self.transport.is_closing():
            rest, self._unparsed = self._unparsed, rest
            if not self.flow.write_paused:
                self.flow.resume_reading()
        self._start_asgi_task(cycle, app)
        if rest and not self.transport.is_closing():
            self.data_received(rest)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """A cycle's turn has come; uvicorn calls this for those that need not wait."""
        if self.transport.is_closing():
            return
        if not isinstance(cycle, Exchange):
            self._served = cycle
            super()._start_asgi_task(cycle, app)
        elif cycle.more_body:
            self.began_at = self.loop.time()  # it was the server that did not read on
            self._continue(cycle)
        else:
            self._begin(cycle)

    def _continue(self, exchange: Exchange) -> None:
        if exchange.expects_100:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _begin(self, exchange: Exchange) -> None:
        self._running = exchange
        exchange.start()

    def _first(self) -> Any:
        """The cycle that is being read, if its turn to be answered has come; None while others wait before it."""
        return self.cycle if not self.pipeline else None

    def _refuse_body(self, size: int) -> None:
        """Answer 413 and close, without keeping the rest."""
        self.close_with(
            TooLarge(
                f"the request's body has {size} bytes or more, and this server takes at most "
                f"{self.max_request_bytes} (--max-request-bytes)"
            )
        )

    def close_with(self, error: HeadraceError) -> None:
        """Answer the request that is being read with an error and end the connection.

        Requests before it are answered first.
        """
        if self._discarding or self.transport.is_closing():
            return
        self._discarding = True
        self._hold(0)
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete and cycle.more_body:
            self._abandon(cycle)
        served = self._served
        is_served = served is not None and not served.response_complete
        is_whole = self.cycle is not None and not self.cycle.response_complete
        if self._running is not None or self.pipeline or is_served or is_whole:
            self._last_words = error
        else:
            self._say_last_words(error)

    def _abandon(self, cycle: Any) -> None:
        """Forget the request whose body is being read: the last words will be its answer."""
        if self.pipeline and self.pipeline[0][0] is cycle:
            self.pipeline.popleft()
        if isinstance(cycle, RequestResponseCycle):
            if cycle.response_started:
                self.transport.close()
            cycle.disconnected = True
            cycle.message_event.set()
        cycle.response_complete = True

    def _say_last_words(self, error: HeadraceError) -> None:
        """Write an error and no more. What the client still sends is read and thrown away for a while.

        Closing a socket with unread data resets it, and the client might never see the answer.
        """
        self.transport.write(last_response(error))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, self.transport.close)

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._discarding:
            return
        if self._unparsed:
            self._put_off(data)
            return
        begins = self._between and (self.cycle is None or self.cycle.response_complete) and not self._leaving
        if begins:
            known = self.heads.find(data)
            if known is not None:
                self._take_known(*known, data)
                return
        before = self.cycle
        self._ended_here = False
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.close_with(InvalidRequest("Invalid HTTP request received."))
        if self._in_head and not self._ended_here:  # else it began somewhere in the middle of the data
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.close_with(InvalidRequest(f"the request's headers have more than {MAX_HEAD_BYTES} bytes"))
        if self._held_bytes or not self._between:
            self._hold(0 if self._between or self._in_head or self._discarding else self._body_bytes)
        exchange: Any = self.cycle
        if begins and self._between and exchange is not before and isinstance(exchange, Exchange):
            exchange.remember(self.heads, data)

    def _put_off(self, data: bytes) -> None:
        """Requests wait that are not even parsed: those that come now wait behind them."""
        self._unparsed += data
        self.flow.pause_reading()
        if len(self._unparsed) > MAX_UNPARSED_BYTES:
            self._unparsed = b""
            self.close_with(InvalidRequest(f"more than {MAX_UNPARSED_BYTES} bytes of requests wait for answers"))

    def _parse(self, data: bytes) -> None:
        """Go through the data, a slice at a time where it may hold many requests; some may have to wait as bytes."""
        view: bytes | memoryview = data if len(data) <= SLICE_BYTES else memoryview(data)
        position = 0
        while position < len(data) and not self._discarding:
            if len(self.pipeline) > MAX_WAITING:
                self._unparsed = data[position:]
                self.flow.pause_reading()
                return
            rest = len(data) - position
            end = position + (rest if self._body_left() >= rest else SLICE_BYTES)
            try:
                self.parser.feed_data(view[position:end])
                position = end
            except httptools.HttpParserUpgrade as found:
                if not self._offers_upgrade:
                    if self.cycle is not None:
                        self.cycle.keep_alive = False  # what follows CONNECT is no HTTP
                    return
                self._offers_upgrade = False
                position += found.args[0]
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

    def _hold(self, size: int) -> None:
        """Count so many bytes of a request that is not whole yet, and no others, among the arrivals."""
        refusal = self.arrivals.change(self._held_bytes, size)
        self._held_bytes = size
        if refusal is not None:
            self.close_with(refusal)

    def _take_known(self, head: KnownHead, start: int, data: bytes) -> None:
        """A whole request whose head was seen before: the parser need not see it."""
        self.began_at = None
        self.cycle = exchange = Exchange(self, head.model, head.version, head.headers, keep_alive=True)  # type: ignore[assignment]
        exchange.more_body = False
        exchange.body.append(data[start:])
        self._begin(exchange)

    # -- the end of a connection --------------------------------------------------------------------------

    def shutdown(self) -> None:
        """The server is stopping: answer what is under way or still arrives, then close.

        uvicorn closes idle connections at once, which resets a client that is just sending its next request.
        Here the next request, if one comes soon, is answered with ``connection: close``.
        """
        self._leaving = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False

    def close_if_idle(self) -> None:
        """Close the connection when nothing is under way on it."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def give_up(self) -> None:
        """The server's time to stop is over: the request that still runs is answered with that."""
        running = self._running
        if running is not None:
            future = running.future
            running.refuse(NotReady("the server has stopped before the request was answered"))
            if future is not None:
                future.cancel()

    def check_time(self, now: float, read_timeout_s: float) -> None:
        """Close the connection when its client has taken too long over a request, or to ask for anything more."""
        if self.transport.is_closing():
            if not self._closing_since:
                self._closing_since = now
            elif now - self._closing_since > 2 * LINGER_S:
                self.transport.abort()  # the client does not read what is left for it
            return
        if self._running is not None or self.pipeline:
            return  # it is the client that waits
        if self.began_at is not None:
            if now - self.began_at > read_timeout_s:
                self.transport.close()
        elif (
            self.cycle is not None and self.cycle.response_complete and now - self.idle_since > self.timeout_keep_alive
        ):
            self.transport.close()


def _content_length(headers: list[tuple[bytes, bytes]]) -> int:
    for name, value in headers:
        if name == b"content-length":
            return int(value)  # the parser has seen to it that it is a number
    return 0


def lane(
    reader: HttpInfer | None, max_request_bytes: int, arrivals: Arrivals, restrictions: Restrictions | None = None
) -> type[asyncio.Protocol]:
    """The protocol class for uvicorn, tied to one engine; without one only its bounds and its drain are there."""
    if restrictions is not None and not restrictions.active:
        restrictions = None
    return type(
        "Lane",
        (LaneProtocol,),
        {
            "reader": reader,
            "heads": KnownHeads(),
            "max_request_bytes": max_request_bytes,
            "arrivals": arrivals,
            "restrictions": restrictions,
        },
    )
