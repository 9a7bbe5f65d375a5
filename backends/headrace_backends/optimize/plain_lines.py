"""A search told in plain lines, one for each finished candidate: for logs, pipes and terminals that can do no more."""

from collections.abc import Callable
from contextlib import suppress

from headrace_backends.optimize import figures, reading
from headrace_backends.optimize.accuracy import Budget
from headrace_backends.optimize.findings import Row
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.summary import short

_FATE_WIDTH = 9


class PlainLines:
    """A listener. A ``write`` that fails for want of a reader is not told to the search."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._budget: Budget | None = None
        self._told = 0

    def about(self, model: str, budget: Budget | None, time_limit_s: float | None) -> None:
        """A line with the model, the budget and the time."""
        self._budget = budget
        allowed = "with the same answers only" if budget is None else f"with {budget}"
        limit = "" if time_limit_s is None else f", for {figures.duration(time_limit_s)} at most"
        self._tell(f"looking for the fastest form of {short(model)} {allowed}{limit}")

    def begin(self, total: int | None) -> None:
        """A line with the number of candidates."""
        if total is not None:
            self._tell(f"{total} candidates to try")

    def trying(self, form: Form, position: int, total: int) -> None:
        """No line: the row says what came of it."""

    def progress(self, text: str, share: float | None = None) -> None:
        """No line."""

    def row(self, row: Row) -> None:
        """One line. The first is the reference's, whose number is 0."""
        self._tell(line(row, self._told, self._budget))
        self._told += 1

    def chosen(self, form: Form, why: str) -> None:
        """A line with the reason."""
        self._tell(f"chosen: {short(reading.title(form))}: {short(why)}")

    def end(self) -> None:
        """No line."""

    def _tell(self, text: str) -> None:
        with suppress(OSError):
            self._write(text)


def line(row: Row, number: int, budget: Budget | None) -> str:
    """A candidate's result on one line."""
    fate = str(row.fate) if number else "reference"
    told = [f"{number:>3}", f"{fate:<{_FATE_WIDTH}}"]
    if row.speedup is not None:
        told.append(f"{figures.times(row.speedup):>7}")
    point = reading.smallest(row)
    if point is not None:
        told.append(f"{figures.milliseconds(point.p50_ms)} for {point.rows} row{'s' if point.rows != 1 else ''}")
    value = reading.decided_by(row, budget)
    if value is not None:
        told.append(f"{reading.metric_label(budget)} {figures.error(value)}")
    told.append(short(reading.title(row.form)))
    return "  ".join(told) + (f": {short(row.reason)}" if row.reason else "")
