"""HTTP over a bare socket, for what no client library would send."""

import contextlib
import json
import socket
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class RawAnswer:
    """A response as it came; ``status`` 0 when the connection was closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """The message of an error, which has no other form."""
        document = json.loads(self.body)
        assert list(document) == ["error"], document
        assert isinstance(document["error"], str)
        return document["error"]


class RawConnection:
    """A TCP connection to the server; every read has a bound on its time."""

    def __init__(self, address: str, timeout_s: float = 60) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send what the server still takes."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def half_close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def answer(self, *, head: bool = False) -> RawAnswer:
        """The next response on the connection."""
        while b"\r\n\r\n" not in self._rest:
            if not self.more():
                return RawAnswer(0, {}, self._rest)
        top, _, self._rest = self._rest.partition(b"\r\n\r\n")
        first, *lines = top.decode("latin-1").split("\r\n")
        status = int(first.split(" ")[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if status == 100 or head:
            return RawAnswer(status, headers, b"")
        length = int(headers["content-length"])
        while len(self._rest) < length:
            assert self.more(), "the connection was closed inside a body"
        body, self._rest = self._rest[:length], self._rest[length:]
        return RawAnswer(status, headers, body)

    def at_end(self) -> bool:
        """Whether the server closes the connection without another word."""
        return not self._rest and not self.more()

    def more(self) -> bool:
        """Read what has come; false at the end of the connection."""
        try:
            piece = self.socket.recv(1 << 16)
        except ConnectionResetError:
            return False
        self._rest += piece
        return bool(piece)


def request(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    """A request's bytes, with its Content-Length unless ``headers`` have one of their own."""
    own = {"Host": "test", **(headers or {})}
    if not {"content-length", "transfer-encoding"} & {name.lower() for name in own} and method not in ("GET", "HEAD"):
        own["Content-Length"] = str(len(body))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in own.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
