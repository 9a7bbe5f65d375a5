"""Inputs made up for a model that nobody has asked anything yet."""

from collections.abc import Sequence
from math import prod

import numpy as np

from headrace.core.tensor import NUMPY_DTYPES, DataType
from headrace_backends.base import Array
from headrace_backends.specs import FoundTensor

# An input whose rows have more elements than this is not made up: it would take seconds and a lot of memory.
MAX_ROW_ELEMENTS = 1 << 23


def made_up(inputs: Sequence[FoundTensor], rows: int | None, free_size: int | None = None) -> dict[str, Array] | None:
    """An array for each input, always the same; None where that cannot be done.

    Numbers with a fraction are normally distributed; others are 0 and 1, which indices, masks and counts allow.
    With ``rows`` None the leading dimension is one like any other. Free dimensions have ``free_size``, or sizes
    that differ: those find more, equal ones please models that tie them together.
    """
    generator = np.random.default_rng(20240229)
    sizes: dict[str, int] = {}
    arrays: dict[str, Array] = {}
    for tensor in inputs:
        if tensor.spec.shape is None:
            return None
        symbols = tensor.symbols or ("",) * len(tensor.spec.shape)
        dimensions = list(zip(tensor.spec.shape, symbols, strict=True))
        if rows is not None:
            dimensions[0] = (rows, "")
        shape = [
            size if size != -1 else free_size or (sizes.setdefault(symbol, 2 + len(sizes) % 7) if symbol else 4)
            for size, symbol in dimensions
        ]
        if prod(shape) > MAX_ROW_ELEMENTS * (rows or 1):
            return None
        arrays[tensor.spec.name] = _array(generator, tensor.spec.datatype, shape)
    return arrays


def _array(generator: np.random.Generator, datatype: DataType, shape: list[int]) -> Array:
    match datatype:
        case DataType.BYTES:
            return generator.choice(np.array([b"a", b"b"], dtype=np.object_), shape)
        case DataType.FP16 | DataType.BF16 | DataType.FP32 | DataType.FP64:
            return np.asarray(generator.standard_normal(shape, dtype=np.float32)).astype(NUMPY_DTYPES[datatype])
        case _:
            return np.asarray(generator.integers(0, 2, shape)).astype(NUMPY_DTYPES[datatype])
