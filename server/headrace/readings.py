"""What the metrics show, read off the living objects at scrape time."""

import os
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, monotonic_ns

from headrace.background.optimizer import BackgroundOptimizer
from headrace.background.schedule import Result
from headrace.batching.adaptive import AdaptivePolicy
from headrace.batching.curve import LatencyCurves
from headrace.batching.objective import Objective
from headrace.batching.sequence_queue import SequenceQueue
from headrace.core.custom_metric import CustomMetric
from headrace.core.machine_memory import read_memory
from headrace.core.process_memory import process_memory
from headrace.engine import Engine
from headrace.frontends.load_report import LoadSample
from headrace.frontends.server_state import ServerState
from headrace.metrics import (
    LatencySample,
    ModelSample,
    ObjectiveSample,
    OptimizerSample,
    PlanSample,
    ResidencySample,
    ServerSample,
    WorkerSample,
)
from headrace.metrics.machine import CpuUtilization
from headrace.repository.pager import Pager
from headrace.repository.plans import Plans
from headrace.repository.repository import Repository, Served
from headrace.repository.served import ServedVersion
from headrace.response_cache import Cache
from headrace.workers.recycler import Recycler
from headrace.workers.supervisor import Supervisor

_TICKS = os.sysconf("SC_CLK_TCK")


class Readings:
    """Samples of one server."""

    def __init__(
        self,
        engine: Engine,
        repository: Repository,
        supervisor: Supervisor,
        state: ServerState,
        cache: Cache | None,
        recycler: Recycler,
        pager: Pager | None,
        optimizer: BackgroundOptimizer | None = None,
    ) -> None:
        self._engine = engine
        self._repository = repository
        self._supervisor = supervisor
        self._state = state
        self._cache = cache
        self._recycler = recycler
        self._pager = pager
        self._optimizer = optimizer
        self._started = monotonic()
        self._cpu = CpuUtilization()

    def models(self) -> Iterator[ModelSample]:
        """Every version that serves."""
        for served in self._repository.served():
            yield ModelSample(
                name=served.folder.name,
                version=served.version,
                statistics=served.statistics,
                waiting=len(served.queue),
                executing=served.queue.executing,
                ready=served.ready,
                instances=len(served.instances),
                instances_up=sum(instance.is_up for instance in served.instances),
                restart_pause_s=max((instance.pause.seconds for instance in served.instances), default=0.0),
                decoupled=served.decoupled,
                cached=served.cached,
                pages=self._pager is not None and isinstance(served, ServedVersion),
                resident=served.resident,
                memory_bytes=served.memory_bytes,
                waiting_by_priority=_by_priority(served),
                active_streams=sum(len(instance.streams) for instance in served.instances),
                active_sequences=served.queue.active_sequences if isinstance(served.queue, SequenceQueue) else 0,
                latencies=() if isinstance(served.queue, SequenceQueue) else _latencies(served.queue.curves),
                objective=None if served.queue.objective is None else _objective(served.queue.objective),
                plan=_plan(served, self._repository.plans),
            )

    def custom(self) -> Iterator[CustomMetric]:
        """The metrics that models' own code keeps."""
        for served in self._repository.served():
            for instance in served.instances:
                yield from instance.custom_metrics

    def workers(self) -> Iterator[WorkerSample]:
        """Every worker process that is running."""
        for process in self._supervisor.processes:
            pid = process.pid
            memory = process_memory(pid) if pid is not None else None
            cpu_seconds = _cpu_seconds(pid) if pid is not None else None
            if pid is not None and memory is not None and cpu_seconds is not None:
                yield WorkerSample(
                    process.name,
                    pid,
                    memory.resident_bytes,
                    cpu_seconds,
                    own_bytes=memory.own_bytes,
                    models=len(process.hosted),
                    restarts=max(0, process.restarts),
                    instances=frozenset(process.hosted),
                )

    def load(self) -> LoadSample:
        """How busy the server is, for load balancers."""
        memory = read_memory()
        served = list(self._repository.served())
        return LoadSample(
            self._cpu.read(),
            memory.used_bytes / memory.total_bytes,
            {
                "queue_requests": sum(len(one.queue) for one in served),
                "inflight_requests": sum(each.in_flight for one in served for each in one.instances),
            },
        )

    def server(self) -> ServerSample:
        """The server as a whole."""
        served = list(self._repository.served())
        return ServerSample(
            inflight_requests=sum(len(one.queue) + sum(each.in_flight for each in one.instances) for one in served),
            inflight_bytes=self._engine.inflight_bytes,
            uptime_seconds=monotonic() - self._started,
            ready=not self._state.why_not_ready(),
            cache=self._cache.usage if self._cache is not None else None,
            recycles=self._recycler.recycles,
            residency=_residency(self._pager) if self._pager is not None else None,
            resources=limiter.resources.usage() if (limiter := self._supervisor.limiter) is not None else {},
            optimizer=_optimizer(self._optimizer) if self._optimizer is not None else None,
        )


def _optimizer(optimizer: BackgroundOptimizer) -> OptimizerSample:
    running = optimizer.running
    results = {str(result): optimizer.results[result] for result in Result}
    return OptimizerSample(running.model if running is not None else "", results)


def _residency(pager: Pager) -> ResidencySample:
    counts = pager.counts
    return ResidencySample(
        pager.limit_bytes,
        pager.resident_bytes,
        pager.resident_models,
        counts.page_ins,
        counts.evictions,
        counts.page_in_seconds,
    )


def _by_priority(served: Served) -> dict[int, int]:
    """Requests that wait at each of the model's priority levels, but no more of them than metrics are to show."""
    waiting = served.queue.levels() if served.levels_shown else {}
    return {level: waiting.get(level, 0) for level in served.levels_shown}


def _plan(served: Served, plans: Plans | None) -> PlanSample | None:
    if plans is None:
        return None
    planned = served.planned if isinstance(served, ServedVersion) else None
    key = served.folder.name, served.version
    refusals, right, wrong = plans.refusals[key], plans.replays[*key, True], plans.replays[*key, False]
    if planned is None and not (refusals or right or wrong):
        return None
    return PlanSample(
        planned.name if planned is not None else "",
        planned.plan.speedup if planned is not None else 0.0,
        refusals,
        right,
        wrong,
    )


def _latencies(curves: LatencyCurves) -> tuple[LatencySample, ...]:
    """Curves at powers of two: labels that stay the same while the curves move."""
    return tuple(
        LatencySample(elements, rows, curve.mean_ns(rows) * 1e-9, curve.high_ns(rows) * 1e-9)
        for elements, curve in curves.named()
        for rows in curve.sizes()
    )


def _objective(objective: Objective) -> ObjectiveSample:
    budget, policy = objective.budget, objective.policy
    return ObjectiveSample(
        objective_s=budget.objective_ns * 1e-9,
        budget_s=budget.ns * 1e-9,
        timely=budget.timely,
        late=budget.late,
        refused=objective.refused,
        arrival_rows_per_s=objective.arrivals.per_ns(monotonic_ns()) * 1e9,
        target_rows=policy.target if isinstance(policy, AdaptivePolicy) else None,
        waited_s=policy.waited_ns * 1e-9 if isinstance(policy, AdaptivePolicy) else None,
    )


def _cpu_seconds(pid: int) -> float | None:
    """CPU seconds of a process; None when it is gone."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / _TICKS
    except (OSError, IndexError):
        return None
