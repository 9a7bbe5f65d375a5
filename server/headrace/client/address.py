"""Where a server listens and which protocol it speaks there."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from headrace.client.errors import ClientError

_EXPECTED = "expected http://HOST:PORT, https://HOST:PORT, grpc://HOST:PORT, grpcs://HOST:PORT or HOST:PORT for HTTP"
_HTTP_PORT = 8000
_GRPC_PORT = 8001


@dataclass(frozen=True, slots=True)
class Address:
    """A server's address, checked. ``target`` is a base URL for HTTP, HOST:PORT for gRPC; ``url`` is for messages."""

    protocol: Literal["http", "grpc"]
    target: str
    tls: bool
    url: str


def parse_address(url: str) -> Address:
    """The address that ``url`` names; one without a scheme is HTTP.

    Raises:
        ClientError: it is none.
    """
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ClientError(f"'{url}' is no server's address ({error}), {_EXPECTED}") from None
    if not host or parts.query or parts.fragment or any(character.isspace() for character in url):
        raise ClientError(f"'{url}' is no server's address, {_EXPECTED}")
    if ":" in host:
        host = f"[{host}]"
    match parts.scheme:
        case "http" | "https":
            if port is None and full is not url:
                full = full.replace(parts.netloc, f"{parts.netloc}:{_HTTP_PORT}", 1)
            return Address("http", full.rstrip("/"), parts.scheme == "https", full.rstrip("/"))
        case "grpc" | "grpcs" if parts.path in ("", "/") and "@" not in parts.netloc:
            target = f"{host}:{_GRPC_PORT if port is None else port}"
            return Address("grpc", target, parts.scheme == "grpcs", f"{parts.scheme}://{target}")
        case _:
            raise ClientError(f"'{url}' is no server's address, {_EXPECTED}")
