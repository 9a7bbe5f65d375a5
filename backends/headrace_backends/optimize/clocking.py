"""How fast forms are, always beside each other: they run in turn, so that a slow minute slows all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from headrace.core.model import Signature
from headrace_backends.base import Array
from headrace_backends.optimize.deadline import Deadline
from headrace_backends.optimize.examples import Example, Examples, merged, shapes_of
from headrace_backends.optimize.findings import Point
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.trial import OutOfTime, Trial


@dataclass(frozen=True, slots=True)
class Runner:
    """A form that is loaded, in one process or in several that run at the same time."""

    form: Form
    trials: tuple[Trial, ...]
    signature: Signature

    def clock(self, batch: Example, seconds: float) -> list[int]:
        """The nanoseconds that a batch takes in each of the processes while all of them run."""
        for trial in self.trials:
            trial.begin_clock(batch, seconds)
        return [time for trial in self.trials for time in trial.end_clock(seconds)]

    @property
    def alive(self) -> bool:
        """Whether every process is."""
        return all(trial.alive for trial in self.trials)

    @property
    def memory_bytes(self) -> int:
        """What the processes hold in memory now."""
        return sum(trial.memory_bytes() for trial in self.trials)


@dataclass(frozen=True, slots=True)
class Laps:
    """What one runner took for a batch, in nanoseconds: by rows of the batch, then by round."""

    instances: int
    by_rows: Mapping[int, tuple[tuple[int, ...], ...]]

    def points(self) -> tuple[Point, ...]:
        """The median and the 99th percentile of all runs, by rows."""
        found = []
        for rows, rounds in self.by_rows.items():
            times = np.array([time for one in rounds for time in one]) * 1e-6
            found.append(Point(rows, float(np.median(times)), float(np.percentile(times, 99))))
        return tuple(found)

    def rates(self, goal: Goal) -> list[float]:
        """Rows a second in each round, in batches of the size that suits the goal best; zeros where none does."""
        return self._rates([point.rows for point in self.points() if goal.fits(point)])

    def nearest_rates(self, goal: Goal) -> list[float]:
        """As ``rates``; where no size suits the goal, those of the size that comes nearest to it."""
        points = self.points()
        fitting = [point.rows for point in points if goal.fits(point)]
        return self._rates(fitting or [point.rows for point in sorted(points, key=lambda one: one.p99_ms)[:1]])

    def _rates(self, sizes: Sequence[int]) -> list[float]:
        rounds = [[rows * self.instances / median(one) * 1e9 for one in self.by_rows[rows]] for rows in sizes]
        count = len(next(iter(self.by_rows.values()), ()))
        return [max(at_once) for at_once in zip(*rounds, strict=True)] if rounds else [0.0] * count


def speedup(mine: Laps, theirs: Laps, goal: Goal) -> float:
    """How many times as fast as the other one is, for what the goal asks for: the median over the rounds.

    0 where it does not reach the goal. Where the other one does not, it is taken as near to that as it comes: else all
    that reach it would be equally good.
    """
    pairs = list(zip(mine.rates(goal), theirs.nearest_rates(goal), strict=True))
    return median(one / other for one, other in pairs) if pairs else 0.0


def race(
    runners: Sequence[Runner],
    examples: Examples,
    sizes: Sequence[int],
    *,
    rounds: int,
    seconds: float,
    deadline: Deadline,
) -> list[Laps]:
    """Clock all on batches of each size, in turn; who begins changes with each round.

    Whoever cannot have batches of a size is not clocked on it.

    Raises:
        OutOfTime: the deadline is over.
        TrialFailed: one of them failed or died.
    """
    taken: list[dict[int, list[tuple[int, ...]]]] = [{} for _ in runners]
    for rows in sizes:
        batch = batch_of(examples, rows)
        able = [place for place, one in enumerate(runners) if rows <= max(1, one.signature.max_batch_size)]
        for place in able:
            taken[place][rows] = []
            # The first runs of a shape allocate, and some runtimes compile.
            _clock(runners[place], batch, 0.0, deadline)
        for number in range(rounds):
            first = number % len(able) if able else 0
            for place in (*able[first:], *able[:first]):
                taken[place][rows].append(tuple(_clock(runners[place], batch, seconds, deadline)))
    return [
        Laps(len(one.trials), {rows: tuple(times) for rows, times in by_rows.items()})
        for one, by_rows in zip(runners, taken, strict=True)
    ]


def _clock(runner: Runner, batch: Example, seconds: float, deadline: Deadline) -> list[int]:
    if deadline.over:
        raise OutOfTime
    return runner.clock(batch, seconds)


def batch_of(examples: Examples, rows: int) -> dict[str, Array]:
    """A batch of real rows of the commonest shape, repeated where there are too few."""
    shapes = [shapes_of(example) for example in examples.inputs]
    commonest = max(set(shapes), key=shapes.count)
    fitting = [example for example, shape in zip(examples.inputs, shapes, strict=True) if shape == commonest]
    if rows == 1 or not all(array.ndim and len(array) for array in fitting[0].values()):
        return dict(fitting[0])
    chosen: list[Example] = []
    held = 0
    while held < rows:
        chosen.append(fitting[len(chosen) % len(fitting)])
        held += len(next(iter(chosen[-1].values())))
    return {name: array[:rows] for name, array in merged(chosen).items()}
