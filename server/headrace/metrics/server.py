"""The metric families that a server has once, those of its worker processes and those of the machine."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from headrace import __version__
from headrace.core.machine_memory import read_memory
from headrace.core.statistics import CacheUsage
from headrace.metrics.machine import CpuUtilization
from headrace.metrics.samples import OptimizerSample, ResidencySample, ServerSample, WorkerSample


class ServerCollector(Collector):
    """Asks the two callables anew at each scrape."""

    def __init__(self, workers: Callable[[], Iterable[WorkerSample]], server: Callable[[], ServerSample]) -> None:
        self._workers = workers
        self._server = server
        self._cpu = CpuUtilization()

    def collect(self) -> Iterator[Metric]:
        """Ask for everything anew."""
        yield from _server_families(self._server())
        yield from _worker_families(self._workers())
        yield _gauge(
            "nv_cpu_utilization",
            "Share of the machine's CPU time that was in use since the last scrape, 0 to 1",
            self._cpu.read(),
        )
        memory = read_memory()
        yield _gauge(
            "nv_cpu_memory_total_bytes",
            "Memory that there is: the limit of the server's cgroup, else the machine's",
            memory.total_bytes,
        )
        yield _gauge(
            "nv_cpu_memory_used_bytes",
            "Memory in use that cannot be given back at once, of the total",
            memory.used_bytes,
        )
        # Triton's pool for copies to a GPU; dashboards divide the one by the other, and here there is none.
        yield _gauge("nv_pinned_memory_pool_total_bytes", "Pinned memory for copies to a GPU", 0)
        yield _gauge("nv_pinned_memory_pool_used_bytes", "Pinned memory in use", 0)


def _server_families(server: ServerSample) -> Iterator[Metric]:
    yield InfoMetricFamily("headrace_build", "The version of Headrace that is running", {"version": __version__})
    yield _gauge("headrace_server_ready", "1 if the server is ready, else 0", int(server.ready))
    yield _gauge("headrace_uptime_seconds", "Seconds since the server started", server.uptime_seconds)
    yield _gauge("headrace_inflight_requests", "Requests accepted and not yet answered", server.inflight_requests)
    yield _gauge("headrace_inflight_bytes", "Bytes that those requests hold", server.inflight_bytes)
    recycles = CounterMetricFamily(
        "headrace_worker_recycles_total", "Workers that were replaced because of their memory", labels=("reason",)
    )
    for reason, count in server.recycles.items():
        recycles.add_metric((reason,), count)
    yield recycles
    if server.residency is not None:
        yield from _residency_families(server.residency)
    if server.cache is not None:
        yield from _cache_families(server.cache)
    if server.resources:
        yield from _resource_families(server.resources)
    if server.optimizer is not None:
        yield from _optimizer_families(server.optimizer)


def _residency_families(residency: ResidencySample) -> Iterator[Metric]:
    yield _gauge("headrace_resident_limit_bytes", "Memory that models may have", residency.limit_bytes)
    yield _gauge("headrace_resident_bytes", "Memory of the models that are there", residency.resident_bytes)
    yield _gauge("headrace_resident_models", "Models that are in memory", residency.resident_models)
    yield CounterMetricFamily("headrace_page_ins_total", "Models that came back into memory", residency.page_ins)
    yield CounterMetricFamily("headrace_evictions_total", "Models that made room for others", residency.evictions)
    seconds = residency.page_in_seconds
    yield HistogramMetricFamily(
        "headrace_page_in_duration_seconds",
        "Seconds from the first request for a model that was not in memory until it was",
        buckets=seconds.cumulative(),
        sum_value=seconds.total,
    )


def _cache_families(cache: CacheUsage) -> Iterator[Metric]:
    yield _gauge("headrace_cache_bytes", "Memory that the response cache holds", cache.bytes)
    yield _gauge("headrace_cache_entries", "Responses in the response cache", cache.entries)
    yield CounterMetricFamily(
        "headrace_cache_evictions_total", "Responses that made room for newer ones", cache.evictions
    )


def _resource_families(resources: dict[tuple[str, str], tuple[int, int]]) -> Iterator[Metric]:
    held = GaugeMetricFamily(
        "headrace_rate_limit_held", "Of a resource, what running instances hold", labels=("resource", "device")
    )
    there = GaugeMetricFamily(
        "headrace_rate_limit_count", "Of a resource, what there is", labels=("resource", "device")
    )
    for (device, name), (used, count) in resources.items():
        labels = (name, device or "global")
        held.add_metric(labels, used)
        there.add_metric(labels, count)
    yield from (held, there)


def _optimizer_families(optimizer: OptimizerSample) -> Iterator[Metric]:
    runs = CounterMetricFamily(
        "headrace_optimizer_runs_total",
        "Runs of the optimiser in the background, by how they ended",
        labels=("result",),
    )
    for result, count in optimizer.results.items():
        runs.add_metric((result,), count)
    running = GaugeMetricFamily(
        "headrace_optimizer_running", "1 for the model that is being optimised in the background", labels=("model",)
    )
    if optimizer.model:
        running.add_metric((optimizer.model,), 1)
    yield from (runs, running)


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value)


def _worker_families(workers: Iterable[WorkerSample]) -> tuple[Metric, ...]:
    resident = GaugeMetricFamily(
        "headrace_worker_resident_bytes", "Resident memory of a worker process", labels=("worker",)
    )
    memory = GaugeMetricFamily(
        "headrace_worker_memory_bytes",
        "Memory of a worker process's own: resident, without shared memory and mapped files",
        labels=("worker",),
    )
    cpu = CounterMetricFamily(
        "headrace_worker_cpu_seconds_total", "CPU time that a worker process has used", labels=("worker",)
    )
    models = GaugeMetricFamily("headrace_worker_models", "Models that a worker process holds", labels=("worker",))
    restarts = CounterMetricFamily(
        "headrace_worker_restarts_total", "Times that a worker was started again", labels=("worker",)
    )
    for worker in workers:
        labels = (worker.name,)
        resident.add_metric(labels, worker.resident_bytes)
        memory.add_metric(labels, worker.own_bytes)
        cpu.add_metric(labels, worker.cpu_seconds)
        models.add_metric(labels, worker.models)
        restarts.add_metric(labels, worker.restarts)
    return resident, memory, cpu, models, restarts
