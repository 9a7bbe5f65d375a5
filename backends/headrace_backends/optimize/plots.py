"""The report's plots, as SVG that takes its colours and its font from the page around it."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from math import isfinite, log10
from typing import Any

from headrace_backends.optimize import figures, reading
from headrace_backends.optimize.findings import Fate, Findings, Point
from headrace_backends.optimize.reading import Candidate

# matplotlib knows no CSS variables: it draws with these, and they are replaced in what it wrote.
_INK, _MUTED, _GRID, _SURFACE = "#010203", "#010204", "#010205", "#010206"
_CHOSEN, _KEPT, _REFUSED, _REFERENCE, _FIRST, _SECOND = "#010207", "#010208", "#010209", "#01020a", "#01020b", "#01020c"
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--line",
    _SURFACE: "--page",
    _CHOSEN: "--chosen",
    _KEPT: "--kept",
    _REFUSED: "--refused",
    _REFERENCE: "--reference",
    _FIRST: "--first",
    _SECOND: "--second",
}
_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "headrace",
    "font.size": 10,
    "text.color": _INK,
    "text.parse_math": False,  # names may hold dollars
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "legend.frameon": False,
}
_MOST_CURVES = 5
_MOST_LABELS = 12
_SPEED_TICKS = tuple(digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5))
_NINES = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
_ROOM = 0.06  # of an axis, beside the outermost points


@dataclass(frozen=True, slots=True)
class Plot:
    """``svg`` is an element for an HTML page."""

    svg: str
    left_out: int = 0  # candidates that could not be drawn, because they were not measured


class NoPlots(Exception):
    """matplotlib is not installed."""


@dataclass(frozen=True, slots=True)
class _Scale:
    """Puts an error where more accurate is further right; ``ticks`` are in errors."""

    place: Callable[[float], float]
    ticks: Sequence[float]


def pareto(findings: Findings) -> Plot | None:
    """Speed over accuracy of everything that has both; None where that is the reference alone.

    Raises:
        NoPlots: matplotlib is not installed.
    """
    drawn = [(one, error) for one in reading.candidates(findings) if (error := _drawable(one, findings)) is not None]
    if len(drawn) < 2:
        return None
    with _settings():
        svg = _svg(_pareto_figure(findings, drawn), "Speed over accuracy of every candidate that was measured")
    return Plot(svg, len(reading.candidates(findings)) - len(drawn))


def _pareto_figure(findings: Findings, drawn: Sequence[tuple[Candidate, float]]) -> Any:
    scale = _accuracy_scale([error for _, error in drawn], findings)
    figure, axes = _figure(7.4, 4.1)
    served = reading.chosen(findings)
    places = {one.number: (scale.place(error), _speed(one)) for one, error in drawn}
    groups = _grouped([one for one, _ in drawn], served)
    allowed = [places[one.number] for name in ("reference", "kept", "chosen") for one in groups[name]]
    front = reading.frontier(allowed)
    axes.plot(*zip(*front, strict=True), color=_KEPT, linewidth=1.2, alpha=0.6, zorder=2, label="frontier")
    _scatter(axes, groups, places)
    _label_points(axes, [one for one, _ in drawn], places, front, served)
    _speed_axis(axes, [speed for _, speed in places.values()])
    _accuracy_axis(axes, scale, [place for place, _ in places.values()], findings)
    figure.legend(loc="outside upper left", ncols=7, handletextpad=0.3, columnspacing=1.2, fontsize=9)
    return figure


def curves(findings: Findings) -> tuple[Plot, Plot] | None:
    """Latency and throughput over the batch size, of the reference and the best kept forms; None without any.

    Raises:
        NoPlots: matplotlib is not installed.
    """
    served = reading.chosen(findings)
    groups = dict(reading.by_fate(findings))
    kept = [one for one in groups.get(Fate.KEPT, []) if len(_points(one)) > 1]
    wanted = {one.number: one for one in (reading.candidates(findings)[0], served, *kept)}
    drawn = [one for one in wanted.values() if _points(one)][:_MOST_CURVES]
    if not drawn:
        return None
    with _settings():
        latency = _curve_plot(drawn, served, "milliseconds", lambda one: one.p50_ms, tail=lambda one: one.p99_ms)
        throughput = _curve_plot(drawn, served, "rows a second", lambda one: one.rows_per_s)
        return (
            Plot(_svg(latency, "Latency over the batch size")),
            Plot(_svg(throughput, "Throughput over the batch size")),
        )


def _curve_plot(
    drawn: Sequence[Candidate],
    served: Candidate,
    unit: str,
    value: Callable[[Point], float],
    tail: Callable[[Point], float] | None = None,
) -> Any:
    figure, axes = _figure(4.6, 3.3)
    others = iter((_FIRST, _SECOND, _KEPT, _MUTED))
    for one in drawn:
        points = _points(one)
        rows = [point.rows for point in points]
        is_served = one.number == served.number
        colour = _CHOSEN if is_served else _REFERENCE if one.is_reference else next(others)
        width = 2.2 if is_served else 1.4
        style = "--" if one.is_reference and not is_served else "-"
        axes.plot(
            rows, list(map(value, points)), style, color=colour, linewidth=width, marker="o", markersize=3.5,
            label=_curve_label(one, served),
        )  # fmt: skip
        if tail is not None:
            axes.plot(rows, list(map(tail, points)), ":", color=colour, linewidth=1, alpha=0.8)
    sizes = sorted({point.rows for one in drawn for point in _points(one)})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("rows in a batch")
    axes.set_ylabel(unit + (" (dotted: p99)" if tail is not None else ""))
    if tail is not None:
        axes.set_yscale("log")
        _plain_ticks(axes, [value(point) for one in drawn for point in _points(one)])
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda tick, _: figures.number(tick))
    figure.legend(loc="outside upper left", ncols=2, fontsize=8.5, handlelength=1.6)
    return figure


def _curve_label(one: Candidate, served: Candidate) -> str:
    told = "reference" if one.is_reference else f"#{one.number} {one.row.form.backend}"
    return f"{told[:28]}, chosen" if one.number == served.number else told[:36]


def _points(one: Candidate) -> list[Point]:
    usable = [point for point in one.row.curve if isfinite(point.p50_ms) and point.p50_ms > 0 and point.rows > 0]
    return sorted(usable, key=lambda point: point.rows)


def _drawable(one: Candidate, findings: Findings) -> float | None:
    """The candidate's deciding error, if the candidate has that and a speed."""
    if one.is_reference:
        return _perfect(findings)
    speedup, error = one.row.speedup, reading.decided_by(one.row, findings.budget)
    good = speedup is not None and isfinite(speedup) and speedup > 0 and error is not None and isfinite(error)
    return error if good else None


def _perfect(findings: Findings) -> float:
    """The reference's own error: none. An owner's metric has its own idea of what the reference is worth."""
    budget = findings.budget
    if budget is not None and budget.is_own:
        known = reading.decided_by(findings.reference, budget)
        limit = budget.min if budget.min is not None else budget.max
        return known if known is not None and isfinite(known) else limit or 0.0
    return 1.0 if reading.more_is_better(budget) else 0.0


def _speed(one: Candidate) -> float:
    known = one.row.speedup
    return known if known is not None and isfinite(known) and known > 0 else 1.0


def _grouped(drawn: Sequence[Candidate], served: Candidate) -> dict[str, list[Candidate]]:
    groups: dict[str, list[Candidate]] = {"reference": [], "kept": [], "chosen": [], "refused": [], "slower": []}
    for one in drawn:
        if one.number == served.number:
            groups["chosen"].append(one)
        elif one.is_reference:
            groups["reference"].append(one)
        elif one.row.fate in (Fate.KEPT, Fate.CHOSEN):
            groups["kept"].append(one)
        else:
            groups["refused" if one.row.fate is Fate.REFUSED else "slower"].append(one)
    return groups


def _scatter(axes: Any, groups: dict[str, list[Candidate]], places: dict[int, tuple[float, float]]) -> None:
    looks = {
        "reference": {"marker": "s", "s": 44, "color": _REFERENCE},
        "kept": {"marker": "o", "s": 36, "color": _KEPT, "edgecolors": _SURFACE, "linewidths": 0.8},
        "chosen": {"marker": "*", "s": 210, "color": _CHOSEN, "edgecolors": _SURFACE, "linewidths": 0.8, "zorder": 4},
        "refused": {"marker": "x", "s": 34, "color": _REFUSED, "linewidths": 1.4},
        "slower": {"marker": "o", "s": 18, "facecolors": "none", "edgecolors": _MUTED, "linewidths": 1.0},
    }
    for name, group in groups.items():
        if group:
            across, up = zip(*(places[one.number] for one in group), strict=True)
            axes.scatter(across, up, **{"zorder": 3, **looks[name]}, label="cut early" if name == "slower" else name)


def _label_points(
    axes: Any,
    drawn: Sequence[Candidate],
    places: dict[int, tuple[float, float]],
    front: Sequence[tuple[float, float]],
    served: Candidate,
) -> None:
    """Numbers beside what is worth looking up: the frontier, and what was refused although it is faster."""
    worth = [
        one
        for one in drawn
        if not one.is_reference
        and (
            one.number == served.number
            or places[one.number] in front
            or (one.row.fate is Fate.REFUSED and places[one.number][1] >= places.get(served.number, (0.0, 0.0))[1])
        )
    ]
    worth.sort(key=lambda one: (one.number != served.number, -places[one.number][1]))
    for one in worth[:_MOST_LABELS]:
        axes.annotate(
            f"#{one.number}", places[one.number], xytext=(6, 5), textcoords="offset points", fontsize=8.5, color=_INK
        )


def _accuracy_scale(errors: Sequence[float], findings: Findings) -> _Scale:
    budget = findings.budget
    if budget is not None and budget.is_own:
        sign = 1.0 if reading.more_is_better(budget) else -1.0
        return _Scale(lambda error: sign * error, ())
    bound = [] if budget is None else [limit for limit in (budget.min, budget.max) if limit is not None]
    losses = [1.0 - error if reading.more_is_better(budget) else error for error in (*errors, *bound)]
    least = max(1e-7, min((loss for loss in losses if loss > 0), default=1e-7) / 3)

    if reading.more_is_better(budget):
        ticks = [tick for tick in _NINES if 1.0 - tick > least * 1.5]

        def place(error: float) -> float:
            return -log10(max(1.0 - error, least))

        return _Scale(place, (*ticks, 1.0))

    def place_of_error(error: float) -> float:
        return -log10(max(error, least))

    powers = range(int(log10(least)) - 1, int(log10(max(*losses, least))) + 2)
    decades = [10.0**power for power in powers if 10.0**power > least * 1.5]
    return _Scale(place_of_error, (0.0, *decades))


def _accuracy_axis(axes: Any, scale: _Scale, places: Sequence[float], findings: Findings) -> None:
    budget = findings.budget
    bound = None if budget is None else budget.min if budget.min is not None else budget.max
    reach = [*places, *([] if bound is None else [scale.place(bound)])]
    low, high = _roomy(min(reach), max(reach))
    axes.set_xlim(low, high)
    ticks = [tick for tick in scale.ticks if low <= scale.place(tick) <= high]
    if scale.ticks:
        axes.set_xticks([scale.place(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    elif not reading.more_is_better(budget):
        axes.xaxis.set_major_formatter(lambda tick, _: f"{-tick:g}")
    axes.set_xlabel(f"{reading.metric_label(budget)}  (more accurate to the right)")
    if bound is not None:
        at = scale.place(bound)
        axes.axvspan(low, at, color=_REFUSED, alpha=0.06, linewidth=0, zorder=0)
        axes.axvline(at, color=_REFUSED, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="budget")


def _speed_axis(axes: Any, speeds: Sequence[float]) -> None:
    axes.set_yscale("log")
    low, high = _roomy(log10(min(speeds)), log10(max(speeds)))
    axes.set_ylim(10**low, 10**high)
    _plain_ticks(axes, [10**low, 10**high], " x")
    axes.set_ylabel("speed-up over the reference")


def _plain_ticks(axes: Any, values: Sequence[float], unit: str = "") -> None:
    """Ticks of a logarithmic axis in plain figures: 1, 2 and 5, or the tens alone where those are many."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in _SPEED_TICKS if min(low, *values) <= tick <= max(high, *values)]
    if len(ticks) > 9:
        ticks = [tick for tick in ticks if abs(log10(tick) - round(log10(tick))) < 1e-6]
    axes.set_yticks(ticks, [f"{tick:g}{unit}" for tick in ticks])
    axes.set_yticks([], minor=True)


def _roomy(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * _ROOM or 0.1
    return low - room, high + room


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot, which would keep figures and look for a screen

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any, label: str) -> str:
    written = StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return embedded(written.getvalue(), label)


@contextmanager
def _settings() -> Iterator[None]:
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise NoPlots("matplotlib is not installed") from error
    with rc_context(_SETTINGS):
        yield


def embedded(svg: str, label: str) -> str:
    """A drawing of matplotlib's as an element of a page: the page's colours and font, no header, no unused ids."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)[\")]", body))
    body = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", body)
    # Several drawings stand in one page: what they refer to by name must not be another one's.
    prefix = re.sub(r"\W+", "-", label.lower())
    body = re.sub(r' id="([^"]+)"', rf' id="{prefix}-\1"', body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", body)
    body = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    head = re.search(r'viewBox="([^"]+)"', body)
    box = head[1] if head else "0 0 1 1"
    inner = body[body.index(">") + 1 :]
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">{inner.strip()}'
