"""The file that recorded examples are written to: arrays that numpy reads, for whoever may read the server's files."""

import contextlib
import os
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from headrace.core.tensor import Array, DataType, Tensor, from_wire
from headrace.recording.examples import Recorded, fits_arrays

PADDED_BYTES = 1 << 20  # that texts of unlike lengths may always take more in one array than they have


def recorded_file(plan_cache: Path, model: str) -> Path:
    """Where the examples of a model are kept."""
    return plan_cache / "recorded" / f"{model}.npz"


def write_examples(path: Path, examples: Sequence[Recorded], *, merges: bool) -> int:
    """Write the examples, whole or not at all, readable by the server's user alone. Returns how many were written.

    Left out are those that have other inputs than most (optional ones), and those that arrays cannot hold. Where
    none is left, no file is written, and one that is there stays.

    Raises:
        OSError: the file cannot be written; nothing is left of the attempt.
    """
    fitting = [one for one in examples if fits_arrays(one)]
    kinds = Counter(_names(one) for one in fitting)
    if not kinds:
        return 0
    usual = kinds.most_common(1)[0][0]
    same = [one for one in fitting if _names(one) == usual]
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            _write(file, same, merges=merges)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
    return len(same)


def arrays_of(examples: Sequence[Recorded], *, merges: bool) -> Iterator[tuple[str, Array]]:
    """The arrays of examples that all have the same inputs, one after the other.

    An input's examples lie along the first axis of one array where they have one shape. Else, and where texts are so
    unlike in length that one array would mostly be padding, they are NAME/0, NAME/1 and so on.
    """
    for column in zip(*examples, strict=True):
        name = column[0].name
        if len({tensor.shape for tensor in column}) == 1 and not _mostly_padding(column):
            parts = [_array(tensor) for tensor in column]
            yield name, np.concatenate(parts) if merges else np.stack(parts)
        else:
            for place, tensor in enumerate(column):
                yield f"{name}/{place}", _array(tensor)


def _names(example: Recorded) -> tuple[str, ...]:
    return tuple(tensor.name for tensor in example)


def _write(file: BinaryIO, examples: Sequence[Recorded], *, merges: bool) -> None:
    # Not numpy's savez: it takes the arrays as named arguments, so no input may be called "file".
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays_of(examples, merges=merges):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)


def _array(tensor: Tensor) -> Array:
    array = from_wire(tensor.data, tensor.datatype, tensor.shape)
    if tensor.datatype is DataType.BF16:  # which .npz files have no name for
        return array.astype(np.float32)
    if tensor.datatype is DataType.BYTES:
        widest = max((len(element) for element in array.reshape(-1).tolist()), default=0)
        return array.astype(f"S{max(1, widest)}")
    return array


def _mostly_padding(column: Sequence[Tensor]) -> bool:
    if column[0].datatype is not DataType.BYTES:
        return False
    arrays = [_array(tensor) for tensor in column]
    widest = max(array.itemsize for array in arrays)
    return widest * sum(array.size for array in arrays) > 2 * sum(array.nbytes for array in arrays) + PADDED_BYTES
