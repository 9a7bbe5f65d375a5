"""How far a search has come, as a listener was told: what the live table shows. No clock and no terminal in here."""

from dataclasses import dataclass, field
from math import isfinite

import msgspec

from headrace_backends.optimize.accuracy import Budget
from headrace_backends.optimize.findings import Fate, Row
from headrace_backends.optimize.form import Form

_ALLOWED = (Fate.CHOSEN, Fate.KEPT)


@dataclass(slots=True)
class Board:
    """Times are seconds of any one clock; ``limit_s`` is what the search may take. The first row is the reference's."""

    model: str = ""
    budget: Budget | None = None
    limit_s: float | None = None
    began_s: float | None = None
    total: int | None = None
    position: int = 0
    present: Form | None = None
    text: str = ""
    share: float | None = None
    why: str = ""
    rows: list[Row] = field(default_factory=list)
    present_began_s: float = 0.0

    def hear(self, now_s: float) -> None:
        """Something is told: the first time that is, the clock starts."""
        if self.began_s is None:
            self.began_s = self.present_began_s = now_s

    def trying(self, form: Form, position: int, total: int | None, now_s: float) -> None:
        """A candidate is taken up; what was told of the one before is over."""
        self.present, self.position, self.present_began_s = form, position, now_s
        self.total = total if total is not None else self.total
        self.text, self.share = "", None

    def progress(self, text: str, share: float | None, now_s: float) -> None:
        """What is done now, about the present candidate or between two. Shares out of range are brought into it."""
        if self.present is None and text != self.text:
            self.present_began_s = now_s
        self.text, self.share = text, None if share is None or not isfinite(share) else min(1.0, max(0.0, share))

    def row(self, row: Row) -> None:
        """A result; the one that there was of the same form is replaced."""
        for place, known in enumerate(self.rows):
            if known.form == row.form:
                self.rows[place] = row
                break
        else:
            self.rows.append(row)
        if row.form == self.present:
            self.present, self.text, self.share = None, "", None

    def choose(self, form: Form, why: str) -> None:
        """The search has decided. The form may have been told of in another layout."""
        self.present, self.text, self.share, self.why = None, "", None, why
        same = [place for place, row in enumerate(self.rows) if row.form == form]
        alike = [place for place, row in enumerate(self.rows) if row.form.name == form.name]
        for place in (same or alike)[:1]:
            self.rows[place] = msgspec.structs.replace(self.rows[place], fate=Fate.CHOSEN)

    def best(self, count: int) -> list[tuple[int, Row]]:
        """So many rows at most, with their numbers: those that may be served first, and the faster ones first."""
        return sorted(enumerate(self.rows), key=_rank)[:count]

    def elapsed_s(self, now_s: float) -> float:
        """Since the search began."""
        return 0.0 if self.began_s is None else now_s - self.began_s

    def left_s(self, now_s: float) -> float | None:
        """Of the time limit, None where there is none."""
        return None if self.limit_s is None else max(0.0, self.limit_s - self.elapsed_s(now_s))


def _rank(numbered: tuple[int, Row]) -> tuple[bool, bool, float, int]:
    number, row = numbered
    speedup = row.speedup if row.speedup is not None and isfinite(row.speedup) else 0.0
    return (row.fate is not Fate.CHOSEN, row.fate not in _ALLOWED, -speedup, number)
