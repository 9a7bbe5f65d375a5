"""One HTTP inference request from bytes to bytes: what the fast lane and the ordinary route share."""

import msgspec

from headrace.core.errors import InvalidRequest
from headrace.core.request import InferRequest, InferResponse
from headrace.engine import Engine
from headrace.wire.binary_v2 import decode_raw_request, decode_request, encode_response
from headrace.wire.compression import choose_encoding, compress, decompress

HEADER_LENGTH = b"inference-header-content-length"
JSON = b"application/json"
BINARY = b"application/octet-stream"
# Below this compressing costs more than the bytes it saves.
COMPRESS_ABOVE_BYTES = 512
LONGEST_LENGTH = 18  # digits; no body is that large


class InferHeaders(msgspec.Struct, gc=False):
    """The headers of a request that decide how it is read and answered."""

    content_length: int = 0
    header_length: str = ""
    content_encoding: str = ""
    accept_encoding: str = ""


class InferReply(msgspec.Struct, gc=False):
    """A response's body in pieces and the headers that tell how to read it."""

    chunks: list[bytes | memoryview]
    size: int  # of all chunks, in bytes
    headers: list[tuple[bytes, bytes]]


def decode(
    engine: Engine, model: str, version: str, headers: InferHeaders, body: bytes | memoryview, limit_bytes: int
) -> InferRequest:
    """The request in ``body``.

    Raises:
        HeadraceError: it is not one; the message says why.
    """
    if headers.content_encoding:
        body = decompress(body, headers.content_encoding, limit_bytes)
    if not headers.header_length:
        return decode_request(body, None, model, version)
    text = headers.header_length.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= LONGEST_LENGTH):
        raise InvalidRequest(
            f"header Inference-Header-Content-Length is {text[:40]!r}, expected the byte length of the JSON part"
        )
    length = int(text)
    if length == 0:
        return decode_raw_request(body, engine.repository.lookup(model, version).info.signature, model, version)
    return decode_request(body, length, model, version)


def encode(response: InferResponse, request: InferRequest, accept_encoding: str) -> InferReply:
    """The response as the client asked for it.

    Raises:
        InvalidRequest: an output cannot be written in the form that was asked for.
    """
    chunks, header_length = encode_response(response, request)
    if header_length is None:
        headers = [(b"content-type", JSON)]
    else:
        headers = [(b"content-type", BINARY), (HEADER_LENGTH, b"%d" % header_length)]
    size = sum(map(len, chunks))
    if accept_encoding and size >= COMPRESS_ABOVE_BYTES:
        encoding = choose_encoding(accept_encoding)
        if encoding is not None:
            chunks = [compress(chunks, encoding)]
            size = len(chunks[0])
            headers += [(b"content-encoding", encoding.encode()), (b"vary", b"accept-encoding")]
    headers.append((b"content-length", b"%d" % size))
    return InferReply(chunks, size, headers)
