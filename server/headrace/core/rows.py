"""A request's rows: cut into several requests, and the answers joined again."""

from collections.abc import Sequence
from math import prod

from headrace.core.errors import InternalError
from headrace.core.tensor import ITEM_BYTES, Tensor, bytes_offsets
from headrace.core.validation import ModelInputs


def slice_rows(inputs: ModelInputs, size: int) -> list[ModelInputs]:
    """A request with more rows than one batch holds, as several of at most ``size`` rows. Copies nothing."""
    tables = [None if tensor is None else row_offsets(tensor, inputs.rows) for tensor in inputs.tensors]
    parts = []
    for start in range(0, inputs.rows, size):
        end = min(start + size, inputs.rows)
        tensors = tuple(
            None
            if tensor is None or table is None
            else Tensor(
                tensor.name,
                tensor.datatype,
                (end - start, *tensor.shape[1:]),
                memoryview(tensor.data)[table[start] : table[end]],
            )
            for tensor, table in zip(inputs.tensors, tables, strict=True)
        )
        parts.append(ModelInputs(tensors, end - start, inputs.key))
    return parts


def join_rows(parts: Sequence[tuple[Tensor, ...]], rows: Sequence[int]) -> tuple[Tensor, ...]:
    """The outputs of ``slice_rows``' parts, which had so many ``rows`` each, as those of the one request.

    Raises:
        InternalError: the parts' outputs cannot be laid end to end.
    """
    return tuple(_join(column, rows) for column in zip(*parts, strict=True))


def _join(column: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    first = column[0]
    for tensor, count in zip(column, rows, strict=True):
        if tensor.shape[:1] != (count,) or tensor.shape[1:] != first.shape[1:]:
            raise InternalError(
                f"output '{first.name}' came back with shape {list(tensor.shape)} for {count} rows, and the request "
                "had to be split: if rows of this model depend on each other, set max_batch_size: 0 in its config.yaml"
            )
    data = b"".join(tensor.data for tensor in column)
    return Tensor(first.name, first.datatype, (sum(rows), *first.shape[1:]), data)


def row_offsets(tensor: Tensor, rows: int) -> Sequence[int]:
    """Where each of a tensor's rows begins in its data, and where the last one ends."""
    per_row = prod(tensor.shape[1:])
    if ITEM_BYTES[tensor.datatype]:
        return range(0, len(tensor.data) + 1, per_row * ITEM_BYTES[tensor.datatype]) if per_row else [0] * (rows + 1)
    offsets = bytes_offsets(tensor.data, rows * per_row)
    return offsets[:: per_row or 1] if per_row else [0] * (rows + 1)
