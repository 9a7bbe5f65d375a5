"""Until when a search waits for its processes, and how its time limit is split."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

_END = 0.25  # of the time limit is kept for what comes after the candidates
_REPORT = 0.08  # of it for the last of that: curves, profiles


class Deadline:
    """The end of what a search does now. It is moved on from one phase to the next; at first there is none."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._at_s = math.inf

    def move(self, at_s: float) -> None:
        """Have it at another time of the clock."""
        self._at_s = at_s

    @property
    def left_s(self) -> float:
        """Until it; 0 where it is over."""
        return max(0.0, self._at_s - self._clock())

    @property
    def over(self) -> bool:
        """Whether there is nothing left."""
        return not self.left_s


@dataclass(frozen=True, slots=True)
class Phases:
    """When each phase of a search has to be over, for the whole to be over in time."""

    candidates_s: float
    finals_s: float
    report_s: float


def phases(began_s: float, limit_s: float) -> Phases:
    """The phases of a search that began then. One that is over early leaves its time to the next."""
    return Phases(began_s + limit_s * (1 - _END), began_s + limit_s * (1 - _REPORT), began_s + limit_s)
