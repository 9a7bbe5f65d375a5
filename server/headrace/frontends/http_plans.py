"""The path by which a server is told to use a new plan now."""

from pathlib import Path

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from headrace.core.errors import Forbidden, InvalidRequest
from headrace.frontends import schemas
from headrace.frontends.http_bodies import json_response, read_body
from headrace.plan_choices import ServedForm, served_form
from headrace.repository.plans import Plans
from headrace.repository.repository import Repository

MAX_BODY_BYTES = 16 * 1024


class TakePlanBody(BaseModel):
    """Where the plan was put."""

    model_config = ConfigDict(extra="forbid")

    plan_cache: str | None = Field(None, description="A folder; where it is not the server's, the request is refused.")


class ServedFormBody(BaseModel):
    """How one version is served now: as planned, or as it was dropped in, and why."""

    version: str
    planned: bool
    form: str
    why: str


class TakenPlanBody(BaseModel):
    """What is served of the model now."""

    model: str
    plan_cache: str
    versions: list[ServedFormBody]


class _Take(msgspec.Struct, forbid_unknown_fields=True):
    plan_cache: str | None = None


class _Taken(msgspec.Struct):
    model: str
    plan_cache: str
    versions: list[ServedForm]


def add_plans(app: FastAPI, repository: Repository, plans: Plans | None, plan_cache: Path, *, used: bool) -> None:
    """Add the path. Plans are not ``used`` where every model is to be served as it was dropped in."""
    folder = plan_cache.resolve()
    path = "/v2/repository/models/{name}/plan"
    body = schemas.json_body(TakePlanBody, {"the newest plan": {}}, required=False)

    @app.post(
        path,
        tags=["repository"],
        response_model=TakenPlanBody,
        **schemas.operation(path, 400, 413, 503, body=body),
    )
    async def take_plan(request: Request) -> Response:
        """Look for a plan of a model and use it from now on; no request fails. Works with every --model-control."""
        name = request.path_params["name"]
        wanted = read_body(await request.body(), _Take, MAX_BODY_BYTES)
        if not used:
            raise Forbidden(
                "this server uses no plans (--optimize off); start it with --optimize plans, or --optimize background"
            )
        if wanted.plan_cache is not None and Path(wanted.plan_cache).resolve() != folder:  # noqa: ASYNC240 - no wait
            raise InvalidRequest(
                f"the plan is in '{wanted.plan_cache}', and this server's plans are in '{folder}'; "
                "give both the same --plan-cache"
            )
        await repository.take_plan(name)
        forms = [served_form(repository.lookup(name, version), plans) for version in repository.versions(name)]
        return json_response(_Taken(name, str(folder), forms))
