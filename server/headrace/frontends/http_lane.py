"""The fast lane: inference requests are begun and answered here, without an ASGI cycle.

uvicorn takes its protocol class as a parameter. This one answers ``POST .../infer`` by callback, as the bytes
come in and as the answers come back; everything else goes to the application as ever. An ASGI cycle costs a
task, an event and several awaits for each request, about as much as all the rest of the front process's work.
The same conformance cases run over the lane and over the ordinary route.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from headrace.core.errors import HeadraceError, NotReady
from headrace.frontends.arrivals import Arrivals
from headrace.frontends.http_exchange import Exchange
from headrace.frontends.http_incoming import Incoming
from headrace.frontends.http_response import last_response, response_head
from headrace.frontends.infer import HttpInfer, InferReply
from headrace.frontends.infer_target import infer_target
from headrace.frontends.known_heads import KnownHeads
from headrace.frontends.restrictions import Restrictions

LINGER_S = 5.0
JOIN_BYTES = 16 * 1024  # copying so little costs less than a second buffer on its way through the transport


class LaneProtocol(Incoming):
    """Has each request answered by the lane or by the application, one at a time, with a drain that resets nobody."""

    restrictions: Restrictions | None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Nothing is under way yet."""
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        self._running: Exchange | None = None  # on the lane, now
        self._served: RequestResponseCycle | None = None  # by the application, now
        self._leaving = False  # each answer is the last one: the server stops
        self._last_words: HeadraceError | None = None  # to be said behind the answers that are under way
        self._closing_since = 0.0

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
        # They have this, and with it requests and what there is of their bodies, which are not to wait for a collector.
        self.cycle = self._running = self._served = None  # type: ignore[assignment] # as it is before the first one
        self.pipeline.clear()

    def eof_received(self) -> bool:  # type: ignore[override] # uvicorn's never keeps the connection
        """The client sends no more; whether the connection is kept for what it has asked.

        It has left, or it has only ended its side (``nc -N``): the two look the same until something is written. So a
        GET is still answered, which is soon done, and what a model would work on is taken back.
        """
        served = self._served
        if served is None or served is not self.cycle or served.response_complete or served.more_body:
            return False
        served.keep_alive = False
        return served.scope["method"] in {"GET", "HEAD"}

    # -- requests, as they come in ------------------------------------------------------------------------

    def _take_head(self) -> None:
        """Decide who answers: the lane or the application."""
        reader, restrictions = self.reader, self.restrictions
        target = infer_target(self.url) if self.parser.get_method() == b"POST" else None
        if target is not None and restrictions is not None and restrictions.group_problem("inference", self.headers):
            target = None  # the application says so to the client
        if target is None or reader is None:
            length = _content_length(self.headers)
            if length > self.max_request_bytes:
                self._refuse_body(length)
            else:
                self._leave_to_application()
                self.cycle.keep_alive = self.cycle.keep_alive and not self._leaving
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
        if before is not None and not before.response_complete:
            # Pipelined: its turn comes when the one before is answered.
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))
        elif exchange.expects_100:
            self._have_sent_on()

    def _begin(self, exchange: Exchange) -> None:
        self._running = exchange
        exchange.start()

    # -- answers, in the requests' order ------------------------------------------------------------------

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
        is_last = not self.pipeline
        if is_last and not self.transport.is_closing() and not self.flow.write_paused:
            self.flow.resume_reading()
        self._start_asgi_task(cycle, app)
        if is_last and not self.transport.is_closing():
            self._take_up()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """A cycle's turn has come; uvicorn calls this for those that need not wait."""
        if self.transport.is_closing():
            return
        if not isinstance(cycle, Exchange):
            self._served = cycle
            super()._start_asgi_task(cycle, app)
        elif cycle.more_body:
            self.began_at = self.loop.time()  # it was the server that did not read on
            if cycle.expects_100:
                self._have_sent_on()
        else:
            self._begin(cycle)

    def _have_sent_on(self) -> None:
        """The client waits for leave to send the body."""
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    # -- ends ---------------------------------------------------------------------------------------------

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

    # -- what the server asks -----------------------------------------------------------------------------

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
