"""One HTTP inference request from bytes to bytes: what the fast lane and the ordinary routes share."""

from collections.abc import Iterable
from time import monotonic_ns

import msgspec

from headrace.core.errors import HeadraceError, InvalidRequest, at
from headrace.core.model import Signature
from headrace.core.regions import Regions
from headrace.core.request import InferRequest, InferResponse
from headrace.engine import Answer, Engine
from headrace.frontends.device_tensors import DeviceTensors
from headrace.frontends.forwarding import HeaderForwarding, with_forwarded
from headrace.frontends.load_report import FORMAT_HEADER, REPORT_HEADER, LoadReport
from headrace.frontends.time_left import TIMEOUT_HEADER, time_left_ns
from headrace.wire.binary_v2 import check_parameter_names, decode_raw_request, decode_request, encode_response
from headrace.wire.compression import choose_encoding, compress, decompress
from headrace.wire.generate_v2 import decode_generate

HEADER_LENGTH = b"inference-header-content-length"
_LOAD_FORMAT = FORMAT_HEADER.encode()
_LOAD_REPORT = REPORT_HEADER.encode()
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
    load_format: str = ""
    timeout: str = ""
    came_at_ns: int = 0  # kept where there is a timeout
    forwarded: dict[str, str] = {}


class InferReply(msgspec.Struct, gc=False):
    """A response's body in pieces and the headers that tell how to read it."""

    chunks: list[bytes | memoryview]
    size: int  # of all chunks, in bytes
    headers: tuple[tuple[bytes, bytes], ...]


class HttpInfer:
    """Reads inference requests, has them run and writes their responses. One for a server.

    Without ``regions`` there is no shared memory, without ``device_tensors`` none of GPUs.
    """

    def __init__(
        self,
        engine: Engine,
        limit_bytes: int,
        *,
        regions: Regions | None = None,
        device_tensors: DeviceTensors | None = None,
        forwarding: HeaderForwarding | None = None,
        load_report: LoadReport | None = None,
    ) -> None:
        self.engine = engine
        self.limit_bytes = limit_bytes  # of a body, also when it is decompressed
        self._regions = regions
        self._device_tensors = device_tensors
        self._forwarding = forwarding if forwarding is not None and forwarding.active else None
        self._load_report = load_report

    def headers(self, headers: Iterable[tuple[bytes, bytes]]) -> InferHeaders:
        """What matters of a request's headers, whose names are in lower case."""
        found = InferHeaders()
        for name, value in headers:
            if name == b"content-length":
                found.content_length = int(value)  # the parser has seen to it that it is a number
            elif name == HEADER_LENGTH:
                found.header_length = value.decode("latin-1") or "?"
            elif name == b"content-encoding":
                found.content_encoding = _listed(found.content_encoding, value)
            elif name == b"accept-encoding":
                found.accept_encoding = _listed(found.accept_encoding, value)
            elif name == _LOAD_FORMAT:
                found.load_format = value.decode("latin-1")
            elif name == TIMEOUT_HEADER:
                found.timeout = value.decode("latin-1") or "?"
                found.came_at_ns = monotonic_ns()
        if self._forwarding is not None:
            found.forwarded = self._forwarding.parameters(headers)
        return found

    def decode(
        self, model: str, version: str, headers: InferHeaders, body: bytes, generate: Signature | None = None
    ) -> InferRequest:
        """The request in ``body``; that of the generate extension where the model's signature is given for it.

        Raises:
            HeadraceError: it is not one, which counts among the model's failures; the message says why.
        """
        try:
            whole = self._body(model, headers, body)
            if generate is None:
                request = self._decoded(model, version, headers.header_length, whole)
            else:
                request = decode_generate(whole, model, version, generate)
                check_parameter_names(request.parameters, model)
            if headers.timeout:
                request = _with_deadline(request, headers)
        except HeadraceError:
            self.engine.count_unreadable(model, version)
            raise
        return with_forwarded(request, headers.forwarded) if headers.forwarded else request

    def infer(self, request: InferRequest) -> Answer:
        """As ``engine.infer``, also for requests whose tensors are on GPUs."""
        return (self._device_tensors or self.engine).infer(request)

    async def fetched(self, request: InferRequest) -> InferRequest:
        """The request with all its inputs.

        Raises:
            HeadraceError: one cannot be fetched.
        """
        return await self._device_tensors.fetched(request) if self._device_tensors is not None else request

    def encode(self, response: InferResponse, request: InferRequest, headers: InferHeaders) -> InferReply:
        """The response as the client asked for it.

        Raises:
            InvalidRequest: an output cannot be written in the form that was asked for.
        """
        chunks, header_length = encode_response(response, request, self._regions)
        if header_length is None:
            lines = [(b"content-type", JSON)]
        else:
            lines = [(b"content-type", BINARY), (HEADER_LENGTH, b"%d" % header_length)]
        size = sum(map(len, chunks))
        if headers.accept_encoding and size >= COMPRESS_ABOVE_BYTES:
            encoding = choose_encoding(headers.accept_encoding)
            if encoding is not None:
                chunks = [compress(chunks, encoding)]
                size = len(chunks[0])
                lines += [(b"content-encoding", encoding.encode()), (b"vary", b"accept-encoding")]
        if headers.load_format and self._load_report is not None:
            report = self._load_report.header(headers.load_format)
            if report is not None:
                lines.append((_LOAD_REPORT, report.encode("latin-1", "replace")))
        lines.append((b"content-length", b"%d" % size))
        return InferReply(chunks, size, tuple(lines))

    def _body(self, model: str, headers: InferHeaders, body: bytes) -> bytes | memoryview:
        """A request's body, decompressed.

        Raises:
            HeadraceError: it cannot be; naming the model.
        """
        if not headers.content_encoding:
            return body
        try:
            return decompress(body, headers.content_encoding, self.limit_bytes)
        except HeadraceError as error:
            raise at(f"model '{model}'", error) from None

    def _decoded(self, model: str, version: str, header_length: str, body: bytes | memoryview) -> InferRequest:
        if not header_length:
            return decode_request(body, None, model, version, self._regions)
        text = header_length.strip()
        if not (text.isascii() and text.isdigit() and len(text) <= LONGEST_LENGTH):
            raise InvalidRequest(
                f"model '{model}': header Inference-Header-Content-Length is {text[:40]!r}, "
                "expected the byte length of the JSON part"
            )
        length = int(text)
        if length == 0:
            signature = self.engine.repository.lookup(model, version).info.signature
            return decode_raw_request(body, signature, model, version)
        return decode_request(body, length, model, version, self._regions)


def _with_deadline(request: InferRequest, headers: InferHeaders) -> InferRequest:
    try:
        left_ns = time_left_ns(headers.timeout)
    except InvalidRequest as error:
        raise at(f"model '{request.model}'", error) from None
    return msgspec.structs.replace(request, deadline_ns=headers.came_at_ns + left_ns) if left_ns else request


def _listed(before: str, value: bytes) -> str:
    """A header that may come in several lines, which stand for one list."""
    text = value.decode("latin-1")
    return f"{before},{text}" if before else text
