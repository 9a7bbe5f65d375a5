"""Content codings of HTTP bodies: gzip and deflate."""

import zlib
from collections.abc import Iterable

from headrace.core.errors import InvalidRequest, TooLarge, Unsupported

ACCEPTED = "gzip, deflate, identity"
# Each layer may cost a whole body's work, and nobody sends more than one on purpose.
MAX_LAYERS = 4
# On a request's way speed counts: for float data level 6 takes several times as long for a few percent.
_LEVEL = 1
_WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}  # HTTP's deflate is the zlib format
_ALIASES = {"x-gzip": "gzip"}


class UnknownCoding(Unsupported):
    """A content coding is not offered; HTTP tells with it which are."""


def decompress(body: bytes | memoryview, encoding: str, limit_bytes: int) -> bytes:
    """``body`` without the codings that ``encoding``, a Content-Encoding header, lists in the order of applying.

    No layer is unpacked further than ``limit_bytes``. A gzip body is one member: more of them are refused.

    Raises:
        UnknownCoding: a coding is unknown, or there are too many.
        TooLarge: what comes out is over the limit.
        InvalidRequest: a stream is broken, ends early, or has bytes after its end.
    """
    codings = [coding for item in encoding.split(",") if (coding := _coding(item)) not in ("", "identity")]
    unknown = [coding for coding in codings if coding not in _WINDOW_BITS]
    if unknown:
        raise UnknownCoding(f"content encoding '{unknown[0]}' is not supported; accepted are {ACCEPTED}")
    if len(codings) > MAX_LAYERS:
        raise UnknownCoding(f"the body is encoded {len(codings)} times, expected at most {MAX_LAYERS}")
    for coding in reversed(codings):
        body = _inflate(body, coding, limit_bytes)
    if len(body) > limit_bytes:
        raise TooLarge(f"the body has {len(body)} bytes, the limit is {limit_bytes}")
    return bytes(body)


def choose_encoding(accept_encoding: str) -> str | None:
    """The coding for a response: "gzip", "deflate", or None for none.

    The header's highest weight wins, gzip where two are equal, and any of the two over no coding unless the
    client weighs identity higher. When nothing that is offered suits, the response goes out as it is.
    """
    weights: dict[str, float] = {}
    for item in accept_encoding.split(","):
        name, *parameters = item.split(";")
        coding = _coding(name)
        if coding:
            weights[coding] = _weight(parameters)
    others = weights.get("*", 0.0)
    best = max(_WINDOW_BITS, key=lambda coding: weights.get(coding, others))  # the first of equals
    weight = weights.get(best, others)
    return best if weight > 0 and weight >= weights.get("identity", 0.0) else None


def compress(chunks: Iterable[bytes | memoryview], encoding: str) -> bytes:
    """``chunks`` joined and packed as ``encoding``, one that ``choose_encoding`` gave."""
    stream = zlib.compressobj(level=_LEVEL, wbits=_WINDOW_BITS[encoding])
    packed = [stream.compress(chunk) for chunk in chunks]
    packed.append(stream.flush())
    return b"".join(packed)


def _coding(text: str) -> str:
    coding = text.strip().lower()
    return _ALIASES.get(coding, coding)


def _weight(parameters: list[str]) -> float:
    """The q of one item of the header: 1 when it has none, 0 when it cannot be read."""
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "q":
            try:
                weight = float(value)
            except ValueError:
                return 0.0
            return weight if 0.0 <= weight <= 1.0 else 0.0
    return 1.0


def _inflate(body: bytes | memoryview, coding: str, limit_bytes: int) -> bytes:
    stream = zlib.decompressobj(wbits=_WINDOW_BITS[coding])
    try:
        unpacked = stream.decompress(body, limit_bytes + 1)  # one more, so that reaching the limit shows
    except zlib.error as error:
        if coding != "deflate":
            raise InvalidRequest(f"the body is not a valid {coding} stream: {error}") from None
        stream = zlib.decompressobj(wbits=-zlib.MAX_WBITS)  # what some clients take deflate for
        try:
            unpacked = stream.decompress(body, limit_bytes + 1)
        except zlib.error:
            raise InvalidRequest(f"the body is not a valid {coding} stream: {error}") from None
    if len(unpacked) > limit_bytes:
        raise TooLarge(f"the body unpacks to more than {limit_bytes} bytes, the limit")
    if not stream.eof:
        raise InvalidRequest(f"the body's {coding} stream ends early")
    if stream.unused_data:
        raise InvalidRequest(f"the body has {len(stream.unused_data)} bytes after the end of its {coding} stream")
    return unpacked
