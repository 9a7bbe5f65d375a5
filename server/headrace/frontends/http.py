"""The HTTP application: every path of the protocol, each error as ``{"error": ...}``."""

import logging
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import headrace
from headrace.core.errors import HeadraceError, InvalidRequest, Kind, Unsupported
from headrace.core.model import TensorSpec
from headrace.engine import Engine
from headrace.frontends import schemas
from headrace.frontends.infer import InferHeaders, decode, encode
from headrace.frontends.server_state import EXTENSIONS, ServerState
from headrace.frontends.status import HTTP_STATUS, http_status
from headrace.metrics import Metrics
from headrace.repository.pbtxt import to_json, to_message
from headrace.repository.repository import Repository
from headrace.wire.json_v2 import encode_error, encode_json

log = logging.getLogger(__name__)

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorBody, "description": HTTPStatus(status).phrase}
    for status in (400, 404, 405, 413, 500, 501, 503)
}


def create_app(engine: Engine, state: ServerState, metrics: Metrics, max_request_bytes: int) -> FastAPI:
    """The application over one engine. Its inference route serves wherever the fast lane does not stand in front."""
    app = FastAPI(
        title="Headrace",
        version=headrace.__version__,
        description="Open Inference Protocol (KServe v2) with Triton's extensions.",
        redirect_slashes=False,
        responses=_ERRORS,
    )
    _handle_errors(app)
    _add_health(app, engine.repository, state)
    _add_models(app, engine.repository, state)
    _add_infer(app, engine, max_request_bytes)
    _add_repository(app, engine.repository)

    @app.get("/metrics", tags=["metrics"], response_class=Response)
    async def metrics_page(request: Request) -> Response:
        """Prometheus metrics, in the classic text format or OpenMetrics as the client accepts."""
        body, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return app


def metrics_app(metrics: Metrics) -> FastAPI:
    """The application of the metrics port."""
    app = FastAPI(title="Headrace metrics", openapi_url=None, redirect_slashes=False)
    _handle_errors(app)

    @app.get("/metrics")
    async def metrics_page(request: Request) -> Response:
        body, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return app


def _json(value: object, status: int = 200) -> Response:
    return Response(encode_json(value), status_code=status, media_type="application/json")


def _error(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_error(message), status_code=status, media_type="application/json", headers=headers)


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(HeadraceError)
    async def expected(_: Request, error: HeadraceError) -> Response:
        status, headers = http_status(error)
        return _error(str(error), status, headers)

    @app.exception_handler(HTTPException)
    async def of_the_framework(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        match error.status_code:
            case 404:
                message = f"Not Found: there is no {where} on this server"
            case 405:
                message = f"Method Not Allowed: {where}"
            case _:
                message = str(error.detail)
        return _error(message, error.status_code, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def of_validation(_: Request, error: RequestValidationError) -> Response:
        return _error("; ".join(str(one["msg"]) for one in error.errors()), 400)

    @app.exception_handler(ClientDisconnect)
    async def of_nobody(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=HTTP_STATUS[Kind.CANCELLED])  # the client left while it sent; nobody reads this

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _error("the request failed; the server's log says why", 500)


def _add_health(app: FastAPI, repository: Repository, state: ServerState) -> None:
    @app.get("/v2/health/live", tags=["health"], response_model=schemas.LiveBody)
    async def live() -> Response:
        """Whether the process answers at all."""
        return _json({"live": True})

    @app.get("/v2/health/ready", tags=["health"], response_model=schemas.ReadyBody)
    async def ready() -> Response:
        """Whether inference requests can be sent: every model found at start was loaded, or refused with a reason."""
        why_not = state.why_not_ready()
        return _error(why_not, 503, {"Retry-After": "1"}) if why_not else _json({"ready": True})

    async def model_ready(name: str, version: str = "") -> Response:
        """Whether a request for the model would be run now."""
        if repository.is_ready(name, version):
            return _json({"name": name, "ready": True})
        which = f"model '{name}'" + (f" version {version}" if version else "")
        return _error(f"{which} is not ready", 400)

    for path in ("/v2/models/{name}/ready", "/v2/models/{name}/versions/{version}/ready"):
        app.add_api_route(path, model_ready, methods=["GET"], tags=["health"], response_model=schemas.ModelReadyBody)


def _add_models(app: FastAPI, repository: Repository, state: ServerState) -> None:
    async def server_metadata() -> Response:
        """The server's name, its version and the protocol extensions that it offers."""
        return _json({"name": state.name, "version": headrace.__version__, "extensions": EXTENSIONS})

    for path in ("/v2", "/v2/"):
        app.add_api_route(
            path,
            server_metadata,
            methods=["GET"],
            tags=["metadata"],
            response_model=schemas.ServerMetadataBody,
            include_in_schema=path == "/v2",
        )

    @app.get("/v2/models", tags=["metadata"], response_model=schemas.ModelListBody)
    async def models() -> Response:
        """The names of the models in the repository."""
        return _json({"models": repository.names()})

    async def model_metadata(name: str, version: str = "") -> Response:
        """A model's versions, inputs and outputs."""
        info = repository.lookup(name, version).info
        return _json(
            {
                "name": info.name,
                "versions": repository.versions(name),
                "platform": info.platform,
                "inputs": [_tensor(spec) for spec in info.signature.inputs],
                "outputs": [_tensor(spec) for spec in info.signature.outputs],
            }
        )

    async def model_config(name: str, version: str = "") -> Response:
        """A model's configuration, in Triton's form, with everything that was inferred filled in."""
        served = repository.lookup(name, version)
        return _json(to_json(to_message(served.folder.config, served.info)))

    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        app.add_api_route(
            prefix, model_metadata, methods=["GET"], tags=["metadata"], response_model=schemas.ModelMetadataBody
        )
        app.add_api_route(f"{prefix}/config", model_config, methods=["GET"], tags=["metadata"])


def _tensor(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape_or_any}


def _add_infer(app: FastAPI, engine: Engine, max_request_bytes: int) -> None:
    async def infer(request: Request, name: str, version: str = "") -> Response:
        """Run the model on the request's inputs."""
        body = await request.body()
        headers = InferHeaders(
            len(body),
            request.headers.get("inference-header-content-length", ""),
            request.headers.get("content-encoding", ""),
            request.headers.get("accept-encoding", ""),
        )
        asked = decode(engine, name, version, headers, body, max_request_bytes)
        reply = encode(await engine.infer(asked), asked, headers.accept_encoding)
        response = Response(b"".join(reply.chunks))
        response.raw_headers = reply.headers
        return response

    body = {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": schemas.InferRequestBody.model_json_schema()},
                "application/octet-stream": {
                    "schema": {
                        "type": "string",
                        "format": "binary",
                        "description": "The JSON part, its length in the header Inference-Header-Content-Length, and "
                        "behind it the raw data of each input that has a binary_data_size.",
                    }
                },
            },
        }
    }
    for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        app.add_api_route(
            path,
            infer,
            methods=["POST"],
            tags=["inference"],
            response_model=schemas.InferResponseBody,
            openapi_extra=body,
        )


class _IndexRequest(msgspec.Struct):
    ready: bool = False


class _ChangeRequest(msgspec.Struct):
    parameters: dict[str, Any] = {}


def _add_repository(app: FastAPI, repository: Repository) -> None:
    @app.post("/v2/repository/index", tags=["repository"], response_model=list[schemas.IndexEntryBody])
    async def index(request: Request) -> Response:
        """Every model in the repository, its versions and their states, with the reason where one is not served."""
        wanted = _parse(await request.body(), _IndexRequest)
        entries = repository.index(wanted.ready)
        return _json(
            [
                {"name": one.name}
                if not one.state
                else {"name": one.name, "version": one.version, "state": one.state, "reason": one.reason}
                for one in entries
            ]
        )

    @app.post("/v2/repository/models/{name}/load", tags=["repository"], response_class=Response)
    async def load(name: str, request: Request) -> Response:
        """Load a model, or anew what has changed of it. Needs --model-control explicit."""
        wanted = _parse(await request.body(), _ChangeRequest)
        if wanted.parameters:
            raise Unsupported(f"load parameters {sorted(wanted.parameters)} are not offered by this server")
        await repository.load(name)
        return Response()

    @app.post("/v2/repository/models/{name}/unload", tags=["repository"], response_class=Response)
    async def unload(name: str, request: Request) -> Response:
        """Stop serving a model; what was accepted is answered. Needs --model-control explicit."""
        _parse(await request.body(), _ChangeRequest)
        await repository.unload(name)
        return Response()

    @app.post("/v2/repository/{repository_name}/{rest:path}", include_in_schema=False)
    async def named(repository_name: str, rest: str) -> Response:
        raise Unsupported(f"'repository/{repository_name}/{rest}': repository names are not offered by this server")


_Body = TypeVar("_Body", bound=msgspec.Struct)


def _parse(body: bytes, kind: type[_Body]) -> _Body:
    if not body.strip():
        return kind()
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the request's body is not what this path takes: {error}") from None
