"""The JSON bodies of the paths that are not for inference: read into what a path takes, written from what it gives."""

from typing import TypeVar

import msgspec
from fastapi import Response

from headrace.core.errors import InvalidRequest
from headrace.wire.json_v2 import encode_json

Body = TypeVar("Body")


def json_response(value: object) -> Response:
    """A success, and what it tells."""
    return Response(encode_json(value), media_type="application/json")


def read_body(body: bytes, kind: type[Body], max_bytes: int | None = None) -> Body:
    """A request's body; an empty one is ``kind()``. It may be as large as any request where no bound is given.

    Raises:
        InvalidRequest: it has more than ``max_bytes``, or is not of that kind.
    """
    if max_bytes is not None and len(body) > max_bytes:
        raise InvalidRequest(f"the request's body has {len(body)} bytes, expected {max_bytes} at most")
    if not body.strip():
        return kind()
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the request's body is not what this path takes: {error}") from None
