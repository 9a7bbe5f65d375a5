"""The tensors that a run sends: drawn at random for a shape, or read from .npy files."""

from pathlib import Path

import numpy as np

from headrace.core.tensor import (
    DATATYPE_BY_NAME,
    NUMPY_DTYPES,
    Array,
    DataType,
    Tensor,
    datatype_of,
    to_wire,
)

SEED = 20


def tensor_of_shape(text: str) -> Tensor:
    """The random tensor that ``name=FP32:1x784`` describes, the same one each time.

    Floats are standard normal. Integers are 0 or 1, which is a valid token id as well as a valid mask.

    Raises:
        ValueError: the text is not of that form.
    """
    name, equals, rest = text.partition("=")
    datatype_name, colon, dimensions = rest.partition(":")
    datatype = DATATYPE_BY_NAME.get(datatype_name)
    if not (name and equals and colon) or datatype is None:
        raise ValueError(f"the shape '{text}' was given; expected NAME=DATATYPE:SIZExSIZE, as x=FP32:1x784")
    sizes = dimensions.split("x") if dimensions else []
    if not all(size.isdecimal() for size in sizes):
        raise ValueError(f"the shape '{text}' has dimensions '{dimensions}'; expected whole numbers joined by x")
    return tensor_of_array(name, _random_array(datatype, tuple(map(int, sizes))))


def tensor_of_file(text: str) -> Tensor:
    """The tensor that ``name=file.npy`` names.

    Raises:
        ValueError: the text is not of that form, or the array has no datatype in the protocol.
    """
    return tensor_of_array(*array_of_file(text))


def array_of_file(text: str) -> tuple[str, Array]:
    """The name and array that ``name=file.npy`` gives.

    Raises:
        ValueError: the text is not of that form.
        OSError: there is no such file.
    """
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"the array '{text}' was given; expected NAME=FILE.npy")
    return name, np.load(Path(path), allow_pickle=False)


def tensor_of_array(name: str, array: Array) -> Tensor:
    """A numpy array as a tensor.

    Raises:
        ValueError: the protocol has no datatype for it.
    """
    datatype = datatype_of(array)
    if datatype is None:
        raise ValueError(f"input '{name}' is an array of {array.dtype}, which the protocol cannot express")
    return Tensor(name, datatype, array.shape, bytes(to_wire(array)))


def _random_array(datatype: DataType, shape: tuple[int, ...]) -> Array:
    random = np.random.default_rng(SEED)
    if datatype is DataType.BYTES:
        return np.full(shape, b"headrace", dtype=np.object_)
    if datatype in (DataType.FP16, DataType.BF16, DataType.FP32, DataType.FP64):
        return np.asarray(random.standard_normal(shape)).astype(NUMPY_DTYPES[datatype])
    return np.asarray(random.integers(0, 2, shape)).astype(NUMPY_DTYPES[datatype])
