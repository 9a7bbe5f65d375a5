"""What a model that was optimised while it served did to its clients: throughput, failures, errors, a plot."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from headrace_backends.optimize.accuracy import Errors, Outputs, compare
from headrace_backends.optimize.goal import Goal
from loadtests.answer import BadResponse
from loadtests.latency import summarize
from loadtests.served_traffic import Exchange

WIRES = ("http", "grpc")


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a burst, in seconds of the monotonic clock."""

    from_s: float
    to_s: float


@dataclass(frozen=True, slots=True)
class Served:
    """The story of one model. Seconds count from when its folder was there; rates are requests a second."""

    model: str
    ready_s: float
    swap_s: float | None  # None: no plan was swapped in
    dropped_in: str
    form: str
    before: Mapping[str, float]  # by wire
    after: Mapping[str, float]
    requests: int
    failures: Mapping[str, int]
    errors: Mapping[str, Errors]  # against the reference's answers, by span
    missed: tuple[str, ...]
    explained: tuple[str, ...]
    timeline: tuple[tuple[float, float, float, float], ...]  # by second: when, answers, p50 and p99 in ms

    @property
    def rise(self) -> float | None:
        """Throughput after the swap over that before."""
        before = sum(self.before.values())
        return sum(self.after.values()) / before if before and self.after else None


def rates(exchanges: Sequence[Exchange], windows: Sequence[Window]) -> dict[str, float]:
    """Good answers a second by wire, the median over the windows."""
    found = {}
    for wire in WIRES:
        ends = [one.answered_s for one in exchanges if one.wire == wire and one.problem is None]
        counts = [sum(window.from_s <= end < window.to_s for end in ends) for window in windows]
        found[wire] = median(
            count / (window.to_s - window.from_s) for count, window in zip(counts, windows, strict=True)
        )
    return found


def cut(window: Window, warmup_s: float, parts: int) -> list[Window]:
    """A burst without its beginning, in equal parts."""
    length_s = (window.to_s - window.from_s - warmup_s) / parts
    starts = [window.from_s + warmup_s + length_s * number for number in range(parts)]
    return [Window(start, start + length_s) for start in starts]


def failures(exchanges: Sequence[Exchange]) -> dict[str, int]:
    """What went wrong, and how often."""
    return dict(Counter(f"{one.wire}: {one.problem}" for one in exchanges if one.problem is not None))


def judge_answers(
    exchanges: Sequence[Exchange], right: Sequence[Outputs], goal: Goal
) -> tuple[Errors | None, list[str]]:
    """The errors of these answers against the reference's, and what is wrong with them; None where there are none."""
    wanted, got, missed = [], [], []
    for one in exchanges:
        if one.problem is not None:
            continue
        try:
            outputs = one.outputs()
        except BadResponse as error:
            missed.append(f"an answer over {one.wire} cannot be read: {error}")
            continue
        if set(outputs) != set(right[one.row]):
            missed.append(f"an answer has the outputs {sorted(outputs)}, expected {sorted(right[one.row])}")
            continue
        wanted.append(right[one.row])
        got.append(outputs)
    if not got:
        return None, missed
    errors = compare(wanted, got)
    if problem := goal.problem(errors):
        missed.append(problem)
    return errors, missed[:10]


def timeline(exchanges: Sequence[Exchange], began_s: float) -> tuple[tuple[float, float, float, float], ...]:
    """Second by second: when, how many good answers, and their p50 and p99 in milliseconds."""
    seconds: dict[int, list[int]] = {}
    for one in exchanges:
        if one.problem is None:
            seconds.setdefault(int(one.answered_s - began_s), []).append(int(one.latency_ms * 1e6))
    found = {second: summarize(latencies_ns) for second, latencies_ns in sorted(seconds.items())}
    return tuple((float(second), float(one.count), one.p50_ms, one.p99_ms) for second, one in found.items())


def lines(served: Served) -> list[str]:
    """The story for a person."""
    told = [f"{served.model}: ready after {served.ready_s:.1f} s, served as {served.dropped_in}"]
    if served.swap_s is None:
        told.append("  no plan was swapped in")
    else:
        told.append(f"  after {served.swap_s:.0f} s the plan was swapped in: {served.form}")
    told += [
        f"  {wire}: {served.before[wire]:,.1f} requests/s before, {rate:,.1f} after"
        for wire, rate in served.after.items()
    ]
    if served.rise is not None:
        told.append(f"  together {served.rise:.2f} times as many")
    told.append(f"  {served.requests:,} requests, {sum(served.failures.values())} failed")
    told += [f"    {count} x {problem}" for problem, count in served.failures.items()]
    for span, errors in served.errors.items():
        values = (("max_rel", errors.max_rel), ("cosine", errors.cosine), ("top1_agreement", errors.top1_agreement))
        said = ", ".join(f"{name} {value:.4g}" for name, value in values if value is not None)
        told.append(f"  {errors.examples:,} answers {span}: {said or f'{errors.mismatches} mismatches'}")
    told += ["  headrace explain:", *(f"    {line}" for line in served.explained)]
    told += [f"  missed: {one}" for one in served.missed] or ["  met"]
    return told


def plot(served: Served, path: Path) -> None:
    """Latency over time with the swap, and throughput before and after, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 3)
    left: Any = figure.add_subplot(grid[0, :2])
    seconds = [one[0] for one in served.timeline]
    left.plot(seconds, [one[3] for one in served.timeline], ".", markersize=3, label="p99 of the second, ms")
    left.plot(seconds, [one[2] for one in served.timeline], ".", markersize=3, label="p50 of the second, ms")
    left.plot(seconds, [one[1] for one in served.timeline], color="gray", linewidth=0.8, label="answers in the second")
    if served.swap_s is not None:
        left.axvline(served.swap_s, color="black", linestyle="dashed", label="the plan is swapped in")
    left.set_yscale("log")
    left.set_xlabel("seconds since the folder was dropped in")
    left.set_title(f"{served.model}: {served.requests:,} requests, {sum(served.failures.values())} failed")
    left.grid(visible=True, alpha=0.3)
    left.legend(fontsize="small")
    right: Any = figure.add_subplot(grid[0, 2])
    for place, (label, values) in enumerate((("before", served.before), ("after", served.after))):
        heights = [values.get(one, 0.0) for one in WIRES]
        right.bar([number + 0.4 * place for number in range(2)], heights, 0.4, label=label)
    right.set_xticks([0.2, 1.2], WIRES)
    right.set_title("requests/s")
    right.grid(visible=True, axis="y", alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=120)
