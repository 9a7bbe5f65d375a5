"""How many of the most sensitive layers must stay in full precision: few first, then twice as many, then in between.

Each layer that stays costs speed, and the first ones most: measured on EfficientNet-lite0, whose budget eight bits miss
by one photo in 160, four layers of 50 are enough, at half as much speed again as with sixteen.
"""

from dataclasses import dataclass

MOST_TRIES = 6


@dataclass(slots=True)
class Mixing:
    """The state of one bisection over ``layers`` layers; the caller tells what came of each ``next_count``."""

    layers: int
    refused: int = 0  # with so many kept, the budget is missed
    within: int | None = None  # with so many kept, it is met
    tries: int = 0

    def next_count(self) -> int | None:
        """How many layers to keep next; None when the answer is known well enough."""
        if self.tries >= MOST_TRIES:
            return None
        if self.within is None:
            count = self.refused * 2 if self.refused else max(1, self.layers // 24)
            return min(count, self.layers) if self.refused < self.layers else None
        return (self.refused + self.within) // 2 if self.within - self.refused > max(1, self.within // 6) else None

    def tell(self, count: int, *, within: bool) -> None:
        """What came of keeping ``count`` layers."""
        self.tries += 1
        if within:
            self.within = count if self.within is None else min(count, self.within)
        else:
            self.refused = max(count, self.refused)
