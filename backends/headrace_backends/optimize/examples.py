"""Real inputs of a model: what is quantised, measured and judged with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from headrace_backends.base import Array

Example = Mapping[str, Array]  # one request's inputs: one row [1, ...] of each where the model merges rows


@dataclass(frozen=True, slots=True)
class Examples:
    """Requests, in no meaningful order.

    ``labels`` has what their owner knows about each, by name; empty mappings where nothing is. ``origin`` is for
    people: the file, "recorded traffic" or "made up". Made-up ones may be timed, and judge only faithful forms.
    """

    inputs: tuple[Example, ...]
    labels: tuple[Mapping[str, Array], ...]
    origin: str
    real: bool = True

    def __post_init__(self) -> None:
        assert len(self.inputs) == len(self.labels), "labels belong to inputs"

    def __len__(self) -> int:
        return len(self.inputs)

    def halves(self, seed: int = 20240229) -> tuple["Examples", "Examples"]:
        """One part to calibrate and choose with, and one held back to decide with; each has at least one."""
        order = np.random.default_rng(seed).permutation(len(self))
        middle = max(1, len(self) // 2)
        first, second = order[:middle], order[middle:] if len(self) > 1 else order
        return self.some(first), self.some(second)

    def some(self, places: Sequence[int] | Array) -> "Examples":
        """Those at these places."""
        return replace(
            self,
            inputs=tuple(self.inputs[int(place)] for place in places),
            labels=tuple(self.labels[int(place)] for place in places),
        )

    def first(self, count: int) -> "Examples":
        """At most ``count`` of them."""
        return self.some(range(min(count, len(self))))


def shapes_of(example: Example) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What examples have in common that can be merged: each input's shape but for the rows."""
    return tuple(sorted((name, array.shape[1:]) for name, array in example.items()))


def merged(examples: Sequence[Example]) -> dict[str, Array]:
    """One batch of examples whose shapes agree."""
    return {name: np.concatenate([example[name] for example in examples]) for name in examples[0]}
