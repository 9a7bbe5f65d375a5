"""What the rules are made of that say which sizes a layer of ncnn can be given."""

from collections.abc import Callable, Sequence
from math import prod

from headrace_backends.ncnn.graph import Layer

Shape = tuple[int, ...]  # of one row, the outermost dimension first
# Why the layer cannot be given tensors of these shapes, as the end of a sentence; None where it can.
Rule = Callable[[Layer, Sequence[Shape]], str | None]

MOST_NUMBERS = 2**28  # in one tensor of a row, which are a gigabyte. ncnn counts some of them in 32 bits
SEPARATE = -233  # ncnn's word for a size that comes from elsewhere
UNFIT_OPTIONS = "its options do not go together"


def too_many(shape: Shape) -> str | None:
    """Why a tensor of such a shape is not made."""
    if prod(shape) <= MOST_NUMBERS:
        return None
    return f"that comes to {list(shape)} numbers, of which a tensor has at most {MOST_NUMBERS}"


def has_axis(shape: Shape, axis: int) -> bool:
    """Whether the shape has a dimension of this number, which may be counted from the end."""
    return -len(shape) <= axis < len(shape)
