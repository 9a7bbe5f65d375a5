"""Reading a model's examples: from a file, from a folder of files, from recorded traffic, or made up."""

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import NUMPY_DTYPES, DataType
from headrace_backends.base import Array
from headrace_backends.made_up import made_up
from headrace_backends.optimize.examples import Example, Examples
from headrace_backends.specs import FoundTensor

MADE_UP_EXAMPLES = 8
_NUMBERED = re.compile(r"(.+)/(\d+)")


class BadCalibration(Exception):
    """The examples cannot be used; the message says which file and why."""


def read_examples(path: Path, signature: Signature, origin: str = "") -> Examples:
    """The examples in a ``.npz`` or ``.npy`` file, or in a folder of them.

    A file has an array for each input, with the examples along its first axis; where their shapes differ, it has
    ``NAME/0``, ``NAME/1`` and so on instead, one example each. Whatever has no input's name is a label.

    Raises:
        BadCalibration: there are none, or they do not suit the model.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".npz", ".npy"))
        if not files:
            raise BadCalibration(f"'{path}' has no .npz or .npy files")
    elif path.is_file():
        files = [path]
    else:
        raise BadCalibration(f"there is no '{path}'")
    inputs: list[Example] = []
    labels: list[Mapping[str, Array]] = []
    for file in files:
        some, theirs = _cut(str(file), _read(file, signature), signature)
        inputs += some
        labels += theirs
    if len({frozenset(one) for one in labels}) > 1:
        raise BadCalibration(f"the files in '{path}' do not all have the same labels")
    return Examples(tuple(inputs), tuple(labels), origin or path.name)


def given_examples(arrays: Mapping[str, Array], signature: Signature) -> Examples:
    """The examples in arrays that are named as those of a file.

    Raises:
        BadCalibration: there are none, or they do not suit the model.
    """
    inputs, labels = _cut("example inputs", arrays, signature)
    return Examples(tuple(inputs), tuple(labels), "given")


def made_up_examples(inputs: Sequence[FoundTensor], signature: Signature) -> Examples | None:
    """Examples of random values, for timing and for forms that are faithful; None where they cannot be made."""
    rows = MADE_UP_EXAMPLES if signature.max_batch_size else None
    for free_size in (None, 32, 8):
        arrays = made_up(inputs, rows, free_size)
        if arrays is not None:
            break
    else:
        return None
    if rows is None:
        return Examples((arrays,), ({},), "made up", real=False)
    requests = tuple({name: array[row : row + 1] for name, array in arrays.items()} for row in range(rows))
    return Examples(requests, tuple({} for _ in requests), "made up", real=False)


def _cut(
    where: str, given: Mapping[str, Array], signature: Signature
) -> tuple[list[Example], list[Mapping[str, Array]]]:
    """Requests and their labels; ``where`` is for messages."""
    arrays = dict(given)
    specs = {spec.name: spec for spec in signature.inputs}
    columns: dict[str, list[Array]] = {}
    for name, spec in specs.items():
        if name in arrays:
            columns[name] = _examples_of(where, spec, arrays.pop(name), merges=signature.max_batch_size > 0)
    numbered: dict[str, dict[int, Array]] = {}
    for key in list(arrays):
        match = _NUMBERED.fullmatch(key)
        if match:
            numbered.setdefault(match[1], {})[int(match[2])] = arrays.pop(key)
    for name, parts in numbered.items():
        column = [parts[place] for place in sorted(parts)]
        columns[name] = [_typed(where, specs[name], part) for part in column] if name in specs else column
    missing = [spec.name for spec in signature.inputs if not spec.optional and spec.name not in columns]
    if missing:
        raise BadCalibration(
            f"'{where}' has no examples of input {', '.join(map(repr, missing))}; it has {list(arrays)}"
        )
    tags: dict[str, list[Array]] = {name: list(array) if array.ndim else [array] for name, array in arrays.items()}
    counts = {name: len(column) for name, column in (*columns.items(), *tags.items())}
    if len(set(counts.values())) != 1:
        raise BadCalibration(f"'{where}' has not as many examples of everything: {counts}")
    count = next(iter(counts.values()))
    if not count:
        raise BadCalibration(f"'{where}' has no examples")
    inputs: list[Example] = [
        {name: column[place] for name, column in columns.items() if name in specs} for place in range(count)
    ]
    tags |= {name: column for name, column in columns.items() if name not in specs}
    labels: list[Mapping[str, Array]] = [
        {name: np.asarray(column[place]) for name, column in tags.items()} for place in range(count)
    ]
    return inputs, labels


def _read(file: Path, signature: Signature) -> dict[str, Array]:
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if len(signature.inputs) != 1:
                raise BadCalibration(
                    f"'{file}' is one array, and the model has {len(signature.inputs)} inputs, expected a .npz"
                )
            return {signature.inputs[0].name: loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise BadCalibration(f"'{file}' cannot be read: {error}") from error


def _examples_of(where: str, spec: TensorSpec, array: Array, *, merges: bool) -> list[Array]:
    """Requests of one input, cut out of an array that has them along its first axis, or of one request without rows."""
    array = _typed(where, spec, array)
    if not array.ndim:
        raise BadCalibration(f"'{where}': '{spec.name}' is one number, expected examples along the first axis")
    if spec.shape is None:
        return [array[place] for place in range(len(array))]
    if array.ndim == len(spec.shape) + 1:
        parts = [array[place] for place in range(len(array))]
    elif array.ndim == len(spec.shape):
        rows = 1 if merges or spec.shape[0] < 1 else spec.shape[0]
        parts = [array[place : place + rows] for place in range(0, len(array) - rows + 1, rows)]
    elif merges and array.ndim == len(spec.shape) - 1:
        parts = [array[np.newaxis]]
    else:
        parts = []
    if not parts or not _fits(spec, parts[0]):
        raise BadCalibration(
            f"'{where}': '{spec.name}' has shape {list(array.shape)}, expected examples of {spec.describe()} along the "
            "first axis"
        )
    return parts


def _typed(where: str, spec: TensorSpec, array: Array) -> Array:
    if spec.datatype is DataType.BYTES:
        if array.dtype.kind not in "SU" and not _is_text(array):
            raise BadCalibration(f"'{where}': '{spec.name}' is {array.dtype}, expected text")
        flat = [one.encode() if isinstance(one, str) else one for one in array.reshape(-1).tolist()]
        texts = np.empty(len(flat), dtype=np.object_)
        texts[:] = flat
        return texts.reshape(array.shape)
    wanted = NUMPY_DTYPES[spec.datatype]
    if array.dtype != wanted and not _converts(array, wanted):
        raise BadCalibration(f"'{where}': '{spec.name}' is {array.dtype}, expected {spec.datatype}")
    return np.ascontiguousarray(array, dtype=wanted).reshape(array.shape)


def _is_text(array: Array) -> bool:
    return array.dtype.kind == "O" and all(isinstance(one, str | bytes) for one in array.reshape(-1).tolist())


def _converts(array: Array, wanted: np.dtype[np.generic]) -> bool:
    if array.dtype.kind in "iu" and wanted.kind in "iu":
        limits = np.iinfo(str(wanted))
        return not array.size or bool(array.min() >= limits.min and array.max() <= limits.max)
    return array.dtype.kind == "f" and (wanted.kind == "f" or wanted == NUMPY_DTYPES[DataType.BF16])


def _fits(spec: TensorSpec, part: Array) -> bool:
    assert spec.shape is not None
    return part.ndim == len(spec.shape) and all(
        wanted in (-1, size) for wanted, size in zip(spec.shape, part.shape, strict=True)
    )
