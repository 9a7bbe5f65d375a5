"""What HTTP clients are told when something is wrong: each error as ``{"error": ...}``, with its status."""

import logging

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from headrace.core.errors import HeadraceError, Kind
from headrace.frontends.status import HTTP_STATUS, http_status
from headrace.wire.json_v2 import encode_error

log = logging.getLogger(__name__)


def error_response(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    """The response that tells an error."""
    return Response(encode_error(message), status_code=status, media_type="application/json", headers=headers)


def handle_errors(app: FastAPI) -> None:
    """Have the application answer so whatever its routes raise, and where it has no route."""

    @app.exception_handler(HeadraceError)
    async def expected(_: Request, error: HeadraceError) -> Response:
        status, headers = http_status(error)
        return error_response(str(error), status, headers)

    @app.exception_handler(HTTPException)
    async def of_the_framework(request: Request, error: HTTPException) -> Response:
        where = f"{request.method} {request.url.path}"
        match error.status_code:
            case 404:
                paths = "; /docs shows its paths" if app.openapi_url else "; it has /metrics"
                message = f"Not Found: there is no {where} on this server{paths}"
            case 405:
                methods = _methods_of(app, request)
                return error_response(f"Method Not Allowed: {where}, expected {methods}", 405, {"Allow": methods})
            case _:
                message = str(error.detail)
        return error_response(message, error.status_code, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def of_validation(_: Request, error: RequestValidationError) -> Response:
        return error_response("; ".join(str(one["msg"]) for one in error.errors()), 400)

    @app.exception_handler(ClientDisconnect)
    async def of_nobody(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=HTTP_STATUS[Kind.CANCELLED])  # the client left while it sent; nobody reads this

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response("the request failed; the server's log says why", 500)


def _methods_of(app: FastAPI, request: Request) -> str:
    """The methods of a request's path, all of them: the framework names those of the first route that it finds."""
    routes = [one for one in app.routes if isinstance(one, Route) and one.matches(request.scope)[0] is not Match.NONE]
    methods = {method for one in routes for method in one.methods or ()}
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
