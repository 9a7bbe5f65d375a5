"""What the optimiser beside the server does next: pure decisions over what is served, what room there is, and now."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

MIB = 1024 * 1024
MOST_FAILURES = 4  # of a model as it is; then its files or its configuration have to change first
FIRST_WAIT_S = 60.0  # after a failure; each further one waits five times as long
WAIT_FACTOR = 5
PAUSE_S = 60.0  # after a run was stopped to make room
TRUSTED_AFTER_S = 3600.0  # a plan that was in use for so long makes earlier failures forgotten

# What a run may take: the reference, the candidate beside it, what a step makes of both, and a framework or two.
MEMORY_COPIES, MEMORY_BYTES = 6, 768 * MIB
DISK_COPIES, DISK_BYTES = 8, 256 * MIB
RESERVE_BYTES = 256 * MIB  # a run is stopped where less memory is free


class Result(StrEnum):
    """How a run ended, as metrics count it."""

    PLANNED = "planned"
    NOTHING_BETTER = "nothing_better"  # a plan that says so was written
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    STOPPED = "stopped"  # by the server: it goes on later, where there is still something to do


@dataclass(frozen=True, slots=True)
class Subject:
    """A served version whose owner asks for a plan. ``basis`` changes with its files and its configuration.

    ``why_not`` says why no plan is used, where there is none.
    """

    model: str
    version: str
    basis: str
    planned: bool = False
    why_not: str = ""
    model_bytes: int = 0

    @property
    def label(self) -> str:
        """What the log calls it."""
        return f"model {self.model} version {self.version}"


@dataclass(frozen=True, slots=True)
class Room:
    """What is free."""

    memory_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Start:
    """Optimise this one."""

    subject: Subject


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run that is under way."""

    reason: str


@dataclass(slots=True)
class _Attempts:
    """What became of one version's runs."""

    basis: str
    runs: int = 0
    failures: int = 0
    due_at: float = 0.0
    made: bool = False  # a plan, of which it is not known yet whether it is used
    planned_since: float | None = None


class Schedule:
    """One run at a time: first what was never tried, then what has waited long enough after a failure.

    ``observe`` is told everything that is served, again and again; ``started``, ``ended`` and ``refused`` what
    happened between. ``obstacles`` says of each version that would be its turn what it waits for.
    """

    def __init__(self) -> None:
        self.running: Subject | None = None
        self.obstacles: dict[tuple[str, str], str] = {}
        self._attempts: dict[tuple[str, str], _Attempts] = {}

    def observe(self, subjects: Iterable[Subject], room: Room, now: float) -> Start | Stop | None:
        """What is to be done now."""
        there = {(one.model, one.version): one for one in subjects}
        self._attempts = {key: one for key, one in self._attempts.items() if key in there}
        for key, subject in there.items():
            self._see(key, subject, now)
        if self.running is not None:
            return self._reason_to_stop(there, room)
        self.obstacles = {}
        waiting = [one for key, one in there.items() if not one.planned and self._is_due(key, now)]
        waiting.sort(key=lambda one: self._attempts[one.model, one.version].runs)
        for subject in waiting:
            obstacle = _obstacle(subject, room)
            if not obstacle:
                return Start(subject)
            self.obstacles[subject.model, subject.version] = obstacle
        return None

    def started(self, subject: Subject) -> None:
        """A run has begun."""
        assert self.running is None, "one at a time"
        self.running = subject
        self._attempts[subject.model, subject.version].runs += 1

    def ended(self, result: Result, now: float) -> float | None:
        """The run has ended. Returns the seconds until it is tried again; None where that is not planned."""
        subject, self.running = self.running, None
        assert subject is not None, "it was started"
        attempts = self._attempts.get((subject.model, subject.version))
        if attempts is None or attempts.basis != subject.basis:
            return None  # it is gone, or another model by now
        if result in (Result.PLANNED, Result.NOTHING_BETTER):
            attempts.made = True
            return None
        if result is Result.STOPPED:
            attempts.due_at = now + PAUSE_S
            return PAUSE_S
        return self._fail(attempts, now)

    def refused(self, model: str, version: str, now: float) -> float | None:
        """A plan turned out to be wrong. Returns the seconds until another is made; None where none is."""
        attempts = self._attempts.get((model, version))
        if attempts is None:
            return 0.0  # nothing is known of it yet: it is due
        attempts.made, attempts.planned_since = False, None
        first = not attempts.failures
        wait = self._fail(attempts, now)
        if first and wait is not None:
            attempts.due_at = now
            return 0.0
        return wait

    # -- small things -------------------------------------------------------------------------------------

    def _see(self, key: tuple[str, str], subject: Subject, now: float) -> None:
        attempts = self._attempts.get(key)
        if attempts is None or attempts.basis != subject.basis:
            attempts = self._attempts[key] = _Attempts(subject.basis)
        if not subject.planned:
            attempts.planned_since = None
            if attempts.made and self.running is None:  # and whoever made it has had it looked for
                attempts.made = False
                self._fail(attempts, now)
            return
        attempts.made = False
        if attempts.planned_since is None:
            attempts.planned_since = now
        elif now - attempts.planned_since >= TRUSTED_AFTER_S:
            attempts.failures = 0

    def _reason_to_stop(self, there: dict[tuple[str, str], Subject], room: Room) -> Stop | None:
        running = self.running
        assert running is not None, "asked while one runs"
        now_there = there.get((running.model, running.version))
        if now_there is None:
            return Stop("it is not served any more")
        if now_there.basis != running.basis:
            return Stop("it has changed")
        if now_there.planned:
            return Stop("there is a plan now")
        if room.memory_bytes < RESERVE_BYTES:
            return Stop(f"only {room.memory_bytes // MIB} MiB of memory are free")
        return None

    def _is_due(self, key: tuple[str, str], now: float) -> bool:
        attempts = self._attempts[key]
        return attempts.failures < MOST_FAILURES and attempts.due_at <= now

    @staticmethod
    def _fail(attempts: _Attempts, now: float) -> float | None:
        attempts.failures += 1
        if attempts.failures >= MOST_FAILURES:
            return None
        wait = FIRST_WAIT_S * float(WAIT_FACTOR ** (attempts.failures - 1))
        attempts.due_at = now + wait
        return wait


def _obstacle(subject: Subject, room: Room) -> str:
    """Why there is no room for a run; empty where there is."""
    for kind, free, needed in (
        ("memory", room.memory_bytes, MEMORY_COPIES * subject.model_bytes + MEMORY_BYTES),
        ("disk space", room.disk_bytes, DISK_COPIES * subject.model_bytes + DISK_BYTES),
    ):
        if free < needed:
            return f"optimising it takes up to {needed // MIB} MiB of {kind}, and {free // MIB} MiB are free"
    return ""
