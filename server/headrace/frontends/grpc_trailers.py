"""What a gRPC response begins and ends with: its header blocks, and the trailers that hold its status. Pure."""

from urllib.parse import quote_from_bytes

from headrace.frontends.status import StatusCode
from headrace.http2.headers import header_block

MAX_MESSAGE_LENGTH = 2000  # of an error
MAX_ENCODED_LENGTH = 6000  # the same as it travels in the headers, of which clients take 8 KB at least
_PRINTABLE = bytes(set(range(0x20, 0x7F)) - {0x25})  # what grpc-message holds as it is

_HEAD = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_ACCEPT = ((b"grpc-accept-encoding", b"identity,deflate,gzip"),)
RESPONSE = header_block((*_HEAD, *_ACCEPT))
OK = header_block([(b"grpc-status", b"0")])
COMPRESSED = {  # in place of RESPONSE, by what the messages are packed with
    encoding: header_block((*_HEAD, (b"grpc-encoding", encoding.encode()), *_ACCEPT))
    for encoding in ("deflate", "gzip")
}


def trailers(status: StatusCode, message: str, *, alone: bool) -> bytes:
    """The header block that ends a call, as the whole response if it is ``alone``."""
    headers = [*_HEAD, *_ACCEPT] if alone else []
    headers.append((b"grpc-status", b"%d" % status))
    if message:
        headers.append((b"grpc-message", _encoded(message[:MAX_MESSAGE_LENGTH])))
    return header_block(headers)


def _encoded(message: str) -> bytes:
    """A message as it travels; what it would take too much room for is left off its end."""
    while True:
        text = quote_from_bytes(message.encode("utf-8", "replace"), safe=_PRINTABLE)
        if len(text) <= MAX_ENCODED_LENGTH:
            return text.encode("ascii")
        message = message[: len(message) * MAX_ENCODED_LENGTH // len(text)]
