"""The finals: the best few forms are judged on the held-back half, tried in other layouts, and one is chosen.

They can be cut short at any point: then the best that was proved so far wins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import msgspec

from headrace_backends.optimize.deadline import Deadline
from headrace_backends.optimize.findings import Fate, Row
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.listener import Listener

FINALISTS = 3
_EVEN = 1.03  # what is no more than so much faster is not worth another form
_UNSURE = 1.1  # where the best of two races is not the same and a speed differs by more, there is another race
_MOST_RACES = 3  # of the best beside each other: of three the median is right, though one was disturbed


class Judge(Protocol):
    """What the finals need of a contest."""

    def decide(self, row: Row) -> Row:
        """The row after the held-back half has been looked at; as it was where there is no time for that."""

    def final(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with their speeds, measured beside each other; what fails or is too late is left out."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The chosen row, why it was chosen, and all rows that were looked at, the chosen one among them.

    ``complete`` says that there was time for everything.
    """

    chosen: Row
    why: str
    rows: tuple[Row, ...]
    complete: bool


class Finals:
    """One run of the finals."""

    def __init__(self, judge: Judge, goal: Goal, cpus: int, deadline: Deadline, listener: Listener) -> None:
        self._judge = judge
        self._goal = goal
        self._cpus = cpus
        self._deadline = deadline
        self._listener = listener
        self._rows: list[Row] = []

    def run(self, reference: Row, kept: Sequence[Row]) -> Decision:
        """Choose one of the forms that are allowed so far, or the model as it was dropped in."""
        laid_out = [self._in_its_best_layout(one) for one in [*self._finalists(kept), reference]]
        best = [reference]  # of several that are even and change as little, the first is chosen
        for row in (laid_out[-1], *laid_out[:-1]):
            if all(row.form != one.form for one in best):
                best.append(row)
        self._listener.progress("measuring the best forms beside each other")
        measured = self._raced(best)
        if self._deadline.over or not measured:  # for the others their own measurements beside the reference stand
            measured += [row for row in best if all(row.form != one.form for one in measured)]
        found = best_of(measured)
        chosen = msgspec.structs.replace(found, fate=Fate.CHOSEN)
        for row in measured:
            self._put(chosen if row is found else row)
        return Decision(chosen, self._why(chosen, reference, measured), tuple(self._rows), not self._deadline.over)

    def _raced(self, best: Sequence[Row]) -> list[Row]:
        """The best beside each other; again where a race does not bear out what was measured before it."""
        known: Sequence[Row] = best
        races: list[list[Row]] = []
        while True:
            left_s = self._deadline.left_s
            races.append(self._judge.final(best))
            took_s = left_s - self._deadline.left_s
            enough = len(races) == _MOST_RACES or self._deadline.left_s < 2 * took_s
            if enough or not _contradict(known, races[-1]):
                return _middle(races)
            known = races[-1]
            self._listener.progress("measuring the best forms again: their speeds were others than before")

    def _finalists(self, kept: Sequence[Row]) -> list[Row]:
        """The fastest that are proved on the held-back half."""
        finalists: list[Row] = []
        for row in sorted(kept, key=lambda one: -(one.speedup or 0.0)):
            if len(finalists) == FINALISTS and not self._goal.exhaustive:
                break
            judged = row
            if row.held_back is None and not self._deadline.over:
                self._listener.progress(f"judging {row.form.name} on the held-back examples")
                judged = self._judge.decide(row)
            self._put(judged)
            if judged.fate is Fate.KEPT and judged.held_back is not None:
                finalists.append(judged)
        return finalists

    def _in_its_best_layout(self, finalist: Row) -> Row:
        if self._deadline.over:
            return finalist
        self._listener.progress(f"trying {finalist.form.name} with other numbers of threads and instances")
        layouts = self._judge.final(self._layouts(finalist))
        for row in layouts:
            self._put(row)
        return best_of(layouts) if layouts else finalist

    def _layouts(self, row: Row) -> list[Row]:
        """A finalist as it is, and with other numbers of threads and instances."""
        layouts = [(1, 0)]
        if self._cpus > 1:
            layouts += [(1, 1), (1, self._cpus)]
            if self._goal.aim == "throughput" and self._goal.several:
                layouts.append((self._cpus, 1))
        return [
            msgspec.structs.replace(row, form=msgspec.structs.replace(row.form, instances=instances, threads=threads))
            for instances, threads in layouts
        ]

    def _why(self, chosen: Row, reference: Row, measured: Sequence[Row]) -> str:
        if self._goal.p99_ms is not None and not chosen.speedup:
            return f"no form was seen to reach {self._goal}, nor was the model as it was dropped in"
        if chosen.form.name == reference.form.name and chosen.form.layout == reference.form.layout:
            return "nothing within the budget is clearly faster than the model as it was dropped in"
        proof = (
            "answers are the same but for float noise" if self._goal.budget is None else f"{self._goal.budget} holds"
        )
        fastest = max(row.speedup or 0.0 for row in measured)
        even = "" if (chosen.speedup or 0.0) >= fastest else ", and nothing that is clearly faster changes less"
        return (
            f"{chosen.speedup:.2f} times as fast as the model as it was dropped in{even}; {proof} on the held-back half"
        )

    def _put(self, row: Row) -> None:
        """Have the row among the others, in place of the one for the same form and layout."""
        self._rows = [*(old for old in self._rows if old.form != row.form), row]


def _contradict(before: Sequence[Row], after: Sequence[Row]) -> bool:
    """Whether another form is the best now, and one of the two is clearly faster or slower than it was."""
    if not before or not after:
        return False
    best = [best_of(before).form, best_of(after).form]
    if best[0] == best[1]:
        return False
    for form in best:
        speeds = [row.speedup or 0.0 for row in (*before, *after) if row.form == form]
        if max(speeds) > _UNSURE * min(speeds):
            return True
    return False


def _middle(races: Sequence[Sequence[Row]]) -> list[Row]:
    """The forms of the last race, with the median of their speeds in all of them."""
    found = []
    for row in races[-1]:
        speeds = [one.speedup or 0.0 for race in races for one in race if one.form == row.form]
        found.append(msgspec.structs.replace(row, speedup=median(speeds)))
    return found


def best_of(rows: Sequence[Row]) -> Row:
    """The fastest; of those that are even with it, the one that changes least."""
    best = max(row.speedup or 0.0 for row in rows)
    even = [row for row in rows if (row.speedup or 0.0) * _EVEN >= best]
    return min(even, key=lambda one: _changes(one.form))


def _changes(form: Form) -> tuple[int, ...]:
    return len(form.techniques), len(form.steps), form.instances, form.max_batch_size or 0
