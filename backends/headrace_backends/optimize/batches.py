"""In batches of which sizes examples are answered, where a model merges rows: a form may be right in one size only."""

from collections.abc import Sequence
from itertools import cycle

from headrace_backends.optimize.examples import Example, Examples, shapes_of

GLANCE_ROWS = 8  # of a batch, where a form is only looked at
LARGEST_ROWS = 256  # of a batch that forms are judged by
_JUDGING_ROWS = (8, 16, 32)
_SINGLES = 8  # requests that are answered alone, for each batch of every other size


def glance_sizes(max_batch_size: int) -> tuple[int, ...]:
    """The sizes in turn, where a form is only looked at."""
    return (max(1, min(GLANCE_ROWS, max_batch_size)),)


def judging_sizes(max_batch_size: int) -> tuple[int, ...]:
    """The sizes in turn by which a form is judged: all that it may be served in, the largest first."""
    most = max(1, min(LARGEST_ROWS, max_batch_size))
    sizes = sorted({most, *(rows for rows in _JUDGING_ROWS if rows <= most)}, reverse=True)
    return tuple(sizes) if most == 1 else (*sizes, *[1] * _SINGLES)


def filling(examples: Examples, sizes: Sequence[int]) -> Examples:
    """The examples by their shapes, and as many times over as it takes for a batch of each size.

    They are repeated only where all have one shape, and each as often as the others: shares of them stay what they are.
    """
    order = sorted(range(len(examples)), key=lambda place: shapes_of(examples.inputs[place]))
    alike = len({shapes_of(example) for example in examples.inputs}) == 1
    times = -(-sum(sizes) // len(examples)) if alike and all(map(_is_one_row, examples.inputs)) else 1
    return examples.some(order * times)


def batches(examples: Sequence[Example], sizes: Sequence[int]) -> list[list[Example]]:
    """The examples in their order, in batches of these sizes in turn; fewer where shapes differ, or none are left."""
    turn = cycle(sizes)
    made: list[list[Example]] = []
    rows = 0
    for example in examples:
        mergeable = _is_one_row(example)
        if made and mergeable and len(made[-1]) < rows and shapes_of(made[-1][0]) == shapes_of(example):
            made[-1].append(example)
            continue
        rows = next(turn)
        made.append([example])
        if not mergeable:
            rows = 1
    return made


def _is_one_row(example: Example) -> bool:
    return all(array.ndim and len(array) == 1 for array in example.values())
