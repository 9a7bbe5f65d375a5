"""What tensors the layers of ncnn can be given that multiply matrices: dense, recurrent, attention, products."""

from collections.abc import Sequence
from math import prod

from headrace_backends.ncnn.graph import Layer
from headrace_backends.ncnn.rule import UNFIT_OPTIONS, Rule, Shape, too_many

_BOTH_WAYS = 2
_BY_ROW, _BY_ROW_COLUMN, _WHOLE, _BY_COLUMN = 1, 2, 3, 4  # what of Gemm's sum the constant is told for


def dense(layer: Layer, given: Sequence[Shape]) -> str | None:
    """InnerProduct: of all numbers, or of each line."""
    outputs, weights = layer.number(0), layer.number(2)
    if min(outputs, weights) < 1 or weights % outputs:
        return UNFIT_OPTIONS
    size, shape = weights // outputs, given[0]
    if prod(shape) == size:
        return None
    fits = len(shape) == 2 and shape[1] == size
    return too_many((shape[0], outputs)) if fits else f"its weights are those of {size} numbers"


def recurrent(gates: int) -> Rule:
    """LSTM, GRU or RNN, over lines; states may come along."""

    def rule(layer: Layer, given: Sequence[Shape]) -> str | None:
        directions, outputs = 2 if layer.number(2) == _BOTH_WAYS else 1, layer.number(0)
        hidden = layer.number(3, outputs) if gates == 4 else outputs
        weights = layer.number(1)
        if min(outputs, hidden, weights) < 1 or layer.number(8) or weights % (directions * hidden * gates):
            return UNFIT_OPTIONS
        size, shape = weights // (directions * hidden * gates), given[0]
        if len(shape) != 2 or shape[1] != size:
            return f"its weights are those of {size} numbers at each step"
        states = [(directions, outputs), (directions, hidden)][: gates // 2 if gates == 4 else 1]
        fits = len(given) == 1 or [(one[0], one[-1]) for one in given[1:] if one[1:-1] in ((), (1,))] == states
        return too_many((shape[0], directions * outputs)) if fits else f"its states are {states}"

    return rule


def attention(layer: Layer, given: Sequence[Shape]) -> str | None:
    """MultiHeadAttention: of one to three tensors, and a mask behind them."""
    embedded, heads, weights = layer.number(0), layer.number(1), layer.number(2)
    inner = (layer.number(3, embedded), layer.number(4, embedded))
    if min(embedded, heads, weights, *inner) < 1 or embedded % heads or weights % embedded:
        return UNFIT_OPTIONS
    if layer.number(7) or layer.number(18):
        return "it is quantised or keeps what it was given, which is not served"
    sizes = (weights // embedded, *inner)
    asked = given[:-1] if layer.flag(5) else given  # behind them comes a mask
    if not 1 <= len(asked) <= 3:
        return "it takes one to three tensors"
    query, key, value = asked[0], asked[min(1, len(asked) - 1)], asked[-1]
    lines = (len(query), len(key), len(value)) == (2, 2, 2)
    if not lines or (query[1], key[1], value[1]) != sizes or key[0] != value[0]:
        return f"its weights are those of {list(sizes)} numbers"
    scores = (heads, query[0], key[0])
    if layer.flag(5) and given[-1] not in (scores, scores[1:]):
        return f"its mask is {list(scores)}"
    return too_many(scores)


def product(layer: Layer, given: Sequence[Shape]) -> str | None:
    """MatMul of two tensors."""
    if len(given) != 2:
        return "it takes two"
    first, second = given[0], given[1]
    turned = layer.flag(0)
    inner = second[-1] if turned or len(second) == 1 else second[-2]
    short, outer = sorted((first[:-2], second[:-2]), key=len)
    if first[-1] != inner or not _go_together((1,) * (len(outer) - len(short)) + short, outer):
        return "there is no product of these"
    columns = 1 if len(second) == 1 else second[-2] if turned else second[-1]
    return too_many(
        (*map(max, zip((1,) * (len(outer) - len(short)) + short, outer, strict=True)), *first[-2:-1], columns)
    )


def general_product(layer: Layer, given: Sequence[Shape]) -> str | None:
    """Gemm: matrices that are tensors or weights, and a sum."""
    constant = [layer.flag(key) for key in (4, 5, 6)]
    told = (layer.number(7), layer.number(8), layer.number(9))
    if layer.number(18) or layer.number(12) or layer.number(13) or any(map(layer.number, (20, 21, 22))):
        return "it is quantised or gives something else than plain numbers, which is not served"
    shapes = list(given)
    if len(shapes) not in (2 - sum(constant[:2]), 3 - sum(constant)):
        return "it takes another number of tensors"
    rows, inner = (told[0], told[2]) if constant[0] else _matrix(shapes.pop(0), turned=layer.flag(2))
    other_inner, columns = (told[2], told[1]) if constant[1] else _matrix(shapes.pop(0), turned=layer.flag(3))
    if min(rows, inner, columns, other_inner) < 1:
        return "it takes matrices"
    if inner != other_inner:
        return f"there is no product of {inner} columns and {other_inner} rows"
    kind = layer.number(10)
    if constant[2]:
        fits = kind in range(-1, 5)
        fits &= kind not in (_BY_ROW, _BY_ROW_COLUMN, _WHOLE) or rows == told[0]
        fits &= kind not in (_WHOLE, _BY_COLUMN) or columns == told[1]
    else:
        fits = not shapes or shapes[0] in ((1,), (rows,), (columns,), (rows, 1), (1, columns), (rows, columns))
    return too_many((rows, columns)) if fits else "what it adds is of other sizes"


def pairwise(layer: Layer, given: Sequence[Shape]) -> str | None:
    """BinaryOp: of two tensors, or of one and a number."""
    if len(given) != 2 - layer.flag(1):
        return UNFIT_OPTIONS
    short, *others = sorted(given, key=len)
    for other in others:
        full = _with_inner(short, other)
        if not _go_together(full, other):
            return "their sizes do not go together"
        return too_many(tuple(map(max, zip(full, other, strict=True))))
    return None


def _matrix(shape: Shape, *, turned: bool) -> tuple[int, int]:
    """Rows and columns; zeros where it is no matrix. Of three dimensions the middle one is to be 1."""
    if len(shape) > 2 and (len(shape) > 3 or shape[1] != 1):
        return 0, 0
    rows, columns = (1, *shape) if len(shape) == 1 else (shape[0], shape[-1])
    return (columns, rows) if turned else (rows, columns)


def _with_inner(short: Shape, other: Shape) -> Shape:
    """The shape with as many dimensions as the other: inner ones of 1. Numbers in a row may also be the innermost."""
    missing = (1,) * (len(other) - len(short))
    return missing + short if len(short) == 1 and short[0] != other[0] else short + missing


def _go_together(one: Shape, other: Shape) -> bool:
    return all(size == more or 1 in (size, more) for size, more in zip(one, other, strict=True))
