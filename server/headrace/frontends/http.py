"""The HTTP application: every path of the protocol."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send

import headrace
from headrace.core.errors import Unsupported
from headrace.core.model import TensorSpec
from headrace.frontends import schemas
from headrace.frontends.http_bodies import json_response, read_body
from headrace.frontends.http_errors import error_response, handle_errors
from headrace.frontends.http_streams import add_streams
from headrace.frontends.infer import HttpInfer
from headrace.frontends.load_override import load_override, unload_dependents
from headrace.frontends.restrictions import Restrictions
from headrace.frontends.server_state import ServerState
from headrace.frontends.status import http_status
from headrace.metrics import Metrics
from headrace.repository.message_json import to_json
from headrace.repository.repository import Repository
from headrace.repository.to_triton import to_message

_TEXT = {"schema": {"type": "string"}}
_METRICS_TYPES = {"text/plain": _TEXT, "application/openmetrics-text": _TEXT}


def create_app(
    reader: HttpInfer,
    state: ServerState,
    metrics: Metrics,
    extensions: Sequence[Callable[[FastAPI], None]] = (),
    restrictions: Restrictions | None = None,
) -> FastAPI:
    """The application over one engine. Its inference route serves wherever the fast lane does not stand in front.

    ``extensions`` add the routes of what is optional. They come first, because a path like /v2/models/stats would
    otherwise be taken for a model's.
    """
    repository = reader.engine.repository
    app = FastAPI(
        title="Headrace",
        version=headrace.__version__,
        description="Open Inference Protocol (KServe v2) with Triton's extensions.",
        redirect_slashes=False,
        openapi_tags=schemas.TAGS,
    )
    handle_errors(app)
    app.add_middleware(_HeadAsGet)
    if restrictions is not None and restrictions.active:
        app.add_middleware(_Restricted, restrictions=restrictions)
    for extend in extensions:
        extend(app)
    _add_health(app, repository, state)
    _add_models(app, repository, state)
    _add_infer(app, reader)
    add_streams(app, reader)
    _add_repository(app, repository)
    _add_metrics(app, metrics)
    return app


def metrics_app(metrics: Metrics) -> FastAPI:
    """The application of the metrics port."""
    app = FastAPI(title="Headrace metrics", openapi_url=None, redirect_slashes=False)
    handle_errors(app)
    app.add_middleware(_HeadAsGet)
    _add_metrics(app, metrics)
    return app


def _add_metrics(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/metrics", tags=["metrics"], response_class=Response, responses={200: {"content": _METRICS_TYPES}})
    async def metrics_page(request: Request) -> Response:
        """Prometheus metrics, in the classic text format or OpenMetrics as the client accepts."""
        body, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})


class _Restricted:
    """ASGI middleware that answers for the application where a request may not pass."""

    def __init__(self, app: ASGIApp, restrictions: Restrictions) -> None:
        self._app = app
        self._restrictions = restrictions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = self._restrictions.http_problem(scope["path"], scope["headers"])
            if problem is not None:
                status, headers = http_status(problem)
                await error_response(str(problem), status, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _HeadAsGet:
    """ASGI middleware that has HEAD answered wherever GET is, with the same status and headers.

    uvicorn goes by the request as it came, and leaves the body out.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


def _add_health(app: FastAPI, repository: Repository, state: ServerState) -> None:
    path = "/v2/health/live"

    @app.get(path, tags=["health"], response_model=schemas.LiveBody, **schemas.operation(path))
    async def live() -> Response:
        """Whether the process answers at all."""
        return json_response({"live": True})

    path = "/v2/health/ready"

    @app.get(path, tags=["health"], response_model=schemas.ReadyBody, **schemas.operation(path, 503))
    async def ready() -> Response:
        """Whether inference requests can be sent: every model found at start was loaded, or refused with a reason."""
        why_not = state.why_not_ready()
        return error_response(why_not, 503, {"Retry-After": "1"}) if why_not else json_response({"ready": True})

    async def model_ready(request: Request) -> Response:
        """Whether a request for the model would be run now."""
        name, version = schemas.model_in(request)
        if repository.is_ready(name, version):
            return json_response({"name": name, "ready": True})
        which = f"model '{name}'" + (f" version {version}" if version else "")
        return error_response(f"{which} is not ready; POST /v2/repository/index says why", 400)

    for path in ("/v2/models/{name}/ready", "/v2/models/{name}/versions/{version}/ready"):
        app.add_api_route(
            path,
            model_ready,
            methods=["GET"],
            tags=["health"],
            response_model=schemas.ModelReadyBody,
            **schemas.operation(path, 400),
        )


def _add_models(app: FastAPI, repository: Repository, state: ServerState) -> None:
    async def server_metadata() -> Response:
        """The server's name, its version and the protocol extensions that it offers."""
        return json_response({"name": state.name, "version": headrace.__version__, "extensions": state.extensions})

    for path in ("/v2", "/v2/"):
        app.add_api_route(
            path,
            server_metadata,
            methods=["GET"],
            tags=["metadata"],
            response_model=schemas.ServerMetadataBody,
            include_in_schema=path == "/v2",
            **schemas.operation(path),
        )

    path = "/v2/models"

    @app.get(path, tags=["metadata"], response_model=schemas.ModelListBody, **schemas.operation(path))
    async def models() -> Response:
        """The names of the models in the repository."""
        return json_response({"models": await repository.names()})

    async def model_metadata(request: Request) -> Response:
        """A model's versions, inputs and outputs."""
        name, version = schemas.model_in(request)
        info = repository.lookup(name, version).info
        return json_response(
            {
                "name": info.name,
                "versions": repository.versions(name),
                "platform": info.platform,
                "inputs": [_tensor(spec) for spec in info.signature.inputs],
                "outputs": [_tensor(spec) for spec in info.signature.outputs],
            }
        )

    async def model_config(request: Request) -> Response:
        """A model's configuration, in Triton's form, with everything that was inferred filled in."""
        served = repository.lookup(*schemas.model_in(request))
        return json_response(to_json(to_message(served.folder.config, served.info)))

    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        for path, answer, answer_body in (
            (prefix, model_metadata, schemas.ModelMetadataBody),
            (f"{prefix}/config", model_config, schemas.ModelConfigBody),
        ):
            app.add_api_route(
                path,
                answer,
                methods=["GET"],
                tags=["metadata"],
                response_model=answer_body,
                **schemas.operation(path, 503),
            )


def _tensor(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape_or_any}


def _add_infer(app: FastAPI, reader: HttpInfer) -> None:
    async def infer(request: Request) -> Response:
        """Run the model on the request's inputs."""
        headers = reader.headers(request.headers.raw)
        asked = reader.decode(*schemas.model_in(request), headers, await request.body())
        reply = reader.encode(await reader.infer(asked), asked, headers)
        response = Response(b"".join(reply.chunks))
        response.raw_headers = list(reply.headers)
        return response

    for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        app.add_api_route(path, infer, methods=["POST"], tags=["inference"], **schemas.infer(path))


class _IndexRequest(msgspec.Struct):
    ready: bool = False


class _ChangeRequest(msgspec.Struct):
    parameters: dict[str, Any] | None = None


def _add_repository(app: FastAPI, repository: Repository) -> None:
    path = "/v2/repository/index"
    body = schemas.json_body(schemas.IndexRequestBody, {"those that serve": {"ready": True}}, required=False)

    @app.post(
        path,
        tags=["repository"],
        response_model=list[schemas.IndexEntryBody],
        **schemas.operation(path, 400, 413, body=body),
    )
    async def index(request: Request) -> Response:
        """Every model in the repository, its versions and their states, with the reason where one is not served."""
        wanted = read_body(await request.body(), _IndexRequest)
        entries = await repository.index(wanted.ready)
        return json_response(
            [
                {"name": one.name}
                if not one.state
                else {"name": one.name, "version": one.version, "state": one.state, "reason": one.reason}
                for one in entries
            ]
        )

    path = "/v2/repository/models/{name}/load"
    examples: dict[str, Any] = {
        "from the repository": {},
        "with another configuration": {"parameters": {"config": '{"max_batch_size": 8}'}},
    }
    body = schemas.json_body(schemas.LoadRequestBody, examples, required=False)

    @app.post(
        path,
        tags=["repository"],
        response_class=Response,
        **schemas.operation(path, 400, 413, 503, body=body),
    )
    async def load(request: Request) -> Response:
        """Load a model, or reload it when its files have changed. Needs --model-control explicit.

        The parameter ``config``, JSON in Triton's form, is used in place of the model's configuration. Beside it,
        parameters such as ``file:1/model.onnx`` bring the files of the model, in base64.
        """
        name = request.path_params["name"]
        wanted = read_body(await request.body(), _ChangeRequest)
        config, files = load_override(name, wanted.parameters or {})
        await repository.load(name, config, files)
        return Response()

    path = "/v2/repository/models/{name}/unload"
    examples = {"alone": {}, "with its parts": {"parameters": {"unload_dependents": True}}}
    body = schemas.json_body(schemas.UnloadRequestBody, examples, required=False)

    @app.post(
        path,
        tags=["repository"],
        response_class=Response,
        **schemas.operation(path, 400, 413, 503, body=body),
    )
    async def unload(request: Request) -> Response:
        """Stop serving a model; accepted requests are answered first. Needs --model-control explicit."""
        name = request.path_params["name"]
        wanted = read_body(await request.body(), _ChangeRequest)
        await repository.unload(name, dependents=unload_dependents(name, wanted.parameters or {}))
        return Response()

    async def named(request: Request) -> Response:
        """Refuse: there is one repository, and it has no name."""
        where = request.scope["path"].removeprefix("/v2/")
        raise Unsupported(f"'{where}': repository names are not offered by this server")

    prefix = "/v2/repository/{repository_name}"
    for rest in ("index", "models/{name}/load", "models/{name}/unload", "{rest:path}"):
        path = f"{prefix}/{rest}"
        shown = rest != "{rest:path}"
        app.add_api_route(
            path,
            named,
            methods=["POST"],
            tags=["repository"],
            include_in_schema=shown,
            status_code=501,
            response_model=schemas.ErrorBody,
            response_description="Always: this server has one repository, without a name.",
            **(schemas.operation(path, 413) if shown else {}),
        )
