"""A request's rows: cut into several requests, and the answers joined again."""

from collections.abc import Sequence
from math import prod

from headrace.core.tensor import ITEM_BYTES, Tensor, bytes_offsets
from headrace.core.validation import ModelInputs


def slice_rows(inputs: ModelInputs, size: int) -> list[ModelInputs]:
    """A request with more rows than one batch holds, as several of at most ``size`` rows. Copies nothing."""
    tables = [None if tensor is None else _row_offsets(tensor, inputs.rows) for tensor in inputs.tensors]
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


def join_rows(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The outputs of ``slice_rows``' parts as those of the one request."""
    return tuple(
        Tensor(
            column[0].name,
            column[0].datatype,
            (sum(tensor.shape[0] for tensor in column), *column[0].shape[1:]),
            b"".join(tensor.data for tensor in column),
        )
        for column in zip(*parts, strict=True)
    )


def _row_offsets(tensor: Tensor, rows: int) -> Sequence[int]:
    per_row = prod(tensor.shape[1:])
    if ITEM_BYTES[tensor.datatype]:
        return range(0, len(tensor.data) + 1, per_row * ITEM_BYTES[tensor.datatype]) if per_row else [0] * (rows + 1)
    offsets = bytes_offsets(tensor.data, rows * per_row)
    return offsets[:: per_row or 1] if per_row else [0] * (rows + 1)
