"""What the C++ source inside a compiled package says of its inputs: their types, and the sizes that it was made for.

AOTInductor keeps that nowhere else. Beside the machine code it packs the source, and in there is a check of each input,
which runs only where an environment variable asks for it. It is read by the few lines that matter, so that a source of
another form tells nothing in place of something wrong.
"""

import re
from dataclasses import dataclass
from itertools import zip_longest

_INPUT = re.compile(r"ConstantHandle\((input|output)_handles\[(\d+)\]\)")  # begins what is said of one
_END = "\n}"  # of the function that it stands in
_TYPE = re.compile(r"_expected_dtype = aoti_torch_dtype_(\w+)\(\)")
_FIXED = re.compile(r"if \((\d+) != \w+_size\[(\d+)\]\)")
_LEAST = re.compile(r"if \(\w+_size\[(\d+)\] < (\d+)\)")
_MOST = re.compile(r"if \(\w+_size\[(\d+)\] > (\d+)\)")
_STRIDE = re.compile(r"if \(\d+ != \w+_stride\[(\d+)\]\)")
_THREADS = re.compile(r"#pragma omp parallel num_threads\((\d+)\)")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Which sizes of a dimension the code was compiled for; ``most`` None where there is no bound."""

    least: int = 0
    most: int | None = None

    @property
    def fixed(self) -> bool:
        """Whether there is only one."""
        return self.least == self.most

    def __contains__(self, size: int) -> bool:
        return self.least <= size and (self.most is None or size <= self.most)

    def __str__(self) -> str:
        if self.fixed:
            return str(self.least)
        return f"{self.least} and more" if self.most is None else f"{self.least} to {self.most}"


@dataclass(frozen=True, slots=True)
class DeclaredInput:
    """One input, with its type as torch calls it."""

    dtype: str
    sizes: tuple[Sizes, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, -1 for what may vary."""
        return tuple(one.least if one.fixed else -1 for one in self.sizes)


def declared_inputs(source: str) -> list[DeclaredInput] | None:
    """The inputs in the order in which they are given; None where the source does not tell of all of them."""
    starts = list(_INPUT.finditer(source))
    found: dict[int, DeclaredInput] = {}
    for start, following in zip_longest(starts, starts[1:]):
        if start[1] == "input":
            end = following.start() if following else len(source)
            declared = _declared(source[start.end() : end].partition(_END)[0])
            if declared is None:
                return None
            found.setdefault(int(start[2]), declared)
    return [found[index] for index in range(len(found))] if found and sorted(found) == list(range(len(found))) else None


def compiled_threads(source: str) -> int:
    """How many threads the kernels start: that is compiled in, whatever the process is allowed."""
    return max(map(int, _THREADS.findall(source)), default=1)


def _declared(check: str) -> DeclaredInput | None:
    dtype = _TYPE.search(check)
    if dtype is None:
        return None
    fixed = {int(place): int(size) for size, place in _FIXED.findall(check)}
    least = {int(place): int(size) for place, size in _LEAST.findall(check)}
    most = {int(place): int(size) for place, size in _MOST.findall(check)}
    # The last stride is 1 and always told, so that a last dimension of any size is not missed.
    rank = 1 + max([*fixed, *least, *most, *map(int, _STRIDE.findall(check))], default=-1)
    return DeclaredInput(
        dtype[1],
        tuple(
            Sizes(fixed[place], fixed[place]) if place in fixed else Sizes(least.get(place, 0), most.get(place))
            for place in range(rank)
        ),
    )
