"""What ONNX Runtime's profile of a session says of its operators."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from headrace_backends.optimize.findings import OperatorTime

_KERNEL = "_kernel_time"


def operator_times(events: Iterable[Mapping[str, Any]], skipped_runs: int) -> list[OperatorTime]:
    """The kernels' own times, a mean over the runs after the first ``skipped_runs``, in the order of execution.

    An operator that runs others, as If and Loop do, has only what is left without those. ``events`` is the file's
    content; its times are whole microseconds.
    """
    told = list(events)
    runs = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in told
        if event.get("cat") == "Session" and event.get("name") == "model_run"
    )[skipped_runs:]
    kernels = sorted(
        (event for event in told if event.get("cat") == "Node" and event["name"].endswith(_KERNEL)),
        key=lambda event: (event["ts"], -event["dur"]),
    )
    took: defaultdict[tuple[str, str], float] = defaultdict(float)
    starts: dict[tuple[str, str], float] = {}
    for began, ended in runs:
        of_run = [event for event in kernels if began <= event["ts"] <= ended]
        seen: set[tuple[str, str]] = set()
        for event, own_us in zip(of_run, _own_times(of_run), strict=True):
            key = (event["name"].removesuffix(_KERNEL), str(event.get("args", {}).get("op_name", "")))
            took[key] += own_us
            if key not in seen:  # the body of a Loop has it once for each round
                starts[key] = float(event["ts"] - began)
                seen.add(key)
    return [
        OperatorTime(name, operator, took[name, operator] / len(runs), start_us)
        for (name, operator), start_us in sorted(starts.items(), key=lambda item: item[1])
    ]


def _own_times(kernels: list[Mapping[str, Any]]) -> list[float]:
    """Each kernel's time without that of the kernels that ran inside of it. They come by start, outer ones first."""
    own = [float(event["dur"]) for event in kernels]
    around: list[int] = []
    for place, event in enumerate(kernels):
        while around and kernels[around[-1]]["ts"] + kernels[around[-1]]["dur"] <= event["ts"]:
            around.pop()
        if around:
            own[around[-1]] = max(0.0, own[around[-1]] - event["dur"])
        around.append(place)
    return own
