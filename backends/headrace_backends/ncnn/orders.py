"""What tensors the layers of ncnn can be given that put numbers in another order, together or apart, or add them up."""

import re
from collections.abc import Sequence
from itertools import pairwise
from math import factorial, prod

from headrace_backends.ncnn.graph import Layer
from headrace_backends.ncnn.rule import SEPARATE, UNFIT_OPTIONS, Rule, Shape, has_axis, too_many

_MOST_DIMENSIONS = 4
_NO_ROWS = 233  # Reshape's word for no dimension of rows
# Of Reshape's expressions: a size of a tensor, of which n is that of the rows, and one of two such or numbers.
_REFERENCE = re.compile(r"(\d)([whdcn])", re.ASCII)
_NUMBER = re.compile(r"-?\d{1,9}", re.ASCII)
_TERM = re.compile(r"(?:(//|\*)\(([^(),]+),([^(),]+)\)|([^(),]+))(?:,(?=.)|$)")


def any_shapes(_layer: Layer, _given: Sequence[Shape]) -> str | None:
    """Whatever there is: numbers are made of numbers, one of each."""
    return None


def equal(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Eltwise: with a factor for each tensor, or none."""
    if layer.number(0) not in range(3) or len(layer.listed(1)) not in (0, len(given)) or len(given) < 2:
        return UNFIT_OPTIONS
    return None if len(set(given)) <= 1 else "it takes equal ones"


def joined(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Concat."""
    axis, count = layer.number(0), len(given[0])
    if not has_axis(given[0], axis):
        return f"there is no dimension {axis}"
    axis += count if axis < 0 else 0
    rests = {(*shape[:axis], 0, *shape[axis + 1 :]) for shape in given}
    if len(rests) > 1:
        return f"only their dimension {axis} may differ"
    return too_many((sum(shape[axis] for shape in given), *given[0][:axis], *given[0][axis + 1 :]))


def parted(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Slice: into parts of told sizes, or at told places."""
    axis, parts, places, shape = layer.number(1), layer.numbers(0), layer.numbers(2), given[0]
    if not has_axis(shape, axis):
        return f"it takes apart a dimension {axis}"
    size = shape[axis]
    if places:
        ends = [0, *(place + size * (place < 0) for place in places), size]
        parts = [end - start for start, end in pairwise(ends)]
    wanted = [part for part in parts if part != SEPARATE]
    if len(parts) != len(layer.writes) or min(wanted, default=1) < 1:
        return UNFIT_OPTIONS
    least = sum(wanted) + len(parts) - len(wanted)
    return None if least <= size else f"it takes apart {least} along dimension {axis}"


def copied(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Noop: as many tensors as there are."""
    return None if len(given) == len(layer.writes) else UNFIT_OPTIONS


def repeated(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Tile: along one dimension, or so many times along each."""
    shape, times = given[0], layer.numbers(2)
    if not times:
        axis, count = layer.number(0), layer.number(1, 1)
        return too_many((count, *shape)) if has_axis(shape, axis) and count > 0 else UNFIT_OPTIONS
    return too_many((*times, *shape)) if min(times) > 0 and len(times) <= len(shape) else UNFIT_OPTIONS


def permuted(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Permute: by the number of the order."""
    fits = layer.number(0) in range(factorial(len(given[0])))
    return None if fits else f"there is no order {layer.number(0)} of their dimensions"


def flipped(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Flip: along some dimensions."""
    return _listed(layer.numbers(0), given[0])


def squeezed(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Squeeze: without some dimensions."""
    return _listed(layer.numbers(3), given[0])


def expanded(layer: Layer, given: Sequence[Shape]) -> str | None:
    """ExpandDims: with more dimensions."""
    added = layer.numbers(3)
    count = len(added) or sum(bool(layer.number(key)) for key in (0, 1, 11, 2))
    made = (1,) * (len(given[0]) + count)
    return _listed(added, made) if len(made) <= _MOST_DIMENSIONS else "that comes to more than four dimensions"


def along(key: int) -> Rule:
    """Along one dimension, whose number the option says."""

    def rule(layer: Layer, given: Sequence[Shape]) -> str | None:
        axis = layer.number(key)
        return None if has_axis(given[0], axis) else f"there is no dimension {axis}"

    return rule


def gated(layer: Layer, given: Sequence[Shape]) -> str | None:
    """GLU: one half of a dimension by the other."""
    axis = layer.number(0)
    fits = has_axis(given[0], axis) and given[0][axis] % 2 == 0
    return None if fits else f"there are no two halves of dimension {axis}"


def reduced(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Reduction: of everything, or along some dimensions."""
    return _listed(layer.numbers(3), given[0]) if layer.number(0) in range(11) else UNFIT_OPTIONS


def reshaped(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Reshape: to sizes, of which 0 stays as it is and -1 is what is left; or by an expression of sizes."""
    written, rows = layer.text(6), [layer.number(key, _NO_ROWS) for key in (12, 13)]
    if layer.number(3) or rows not in ([_NO_ROWS] * 2, [0, 0]):
        return UNFIT_OPTIONS
    sizes = _sizes_of(written, given) if written else _told_sizes(layer)
    if rows == [0, 0]:  # the outermost is how many rows there are, which is one
        if not written or sizes[-1:] != [1]:
            return UNFIT_OPTIONS
        sizes = sizes[:-1]
    if not 1 <= len(sizes) <= _MOST_DIMENSIONS:
        return f"its expression {written} cannot be looked at" if written else UNFIT_OPTIONS
    old = _by_letter(given[0])
    letters = {4: "whdc"}.get(len(sizes), "whc")
    sizes = [size or old[letter] for size, letter in zip(sizes, letters, strict=False)]
    total, told = prod(given[0]), prod(size for size in sizes if size != -1)
    fits = min(sizes) >= -1 and told > 0 and (total % told == 0 if sizes.count(-1) == 1 else total == told)
    return None if fits else f"they cannot be brought into {list(reversed(sizes))}"


def _told_sizes(layer: Layer) -> list[int]:
    sizes = {key: layer.number(key, SEPARATE) for key in (0, 1, 2, 11)}
    for count, key in enumerate((0, 1, 2, 11)):  # the first that is not told says how many dimensions there are
        if sizes[key] == SEPARATE:
            return [sizes[one] for one in (0, 1, 2)[:count]]
    return [sizes[one] for one in (0, 1, 11, 2)]


def _sizes_of(written: str, given: Sequence[Shape]) -> list[int]:
    """What an expression of plain sizes, products and quotients comes to; nothing where there is more to it."""
    sizes: list[int] = []
    place = 0
    while place < len(written):
        term = _TERM.match(written, place)
        if term is None or len(sizes) > _MOST_DIMENSIONS:
            return []
        operator, *pair, alone = term.groups()
        found = [_size_of(one, given) for one in ([alone] if alone else pair)]
        if min(found) < (-1 if alone else 1):
            return []
        sizes.append(found[0] if alone else prod(found) if operator == "*" else found[0] // found[1])
        place = term.end()
    return sizes


def _size_of(term: str, given: Sequence[Shape]) -> int:
    reference = _REFERENCE.fullmatch(term)
    if reference is not None and int(reference[1]) < len(given):
        return _by_letter(given[int(reference[1])])[reference[2]]
    return int(term) if _NUMBER.fullmatch(term) else -2


def _by_letter(shape: Shape) -> dict[str, int]:
    """The sizes by ncnn's letters: width, height, depth and channels."""
    letters = {1: "w", 2: "hw", 3: "chw", 4: "cdhw"}[len(shape)]
    return {"w": 1, "h": 1, "d": 1, "c": 1, "n": 1, **dict(zip(letters, shape, strict=True))}


def _listed(axes: Sequence[int], shape: Shape) -> str | None:
    """Each dimension once at most, and one that there is."""
    places = {axis % len(shape) for axis in axes if has_axis(shape, axis)}
    return None if len(places) == len(axes) else f"there are no dimensions {list(axes)}"
