"""Batches filled up to a size that a module takes, and its answers cut to the rows that were asked."""

from collections.abc import Sequence
from typing import Any

import torch

from headrace_backends.torch_model import Call


def fitting(rows: int, sizes: Sequence[int]) -> int | None:
    """The smallest of the rising ``sizes`` that so many rows fit into; None where they are more than any."""
    return next((size for size in sizes if size >= rows), None)


def filled(tensors: Sequence[torch.Tensor], rows: int) -> list[torch.Tensor]:
    """The tensors with their last row repeated, so that it is one that the module takes, until there are ``rows``."""
    return [
        torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), *tensor.shape[1:])]) if len(tensor) < rows else tensor
        for tensor in tensors
    ]


def cut(values: Sequence[Any], rows: int) -> list[Any]:
    """The answers to the first ``rows``; what is no tensor stays, and is refused where outputs are looked at."""
    return [value[:rows] if isinstance(value, torch.Tensor) and value.ndim else value for value in values]


def at_least(rows: int, call: Call) -> Call:
    """A call of a module that takes no fewer rows. Its rows must be independent of each other."""
    if rows <= 1:
        return call

    def call_filled(module: Any, tensors: list[torch.Tensor]) -> list[Any]:
        given = len(tensors[0])
        if not 0 < given < rows:
            return call(module, tensors)
        return cut(call(module, filled(tensors, rows)), given)

    return call_filled
