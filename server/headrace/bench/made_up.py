"""Inputs made up from what a model says that it takes: pure, and the same each time."""

from collections.abc import Mapping

import numpy as np

from headrace.client.answers import ModelMetadata, TensorMetadata
from headrace.client.command_values import BadArgument
from headrace.core.tensor import DATATYPE_BY_NAME, NUMPY_DTYPES, Array, DataType

_SEED = 11
_FLOATS = (DataType.FP16, DataType.BF16, DataType.FP32, DataType.FP64)


def make_up(metadata: ModelMetadata, shapes: Mapping[str, tuple[int, ...]], rows: int) -> dict[str, Array]:
    """An array for each input. ``shapes`` are those asked for, whole; else a leading -1 is ``rows``, others are 1.

    Floats are normal, integers 0 or 1, which serve as token ids and as masks, and texts short.

    Raises:
        BadArgument: a shape does not fit its input or there is no such input, or its datatype is unknown.
    """
    known = {spec.name: spec for spec in metadata.inputs}
    for name in shapes:
        if name not in known:
            raise BadArgument(
                f"--shape {name}: model '{metadata.name}' has no such input; it has: {', '.join(known) or 'none'}"
            )
    return {name: _draw(spec, _shape(spec, shapes.get(name), rows)) for name, spec in known.items()}


def parse_shape(name: str, text: str) -> tuple[int, ...]:
    """The sizes in ``1x32``.

    Raises:
        BadArgument: the text is not of that form.
    """
    sizes = text.lower().split("x")
    if not all(size.isascii() and size.isdecimal() for size in sizes):
        raise BadArgument(f"--shape {name}={text} is not of the form NAME=SIZExSIZE, as {name}=1x32")
    return tuple(map(int, sizes))


def _shape(spec: TensorMetadata, asked: tuple[int, ...] | None, rows: int) -> tuple[int, ...]:
    if asked is None:
        return tuple((rows if place == 0 else 1) if size < 0 else size for place, size in enumerate(spec.shape))
    fits = len(asked) == len(spec.shape) and all(
        declared in (-1, size) for declared, size in zip(spec.shape, asked, strict=True)
    )
    if not fits:
        raise BadArgument(f"--shape {spec.name}: {list(asked)} does not fit, the model takes {list(spec.shape)}")
    return asked


def _draw(spec: TensorMetadata, shape: tuple[int, ...]) -> Array:
    datatype = DATATYPE_BY_NAME.get(spec.datatype)
    if datatype is None:
        raise BadArgument(f"input '{spec.name}' has the unknown datatype '{spec.datatype}'; give it with --input")
    random = np.random.default_rng(_SEED)
    if datatype is DataType.BYTES:
        return np.full(shape, b"headrace", np.object_)
    drawn = random.standard_normal(shape) if datatype in _FLOATS else random.integers(0, 2, shape)
    return np.asarray(drawn).astype(NUMPY_DTYPES[datatype])
