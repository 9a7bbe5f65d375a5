"""What a search is to bring: the budget, what may be tried, what is to become fast, and how long it may take."""

from dataclasses import dataclass
from typing import Literal

from headrace_backends.optimize.accuracy import Budget, Errors
from headrace_backends.optimize.findings import Point
from headrace_backends.optimize.form import Technique

Aim = Literal["latency", "throughput"]
THROUGHPUT_ROWS = (1, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Goal:
    """With ``p99_ms``: throughput, as long as a request that finds the model busy is answered in time."""

    budget: Budget | None = None
    allow: frozenset[Technique] = frozenset()
    aim: Aim = "latency"
    p99_ms: float | None = None
    time_limit_s: float = 600.0
    exhaustive: bool = False  # measure everything to the end: what the search is judged by
    several: bool = True  # instances may run at once; not in a function, nor where their number is configured

    def __str__(self) -> str:
        return self.aim if self.p99_ms is None else f"{self.aim} with p99 of at most {self.p99_ms:g} ms"

    def rows(self, max_batch_size: int) -> tuple[int, ...]:
        """The batch sizes that count, where so many rows may be merged (0: none)."""
        most = max(1, max_batch_size)
        if self.aim == "latency":
            return (1,)
        return tuple(sorted({rows for rows in THROUGHPUT_ROWS if rows < most} | {min(32, most)}))

    def problem(self, errors: Errors) -> str | None:
        """Why answers with these errors may not be given; None where they may."""
        if self.budget is not None:
            return self.budget.problem(errors)
        if errors.faithful:
            return None
        return (
            f"answers differ by more than float noise (max_rel {_told(errors.max_rel)}, {errors.mismatches} "
            "mismatches), and there is no budget for that"
        )

    def budget_tells(self, errors: Errors) -> bool:
        """Whether the budget says anything of a model with such outputs."""
        return self.budget is None or self.budget.tells(errors)

    def fits(self, point: Point) -> bool:
        """Whether batches of that size suit the goal, taking so long."""
        if self.aim == "latency":
            return point.rows == 1
        # A request waits for the batch under way and then for its own.
        return self.p99_ms is None or 2 * point.p99_ms <= self.p99_ms


def _told(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"
