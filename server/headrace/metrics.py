"""What a scrape of ``/metrics`` shows, read from plain counters at that moment.

What a server has once goes through a registry of prometheus_client. The families of models are written here: 1,400
models have 120,000 samples, which took the library 0.8 s on a machine where this file takes 0.12 s.

Triton's counters (``nv_*``) have no ``_total`` at the end, and dashboards name them as they are. The classic text
format takes any name for a counter. OpenMetrics does not, and Prometheus asks for OpenMetrics unless told
otherwise; there they are of type ``unknown``, because a lost type costs a hint and a changed name costs the
dashboard. ``rate()`` works on both.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from headrace import __version__
from headrace.core.statistics import Histogram, Statistics

FAILURE_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
_OPENMETRICS = "application/openmetrics-text"


@dataclass(frozen=True, slots=True)
class ModelSample:
    """One model version now: ``waiting`` counts requests in its queue, ``executing`` batches on its instances."""

    name: str
    version: str
    statistics: Statistics
    waiting: int
    executing: int
    ready: bool
    instances: int
    instances_up: int


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One worker process now. ``name`` outlives restarts, ``pid`` does not, so only ``name`` is a label."""

    name: str
    pid: int
    resident_bytes: int
    cpu_seconds: float
    models: int
    restarts: int


@dataclass(frozen=True, slots=True)
class ServerSample:
    """The front process now: requests accepted and not yet answered, and the bytes that they hold."""

    inflight_requests: int
    inflight_bytes: int
    uptime_seconds: float
    ready: bool


class Metrics:
    """The scrape. The three callables are asked at every one and must give what is true at that moment."""

    def __init__(
        self,
        models: Callable[[], Iterable[ModelSample]],
        workers: Callable[[], Iterable[WorkerSample]],
        server: Callable[[], ServerSample],
    ) -> None:
        self._models = models
        self._registry = CollectorRegistry()
        self._registry.register(_ServerCollector(workers, server))
        ProcessCollector(registry=self._registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Body and content type: OpenMetrics where the Accept header prefers it, else the classic text format.

        Anyone may call it, one caller at a time. On the event loop, where the counters are written, a body is one
        moment; in a thread, if the callables allow that, its numbers are milliseconds apart and each histogram
        still adds up.
        """
        openmetrics = prefers_openmetrics(accept)
        encode, content_type = choose_encoder(_OPENMETRICS if openmetrics else "")
        # A folder's name need not be UTF-8, and one such model must not cost the scrape of all others.
        text = _model_text(self._models(), openmetrics).encode(errors="replace")
        # The registry comes last: in OpenMetrics its end is the end of the body, "# EOF".
        return text + encode(self._registry), content_type


def prefers_openmetrics(accept: str) -> bool:
    """Whether an Accept header names OpenMetrics and gives it at least the quality of plain text."""
    quality = {_OPENMETRICS: 0.0, "text/plain": 0.0}
    for choice in accept.lower().split(","):
        media, *parameters = (part.strip() for part in choice.split(";"))
        if media in quality:
            quality[media] = max(quality[media], _quality(parameters))
    return 0 < quality[_OPENMETRICS] >= quality["text/plain"]


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


@dataclass(frozen=True, slots=True)
class _Family:
    """One number for each model."""

    name: str
    kind: str
    help: str
    read: Callable[[ModelSample], float]


@dataclass(frozen=True, slots=True)
class _HistogramFamily:
    """One histogram for each model."""

    name: str
    help: str
    read: Callable[[ModelSample], Histogram]


_FAILURES = "nv_inference_request_failure"

_FAMILIES = (
    _Family(
        "nv_inference_request_success",
        "counter",
        "Requests answered without an error",
        lambda model: model.statistics.success,
    ),
    _Family(
        "nv_inference_count",
        "counter",
        "Inferences, a batch of n rows counting n times",
        lambda model: model.statistics.rows,
    ),
    _Family("nv_inference_exec_count", "counter", "Batches executed", lambda model: model.statistics.executions),
    _Family(
        "nv_inference_request_duration_us",
        "counter",
        "Microseconds from a request's arrival to its answer, successful requests",
        lambda model: model.statistics.success_ns // 1000,
    ),
    _Family(
        "nv_inference_queue_duration_us",
        "counter",
        "Microseconds that requests waited in the queue",
        lambda model: model.statistics.queue_ns // 1000,
    ),
    _Family(
        "nv_inference_compute_input_duration_us",
        "counter",
        "Microseconds spent on preparing inputs, once for each request of a batch",
        lambda model: model.statistics.compute_input_ns // 1000,
    ),
    _Family(
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Microseconds spent in the model, once for each request of a batch",
        lambda model: model.statistics.compute_infer_ns // 1000,
    ),
    _Family(
        "nv_inference_compute_output_duration_us",
        "counter",
        "Microseconds spent on taking outputs, once for each request of a batch",
        lambda model: model.statistics.compute_output_ns // 1000,
    ),
    _Family(
        "nv_inference_pending_request_count", "gauge", "Requests waiting to be executed", lambda model: model.waiting
    ),
    _Family(
        "nv_model_load_duration_secs",
        "gauge",
        "Seconds that loading the model took",
        lambda model: model.statistics.load_seconds,
    ),
    _Family("headrace_queue_requests", "gauge", "Requests in the queue", lambda model: model.waiting),
    _Family("headrace_executing_batches", "gauge", "Batches being executed", lambda model: model.executing),
    _Family("headrace_model_ready", "gauge", "1 if the model can answer now, else 0", lambda model: int(model.ready)),
    _Family("headrace_instances", "gauge", "Instances that should be up", lambda model: model.instances),
    _Family("headrace_instances_up", "gauge", "Instances that are up", lambda model: model.instances_up),
    _Family(
        "headrace_worker_deaths_total",
        "counter",
        "Times that a worker died while it held the model",
        lambda model: model.statistics.worker_deaths,
    ),
    _Family(
        "headrace_retried_requests_total",
        "counter",
        "Requests run again after the worker that held them died",
        lambda model: model.statistics.retries,
    ),
)

_HISTOGRAMS = (
    _HistogramFamily(
        "headrace_request_duration_seconds",
        "Time from a request's arrival to its answer, successful requests",
        lambda model: model.statistics.request_latency_s,
    ),
    _HistogramFamily(
        "headrace_queue_duration_seconds",
        "Time that a request waited in the queue",
        lambda model: model.statistics.queue_time_s,
    ),
    _HistogramFamily(
        "headrace_compute_duration_seconds",
        "Time that a batch took: inputs, model and outputs",
        lambda model: model.statistics.compute_time_s,
    ),
    _HistogramFamily("headrace_batch_rows", "Rows in an executed batch", lambda model: model.statistics.batch_rows),
)


def _model_text(models: Iterable[ModelSample], openmetrics: bool) -> str:
    """Every family of every model. A family's samples must stand together, so models are the inner loop."""
    labelled = [(_labels(model), model) for model in models]
    lines: list[str] = []
    for family in _FAMILIES:
        name, read = family.name, family.read
        lines += _header(name, family.kind, family.help, openmetrics)
        lines += [f"{name}{{{labels}}} {read(model)}" for labels, model in labelled]
    lines += _header(_FAILURES, "counter", "Requests answered with an error, by reason", openmetrics)
    for labels, model in labelled:
        lines += _failure_lines(labels, model.statistics.failures)
    for histogram in _HISTOGRAMS:
        lines += _header(histogram.name, "histogram", histogram.help, openmetrics)
        for labels, model in labelled:
            lines += _histogram_lines(histogram.name, labels, histogram.read(model))
    return "\n".join(lines) + "\n"


def _header(name: str, kind: str, documentation: str, openmetrics: bool) -> tuple[str, str]:
    if openmetrics and kind == "counter":
        # There a counter's family has no suffix and its samples must have it.
        family = name.removesuffix("_total")
        kind = "unknown" if family == name else kind
        name = family
    return f"# HELP {name} {documentation}", f"# TYPE {name} {kind}"


def _labels(model: ModelSample) -> str:
    return f'model="{_escaped(model.name)}",version="{_escaped(model.version)}"'


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _failure_lines(labels: str, failures: dict[str, int]) -> list[str]:
    """All reasons, at 0 too: a series that begins with its first failure hides that one from ``rate()``."""
    return [f'{_FAILURES}{{{labels},reason="{reason}"}} {failures.get(reason, 0)}' for reason in FAILURE_REASONS]


def _histogram_lines(name: str, labels: str, histogram: Histogram) -> list[str]:
    rows = histogram.cumulative()
    lines = [f'{name}_bucket{{{labels},le="{bound}"}} {count}' for bound, count in rows]
    lines += (f"{name}_sum{{{labels}}} {histogram.total}", f"{name}_count{{{labels}}} {rows[-1][1]}")
    return lines


class _ServerCollector(Collector):
    """The families that a server has once, those of its worker processes and those of the machine."""

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


def _server_families(server: ServerSample) -> Iterator[Metric]:
    yield InfoMetricFamily("headrace_build", "The version of Headrace that is running", {"version": __version__})
    yield _gauge("headrace_server_ready", "1 if the server is ready, else 0", int(server.ready))
    yield _gauge("headrace_uptime_seconds", "Seconds since the server started", server.uptime_seconds)
    yield _gauge("headrace_inflight_requests", "Requests accepted and not yet answered", server.inflight_requests)
    yield _gauge("headrace_inflight_bytes", "Bytes that those requests hold", server.inflight_bytes)


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value)


def _worker_families(workers: Iterable[WorkerSample]) -> tuple[Metric, ...]:
    resident = GaugeMetricFamily(
        "headrace_worker_resident_bytes", "Resident memory of a worker process", labels=("worker",)
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
        cpu.add_metric(labels, worker.cpu_seconds)
        models.add_metric(labels, worker.models)
        restarts.add_metric(labels, worker.restarts)
    return resident, cpu, models, restarts


class CpuUtilization:
    """The machine's CPU use between two readings, as Triton has it: of all CPUs, whatever the cgroup allows."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._idle, self._total = self._ticks()
        self._utilization = 0.0

    def read(self) -> float:
        """0 to 1 since the last reading, or since this was made; that of the last while no tick has passed."""
        idle, total = self._ticks()
        if total > self._total:
            # The kernel's idle count may step back a tick or two, hence the bounds.
            share = 1 - (idle - self._idle) / (total - self._total)
            self._utilization = min(1.0, max(0.0, share))
            self._idle, self._total = idle, total
        return self._utilization

    def _ticks(self) -> tuple[int, int]:
        """Idle and all, from the line ``cpu user nice system idle iowait irq softirq steal guest guest_nice``."""
        with self._stat.open() as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]  # guests are in user and nice already
        return ticks[3] + ticks[4], sum(ticks)


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory that the server lives in: its cgroup's, where that has a limit below the machine's."""

    total_bytes: int
    used_bytes: int


def read_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Memory:
    """The tightest limit of cgroup v2 from this process's group up, else the machine.

    Used is what would have to be killed to get it back: file cache that nobody touched lately is not counted, as
    Kubernetes counts for evictions. Tensors in memfds are counted.
    """
    machine = _numbers(proc / "meminfo")
    total_bytes = machine["MemTotal:"] * 1024
    limit_bytes, group = min(_limits(proc / "self" / "cgroup", cgroups), default=(total_bytes, None))
    if group is None or limit_bytes >= total_bytes:
        return Memory(total_bytes, total_bytes - machine["MemAvailable:"] * 1024)
    current_bytes = int((group / "memory.current").read_text())
    return Memory(limit_bytes, max(0, current_bytes - _numbers(group / "memory.stat")["inactive_file"]))


def _limits(self_cgroup: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """Each group from this process's up to the root that has a limit, and that limit in bytes."""
    own = next((line[3:] for line in self_cgroup.read_text().splitlines() if line.startswith("0::")), "/")
    folder = root / own.strip("/")
    for group in (folder, *folder.parents):
        limit = group / "memory.max"
        # No such file: the root group, cgroup v1, or a path from outside of this container.
        if group.is_relative_to(root) and limit.exists():
            text = limit.read_text().strip()
            if text != "max":
                yield int(text), group


def _numbers(path: Path) -> dict[str, int]:
    """A kernel file of lines ``name number [unit]``."""
    return {name: int(rest[0]) for name, *rest in map(str.split, path.read_text().splitlines())}
