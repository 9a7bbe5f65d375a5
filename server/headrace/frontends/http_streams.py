"""The HTTP routes on which a request may have any number of responses: generate, generate_stream and infer_stream."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from headrace.batching.response_stream import ResponseStream, StreamItem
from headrace.core.errors import HeadraceError, InternalError, InvalidRequest, released
from headrace.core.request import InferRequest, InferResponse
from headrace.engine import Engine
from headrace.frontends import schemas
from headrace.frontends.infer import HttpInfer
from headrace.frontends.status import http_status
from headrace.wire.binary_v2 import encode_response
from headrace.wire.generate_v2 import encode_generate
from headrace.wire.json_v2 import encode_error

log = logging.getLogger(__name__)

EVENT_STREAM = f"{schemas.EVENT_STREAM}; charset=utf-8"

Encode = Callable[[InferResponse], bytes]


def add_streams(app: FastAPI, reader: HttpInfer) -> None:
    """The routes over one engine."""
    engine: Engine = reader.engine

    async def read_generate(request: Request) -> InferRequest:
        name, version = schemas.model_in(request)
        served = engine.repository.lookup(name, version)
        headers = reader.headers(request.headers.raw)
        return reader.decode(name, version, headers, await request.body(), generate=served.info.signature)

    async def generate(request: Request) -> Response:
        """Run a model that answers with exactly one response, on a flat JSON object keyed by input."""
        asked = await read_generate(request)
        stream = engine.stream(asked)
        try:
            first = await _next(stream, request)
            second = await _next(stream, request) if isinstance(first, InferResponse) else None
        finally:
            stream.cancel()
        if isinstance(first, HeadraceError):
            raise first
        if isinstance(second, HeadraceError):
            raise second
        if first is None or second is not None:
            raise InvalidRequest(
                f"model '{asked.model}': generate expects model to produce exactly 1 response, and it gave "
                f"{'none' if first is None else 'more'}; use generate_stream"
            )
        return Response(encode_generate(first), media_type="application/json")

    async def generate_stream(request: Request) -> Response:
        """Run a model on a flat JSON object keyed by input; each response is an event as it is made."""
        asked = await read_generate(request)
        return await _event_stream(engine.stream(asked), encode_generate, request)

    async def infer_stream(request: Request) -> Response:
        """Run a model; each response is an event as it is made, in the form of an inference response."""
        headers = reader.headers(request.headers.raw)
        asked = await reader.fetched(reader.decode(*schemas.model_in(request), headers, await request.body()))
        plain = InferRequest(asked.model, asked.version, asked.id, ())  # its events outlive what was asked
        return await _event_stream(
            engine.stream(asked), lambda response: b"".join(encode_response(response, plain)[0]), request
        )

    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        path = f"{prefix}/generate"
        app.add_api_route(
            path,
            generate,
            methods=["POST"],
            tags=["inference"],
            response_model=schemas.GenerateResponseBody,
            **schemas.generation(path),
        )
        for route, call, describe in (
            ("generate_stream", generate_stream, schemas.generation),
            ("infer_stream", infer_stream, schemas.inference),
        ):
            path = f"{prefix}/{route}"
            app.add_api_route(
                path,
                call,
                methods=["POST"],
                tags=["inference"],
                response_class=Response,
                **schemas.streaming(describe(path)),
            )


async def _next(stream: ResponseStream, request: Request) -> StreamItem | None:
    """The next item, None at the end.

    Raises:
        ClientDisconnect: the client has left before it came.
    """
    loop = asyncio.get_running_loop()
    left = loop.create_task(_departure(request))
    item = loop.create_task(_item(stream))
    try:
        await asyncio.wait({item, left}, return_when=asyncio.FIRST_COMPLETED)
        if not item.done():
            raise ClientDisconnect
        return item.result()
    finally:
        left.cancel()
        item.cancel()


async def _item(stream: ResponseStream) -> StreamItem | None:
    return await anext(stream, None)


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _event_stream(stream: ResponseStream, encode: Encode, request: Request) -> Response:
    """The responses as server-sent events. The first one decides on the status: an error then is an ordinary one."""
    try:
        first = await _next(stream, request)
    except BaseException:
        stream.cancel()
        raise
    if isinstance(first, HeadraceError):
        stream.cancel()
        status, headers = http_status(first)
        return Response(
            b"data: %b\n\n" % encode_error(str(first)),
            status_code=status,
            headers={**headers, "content-type": EVENT_STREAM},
        )
    return _EventResponse(first, stream, encode)


class _EventResponse(StreamingResponse):
    """Takes the request back when it is over, also where the client has left before its first event."""

    def __init__(self, first: StreamItem | None, stream: ResponseStream, encode: Encode) -> None:
        super().__init__(_events(first, stream, encode), media_type=EVENT_STREAM)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.cancel()


async def _events(first: StreamItem | None, stream: ResponseStream, encode: Encode) -> AsyncIterator[bytes]:
    item = first
    while item is not None:
        yield b"data: %b\n\n" % _event(item, encode)
        item = await anext(stream, None)


def _event(item: StreamItem, encode: Encode) -> bytes:
    if isinstance(item, InferResponse):
        try:
            return encode(item)
        except HeadraceError as error:
            item = released(error)
        except Exception:
            log.exception("could not write a response of model %s", item.model)
            item = InternalError("the response could not be written; the server's log says why")
    return encode_error(str(item))
