"""How large a module is: its parameters, and the multiply-adds of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import Module
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, slots=True)
class Size:
    """``multiply_adds`` are those of convolutions and matrix products, for one row."""

    parameters: int
    multiply_adds: float


def size_of(module: Module, inputs: Sequence[torch.Tensor], rows: int) -> Size:
    """The module's size, by running it on inputs of so many rows."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    count = sum(parameter.numel() for parameter in module.parameters())
    return Size(count, counter.get_total_flops() / 2 / rows)


def told(before: Size, after: Size) -> str:
    """Both sizes, for people."""
    parameters = _change(before.parameters, after.parameters)
    return f"parameters {parameters}, multiply-adds a row {_change(before.multiply_adds, after.multiply_adds)}"


def _change(before: float, after: float) -> str:
    times = f" ({before / after:.1f} times fewer)" if after and before > after else ""
    return f"{_count(before)} -> {_count(after)}{times}"


def _count(number: float) -> str:
    for unit, value in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= value:
            return f"{number / value:.3g} {unit}"
    return f"{number:.0f}"
