"""What a search found out: a row for every candidate, and what was chosen. The report is made of it."""

from enum import StrEnum

import msgspec

from headrace_backends.optimize.accuracy import Budget, Errors
from headrace_backends.optimize.form import Form


class Fate(StrEnum):
    """What became of a candidate."""

    CHOSEN = "chosen"
    KEPT = "kept"  # within the budget, and slower than the chosen one
    REFUSED = "refused"  # beyond the budget
    SLOWER = "slower"  # cut early: clearly slower than another
    FAILED = "failed"  # it could not be made, loaded or run; crashes and hangs are among these
    SKIPPED = "skipped"  # not tried, or stopped under way: no time was left, or such forms never come near


class Point(msgspec.Struct, frozen=True):
    """What batches of ``rows`` rows took, in milliseconds."""

    rows: int
    p50_ms: float
    p99_ms: float

    @property
    def rows_per_s(self) -> float:
        """Of one instance that has nothing else to do."""
        return self.rows / self.p50_ms * 1e3


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """One candidate. None is what was not measured, because the candidate had been cut before.

    ``speedup`` is the reference's time over its own in the same rounds, for what the objective asks for; ``errors`` are
    against the reference on the calibration half, ``held_back`` on the other half, where the budget decides.
    """

    form: Form
    fate: Fate
    reason: str = ""
    speedup: float | None = None
    curve: tuple[Point, ...] = ()
    errors: Errors | None = None
    held_back: Errors | None = None
    file_bytes: int | None = None
    memory_bytes: int | None = None  # of the process that ran it, with weights and workspace
    build_s: float = 0.0
    load_s: float | None = None
    notes: tuple[str, ...] = ()  # of its steps and its backend


class LayerSensitivity(msgspec.Struct, frozen=True):
    """What quantising nothing but this layer does to the answers: the budget's metric, or the relative error."""

    layer: str
    operator: str
    error: float
    macs: float | None = None  # multiplications of one row, where the file tells


class OperatorTime(msgspec.Struct, frozen=True):
    """What one operator of a graph takes in a run, by the runtime's own profiler."""

    name: str
    operator: str
    duration_us: float  # mean over the profiled runs
    start_us: float = 0.0  # in the last of them, for the trace


class Profile(msgspec.Struct, frozen=True):
    """One form's operators, in the order of execution."""

    form: str
    operators: tuple[OperatorTime, ...]


class Hardware(msgspec.Struct, frozen=True):
    """What plans depend on."""

    cpu: str
    cpus: int  # that may be used
    features: tuple[str, ...]  # of the instruction set, as avx512_vnni
    gpu: str = ""


class Findings(msgspec.Struct, frozen=True, omit_defaults=True):
    """Everything about one search."""

    model: str
    source: str  # the file's name
    started_at: str  # ISO 8601, UTC
    seconds: float
    objective: str
    budget: Budget | None
    allow: tuple[str, ...]
    examples: str  # how many, of what origin, and how they were split
    hardware: Hardware
    versions: dict[str, str]
    reference: Row
    rows: tuple[Row, ...]  # in the order in which they were tried
    chosen: Form
    why: str
    sensitivities: tuple[LayerSensitivity, ...] = ()
    profiles: tuple[Profile, ...] = ()  # reference first, then the chosen form
    graphs: dict[str, dict[str, int]] = {}  # operator counts by form: the graph before and after
    complete: bool = True  # False: stopped or out of time before everything had been tried
