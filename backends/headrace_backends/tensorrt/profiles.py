"""Optimisation profiles: the ranges of input shapes that an engine is built for. Pure."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace_backends.base import DEFAULT_MAX_BATCH_SIZE, LoadError
from headrace_backends.specs import FoundTensor

Shape = tuple[int, ...]

FREE_RANGE = (1, 128, 512)  # of a dimension of any size that nobody says anything of: tokens, mostly
_UNMERGED_RANGE = (1, 1, DEFAULT_MAX_BATCH_SIZE)  # of a leading dimension where requests are not merged
_ENDS = ("min", "opt", "max")
_SIZES = re.compile(r"\d{1,9}(x\d{1,9})*")


@dataclass(frozen=True, slots=True)
class Range:
    """The shapes of one input: the smallest, the one to be quickest for, the largest."""

    min: Shape
    opt: Shape
    max: Shape

    def covers(self, shape: Shape) -> bool:
        """Whether the shape lies in it."""
        return len(shape) == len(self.max) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )

    def __str__(self) -> str:
        return f"{list(self.min)} to {list(self.max)}"


Profile = Mapping[str, Range]


@dataclass(frozen=True, slots=True)
class Derived:
    """What to build for, and which ranges were nobody's word but ours."""

    profiles: tuple[Profile, ...]
    guesses: tuple[str, ...] = ()


def asked_ranges(parameters: Mapping[str, Any]) -> dict[str, dict[str, Shape]]:
    """``min_shapes``, ``opt_shapes`` and ``max_shapes`` by input and end; as trtexec has them, ``ids:1x8,mask:1x8``.

    Raises:
        LoadError: with everything that is wrong with them.
    """
    problems: list[str] = []
    ranges: dict[str, dict[str, Shape]] = {}
    for end in _ENDS:
        text = str(parameters.get(f"{end}_shapes", ""))
        for part in filter(None, (one.strip() for one in text.split(","))):
            name, _, sizes = part.rpartition(":")
            if not name or not _SIZES.fullmatch(sizes):
                problems.append(f"parameters.{end}_shapes has {part!r}, expected as data:32x3x224x224")
                continue
            ranges.setdefault(name, {})[end] = tuple(map(int, sizes.split("x")))
    problems += [f"parameters.max_shapes lacks '{name}'" for name, ends in ranges.items() if "max" not in ends]
    if problems:
        raise LoadError("; ".join(problems))
    return ranges


def asked_batches(parameters: Mapping[str, Any]) -> tuple[int, ...]:
    """``batch_profiles``: batch sizes that each get a profile of their own, rising, as ``1, 8``; empty for one for all.

    Raises:
        LoadError: it is no such list.
    """
    text = str(parameters.get("batch_profiles", ""))
    if not re.fullmatch(r"\s*(\d{1,6}\s*(,\s*\d{1,6}\s*)*)?", text):
        raise LoadError(f"parameters.batch_profiles is {text!r}, expected rising batch sizes as '1, 8, 32'")
    sizes = tuple(int(one) for one in text.split(",") if one.strip())
    if 0 in sizes or list(sizes) != sorted(set(sizes)):
        raise LoadError(f"parameters.batch_profiles is {text!r}, expected rising batch sizes as '1, 8, 32'")
    return sizes


def derive(
    inputs: Sequence[FoundTensor],
    max_batch_size: int | None,
    ranges: Mapping[str, Mapping[str, Shape]],
    batches: Sequence[int] = (),
) -> Derived:
    """The profiles to build a model with.

    Where requests are merged the leading dimension goes up to ``max_batch_size`` (None: as configured nowhere). Other
    dimensions of any size go as far as ``ranges`` say, else by ``FREE_RANGE``, which is told.

    Raises:
        LoadError: the ranges do not go with the model or its batch size; with everything that is wrong.
    """
    names = [tensor.spec.name for tensor in inputs]
    problems = [
        f"parameters.max_shapes has '{name}', and the inputs are {names}" for name in ranges if name not in names
    ]
    guesses: list[str] = []
    rows = _rows(inputs, max_batch_size)
    profile: dict[str, Range] = {}
    for tensor in inputs:
        name, shape = tensor.spec.name, tensor.spec.shape
        if shape is None:
            problems.append(f"input '{name}' has no declared shape; configure one under inputs")
        elif name in ranges:
            asked = _asked(shape, ranges[name])
            found = _problems(name, shape, asked, max_batch_size)
            problems += found
            if not found:
                profile[name] = asked
        else:
            profile[name] = _ranged(tensor, shape, rows, guesses)
    if problems:
        raise LoadError("; ".join(problems))
    return Derived(_split(profile, batches, leading_free(inputs)), tuple(guesses))


def leading_free(inputs: Iterable[FoundTensor]) -> frozenset[str]:
    """The inputs whose first dimension is of any size."""
    return frozenset(tensor.spec.name for tensor in inputs if (tensor.spec.shape or ())[:1] == (-1,))


def most_rows(profiles: Sequence[Profile]) -> int:
    """The largest leading dimension that all inputs of some profile take; 0 where there is none."""
    sizes = [min((one.max[0] if one.max else 0 for one in profile.values()), default=0) for profile in profiles]
    return max(sizes, default=0)


def least_rows(profiles: Sequence[Profile]) -> int:
    """The smallest leading dimension that all inputs of some profile take."""
    return min(max((one.min[0] if one.min else 0 for one in profile.values()), default=0) for profile in profiles)


def choose(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int | None:
    """The first profile that all the shapes lie in."""
    for index, profile in enumerate(profiles):
        if all(name in profile and profile[name].covers(shape) for name, shape in shapes.items()):
            return index
    return None


def refusal(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> str:
    """Why no profile was found, for whoever sent those shapes."""
    for name, shape in shapes.items():
        ranges = [profile[name] for profile in profiles if name in profile]
        if not any(one.covers(shape) for one in ranges):
            return (
                f"input '{name}' has shape {list(shape)}, and the engine takes {' or '.join(map(str, ranges))}; "
                "a wider range needs another engine"
            )
    together = {name: list(shape) for name, shape in shapes.items()}
    return f"no profile of the engine takes these together: {together}"


# -- small things -----------------------------------------------------------------------------------------


def _rows(inputs: Sequence[FoundTensor], max_batch_size: int | None) -> tuple[int, int, int]:
    """The range of a leading dimension of any size."""
    merged = bool(inputs) and len(leading_free(inputs)) == len(inputs) and max_batch_size != 0
    most = max_batch_size or DEFAULT_MAX_BATCH_SIZE
    return (1, most, most) if merged else _UNMERGED_RANGE


def _ranged(tensor: FoundTensor, shape: Shape, rows: tuple[int, int, int], guesses: list[str]) -> Range:
    ends: list[list[int]] = [[], [], []]
    for position, size in enumerate(shape):
        if size != -1:
            sizes = (size, size, size)
        elif position == 0:
            sizes = rows
        else:
            sizes = FREE_RANGE
            symbol = tensor.symbols[position] if tensor.symbols else ""
            low, best, high = FREE_RANGE
            guesses.append(
                f"dimension {position}{f' ({symbol})' if symbol else ''} of input '{tensor.spec.name}' is taken to go "
                f"from {low} to {high}, quickest at {best}; parameters.max_shapes can say otherwise"
            )
        for end, one in zip(ends, sizes, strict=True):
            end.append(one)
    return Range(*map(tuple, ends))


def _asked(shape: Shape, asked: Mapping[str, Shape]) -> Range:
    largest = asked["max"]
    smallest = asked.get("min") or tuple(
        1 if declared == -1 else size for declared, size in zip(shape, largest, strict=False)
    )
    return Range(smallest, asked.get("opt", largest), largest)


def _problems(name: str, shape: Shape, asked: Range, max_batch_size: int | None) -> list[str]:
    where = f"the range for input '{name}'"
    if any(len(one) != len(shape) for one in (asked.min, asked.opt, asked.max)):
        return [f"{where} has another number of dimensions than the input, whose shape is {list(shape)}"]
    if not all(low <= best <= high for low, best, high in zip(asked.min, asked.opt, asked.max, strict=True)):
        return [f"{where}: min {list(asked.min)}, opt {list(asked.opt)} and max {list(asked.max)} do not rise"]
    ends = zip(shape, asked.min, asked.max, strict=True)
    if any(size != -1 and not low == size == high for size, low, high in ends):
        return [f"{where} changes dimensions that the model fixes: its shape is {list(shape)}"]
    if max_batch_size and shape[:1] == (-1,) and (asked.max[0] < max_batch_size or asked.min[0] > 1):
        return [f"{where} goes from {asked.min[0]} to {asked.max[0]} rows, and batches have from 1 to {max_batch_size}"]
    return []


def _split(profile: dict[str, Range], batches: Sequence[int], leading: frozenset[str]) -> tuple[Profile, ...]:
    """A profile for each batch size, from the one below it up; the largest goes as far as the whole did."""
    if not batches or not leading:
        return (profile,)
    top = min(profile[name].max[0] for name in leading)
    if batches[-1] > top:
        raise LoadError(f"parameters.batch_profiles goes to {batches[-1]} rows, and batches have at most {top}")
    sizes = [*batches, top] if batches[-1] < top else list(batches)
    found, low = [], 1
    for high in sizes:
        found.append(
            {
                name: Range((low, *one.min[1:]), (high, *one.opt[1:]), (high, *one.max[1:])) if name in leading else one
                for name, one in profile.items()
            }
        )
        low = high + 1
    return tuple(found)
