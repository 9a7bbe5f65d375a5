"""Whether the search's choice is as good as the best of everything, and how much of the time for that it has saved.

A model is searched as its owner would have it, then swept: every candidate is measured to the end, and all that are
allowed are tried in every layout. The two winners are then measured once more, beside each other in the same rounds:
two runs at different times tell little about five in a hundred.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.core.cpus import usable_cpus
from headrace.optimizing import CannotOptimize, OptimizeArguments, job_of
from headrace.repository.layout import list_models
from headrace_backends.base import LoadError
from headrace_backends.optimize.accuracy import own_metric
from headrace_backends.optimize.calibration import made_up_examples, read_examples
from headrace_backends.optimize.contest import Contest
from headrace_backends.optimize.findings import Fate, Findings, Row
from headrace_backends.optimize.workshop import Workshop
from headrace_backends.specs import FoundTensor

EVEN = 0.95  # of the speed of the sweep's best
SHARE = 0.25  # of the sweep's time

# Searches a model within so many seconds, with options of the command; what was found, and the seconds that it took.
Search = Callable[[str, Path, int, Sequence[str]], tuple[Findings, float]]


@dataclass(frozen=True, slots=True)
class Sweep:
    """One model. Speeds are over the model as it was dropped in, each in its own run; ``beside`` is of one run."""

    model: str
    found: str
    found_speedup: float
    best: str
    best_speedup: float
    beside: float  # the speed of what was found over that of the best
    search_s: float
    sweep_s: float
    complete: bool  # whether the sweep had time for everything

    @property
    def share(self) -> float:
        """Of the sweep's time, what the search took."""
        return self.search_s / self.sweep_s

    @property
    def missed(self) -> tuple[str, ...]:
        """What is not as it should be."""
        told = []
        if self.beside < EVEN:
            told.append(f"{self.beside:.0%} of the best's speed, the goal is {EVEN:.0%}")
        if self.share > SHARE:
            told.append(f"the search took {self.share:.0%} of the sweep's time, the goal is {SHARE:.0%} at most")
        if not self.complete:
            told.append("the sweep ran out of time, so that its best may not be the best")
        return tuple(told)


def sweepable(repository: Path) -> list[str]:
    """The models that the optimiser may work on, in the order of their names."""
    found = []
    for name in list_models(repository):
        try:
            job_of(OptimizeArguments(name, repository, repository / "no-plans"))
        except (CannotOptimize, LoadError):
            continue
        found.append(name)
    return found


def sweep(model: str, repository: Path, work: Path, limit_s: int, cap_s: int, search: Search) -> Sweep:
    """Search within ``limit_s``, sweep within ``cap_s``, and measure both winners beside each other.

    Raises:
        RuntimeError, TrialFailed: one of the runs failed.
    """
    aim = ("--objective", "throughput")
    found, search_s = search(model, work / "searched", limit_s, aim)
    swept, sweep_s = search(model, work / "swept", cap_s, (*aim, "--exhaustive"))
    one, other = chosen(found), chosen(swept)
    return Sweep(
        model,
        *(f"{one.form.name}; {one.form.layout}", one.speedup or 0.0),
        *(f"{other.form.name}; {other.form.layout}", other.speedup or 0.0),
        1.0 if one.form == other.form else beside(model, repository, work / "beside", one, other),
        *(search_s, sweep_s, swept.complete),
    )


def chosen(findings: Findings) -> Row:
    """The row of the chosen form."""
    (row,) = [row for row in findings.rows if row.fate is Fate.CHOSEN]
    return row


def beside(model: str, repository: Path, work: Path, one: Row, other: Row) -> float:
    """How many times as fast as the other one is, in the same rounds."""
    job = job_of(OptimizeArguments(model, repository, work / "plans", aim="throughput"))
    cpus, budget = usable_cpus(), job.goal.budget
    metric = own_metric(budget.metric, job.subject.folder) if budget is not None and budget.is_own else None
    with Contest(job.subject, job.goal, Workshop(work / "work", job.subject, cpus), cpus, metric) as contest:
        signature, notes, seconds = contest.load_reference()
        if job.calibration is not None:
            examples = read_examples(job.calibration, signature)
        else:
            made_up = made_up_examples([FoundTensor(spec) for spec in signature.inputs], signature)
            assert made_up is not None, "the search has had examples too"
            examples = made_up
        contest.measure_reference(*examples.halves(), notes, seconds)
        speeds = [row.speedup or 0.0 for row in contest.final([one, other])]
    if len(speeds) != 2 or not speeds[1]:
        raise RuntimeError(f"model '{model}': {one.form.name} and {other.form.name} could not be measured together")
    return speeds[0] / speeds[1]
