"""What a model's own code gives, made into arrays of the declared datatypes and held against the declared shapes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headrace.core.model import TensorSpec
from headrace.core.tensor import NUMPY_DTYPES, DataType
from headrace_backends.base import Array

_BECOMES = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}  # plain Python numbers of which kinds, by the declared kind


def checked(
    given: Mapping[str, Any], outputs: Mapping[str, TensorSpec], wanted: Sequence[str], rows: int | None
) -> dict[str, Array]:
    """The outputs as arrays: each of ``wanted`` and perhaps others that are declared, of ``rows`` rows unless None.

    Raises:
        RuntimeError: something is missing, unknown, or not as declared.
    """
    missing = [name for name in wanted if name not in given]
    extra = [name for name in given if name not in outputs]
    if missing or extra:
        expected = list(wanted) or f"some of {list(outputs)}"
        raise RuntimeError(f"infer gave the outputs {list(given)}, expected {expected}")
    arrays = {}
    for name, spec in outputs.items():
        if name in given:
            arrays[name] = _converted(spec, given[name])
            problem = _shape_problem(arrays[name].shape, spec, rows)
            if problem:
                raise RuntimeError(f"output '{name}' {problem}")
    return arrays


def _converted(spec: TensorSpec, value: Any) -> Array:
    try:
        return _as_text(value) if spec.datatype is DataType.BYTES else _as_numbers(value, spec.datatype)
    except (TypeError, ValueError, OverflowError) as error:
        raise RuntimeError(f"output '{spec.name}' {error}, expected {spec.datatype}") from error


def _as_numbers(value: Any, datatype: DataType) -> Array:
    """An array as it is, which must have the declared type; or plain Python numbers, given that type."""
    dtype = NUMPY_DTYPES[datatype]
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype != dtype:
            raise TypeError(f"is an array of {value.dtype}")
        return np.asarray(value)
    if not isinstance(value, list | tuple | bool | int | float):
        raise TypeError(f"is {type(value).__name__}")
    natural = np.asarray(value)
    wanted = "f" if datatype is DataType.BF16 else dtype.kind  # ml_dtypes.bfloat16 is of numpy's kind V
    if natural.size and natural.dtype.kind not in _BECOMES[wanted] and not (wanted in "iu" and _are_whole(value)):
        raise TypeError(f"holds what numpy takes for {natural.dtype}")
    return natural.astype(dtype) if wanted == "f" or not natural.size else np.asarray(value, dtype=dtype)


def _are_whole(value: Any) -> bool:
    """Whether all are whole numbers: numpy makes floats of small ones beside those that only UINT64 holds."""
    return all(type(one) is int for one in np.asarray(value, dtype=np.object_).ravel().tolist())


def _as_text(value: Any) -> Array:
    """An object array of str and bytes."""
    array = np.asarray(value, dtype=np.object_)
    for element in array.reshape(-1).tolist():
        if not isinstance(element, str | bytes):
            raise TypeError(f"has an element of type {type(element).__name__}")
    return array


def _shape_problem(shape: tuple[int, ...], spec: TensorSpec, rows: int | None) -> str | None:
    if spec.shape is not None and (
        len(shape) != len(spec.shape)
        or any(wanted not in (-1, size) for size, wanted in zip(shape, spec.shape, strict=True))
    ):
        return f"has shape {list(shape)}, expected {list(spec.shape)}"
    if rows is not None and shape[:1] != (rows,):
        return f"has shape {list(shape)}, expected {rows} rows, as many as the inputs have"
    return None
