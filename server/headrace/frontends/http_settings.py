"""Log and trace settings over HTTP."""

from collections.abc import Callable
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from headrace.core.errors import InvalidRequest, NotFound
from headrace.frontends import schemas
from headrace.frontends.http_bodies import json_response, read_body
from headrace.log_settings import LogSettings
from headrace.tracing import Tracer

MAX_SETTINGS_BYTES = 64 * 1024  # of a request's body


class LogSettingsBody(BaseModel):
    """What the server logs. ``log_file`` is empty for standard error, where it always logs to."""

    log_file: str
    log_info: bool
    log_warning: bool
    log_error: bool
    log_verbose_level: int
    log_format: Literal["default", "ISO8601"]


class ChangeLogSettingsBody(BaseModel):
    """The log settings to change; null leaves one as it is."""

    model_config = ConfigDict(extra="forbid")

    log_file: str | None = Field(None, description="Cannot be changed: any text is refused.")
    log_info: bool | None = None
    log_warning: bool | None = None
    log_error: bool | None = None
    log_verbose_level: int | None = Field(None, ge=0, le=2**32 - 1)
    log_format: Literal["default", "ISO8601"] | None = None


class TraceSettingsBody(BaseModel):
    """What is traced. Numbers are texts, as in Triton's protocol."""

    trace_level: list[Literal["OFF", "TIMESTAMPS", "TENSORS"]]
    trace_rate: str
    trace_count: str
    log_frequency: str
    trace_file: str
    trace_mode: str


class ChangeTraceSettingsBody(BaseModel):
    """The trace settings to change; null resets a setting. The file and the mode cannot be changed."""

    model_config = ConfigDict(extra="forbid")

    trace_level: str | list[str] | None = None
    trace_rate: str | int | None = None
    trace_count: str | int | None = None
    log_frequency: str | int | None = None
    trace_file: str | None = None
    trace_mode: str | None = None


def add_settings(app: FastAPI, log_settings: LogSettings, tracer: Tracer, has_model: Callable[[str], bool]) -> None:
    """Add the paths of the logging and the trace extension."""
    _add_logging(app, log_settings)
    _add_tracing(app, tracer, has_model)


def _add_logging(app: FastAPI, log_settings: LogSettings) -> None:
    path = "/v2/logging"

    @app.get(path, tags=["logging"], response_model=LogSettingsBody, **schemas.operation(path))
    async def read_log_settings() -> Response:
        """What the server logs."""
        return json_response(log_settings.values())

    examples = {"talk more": {"log_verbose_level": 1}, "only errors": {"log_info": False, "log_warning": False}}
    body = schemas.json_body(ChangeLogSettingsBody, examples, required=False)

    @app.post(
        path,
        tags=["logging"],
        response_model=LogSettingsBody,
        **schemas.operation(path, 400, 413, 501, body=body),
    )
    async def change_log_settings(request: Request) -> Response:
        """Change what the server logs, from now on."""
        log_settings.change(_settings_in(await request.body()))
        return json_response(log_settings.values())


def _add_tracing(app: FastAPI, tracer: Tracer, has_model: Callable[[str], bool]) -> None:
    def check(name: str) -> None:
        if name and not has_model(name):
            raise NotFound(f"Request for unknown model: '{name}' is not found")

    async def read_trace_settings(request: Request) -> Response:
        """What is traced: of one model, or of all models without settings of their own."""
        name = request.path_params.get("name", "")
        check(name)
        return json_response(tracer.settings(name).values())

    async def change_trace_settings(request: Request) -> Response:
        """Change what is traced; null resets a setting."""
        name = request.path_params.get("name", "")
        body = await request.body()
        check(name)
        given = {key: _texts(key, value) for key, value in _settings_in(body).items()}
        tracer.change(given, name)
        return json_response(tracer.settings(name).values())

    examples = {
        "one request in a hundred; needs --trace-file": {"trace_level": ["TIMESTAMPS"], "trace_rate": "100"},
        "as at the start": {"trace_level": None, "trace_rate": None},
    }
    body = schemas.json_body(ChangeTraceSettingsBody, examples, required=False)
    for path in ("/v2/trace/setting", "/v2/models/{name}/trace/setting"):
        for method, route, described in (
            ("GET", read_trace_settings, schemas.operation(path)),
            ("POST", change_trace_settings, schemas.operation(path, 400, 413, 501, body=body)),
        ):
            app.add_api_route(
                path, route, methods=[method], tags=["trace"], response_model=TraceSettingsBody, **described
            )


def _settings_in(body: bytes) -> dict[str, Any]:
    """The settings in a request's body; none in an empty one."""
    return read_body(body, dict[str, Any], MAX_SETTINGS_BYTES)


def _texts(key: str, value: object) -> list[str] | None:
    """A trace setting's values as texts; numbers may come as such."""
    if value is None:
        return None
    texts = [
        one if isinstance(one, str) else str(one)
        for one in (value if isinstance(value, list) else [value])
        if isinstance(one, str | int) and not isinstance(one, bool)
    ]
    if len(texts) != (len(value) if isinstance(value, list) else 1):
        raise InvalidRequest(f"trace setting '{key[:100]}' is no text, number or array of them, expected one of these")
    return texts
