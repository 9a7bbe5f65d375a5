"""One HTTP/2 connection, the server's end: how it begins, and the ends that it can come to."""

import contextlib
import logging
import socket
from asyncio import TimerHandle, get_running_loop
from collections.abc import Callable
from typing import Any

from headrace.http2 import frames
from headrace.http2.client_frames import (
    CONNECTION_WINDOW,
    MAX_STREAMS,
    STOPPING,
    STREAM_WINDOW,
    Accept,
    ClientFrames,
    Head,
)
from headrace.http2.frames import ErrorCode, Setting
from headrace.http2.headers import ADVERTISED_BYTES, Headers
from headrace.http2.incoming import FRAME_BYTES
from headrace.http2.outgoing import TRANSPORT_BYTES

log = logging.getLogger(__name__)

STUCK_TIMEOUT_NS = 300 * 10**9  # for a client to make room for any of a response that it could have whole
PREFACE_TIMEOUT_S = 20.0
GOAWAY_TIMEOUT_S = 1.0  # for a client to show that it has read the first GOAWAY
LINGER_TIMEOUT_S = 2.0  # for a client to close a connection that the server has ended
KEEP_ALIVE_S = 60  # after which the system looks whether a silent client is still there


class Connection(ClientFrames[Head]):
    """Speaks HTTP/2 with one client and has ``accept`` make a stream of each of its requests.

    ``parse`` makes of a request's headers what ``accept`` is given, beside the connection, the stream's number and
    whether the headers are all of the request. ``crowd`` is the set of all connections, which this one is in for as
    long as it is open.
    """

    def __init__(self, accept: Accept[Head], parse: Callable[[Headers], Head], crowd: "set[Connection[Head]]") -> None:
        super().__init__(accept, parse)
        self._crowd = crowd
        self._timer: TimerHandle | None = None

    # -- the transport's callbacks ------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """Wait for the client's first bytes: what this end says depends on whether they are HTTP/2."""
        self.transport = transport
        transport.set_write_buffer_limits(high=TRANSPORT_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_ALIVE_S)
        self._crowd.add(self)
        self._set_timer(PREFACE_TIMEOUT_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """The client has left: what it waited for need not be computed."""
        self._crowd.discard(self)
        self._closed = True
        self._leaving = False  # there is nothing to close
        if self._timer is not None:
            self._timer.cancel()
        self._rest.clear()
        self._gathered.clear()
        self._lose_all()

    def _begin(self) -> None:
        """Say what this end allows."""
        self._set_timer(None)
        self.transport.write(
            frames.settings(
                (
                    (Setting.MAX_CONCURRENT_STREAMS, MAX_STREAMS),
                    (Setting.INITIAL_WINDOW_SIZE, STREAM_WINDOW),
                    (Setting.MAX_FRAME_SIZE, FRAME_BYTES),
                    (Setting.MAX_HEADER_LIST_SIZE, ADVERTISED_BYTES),
                )
            )
            + frames.window_update(0, CONNECTION_WINDOW - frames.DEFAULT_WINDOW)
        )

    # -- what the server asks -----------------------------------------------------------------------------

    def check_time(self, now_ns: int) -> None:
        """Called once in a while: end streams that take longer than they may."""
        for stream in list(self._streams.values()):
            unsent = stream.unsent
            if unsent is not None and stream.ended and unsent.stuck_ns(now_ns) > STUCK_TIMEOUT_NS:
                log.info("a response is given up: its client has made no room for the rest, %d bytes", unsent.size)
                self._lose(stream, ErrorCode.CANCEL)
            else:
                stream.check_time(now_ns)

    def leave(self) -> None:
        """The server is stopping: take no more requests, and close when those under way are answered.

        The client learns first that it should stop, and only when it must have read that, which its answer to a
        ping shows, which of its requests were taken: so none of them is lost on the way (RFC 9113, section 6.8).
        """
        if self._closed or self._asked_to_leave:
            return
        if self._expects_preface:
            self._close()
            return
        self._asked_to_leave = True
        self.transport.write(
            frames.goaway(frames.MAX_WINDOW, ErrorCode.NO_ERROR, "the server is stopping") + frames.ping(STOPPING)
        )
        self._set_timer(GOAWAY_TIMEOUT_S, self._take_no_more)

    def give_up(self) -> None:
        """The server's time to stop is over: end what is still under way, and the connection with it."""
        self._leaving = False  # so that it is closed once, behind them all
        for stream in list(self._streams.values()):
            stream.stop()
        self._close()

    # -- ends ---------------------------------------------------------------------------------------------

    def _take_no_more(self) -> None:
        if self._closed or self._leaving:
            return
        self._set_timer(None)
        self._leaving = True
        self.transport.write(frames.goaway(self._last_stream, ErrorCode.NO_ERROR, "the server is stopping"))
        if not self._streams:
            self._close()

    def _lose_all(self) -> None:
        for stream in list(self._streams.values()):
            self._forget(stream)
            stream.lost()

    def _end_with(self, code: ErrorCode, why: str) -> None:
        """Tell the client what it did wrong and close."""
        log.info("an HTTP/2 connection is closed: %s (%s)", why, code.name)
        self._leaving = False
        self._flush()
        self.transport.write(frames.goaway(self._last_stream, code, why))
        self._lose_all()
        self._close()

    def _close(self) -> None:
        """End what is sent, and leave the rest to the client.

        A socket that is closed while something is unread is reset, and what the client has not received yet is lost:
        so what it still sends is read, and thrown away, until it has closed its end or its time is over.
        """
        if self._closed:
            return
        self._flush()
        self._closed = True
        self._leaving = False
        self._rest.clear()
        self._set_timer(LINGER_TIMEOUT_S, self.transport.abort)
        with contextlib.suppress(RuntimeError, OSError):  # it is closed already
            self.transport.write_eof()
            self.transport.resume_reading()

    def _set_timer(self, delay_s: float | None, callback: Callable[[], object] | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if delay_s is not None and callback is not None:
            self._timer = get_running_loop().call_later(delay_s, callback)
