"""What PyTorch's profiler says of a model's operators."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from headrace_backends.optimize.findings import OperatorTime

_RUN = "headrace: one run"
# Between arrays and tensors, and views in any case: no work of the model's.
_HANDED_OVER = frozenset({"aten::lift_fresh", "aten::detach", "aten::resolve_neg", "aten::resolve_conj"})


@dataclass(frozen=True, slots=True)
class _Call:
    operator: str
    start_us: float
    duration_us: float


def operator_times(run: Callable[[], Any], runs: int) -> list[OperatorTime]:
    """The times of the operators that the model itself calls, a mean over runs, in the order of the last one.

    What an operator calls is counted as its own. Around operators there may be regions, as the interpreter of
    TorchScript or a compiled part, whose kernels PyTorch does not tell apart: a region has what is left without the
    operators inside of it.
    """
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            with record_function(_RUN):
                run()
    found = [event for event in profiler.events() or () if event.name == _RUN and event.cpu_parent is None]
    return _means([list(_calls(event, event.time_range.start)) for event in found])


def _calls(region: Any, began_us: float) -> Iterator[_Call]:
    """The outermost operators below a region, and the regions between."""
    for event in sorted(region.cpu_children, key=lambda event: event.time_range.start):
        start_us = float(event.time_range.start - began_us)
        if event.name in _HANDED_OVER:
            continue
        if "::" in event.name:
            yield _Call(event.name, start_us, float(event.cpu_time_total))
        else:
            yield _Call(event.name, start_us, float(event.self_cpu_time_total))
            yield from _calls(event, began_us)


def _means(runs: Sequence[Sequence[_Call]]) -> list[OperatorTime]:
    """Calls are the same in two runs if they are the same operator's for the n-th time."""
    took: defaultdict[tuple[str, int], float] = defaultdict(float)
    starts: dict[tuple[str, int], float] = {}
    for run in runs:
        count: Counter[str] = Counter()
        for call in run:
            count[call.operator] += 1
            key = (call.operator, count[call.operator])
            took[key] += call.duration_us
            starts[key] = call.start_us
    return [
        OperatorTime(f"{operator} {number}", operator, took[operator, number] / len(runs), start_us)
        for (operator, number), start_us in sorted(starts.items(), key=lambda item: item[1])
    ]
