"""The paths that record a model's real inputs."""

from typing import Literal

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import FileResponse

from headrace.core.errors import NotFound
from headrace.frontends import schemas
from headrace.frontends.http_bodies import json_response, read_body
from headrace.recording.recorder import MOST_EXAMPLES, MOST_SECONDS, Recorder
from headrace.repository.repository import Repository

MAX_BODY_BYTES = 4096


class StartRecordingBody(BaseModel):
    """How much is recorded."""

    model_config = ConfigDict(extra="forbid")

    requests: int = Field(
        256, ge=1, le=MOST_EXAMPLES, description="Examples to keep: rows where the model merges rows, else requests."
    )
    seconds: float = Field(60.0, gt=0, le=MOST_SECONDS, description="How long; the examples are drawn from all of it.")


class RecordingBody(BaseModel):
    """How a recording stands. ``reason`` says why there is no file where its time is over and there is none."""

    model: str
    version: str
    state: Literal["recording", "writing", "written", "nothing", "failed"]
    requests_seen: int
    examples_seen: int
    examples_kept: int
    examples_left_out: int
    bytes_kept: int
    most_examples: int
    most_bytes: int
    seconds: float
    seconds_left: float
    file: str
    reason: str


class _Start(msgspec.Struct, forbid_unknown_fields=True):
    requests: int = 256
    seconds: float = 60.0


def add_recording(app: FastAPI, recorder: Recorder, repository: Repository) -> None:
    """Add the paths."""

    async def start(request: Request) -> Response:
        """Record inputs of a model for a while: a fair sample, bounded by number and bytes. Needs --allow-recording."""
        wanted = read_body(await request.body(), _Start, MAX_BODY_BYTES)
        return json_response(recorder.start(*schemas.model_in(request), wanted.requests, wanted.seconds))

    async def status(request: Request) -> Response:
        """The state of a model's last recording."""
        return json_response(recorder.status(*schemas.model_in(request)))

    async def stop(request: Request) -> Response:
        """End a recording early, and write what it has."""
        return json_response(await recorder.stop(*schemas.model_in(request)))

    examples = {"a thousand examples of an hour": {"requests": 1000, "seconds": 3600}}
    body = schemas.json_body(StartRecordingBody, examples, required=False)
    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        path = f"{prefix}/recording"
        for method, route, described in (
            ("POST", start, schemas.operation(path, 400, 413, 503, body=body)),
            ("GET", status, schemas.operation(path)),
            ("DELETE", stop, schemas.operation(path)),
        ):
            app.add_api_route(
                path, route, methods=[method], tags=["recording"], response_model=RecordingBody, **described
            )

    path = "/v2/models/{name}/recording/file"

    @app.get(path, tags=["recording"], response_class=FileResponse, **schemas.operation(path))
    async def file(request: Request) -> Response:
        """The file of a model's last recording, as numpy's .npz."""
        name = request.path_params["name"]
        _check(repository, name)
        return FileResponse(recorder.file(name), media_type="application/octet-stream")

    @app.delete(path, tags=["recording"], response_class=Response, **schemas.operation(path))
    async def remove(request: Request) -> Response:
        """Remove the recording of a model. One that is under way ends, and is not written."""
        name = request.path_params["name"]
        _check(repository, name)
        await recorder.discard(name)
        return Response()


def _check(repository: Repository, name: str) -> None:
    if not repository.has(name):
        raise NotFound(f"Request for unknown model: '{name}' is not found")
