"""What the metrics are made of: readings of one moment, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace.core.statistics import CacheUsage, Histogram, Statistics


@dataclass(frozen=True, slots=True)
class LatencySample:
    """What batches of up to ``rows`` take, as learned: on average, and what one in a hundred takes longer than.

    ``row_elements`` is what a row of such shapes has at most; 0 for a model whose shapes do not differ.
    """

    row_elements: int
    rows: int
    mean_s: float
    high_s: float


@dataclass(frozen=True, slots=True)
class ObjectiveSample:
    """A model's latency objective and what has become of it. The last two are None where batch sizes are fixed."""

    objective_s: float
    budget_s: float
    timely: int
    late: int
    refused: int
    arrival_rows_per_s: float
    target_rows: int | None = None
    waited_s: float | None = None


@dataclass(frozen=True, slots=True)
class PlanSample:
    """The plan that a version is served by, and what became of those that it was served by. ``form`` "": none now."""

    form: str
    speedup: float
    refusals: int
    replays_right: int
    replays_wrong: int


@dataclass(frozen=True, slots=True)
class ModelSample:
    """One model version now: ``waiting`` counts requests in its queue, ``executing`` batches on its instances.

    ``waiting_by_priority`` is empty where there are no priority levels.
    ``active_streams`` are requests that are being answered with several responses, ``active_sequences`` those that
    have begun and not ended.
    """

    name: str
    version: str
    statistics: Statistics
    waiting: int
    executing: int
    ready: bool
    instances: int
    instances_up: int
    restart_pause_s: float = 0.0  # for which an instance that keeps dying is left alone, until it is up; 0 for none
    active_streams: int = 0
    active_sequences: int = 0
    cached: bool = False  # whether the response cache is asked first
    decoupled: bool = False
    pages: bool = False  # whether it may leave the memory and come back
    resident: bool = True  # whether it is there
    memory_bytes: int = 0  # that it takes there
    waiting_by_priority: dict[int, int] = field(default_factory=dict)
    latencies: tuple[LatencySample, ...] = ()
    objective: ObjectiveSample | None = None
    plan: PlanSample | None = None  # None: there never was one


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One worker process now. ``name`` outlives restarts, ``pid`` does not, so only ``name`` is a label."""

    name: str
    pid: int
    resident_bytes: int
    cpu_seconds: float
    models: int
    restarts: int
    instances: frozenset[int] = frozenset()  # the numbers of those that it holds
    own_bytes: int = 0  # without shared memory and mapped files


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One GPU a moment ago. None is what it does not tell."""

    uuid: str
    utilization: float | None = None  # 0 to 1
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None  # since the server started


@dataclass(frozen=True, slots=True)
class ResidencySample:
    """The models that are in memory, where that has a limit. ``page_in_seconds``: from a request to ready."""

    limit_bytes: int
    resident_bytes: int
    resident_models: int
    page_ins: int
    evictions: int
    page_in_seconds: Histogram


@dataclass(frozen=True, slots=True)
class OptimizerSample:
    """The optimiser beside the server: what it works on, empty for nothing, and how its runs ended."""

    model: str
    results: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ServerSample:
    """The front process now: requests accepted and not yet answered, and the bytes that they hold.

    ``cache`` is None where this process holds no response cache. ``resources`` are those of the rate limiter, by
    device ("" for the whole server's) and name: how many are held, and how many there are.
    """

    inflight_requests: int
    inflight_bytes: int
    uptime_seconds: float
    ready: bool
    cache: CacheUsage | None = None
    residency: ResidencySample | None = None  # None where there is no limit
    recycles: Mapping[str, int] = field(default_factory=dict)  # workers that were replaced, by reason
    resources: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    optimizer: OptimizerSample | None = None  # None where there is none
