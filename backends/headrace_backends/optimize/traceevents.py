"""Profiles as trace events, which ui.perfetto.dev and chrome://tracing open: a process for each form."""

from collections.abc import Iterable
from math import isfinite
from typing import Any

from headrace_backends.optimize.findings import Profile

_THREAD = 1


def trace(profiles: Iterable[Profile]) -> dict[str, Any]:
    """The whole file's content, in the Trace Event Format's JSON object form, in microseconds.

    Durations are means over runs and starts are those of one run. Where the one before would reach into an operator,
    the operator starts later: events of one thread must not overlap. All forms begin at 0, to be compared.
    """
    events: list[dict[str, Any]] = []
    for process, profile in enumerate(profiles, 1):
        events += [
            _named("process_name", process, profile.form),
            _named("thread_name", process, "operators"),
            {"ph": "M", "name": "process_sort_index", "pid": process, "tid": _THREAD, "args": {"sort_index": process}},
        ]
        events += _slices(process, profile)
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _slices(process: int, profile: Profile) -> list[dict[str, Any]]:
    timed = [one for one in profile.operators if isfinite(one.duration_us) and isfinite(one.start_us)]
    origin_us = min((one.start_us for one in timed), default=0.0)
    slices, end_us = [], 0.0
    for one in timed:
        start_us = max(one.start_us - origin_us, end_us)
        duration_us = max(0.0, one.duration_us)
        end_us = start_us + duration_us
        slices.append(
            {
                "ph": "X",
                "name": one.name,
                "cat": one.operator,
                "pid": process,
                "tid": _THREAD,
                "ts": round(start_us, 3),
                "dur": round(duration_us, 3),
                "args": {"operator": one.operator},
            }
        )
    return slices


def _named(kind: str, process: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": _THREAD, "args": {"name": name}}
