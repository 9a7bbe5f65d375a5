"""Offers to go on in another protocol, which are not taken: some clients make one with each of their first requests."""

from collections.abc import Iterable

_OF_THE_OFFER = frozenset((b"upgrade", b"http2-settings"))


def head_without_offer(method: bytes, url: bytes, version: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The head of a request as it would be if nothing had been offered; names of headers are in lower case.

    The parser takes what follows a head with an offer for the other protocol, also where it is the request's body.
    """
    lines = [b"%b %b HTTP/%b" % (method, url, version.encode())]
    for name, value in headers:
        if name == b"connection":
            kept = b", ".join(one for token in value.split(b",") if (one := token.strip().lower()) not in _OF_THE_OFFER)
            if kept:
                lines.append(b"connection: " + kept)
        elif name not in _OF_THE_OFFER:
            lines.append(name + b": " + value)
    return b"\r\n".join(lines) + b"\r\n\r\n"
