"""The statistics extension's answer, as both protocols give it: one plain structure a model version."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from headrace.core.errors import InvalidRequest, NotFound, NotReady
from headrace.core.statistics import BatchSizeTotals, ResponseTotals, Statistics, Tally
from headrace.metrics import WorkerSample
from headrace.repository.repository import Repository, Served

Workers = Callable[[], Iterable[WorkerSample]]


@dataclass(frozen=True, slots=True)
class Duration:
    """How often something happened, and the nanoseconds that it took in all."""

    count: int
    ns: int


@dataclass(frozen=True, slots=True)
class InferenceStatistics:
    """Requests. ``queue`` is of all that succeeded, ``compute_*`` of those that the response cache did not answer."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


@dataclass(frozen=True, slots=True)
class ResponseStatistics:
    """Responses of a decoupled model that had one index within their requests."""

    compute_infer: Duration
    compute_output: Duration
    success: Duration
    fail: Duration
    empty_response: Duration
    cancel: Duration


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Executions of one size, in rows."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """What one worker process that holds the model has in memory; it may hold other models too."""

    type: str
    id: int
    byte_size: int


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """One model version since it was loaded. ``last_inference`` is in milliseconds since 1970, 0 for never."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferenceStatistics
    response_stats: dict[str, ResponseStatistics]
    batch_stats: list[BatchStatistics]
    memory_usage: list[MemoryUsage]


@dataclass(frozen=True, slots=True)
class StatisticsReport:
    """The whole answer."""

    model_stats: list[ModelStatistics]


def report(repository: Repository, workers: Workers, name: str, version: str) -> StatisticsReport:
    """The statistics of one version, of all that serve of a model, or with no name of everything that serves.

    Raises:
        InvalidRequest: there is no such model or version that serves. (Triton's answer to this, and clients test it.)
    """
    samples = list(workers())
    return StatisticsReport(
        [
            model_statistics(one.folder.name, one.version, one.statistics, _resident_bytes(one, samples))
            for one in _chosen(repository, name, version)
        ]
    )


def model_statistics(name: str, version: str, statistics: Statistics, resident_bytes: Sequence[int]) -> ModelStatistics:
    """One version's counters in the protocol's form; ``resident_bytes`` has one number for each worker process."""
    success, computed = statistics.success, statistics.computed
    return ModelStatistics(
        name=name,
        version=version,
        last_inference=statistics.last_inference_ms,
        inference_count=statistics.rows,
        execution_count=statistics.executions,
        inference_stats=InferenceStatistics(
            success=Duration(success, statistics.success_ns),
            fail=Duration(sum(statistics.failures.values()), statistics.failure_ns),
            queue=Duration(success, statistics.queue_ns),
            compute_input=Duration(computed, statistics.compute_input_ns),
            compute_infer=Duration(computed, statistics.compute_infer_ns),
            compute_output=Duration(computed, statistics.compute_output_ns),
            cache_hit=Duration(statistics.cache_hits, statistics.cache_hit_ns),
            cache_miss=Duration(statistics.cache_misses, statistics.cache_miss_ns),
        ),
        response_stats={str(index): _response(totals) for index, totals in sorted(statistics.by_response.items())},
        batch_stats=[_batch(rows, totals) for rows, totals in sorted(statistics.by_batch_size.items())],
        memory_usage=[MemoryUsage("CPU", 0, size) for size in resident_bytes],
    )


def _response(totals: ResponseTotals) -> ResponseStatistics:
    return ResponseStatistics(
        compute_infer=_duration(totals.compute_infer),
        compute_output=_duration(totals.compute_output),
        success=_duration(totals.success),
        fail=_duration(totals.fail),
        empty_response=_duration(totals.empty_response),
        cancel=_duration(totals.cancel),
    )


def _duration(tally: Tally) -> Duration:
    return Duration(tally.count, tally.ns)


def _batch(rows: int, totals: BatchSizeTotals) -> BatchStatistics:
    return BatchStatistics(
        batch_size=rows,
        compute_input=Duration(totals.executions, totals.compute_input_ns),
        compute_infer=Duration(totals.executions, totals.compute_infer_ns),
        compute_output=Duration(totals.executions, totals.compute_output_ns),
    )


def _chosen(repository: Repository, name: str, version: str) -> list[Served]:
    if not name:
        if version:
            raise InvalidRequest(f"the request asks for version {version} and names no model")
        return sorted(repository.served(), key=lambda one: (one.folder.name, int(one.version)))
    try:
        return [repository.lookup(name, each) for each in ([version] if version else repository.versions(name) or [""])]
    except (NotFound, NotReady) as error:
        raise InvalidRequest(str(error)) from None


def _resident_bytes(served: Served, workers: Sequence[WorkerSample]) -> list[int]:
    own = {instance.load.instance for instance in served.instances}
    return [worker.resident_bytes for worker in workers if not own.isdisjoint(worker.instances)]
