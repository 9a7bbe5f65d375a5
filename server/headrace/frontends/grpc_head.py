"""What the headers of a gRPC call say: which procedure, by when, and in which encoding (gRPC over HTTP/2)."""

import base64
import binascii
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from headrace.core.errors import HeadraceError, InvalidRequest
from headrace.frontends.grpc_infer import Metadata
from headrace.frontends.grpc_message import check_encoding
from headrace.frontends.restrictions import Restrictions
from headrace.frontends.time_left import TIMEOUT_HEADER, time_left_ns
from headrace.http2.headers import Headers

_GRPC = re.compile(rb"application/grpc(?:[+;].*)?", re.IGNORECASE | re.DOTALL)  # and not grpc-web
_NOT_METADATA = (b":", b"grpc-")
_OF_HTTP = frozenset((b"te", b"content-type", b"content-length", b"host"))
_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))
_OF_HTTP_1 = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))


@dataclass(frozen=True, slots=True)
class Procedure:
    """One RPC of a service: who answers it and in which form.

    ``answer`` is given the request (of a client that streams, an iterator of messages as bytes) and the call, and
    returns the response, or writes responses to the call where there can be many.
    """

    name: str
    answer: Callable[[Any, Any], Awaitable[Any]]
    request: Any  # the message class
    client_streaming: bool = False
    server_streaming: bool = False


class CallHead(msgspec.Struct, frozen=True):
    """What is known of a call before its first message. ``http_status`` is not 200 for what is no gRPC at all."""

    procedure: Procedure | None
    path: str
    metadata: Metadata = ()
    timeout_ns: int = 0  # 0 for none
    encoding: str = ""  # of the client's messages
    accepts: frozenset[str] = frozenset()  # encodings that the client can read
    refusal: HeadraceError | None = None
    http_status: int = 200


def parse_head(
    headers: Headers, procedures: Mapping[bytes, Procedure], restrictions: Restrictions | None = None
) -> CallHead:
    """A call's headers; whatever is wrong with them is told in the head."""
    said: dict[bytes, bytes] = {}
    given: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        if name.startswith(_NOT_METADATA) or name in _OF_HTTP:
            said[name] = value
        else:
            given.append((name, value))
    accepts = b",".join(value for name, value in headers if name == b"grpc-accept-encoding")
    path = said.get(b":path", b"")
    procedure = procedures.get(path)
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    timeout_ns = 0
    encoding = said.get(b"grpc-encoding", b"").decode("latin-1")
    try:
        metadata = tuple(one for name, value in given for one in _metadata(name, value))
        timeout = said.get(TIMEOUT_HEADER)
        if timeout is not None:
            timeout_ns = time_left_ns(timeout.decode("latin-1"))
        refusal: HeadraceError | None = check_encoding(encoding)
    except InvalidRequest as error:
        refusal = error
    if procedure is not None and restrictions is not None and refusal is None:
        refusal = restrictions.grpc_problem(procedure.name, metadata)
    return CallHead(
        procedure,
        path.decode("latin-1"),
        metadata,
        timeout_ns,
        encoding,
        frozenset(one.strip() for one in accepts.decode("latin-1").split(",")),
        refusal,
        400 if _is_malformed(headers) else _http_status(said),
    )


def _http_status(said: Mapping[bytes, bytes]) -> int:
    if said.get(b":method") != b"POST":
        return 405
    return 200 if _GRPC.fullmatch(said.get(b"content-type", b"")) else 415


def _is_malformed(headers: Headers) -> bool:
    """Whether HTTP/2 forbids headers like these (RFC 9113, sections 8.2 and 8.3)."""
    seen: set[bytes] = set()
    regular = False
    for name, value in headers:
        if name.startswith(b":"):
            if regular or name in seen or name not in _PSEUDO:
                return True
            seen.add(name)
        else:
            regular = True
            if not name or name != name.lower() or name in _OF_HTTP_1 or (name == b"te" and value != b"trailers"):
                return True
    return False


def _metadata(name: bytes, value: bytes) -> list[tuple[str, str | bytes]]:
    """What one header says; several values of a name that ends in -bin may come in one, with commas between them."""
    text = name.decode("latin-1")
    if not name.endswith(b"-bin"):
        return [(text, value.decode("latin-1"))]
    try:
        return [(text, _from_base64(one.strip())) for one in value.split(b",")]
    except binascii.Error:
        raise InvalidRequest(f"metadata '{text}' is not base64, which names that end in -bin ask for") from None


def _from_base64(value: bytes) -> bytes:
    """The padding may be there or not."""
    return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
