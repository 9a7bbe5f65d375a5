"""A model under load with a made-up clock: the real backlog, policies, curves and admission, simulated instances."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from headrace.batching.backlog import Backlog
from headrace.batching.curve import LatencyCurves
from headrace.batching.objective import Objective
from headrace.batching.policy import BatchLimits, Wait

MS = 1_000_000
NEVER_NS = 1 << 62
DRAWN = 1 << 16  # noise factors, used in turn


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """What batches take: a line, times noise, times what a neighbour on the machine does to it.

    Noise is lognormal with ``noise`` as its deviation; ``stragglers`` is the share of batches that take twice as long.
    Through every second half of ``neighbour_period_s`` everything takes ``neighbour`` times as long.
    """

    name: str
    batch_ms: float
    row_ms: float
    max_rows: int
    noise: float = 0.08
    stragglers: float = 0.003
    neighbour: float = 1.0
    neighbour_period_s: float = 6.0

    def mean_ms(self, rows: int) -> float:
        """What a batch of so many rows takes on average, while there is no neighbour."""
        return self.batch_ms + self.row_ms * rows

    def capacity_per_s(self, objective_ms: float) -> float:
        """Rows/s in batches of the best size of which two in a row fit the objective."""
        sizes = [rows for rows in range(1, self.max_rows + 1) if 2 * self.mean_ms(rows) <= objective_ms] or [1]
        return max(1e3 * rows / self.mean_ms(rows) for rows in sizes)

    def service(self, seed: int) -> Callable[[int, int], int]:
        """A function that gives the nanoseconds that the next batch takes, from its rows and its start."""
        random = np.random.default_rng(seed)
        factors = np.exp(random.normal(0, self.noise, DRAWN)) * np.where(random.random(DRAWN) < self.stragglers, 2, 1)
        drawn = factors.tolist()
        batches = 0

        def took_ns(rows: int, now_ns: int) -> int:
            nonlocal batches
            batches += 1
            period_ns = self.neighbour_period_s * 1e9
            slowed = self.neighbour if now_ns % period_ns > period_ns / 2 else 1.0
            return int(self.mean_ms(rows) * MS * drawn[batches % DRAWN] * slowed)

        return took_ns


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model is served. Without ``admission`` nothing is refused but by a full queue; adaptive has it always."""

    adaptive: bool = False
    admission: bool = False
    max_rows: int = 64
    delay_ms: float = 0.0
    objective_ms: float = 50.0
    instances: int = 1
    max_queue_size: int = 1024

    @property
    def name(self) -> str:
        """For tables."""
        if self.adaptive:
            return "adaptive"
        return f"{self.max_rows} rows, {self.delay_ms:g} ms"


@dataclass(slots=True)
class Outcome:
    """What became of the requests that arrived in the measured part."""

    offered: int = 0
    refused: int = 0  # by admission or because the queue was full
    timely: int = 0
    late: int = 0
    batches: int = 0
    rows: int = 0
    latencies_ns: list[int] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """The share of all requests that were answered within the objective."""
        return self.timely / max(1, self.offered)

    @property
    def kept(self) -> float:
        """The share of accepted requests that were."""
        return self.timely / max(1, self.timely + self.late)


@dataclass(eq=False, slots=True)
class _Request:
    """As much of a pending request as a backlog and a policy look at."""

    queued_at_ns: int
    rows: int = 1
    key: None = None
    priority: int = 0
    rank_ns: int = 0
    late_ns: int = 0
    alone: bool = False
    dead: bool = False


class Simulation:
    """One run. Events are arrivals, ends of batches and the times at which the policy wants to be asked again."""

    def __init__(self, setup: Setup, model: SimulatedModel, seed: int, measured_from_ns: int = 0) -> None:
        self.curves = LatencyCurves()
        self.objective = Objective(int(setup.objective_ms * MS), self.curves, adaptive=setup.adaptive)
        self.outcome = Outcome()
        self.now_ns = 0
        limits = BatchLimits(min(setup.max_rows, model.max_rows), (), int(setup.delay_ms * MS))
        self.backlog = Backlog(limits, self.objective.set_limits(limits))
        self._setup = setup
        self._service = model.service(seed)
        self._from_ns = measured_from_ns
        self._idle = setup.instances
        for _ in range(setup.instances):
            self.objective.forecast.up()
        self._ends: list[tuple[int, int, list[_Request], int]] = []  # when, which, what, how long it took
        self._numbers = 0
        self._ask_again_ns = NEVER_NS

    def run(self, arrivals_ns: Sequence[int]) -> Outcome:
        """All of these arrivals, until the last is answered."""
        for arrival_ns in arrivals_ns:
            self._advance(arrival_ns)
            self._arrive()
            self._start()
        self._advance(NEVER_NS)
        return self.outcome

    def _advance(self, to_ns: int) -> None:
        while True:
            end_ns = self._ends[0][0] if self._ends else NEVER_NS
            next_ns = min(end_ns, self._ask_again_ns)
            if next_ns > to_ns or next_ns == NEVER_NS:
                break
            self.now_ns = next_ns
            if end_ns == next_ns:
                self._finish()
            self._start()
        self.now_ns = to_ns

    def _arrive(self) -> None:
        counted = self.now_ns >= self._from_ns
        self.outcome.offered += counted
        full = len(self.backlog) >= self._setup.max_queue_size
        admits = self._setup.adaptive or self._setup.admission
        if full or (admits and self.objective.admit(self.backlog.ahead(0), None, 1, self.now_ns) is not None):
            self.outcome.refused += counted
            return
        self.backlog.add(_Request(self.now_ns))  # type: ignore[arg-type] # all that is looked at is there

    def _start(self) -> None:
        self._ask_again_ns = NEVER_NS
        while self._idle and len(self.backlog):
            batch = self.backlog.next_batch(self.now_ns)
            if isinstance(batch, Wait):
                assert batch.until_ns > self.now_ns, "a policy that waits for what has been would be asked for ever"
                self._ask_again_ns = batch.until_ns
                return
            assert batch, "none of them is dead"
            self._idle -= 1
            self._numbers += 1
            took_ns = self._service(len(batch), self.now_ns)
            self.objective.forecast.taken(self._numbers, None, len(batch), self.now_ns)
            heappush(self._ends, (self.now_ns + took_ns, self._numbers, batch, took_ns))  # type: ignore[arg-type]

    def _finish(self) -> None:
        _, number, batch, took_ns = heappop(self._ends)
        self._idle += 1
        self.objective.forecast.ended(number, self.now_ns)
        self.curves.observe(None, len(batch), took_ns)
        earliest_ns = self.now_ns - self.objective.budget.objective_ns
        late = sum(one.queued_at_ns < earliest_ns for one in batch)
        self.objective.answered(None, len(batch) - late, late)
        counted = [one for one in batch if one.queued_at_ns >= self._from_ns]
        late = sum(one.queued_at_ns < earliest_ns for one in counted)
        self.outcome.late += late
        self.outcome.timely += len(counted) - late
        self.outcome.batches += 1
        self.outcome.rows += len(batch)
        self.outcome.latencies_ns += [self.now_ns - one.queued_at_ns for one in counted]


def simulate(
    setup: Setup, model: SimulatedModel, arrivals_ns: Sequence[int], seed: int, measured_from_ns: int = 0
) -> Outcome:
    """What becomes of these arrivals; the same arguments give the same outcome."""
    return Simulation(setup, model, seed, measured_from_ns).run(arrivals_ns)
