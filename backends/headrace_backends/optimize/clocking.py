"""How fast a form is, always beside the reference: both run in turn, so that a slow minute slows both."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from headrace_backends.base import Array
from headrace_backends.optimize.examples import Example, Examples, merged, shapes_of
from headrace_backends.optimize.findings import Point
from headrace_backends.optimize.trial import Trial


@dataclass(frozen=True, slots=True)
class Beside:
    """What both took in the same rounds. ``speedup`` is the median over rounds of the reference's time over ours."""

    speedup: float
    point: Point
    reference: Point


def batch_of(examples: Examples, rows: int) -> dict[str, Array]:
    """A batch of real rows of the commonest shape, repeated where there are too few."""
    shapes = [shapes_of(example) for example in examples.inputs]
    commonest = max(set(shapes), key=shapes.count)
    fitting: list[Example] = [
        example for example, shape in zip(examples.inputs, shapes, strict=True) if shape == commonest
    ]
    chosen: list[Example] = []
    held = 0
    while held < rows:
        chosen.append(fitting[len(chosen) % len(fitting)])
        held += len(next(iter(chosen[-1].values())))
    return {name: array[:rows] for name, array in merged(chosen).items()}


def beside(reference: Trial, candidate: Trial, batch: Example, rows: int, *, rounds: int, seconds: float) -> Beside:
    """Clock both on one batch, in turn; who begins changes with each round."""
    theirs: list[list[int]] = []
    ours: list[list[int]] = []
    reference.clock(batch, 0.0)  # the first runs of a shape allocate, and some runtimes compile
    candidate.clock(batch, 0.0)
    for number in range(rounds):
        if number % 2:
            ours.append(candidate.clock(batch, seconds))
            theirs.append(reference.clock(batch, seconds))
        else:
            theirs.append(reference.clock(batch, seconds))
            ours.append(candidate.clock(batch, seconds))
    ratios = [median(one) / median(other) for one, other in zip(theirs, ours, strict=True)]
    return Beside(median(ratios), point_of(rows, ours), point_of(rows, theirs))


def point_of(rows: int, rounds: Sequence[Sequence[int]]) -> Point:
    """The median and the 99th percentile of all runs."""
    times = np.array([time for one in rounds for time in one]) * 1e-6
    return Point(rows, float(np.median(times)), float(np.percentile(times, 99)))


def together(trials: Sequence[Trial], batch: Example, rows: int, seconds: float) -> float:
    """Rows a second of several instances that run at the same time."""
    for trial in trials:
        trial.begin_clock(batch, seconds)
    return sum(rows * len(times) / sum(times) * 1e9 for times in (trial.end_clock(seconds) for trial in trials))
