"""The bytes of responses that are written without an ASGI cycle. Pure."""

from functools import lru_cache

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from headrace.core.errors import HeadraceError
from headrace.frontends.status import http_status
from headrace.wire.json_v2 import encode_error


@lru_cache(maxsize=1024)
def response_head(status: int, headers: tuple[tuple[bytes, bytes], ...], keep_alive: bool) -> bytes:
    """A response's head, names of headers in lower case; that of most responses of a model is the same."""
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    return STATUS_LINE[status] + lines + (b"\r\n" if keep_alive else b"connection: close\r\n\r\n")


def last_response(error: HeadraceError) -> bytes:
    """The whole response that tells an error and ends the connection."""
    status, headers = http_status(error)
    body = encode_error(str(error))
    lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    lines += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return response_head(status, tuple(lines), keep_alive=False) + body
