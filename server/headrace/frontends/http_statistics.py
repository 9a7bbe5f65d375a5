"""The paths of the statistics extension."""

from fastapi import FastAPI, Request, Response

from headrace.frontends import schemas
from headrace.frontends.http_bodies import json_response
from headrace.frontends.statistics_report import StatisticsReport, Workers, report
from headrace.repository.repository import Repository


def add_statistics(app: FastAPI, repository: Repository, workers: Workers) -> None:
    """Add the paths. Call it before ``/v2/models/{name}`` is added, which would take ``stats`` for a model's name."""
    path = "/v2/models/stats"

    @app.get(path, tags=["statistics"], response_model=StatisticsReport, **schemas.operation(path))
    async def all_statistics() -> Response:
        """What every model has done since it was loaded."""
        return json_response(report(repository, workers, "", ""))

    async def statistics(request: Request) -> Response:
        """What a model has done since it was loaded: each version that serves, or the one that is asked for."""
        return json_response(report(repository, workers, *schemas.model_in(request)))

    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        path = f"{prefix}/stats"
        app.add_api_route(
            path,
            statistics,
            methods=["GET"],
            tags=["statistics"],
            response_model=StatisticsReport,
            **schemas.operation(path, 400),
        )
