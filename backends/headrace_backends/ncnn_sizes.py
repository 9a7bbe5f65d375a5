"""What sizes a layer of ncnn can be given: it looks at none itself, and reads beyond its weights and its tensors."""

from collections.abc import Callable, Sequence
from math import prod

from headrace_backends.ncnn_graph import Layer

Shape = tuple[int, ...]  # of one row, the outermost dimension first

_EACH = -233  # stands for a size that comes from elsewhere


def refusal(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Why the layer cannot be given tensors of these shapes; None where it can, or is of a kind that is not known here.

    Known are the kinds that have weights, and those that put tensors together or take them apart.
    """
    rule = _RULES.get(layer.kind)
    problem = None if rule is None or not given else rule(_Options(layer), given)
    if problem is None:
        return None
    shapes = " and ".join(str(list(shape)) for shape in given)
    return f"layer '{layer.name}' ({layer.kind}) is given {shapes}, and {problem}"


def is_checked(layer: Layer) -> bool:
    """Whether there are shapes that the layer is refused."""
    return layer.kind in _RULES


class _Options:
    """A layer's whole numbers by their keys; those that are not there have ncnn's defaults."""

    def __init__(self, layer: Layer) -> None:
        self._written = dict(option.split("=", 1) for option in layer.options)

    def number(self, key: int, default: int = 0) -> int:
        try:
            return int(self._written.get(str(key), default))
        except ValueError:
            return default

    def numbers(self, key: int) -> list[int]:
        """A list, which is written behind how many there are."""
        return [int(one) for one in self._written.get(str(-23300 - key), "0").split(",")[1:]]


_Rule = Callable[[_Options, Sequence[Shape]], str | None]


def _convolution(dimensions: int) -> _Rule:
    def rule(options: _Options, given: Sequence[Shape]) -> str | None:
        width = options.number(1)
        sizes = [width, options.number(11, width), options.number(21, width)][: dimensions - 1]
        per_channel = options.number(0) * prod(sizes)
        weights = options.number(6) * options.number(7, 1)  # each group has those of its own channels
        if not per_channel or not weights:
            return None  # they are another tensor
        shape, channels = given[0], weights // per_channel
        # One of fewer dimensions is taken for one channel, but for numbers in a row: they are those of one pixel.
        is_pixel = len(shape) == 1 and prod(sizes) == 1
        found = shape[0] if is_pixel or len(shape) == dimensions else 1
        return None if found == channels else f"its weights are those of {channels} channels"

    return rule


def _dense(options: _Options, given: Sequence[Shape]) -> str | None:
    size = options.number(2) // max(1, options.number(0))
    shape = given[0]
    fits = prod(shape) == size or (len(shape) == 2 and shape[1] == size)
    return None if fits else f"its weights are those of {size} numbers"


def _recurrent(gates: int) -> _Rule:
    def rule(options: _Options, given: Sequence[Shape]) -> str | None:
        directions = 2 if options.number(2) == 2 else 1
        hidden = options.number(3, options.number(0)) if gates == 4 else options.number(0)
        size = options.number(1) // max(1, directions * hidden * gates)
        return None if given[0][-1] == size else f"its weights are those of {size} numbers at each step"

    return rule


def _channels(key: int) -> _Rule:
    def rule(options: _Options, given: Sequence[Shape]) -> str | None:
        channels = options.number(key)
        fits = channels in (_EACH, given[0][0])
        return None if fits else f"its weights are those of {channels} channels"

    return rule


def _instances(options: _Options, given: Sequence[Shape]) -> str | None:
    shape, channels = given[0], options.number(0)
    found = shape[0] if len(shape) > 2 else 1
    fits = not options.number(2, 1) or found == channels
    return None if fits else f"its weights are those of {channels} channels"


def _slopes(options: _Options, given: Sequence[Shape]) -> str | None:
    return None if options.number(0) == 1 else _channels(0)(options, given)


def _normalised(options: _Options, given: Sequence[Shape]) -> str | None:
    size, shape = options.number(0), given[0]
    fits = not options.number(2, 1) or size == shape[-1] or (len(shape) > 2 and size == prod(shape[-2:]))
    return None if fits else f"its weights are those of {size} numbers"


def _attention(options: _Options, given: Sequence[Shape]) -> str | None:
    if options.number(7):  # with what it has kept, in further tensors
        return None
    embedded = options.number(0)
    sizes = (
        options.number(2) // max(1, embedded),
        options.number(3, embedded),
        options.number(4, embedded),
    )
    asked = given[:-1] if options.number(5) else given  # behind them comes a mask
    pairs = zip(asked, sizes, strict=False)  # one or two tensors may stand for all three
    fits = all(shape[-1] == size for shape, size in pairs)
    return None if fits else f"its weights are those of {list(sizes)} numbers"


def _product(options: _Options, given: Sequence[Shape]) -> str | None:
    if len(given) < 2:
        return None
    first, second = given[0], given[1]
    inner = second[-1] if options.number(0) or len(second) == 1 else second[-2]
    short, outer = sorted((first[:-2], second[:-2]), key=len)
    fits = first[-1] == inner and _go_together((1,) * (len(outer) - len(short)) + short, outer)
    return None if fits else "there is no product of these"


def _general_product(options: _Options, given: Sequence[Shape]) -> str | None:
    left, right = options.number(4), options.number(5)
    shapes, inner = list(given), []
    if len(shapes) < 2 - (bool(left) + bool(right)):
        return None
    for constant, turned, outer_first in ((left, options.number(2), False), (right, options.number(3), True)):
        if constant:
            inner.append(options.number(9))
            continue
        shape = shapes.pop(0)
        inner.append(shape[0] if bool(turned) != outer_first else shape[-1])
    return None if inner[0] == inner[1] else f"there is no product of {inner[0]} columns and {inner[1]} rows"


def _pairwise(_options: _Options, given: Sequence[Shape]) -> str | None:
    short, *others = sorted(given, key=len)
    fits = all(_go_together(_with_inner(short, other), other) for other in others)
    return None if fits else "their sizes do not go together"


def _with_inner(short: Shape, other: Shape) -> Shape:
    """The shape with as many dimensions as the other: inner ones of 1. Numbers in a row may also be the innermost."""
    missing = (1,) * (len(other) - len(short))
    return missing + short if len(short) == 1 and short[0] != other[0] else short + missing


def _go_together(one: Shape, other: Shape) -> bool:
    return all(size == more or 1 in (size, more) for size, more in zip(one, other, strict=True))


def _equal(_options: _Options, given: Sequence[Shape]) -> str | None:
    return None if len(set(given)) <= 1 else "it takes equal ones"


def _joined(options: _Options, given: Sequence[Shape]) -> str | None:
    axis, count = options.number(0), len(given[0])
    axis += count if axis < 0 else 0
    rests = {(*shape[:axis], 0, *shape[axis + 1 :]) for shape in given}
    return None if len(rests) == 1 else f"only their dimension {axis} may differ"


def _parted(options: _Options, given: Sequence[Shape]) -> str | None:
    axis, parts = options.number(1), options.numbers(0)
    wanted = sum(part for part in parts if part != _EACH)
    shape = given[0]
    if not -len(shape) <= axis < len(shape):
        return f"it takes apart a dimension {axis}"
    return None if wanted <= shape[axis] else f"it takes apart {wanted} along dimension {axis}"


def _indices(_options: _Options, _given: Sequence[Shape]) -> str | None:
    return "it takes whole numbers, and this backend has FP32 alone"


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("Convolution1D", "ConvolutionDepthWise1D"), _convolution(2)),
    **dict.fromkeys(("Deconvolution1D", "DeconvolutionDepthWise1D"), _convolution(2)),
    **dict.fromkeys(("Convolution", "ConvolutionDepthWise", "DeformableConv2D"), _convolution(3)),
    **dict.fromkeys(("Deconvolution", "DeconvolutionDepthWise"), _convolution(3)),
    **dict.fromkeys(("Convolution3D", "ConvolutionDepthWise3D"), _convolution(4)),
    **dict.fromkeys(("Deconvolution3D", "DeconvolutionDepthWise3D"), _convolution(4)),
    "InnerProduct": _dense,
    "LSTM": _recurrent(4),
    "GRU": _recurrent(3),
    "RNN": _recurrent(1),
    **dict.fromkeys(("BatchNorm", "Bias", "Scale"), _channels(0)),
    "InstanceNorm": _instances,
    "GroupNorm": _channels(1),
    "PReLU": _slopes,
    **dict.fromkeys(("LayerNorm", "RMSNorm"), _normalised),
    "MultiHeadAttention": _attention,
    "MatMul": _product,
    "Gemm": _general_product,
    "BinaryOp": _pairwise,
    "Eltwise": _equal,
    "Concat": _joined,
    "Slice": _parted,
    "Embed": _indices,
}
