"""What pictures the layers of ncnn can be given that move windows over them, enlarge them or cut them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from headrace_backends.ncnn.graph import Layer
from headrace_backends.ncnn.rule import SEPARATE, UNFIT_OPTIONS, Rule, Shape, too_many

_SAME = ({-233}, {-234})  # instead of paddings: as much as leaves nothing out, the odd one behind or before
# Options by dimension, the innermost first; a list of them is written for one, two or three dimensions.
_CONVOLUTION = {"kernel": (1, 11, 21), "dilation": (2, 12, 22), "stride": (3, 13, 23)}
_CONVOLUTION_PADDING = ((4, 15), (14, 16), (24, 17))
_POOLING = {"kernel": (1, 11, 21), "dilation": (), "stride": (2, 12, 22)}
_POOLING_PADDING = ((3, 14), (13, 15), (23, 16))
_CEILING, _FLOOR = 0, 1  # of Pooling's modes; in the others it pads as for _SAME
_REFLECT = 2  # of Padding's modes
_ENLARGED = (2, 1)  # Interp's scales, innermost first
_CUT = ((0, 3, 6), (1, 4, 7), (13, 14, 15), (2, 5, 8))  # Crop's offset, size and what is left off: w, h, d, c


@dataclass(frozen=True, slots=True)
class _Window:
    """How a window moves along one dimension. ``before`` and ``after`` are paddings."""

    kernel: int
    dilation: int
    stride: int
    before: int
    after: int

    @property
    def extent(self) -> int:
        return self.dilation * (self.kernel - 1) + 1


def convolution(dimensions: int) -> Rule:
    """Of a picture with so many dimensions."""

    def rule(layer: Layer, given: Sequence[Shape]) -> str | None:
        if layer.number(19):
            return "its weights are another tensor, which cannot be looked at"
        windows, wanted = _windows(layer, dimensions, _CONVOLUTION, _CONVOLUTION_PADDING), channels(layer)
        if not wanted or not windows:
            return UNFIT_OPTIONS
        shape = given[0]
        if layer.kind == "Convolution" and len(shape) == 1 and all(window.kernel == 1 for window in windows):
            shape = (shape[0], 1, 1)  # numbers in a row are those of one pixel
        problem = _rank_problem(shape, dimensions)
        if problem or shape[0] != wanted:
            return problem or f"its weights are those of {wanted} channels"
        return _swept(shape, windows, layer.number(0), _padded_same(windows))

    return rule


def deconvolution(dimensions: int) -> Rule:
    """Of a picture with so many dimensions."""

    def rule(layer: Layer, given: Sequence[Shape]) -> str | None:
        windows, wanted = _windows(layer, dimensions, _CONVOLUTION, _CONVOLUTION_PADDING), channels(layer)
        more = [layer.number(key) for key in (18, 19, 20)[:dimensions]]
        fixed = {1: (20,), 2: (20, 21), 3: (25, 26, 27)}[dimensions]
        if not wanted or not windows or min(more) < 0 or _padded_same(windows) or any(map(layer.number, fixed)):
            return UNFIT_OPTIONS
        shape = given[0]
        problem = _rank_problem(shape, dimensions)
        if problem or shape[0] != wanted:
            return problem or f"its weights are those of {wanted} channels"
        whole = [
            (size - 1) * window.stride + window.extent + extra
            for size, window, extra in zip(reversed(shape[1:]), windows, more, strict=True)
        ]
        left = [size - window.before - window.after for size, window in zip(whole, windows, strict=True)]
        return "nothing is left of them" if min(left) < 1 else too_many((layer.number(0), *reversed(whole)))

    return rule


def deformable(layer: Layer, given: Sequence[Shape]) -> str | None:
    """A convolution whose window is moved at each place by a second tensor, and weighted by a third if there is one."""
    problem = convolution(2)(layer, given)
    if problem or len(given) not in (2, 3):
        return problem or "it takes two or three tensors"
    windows = _windows(layer, 2, _CONVOLUTION, _CONVOLUTION_PADDING)
    sizes = [_moved(size, one, floor=True) for size, one in zip(reversed(given[0][1:]), windows, strict=True)]
    taps = prod(window.kernel for window in windows)
    wanted = [(2 * taps, *reversed(sizes)), (taps, *reversed(sizes))][: len(given) - 1]
    return None if list(given[1:]) == wanted and not _padded_same(windows) else f"it needs {wanted} beside the first"


def pooling(dimensions: int) -> Rule:
    """Of a picture with so many dimensions."""

    def rule(layer: Layer, given: Sequence[Shape]) -> str | None:
        shape = given[0]
        if layer.number(0) not in (0, 1):
            return UNFIT_OPTIONS
        problem = _rank_problem(shape, dimensions)
        if problem or layer.flag(4):  # or over everything
            return problem
        if layer.flag(7):  # to a size
            sizes = [layer.number(key, layer.number(8)) for key in (8, 18, 28)[:dimensions]]
            made = [old if size == SEPARATE else size for size, old in zip(sizes, reversed(shape[1:]), strict=True)]
            return UNFIT_OPTIONS if min(made) < 1 else too_many((shape[0], *reversed(made)))
        windows, mode = _windows(layer, dimensions, _POOLING, _POOLING_PADDING), layer.number(5)
        if not windows or _padded_same(windows) or mode not in range(4):
            return UNFIT_OPTIONS
        return _swept(shape, windows, shape[0], same=mode not in (_CEILING, _FLOOR))

    return rule


def padding(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Around a picture; the outermost of three or four dimensions too."""
    shape, mode = given[0], layer.number(4)
    around = [
        (layer.number(2), layer.number(3)),
        (layer.number(0), layer.number(1)),
        (layer.number(7), layer.number(8)),
    ]
    if min(map(min, around)) < 0 or mode not in range(3) or layer.number(6) or len(given) > 1:
        return UNFIT_OPTIONS
    # Of four dimensions the outermost is no part of it.
    inner = shape[-3:]
    if any(max(one) for one in around[len(inner) :]):
        return f"it pads {len(around)} dimensions"
    if mode == _REFLECT and any(max(one) >= size for one, size in zip(around, reversed(inner), strict=False)):
        return "there are not as many as it reflects"
    made = [size + sum(one) for one, size in zip(around, reversed(inner), strict=False)]
    return too_many((*shape[:-3], *reversed(made)))


def enlargement(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Interp: to a size, by a factor, or to another tensor's size."""
    shape = given[0]
    if layer.number(0) not in (1, 2, 3) or layer.text(9):
        return UNFIT_OPTIONS
    problem = None if len(shape) in (1, 2, 3) else "it takes one to three dimensions"
    if problem or len(given) != (2 if layer.number(5) else 1):
        return problem or "it takes a second tensor only where that says the size"
    if layer.number(5):
        made = [*reversed(given[1][-2:]), 1][:2]
    else:
        told, old = (layer.number(4), layer.number(3)), (*reversed(shape[-2:]), 1)
        if len(shape) == 1:
            old = (1, 1)
        made = [
            size or int(before * layer.real(key, 1.0))
            for size, before, key in zip(told, old[:2], _ENLARGED, strict=True)
        ]
    outer = shape[:1]
    if len(shape) == 2:  # lines, which are made longer
        return "nothing is left of them" if made[0] < 1 else too_many((*outer, made[0] + 1))
    return "nothing is left of them" if min(made) < 1 else too_many((*outer, made[1] + 1, made[0] + 1))


def cut(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Crop: along listed dimensions, or by sizes for all of them."""
    if len(given) > 1:
        return "it takes its size from another tensor, which cannot be looked at"
    pieces = list(_listed_pieces(layer, given[0]) if layer.numbers(9) else _told_pieces(layer, given[0]))
    fits = pieces and all(0 <= start < end <= size for start, end, size in pieces)
    return None if fits else "what it cuts out is not within that"


def _listed_pieces(layer: Layer, shape: Shape) -> Iterator[tuple[int, int, int]]:
    """Start, end and size of each dimension that is cut; an impossible piece where the lists do not fit."""
    starts, ends, axes = layer.numbers(9), layer.numbers(10), layer.numbers(11)
    axes = axes or list(range(len(starts)))
    if len({len(starts), len(ends), len(axes)}) != 1 or any(not -len(shape) <= axis < len(shape) for axis in axes):
        yield 1, 0, 0
        return
    for start, end, axis in zip(starts, ends, axes, strict=True):
        size = shape[axis]
        first = 0 if start == SEPARATE else start + size * (start < 0)
        last = size if end == SEPARATE else min(end + size * (end < 0), size)
        yield first, last, size


def _told_pieces(layer: Layer, shape: Shape) -> Iterator[tuple[int, int, int]]:
    order = {1: "w", 2: "hw", 3: "chw", 4: "cdhw"}[len(shape)]
    keys = dict(zip("whdc", _CUT, strict=True))
    for axis, size in zip(order, shape, strict=True):
        offset, wanted, off = map(layer.number, keys[axis])
        yield offset, offset + (size - offset - off if wanted == SEPARATE else wanted), size - max(off, 0)


def pixels_of_channels(layer: Layer, given: Sequence[Shape]) -> str | None:
    """PixelShuffle: channels become a block of pixels."""
    factor = layer.number(0, 1)
    if factor < 1 or layer.number(1) not in (0, 1):
        return UNFIT_OPTIONS
    problem = _rank_problem(given[0], 2)
    return problem or (f"its channels cannot be parted by {factor}" if given[0][0] % factor**2 else None)


def channels_of_pixels(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Reorg: a block of pixels becomes channels."""
    factor = layer.number(0, 1)
    if factor < 1 or layer.number(1) not in (0, 1):
        return UNFIT_OPTIONS
    problem = _rank_problem(given[0], 2)
    unfit = any(size % factor for size in given[0][1:])
    return problem or (f"its sides cannot be parted by {factor}" if unfit else None)


def shuffled(layer: Layer, given: Sequence[Shape]) -> str | None:
    """ShuffleChannel: channels in groups."""
    groups = layer.number(0, 1)
    problem = _rank_problem(given[0], 2)
    if problem or groups < 1:
        return problem or UNFIT_OPTIONS
    return f"that cannot be parted by {groups}" if given[0][0] % groups else None


def neighbours(layer: Layer, given: Sequence[Shape]) -> str | None:
    """LRN: by so many neighbours."""
    problem = _rank_problem(given[0], 2)
    return problem or (None if 1 <= layer.number(1, 5) <= 255 and layer.number(0) in (0, 1) else UNFIT_OPTIONS)


def _rank_problem(shape: Shape, dimensions: int) -> str | None:
    return None if len(shape) == dimensions + 1 else f"it takes {dimensions + 1} dimensions"


def fails_in_16_bits(layer: Layer) -> bool:
    """Whether ncnn computes the layer from memory that is not its own, where numbers are kept in 16 bits.

    So it does with groups of a few channels; its file's own word that a layer is to be left out of that ends worse.
    """
    grouped = "DepthWise" in layer.kind and not layer.number(7, 1) == layer.number(0) == channels(layer)
    return grouped or layer.kind == "DeformableConv2D" or layer.number(31) != 0


def channels(layer: Layer) -> int:
    """How many channels the weights of a convolution are for; 0 where that does not come out."""
    kernel, dimensions = layer.number(1), {"1D": 1, "3D": 3}.get(layer.kind[-2:], 2)
    sizes = [layer.number(key, kernel) for key in _CONVOLUTION["kernel"][:dimensions]]
    outputs, groups = layer.number(0), layer.number(7, 1)
    if min(outputs, groups, layer.number(6), *sizes) < 1 or outputs % groups:
        return 0
    # Each group has weights of its own channels.
    found, rest = divmod(layer.number(6) * groups, outputs * prod(sizes))
    return 0 if rest or found % groups else found


def _windows(
    layer: Layer, dimensions: int, keys: Mapping[str, tuple[int, ...]], paddings: tuple[tuple[int, int], ...]
) -> list[_Window]:
    """How windows move along each dimension, the innermost first; empty where that is impossible."""
    along = {
        what: [layer.number(key, layer.number(numbers[0], 1)) for key in numbers[:dimensions]] or [1] * dimensions
        for what, numbers in keys.items()
    }
    windows = []
    for place, (key, other) in enumerate(paddings[:dimensions]):
        before = layer.number(key, layer.number(paddings[0][0]))
        sizes = (along["kernel"][place], along["dilation"][place], along["stride"][place])
        if min(sizes) < 1:
            return []
        windows.append(_Window(*sizes, before, layer.number(other, before)))
    paddings_found = {size for window in windows for size in (window.before, window.after)}
    return windows if min(paddings_found) >= 0 or paddings_found in _SAME else []


def _padded_same(windows: Sequence[_Window]) -> bool:
    return windows[0].before < 0


def _swept(shape: Shape, windows: Sequence[_Window], outputs: int, same: bool) -> str | None:
    """What is wrong with windows that move over the inner dimensions of a shape."""
    padded, made = [], []
    for size, window in zip(reversed(shape[1:]), windows, strict=True):
        if same:
            made.append(-(-size // window.stride))
            padded.append(max(size, window.extent + (made[-1] - 1) * window.stride))
            continue
        made.append(_moved(size, window, floor=False))  # at most
        padded.append(size + window.before + window.after + window.stride)
        if size + window.before + window.after < window.extent:
            return "nothing is left of them: they are smaller than its kernel"
    return too_many((shape[0], *reversed(padded))) or too_many((outputs, *reversed(made)))


def _moved(size: int, window: _Window, *, floor: bool) -> int:
    """To how many places a window fits; ``floor`` without one that is not filled."""
    room = size + window.before + window.after - window.extent
    return (room if floor else room + window.stride - 1) // window.stride + 1
