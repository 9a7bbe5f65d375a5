"""How a request is cut into the examples that are recorded of it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import prod
from random import Random

from headrace.core.rows import row_offsets
from headrace.core.tensor import DataType, Tensor, unpack_bytes
from headrace.core.validation import ModelInputs

Recorded = tuple[Tensor, ...]  # the inputs of one example, in buffers of their own


def examples_in(
    inputs: ModelInputs, *, merges: bool, most: int, random: Random
) -> Iterator[tuple[int, Callable[[], Recorded]]]:
    """The bytes of each example in a request, and what copies it. Copies must be made before the request is answered.

    Each row is one where the model ``merges`` rows, else the whole request is. Of a request with more than ``most``
    rows only so many are looked at, drawn by chance: it is not to take the event loop's time, nor all the room.
    """
    given = [tensor for tensor in inputs.tensors if tensor is not None]
    if not merges or inputs.rows == 1:
        yield sum(len(tensor.data) for tensor in given), partial(_whole, given)
        return
    rows: Iterable[int] = range(inputs.rows)
    if inputs.rows > most:
        rows = sorted(random.sample(range(inputs.rows), most))
    offsets = [row_offsets(tensor, inputs.rows) for tensor in given]
    for row in rows:
        yield sum(one[row + 1] - one[row] for one in offsets), partial(_row, given, offsets, row)


def fits_arrays(example: Recorded) -> bool:
    """Whether numpy's arrays can hold it: their texts cannot end in a byte of zero."""
    return not any(
        element.endswith(b"\0")
        for tensor in example
        if tensor.datatype is DataType.BYTES
        for element in unpack_bytes(tensor.data, prod(tensor.shape))
    )


def _whole(tensors: Sequence[Tensor]) -> Recorded:
    return tuple(Tensor(one.name, one.datatype, tuple(one.shape), bytes(one.data)) for one in tensors)


def _row(tensors: Sequence[Tensor], offsets: Sequence[Sequence[int]], row: int) -> Recorded:
    return tuple(
        Tensor(
            tensor.name,
            tensor.datatype,
            (1, *tensor.shape[1:]),
            bytes(memoryview(tensor.data)[starts[row] : starts[row + 1]]),
        )
        for tensor, starts in zip(tensors, offsets, strict=True)
    )
