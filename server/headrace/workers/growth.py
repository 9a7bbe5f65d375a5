"""Which worker has grown so much that another is to take its place: memory samples and the time in, a verdict out."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Reason = Literal["growth", "limit"]

CONFIRM = 3  # samples in a row: a batch's own memory comes and goes
SETTLE_BATCHES = 8  # beside a time: what a first batch makes a framework set aside is no growth
FUTILE = 3  # replacements in a row that did not last
GIVE_UP_INTERVALS = 60  # for so long a worker is left alone then


@dataclass(frozen=True, slots=True)
class GrowthLimits:
    """What a worker may take. 0 is no bound, of each.

    ``growth`` is a factor over its baseline, and grown by less than ``least_bytes`` is not grown. Between two
    replacements for growth, of whatever workers, are ``interval_s`` at least.
    """

    growth: float = 0.0
    least_bytes: int = 64 << 20
    limit_bytes: int = 0
    interval_s: float = 60.0

    @property
    def settle_s(self) -> float:
        """How long a baseline is taken."""
        return self.interval_s / 2

    @property
    def help_s(self) -> float:
        """A replacement that lasts longer than this has helped."""
        return self.interval_s * 2


@dataclass(frozen=True, slots=True)
class MemorySample:
    """A worker now. ``life`` changes when the process or what it hosts does, and ``batches`` only grows meanwhile.

    ``limit_bytes`` is what its models' owners allow, 0 for no bound. One that is not ``at_rest``, because it loads
    or comes back, is known and not looked at.
    """

    worker: str
    life: object
    memory_bytes: int
    batches: int
    limit_bytes: int = 0
    at_rest: bool = True


@dataclass(frozen=True, slots=True)
class Recycle:
    """Have another worker take this one's place."""

    worker: str
    reason: Reason
    why: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Leave this one alone for a while: replacing it does not help."""

    worker: str
    why: str


@dataclass(slots=True)
class _Watched:
    """One worker. ``since`` is when its present life began, ``placed_at`` when it took another's place."""

    life: object
    since: float
    batches: int
    baseline_bytes: int = 0
    settled: bool = False
    recent: list[int] = field(default_factory=list)
    limit_bytes: int = 0
    placed_at: float | None = None
    futile: int = 0  # replacements in a row, this one the last, of workers that did not last
    left_alone_until: float = 0.0


class MemoryWatch:
    """Told of every worker at intervals, it names one at a time that is to be replaced.

    Whoever carries that out says ``replaced`` or ``failed``; no other is named before that.
    """

    def __init__(self, limits: GrowthLimits) -> None:
        self.limits = limits
        self._workers: dict[str, _Watched] = {}
        self._replacing = ""
        self._last_growth_at: float | None = None

    def baseline_bytes(self, worker: str) -> int:
        """The memory that growth is measured by; 0 while it is being found out."""
        watched = self._workers.get(worker)
        return watched.baseline_bytes if watched is not None and watched.settled else 0

    def observe(self, samples: Iterable[MemorySample], now: float) -> Recycle | GiveUp | None:
        """Take note of all workers that are there, and say what is to be done about one."""
        seen = {sample.worker: sample for sample in samples}
        for gone in self._workers.keys() - seen.keys():
            del self._workers[gone]
        for sample in seen.values():
            self._note(sample, now)
        if self._replacing:
            return None
        over = sorted(self._over(now), key=lambda one: (one.reason != "limit", one.worker))
        if not over:
            return None
        verdict = over[0]
        watched = self._workers[verdict.worker]
        if watched.placed_at is not None and now - watched.placed_at >= self.limits.help_s:
            watched.futile = 0
        if watched.futile >= FUTILE:
            watched.futile = 0
            why = f"{verdict.why}, as the {FUTILE} workers before it soon had"
            return self._leave_alone(verdict.worker, watched, why, now)
        self._replacing = verdict.worker
        if verdict.reason == "growth":
            self._last_growth_at = now
        return verdict

    def replaced(self, worker: str, successor: str, now: float) -> None:
        """Another has taken its place."""
        assert worker == self._replacing, "only what was named is replaced"
        self._replacing = ""
        before = self._workers.get(worker)
        # The life is not known yet: with the first sample a new one begins.
        self._workers[successor] = _Watched(
            None, now, 0, placed_at=now, futile=1 + (before.futile if before is not None else 0)
        )

    def failed(self, worker: str, why: str, now: float) -> GiveUp | None:
        """It could not be replaced, so it is left alone for a while."""
        assert worker == self._replacing, "only what was named is replaced"
        self._replacing = ""
        watched = self._workers.get(worker)
        return self._leave_alone(worker, watched, why, now) if watched is not None else None

    def _note(self, sample: MemorySample, now: float) -> None:
        watched = self._workers.get(sample.worker)
        if watched is None:
            # Of a life that is seen from its beginning on, all batches count.
            watched = self._workers[sample.worker] = _Watched(sample.life, now, 0)
        if not sample.at_rest:
            watched.recent.clear()
            return
        if watched.life != sample.life:
            watched.life, watched.since, watched.batches = sample.life, now, sample.batches
            watched.baseline_bytes, watched.settled = 0, False
            watched.recent.clear()
        if not watched.settled:
            watched.baseline_bytes = max(watched.baseline_bytes, sample.memory_bytes)
            long_enough = now - watched.since >= self.limits.settle_s
            watched.settled = long_enough and sample.batches - watched.batches >= SETTLE_BATCHES
        limits = [limit for limit in (self.limits.limit_bytes, sample.limit_bytes) if limit]
        watched.limit_bytes = min(limits, default=0)
        watched.recent = [*watched.recent[1 - CONFIRM :], sample.memory_bytes]

    def _over(self, now: float) -> Iterable[Recycle]:
        last = self._last_growth_at
        rested = last is None or now - last >= self.limits.interval_s
        for name, one in self._workers.items():
            if len(one.recent) < CONFIRM or now < one.left_alone_until:
                continue
            least = min(one.recent)
            if one.limit_bytes and least > one.limit_bytes:
                yield Recycle(name, "limit", f"it holds {least} bytes, allowed are {one.limit_bytes}")
            elif self._has_grown(one, least) and rested:
                yield Recycle(name, "growth", f"it has grown from {one.baseline_bytes} to {least} bytes")

    def _has_grown(self, one: _Watched, least: int) -> bool:
        if not one.settled or not self.limits.growth:
            return False
        grown = least - one.baseline_bytes
        return grown >= self.limits.least_bytes and least >= one.baseline_bytes * self.limits.growth

    def _leave_alone(self, worker: str, watched: _Watched, why: str, now: float) -> GiveUp:
        watched.left_alone_until = now + GIVE_UP_INTERVALS * self.limits.interval_s
        return GiveUp(worker, why)
