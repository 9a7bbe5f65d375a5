"""What reports, tables and summaries read out of findings: numbers of candidates, what decides, the frontier."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

from headrace_backends.optimize.accuracy import Budget, Errors
from headrace_backends.optimize.findings import Fate, Findings, Point, Row
from headrace_backends.optimize.form import Form

REFERENCE_NUMBER = 0
_METRICS = {
    "max_abs": "largest absolute error",
    "max_rel": "largest relative error",
    "cosine": "worst cosine",
    "mean_cosine": "mean cosine",
    "top1_agreement": "top-1 agreement",
    "topk_agreement": "top-5 agreement",
    "own": "the owner's metric",
    "mismatches": "elements that differ and are no floats",
    "same": "share of what is no float that is the same",
}
# How a list of candidates is sorted: what is served first, then what could be, then what could not.
FATES = (Fate.CHOSEN, Fate.KEPT, Fate.REFUSED, Fate.SLOWER, Fate.FAILED, Fate.SKIPPED)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row, with the number that every part of a report calls it by. The reference's is 0."""

    number: int
    row: Row

    @property
    def is_reference(self) -> bool:
        """Whether it is the model as it was dropped in."""
        return self.number == REFERENCE_NUMBER


def candidates(findings: Findings) -> list[Candidate]:
    """The reference, and the others in the order in which they were tried."""
    others = [row for row in findings.rows if row.form != findings.reference.form]
    return [Candidate(number, row) for number, row in enumerate([findings.reference, *others])]


def chosen(findings: Findings) -> Candidate:
    """The candidate that is served. The reference where findings do not tell a row of the chosen form."""
    found = candidates(findings)
    of_form = [candidate for candidate in found if candidate.row.form == findings.chosen]
    fated = [candidate for candidate in found if candidate.row.fate is Fate.CHOSEN]
    return (of_form or fated or found)[0]


def by_fate(findings: Findings) -> list[tuple[Fate, list[Candidate]]]:
    """The candidates without the reference, what is best of each fate first."""
    served = chosen(findings)
    groups: dict[Fate, list[Candidate]] = {fate: [] for fate in FATES}
    for candidate in candidates(findings)[1:]:
        groups[Fate.CHOSEN if candidate.number == served.number else candidate.row.fate].append(candidate)
    return [(fate, sorted(group, key=_fastest_first)) for fate, group in groups.items() if group]


def counts(rows: Iterable[Row]) -> dict[Fate, int]:
    """How many there are of each fate, in the order of ``FATES``; only fates that there are."""
    counted = Counter(row.fate for row in rows)
    return {fate: counted[fate] for fate in FATES if counted[fate]}


def metric_label(budget: Budget | None) -> str:
    """What the deciding error is called."""
    return metric_name("max_rel" if budget is None else budget.metric)


def metric_name(field: str) -> str:
    """What people call a field of ``Errors``; anything else is called what it is."""
    return _METRICS.get(field, field)


def more_is_better(budget: Budget | None) -> bool:
    """Whether the deciding error is one that a budget bounds from below."""
    return budget is not None and budget.min is not None


def deciding(errors: Errors | None, budget: Budget | None) -> float | None:
    """The error that the budget is about; without one the relative error, which must be float noise."""
    if errors is None:
        return None
    if budget is None:
        return errors.max_rel
    value: float | None = errors.own if budget.is_own else getattr(errors, budget.metric)
    return value


def decided_by(row: Row, budget: Budget | None) -> float | None:
    """The row's deciding error: on the held-back half, or on the other where it never came to that."""
    held_back = deciding(row.held_back, budget)
    return deciding(row.errors, budget) if held_back is None else held_back


def title(form: Form) -> str:
    """The form's name, with its layout where that is another than one instance on all threads."""
    return f"{form.name}, {form.layout}" if has_own_layout(form) else form.name


def has_own_layout(form: Form) -> bool:
    """Whether the form says how many instances or threads there are to be."""
    return bool(form.threads) or form.instances != 1


def smallest(row: Row) -> Point | None:
    """The smallest batch that was measured: one row, where the model takes one."""
    return min(_measured(row), key=lambda point: point.rows, default=None)


def fullest(row: Row) -> Point | None:
    """The batch size with the most rows a second."""
    return max(_measured(row), key=lambda point: point.rows_per_s, default=None)


def frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of pairs (accuracy, speed), both the more the better: those that no other beats in both, by accuracy."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def _measured(row: Row) -> list[Point]:
    return [point for point in row.curve if isfinite(point.p50_ms) and point.p50_ms > 0]


def _fastest_first(candidate: Candidate) -> tuple[float, int]:
    speedup = candidate.row.speedup
    known = speedup is not None and isfinite(speedup)
    return (-speedup if known and speedup is not None else 0.0, candidate.number)
