"""One inference request in the fast lane, and its response."""

import asyncio
import logging
from typing import Protocol

from headrace.core.errors import HeadraceError, InternalError, released
from headrace.core.request import InferRequest, InferResponse
from headrace.frontends.infer import HttpInfer, InferHeaders, InferReply
from headrace.frontends.known_heads import KnownHead, KnownHeads
from headrace.frontends.status import http_status
from headrace.wire.json_v2 import encode_error

log = logging.getLogger(__name__)


class Connection(Protocol):
    """What an exchange needs of the connection that it is on."""

    reader: HttpInfer | None

    def respond(self, exchange: "Exchange", status: int, reply: InferReply) -> None:
        """Write one whole response."""


class _Silent:
    """Stands where uvicorn keeps the event that wakes an ASGI application."""

    def set(self) -> None:
        """Nobody sleeps on it."""


_SILENT = _Silent()


class Exchange:
    """One inference request and its response. Has the attributes that uvicorn looks at in a cycle of its own."""

    __slots__ = (
        "_protocol",
        "body",
        "disconnected",
        "expects_100",
        "future",
        "headers",
        "keep_alive",
        "message_event",
        "model",
        "more_body",
        "request",
        "response_complete",
        "version",
    )

    def __init__(self, protocol: Connection, model: str, version: str, headers: InferHeaders, keep_alive: bool) -> None:
        self._protocol = protocol
        self.model = model
        self.version = version
        self.keep_alive = keep_alive
        self.body: list[bytes] = []
        self.more_body = True
        self.headers = headers
        self.expects_100 = False
        self.request: InferRequest | None = None
        self.future: asyncio.Future[InferResponse] | None = None
        self.disconnected = False
        self.response_complete = False
        self.message_event = _SILENT

    def remember(self, heads: KnownHeads, data: bytes) -> None:
        """Have the head known that came as the beginning of ``data``, all of which was the request."""
        if self.keep_alive and not self.expects_100 and not self.headers.timeout:  # a deadline is of one request only
            heads.remember(data, KnownHead(self.model, self.version, self.headers))

    def start(self) -> None:
        """The request is whole and nothing before it on its connection is unanswered: have it run."""
        reader = self._protocol.reader
        assert reader is not None, "an exchange is begun only where there is inference"
        body = self.body[0] if len(self.body) == 1 else b"".join(self.body)
        self.body.clear()
        try:
            self.request = reader.decode(self.model, self.version, self.headers, body)
            self.future = reader.infer(self.request)
        except HeadraceError as error:
            self.refuse(error)
        except Exception:
            log.exception("could not read a request for model %s", self.model)
            self.refuse(InternalError("the request could not be read; the server's log says why"))
        else:
            self.future.add_done_callback(self._answer)

    def refuse(self, error: HeadraceError) -> None:
        """Answer with an error."""
        status, headers = http_status(error)
        body = encode_error(str(error))
        lines = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        lines += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        self._protocol.respond(self, status, InferReply([body], len(body), tuple(lines)))

    def _answer(self, future: asyncio.Future[InferResponse]) -> None:
        if future.cancelled() or self.disconnected:
            return
        error = future.exception()
        if error is None:
            reader = self._protocol.reader
            assert self.request is not None
            assert reader is not None
            try:
                reply = reader.encode(future.result(), self.request, self.headers)
            except HeadraceError as refusal:
                error = released(refusal)
            except Exception:
                log.exception("could not write the response of model %s", self.model)
                error = InternalError("the response could not be written; the server's log says why")
            else:
                self._protocol.respond(self, 200, reply)
                return
        if not isinstance(error, HeadraceError):
            log.error("model %s", self.model, exc_info=error)
            error = InternalError("the request failed; the server's log says why")
        self.refuse(error)
