"""The procedure of the statistics extension."""

from dataclasses import asdict
from typing import Any

from headrace.frontends.statistics_report import Workers, report
from headrace.repository.repository import Repository
from headrace.wire import pb


class StatisticsService:
    """ModelStatistics of inference.GRPCInferenceService."""

    def __init__(self, repository: Repository, workers: Workers) -> None:
        self._repository = repository
        self._workers = workers

    async def ModelStatistics(self, request: Any, _: Any) -> Any:  # noqa: N802 - the protocol's name
        """What models have done since they were loaded: one, or all when none is named."""
        answer = pb.ModelStatisticsResponse()
        for one in report(self._repository, self._workers, request.name, request.version).model_stats:
            fields = asdict(one)
            responses = fields.pop("response_stats")
            message = answer.model_stats.add(**fields)
            for index, response in responses.items():
                message.response_stats[index].MergeFrom(pb.InferResponseStatistics(**response))
        return answer
