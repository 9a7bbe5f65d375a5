"""What a person reads of the optimiser's load test: tables, and plots of the cases and of the sweeps."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from headrace_backends.optimize import reading
from headrace_backends.optimize.accuracy import FLOAT_NOISE
from headrace_backends.optimize.findings import Fate, Findings, Row
from loadtests.optimize_models import Case
from loadtests.optimize_sweep import EVEN, SHARE, Sweep
from loadtests.optimize_verdict import Verdict

_COLOURS = {Fate.CHOSEN: "tab:green", Fate.KEPT: "tab:blue", Fate.SLOWER: "tab:gray", Fate.REFUSED: "tab:red"}
_LEAST_ERROR = 1e-6  # so small is drawn what is no different


def describe(row: Row) -> dict[str, object]:
    """One candidate, for the file."""
    return {
        "form": row.form.name,
        "layout": row.form.layout,
        "fate": str(row.fate),
        "speedup": row.speedup,
        "reason": row.reason,
        "errors": None if row.errors is None else msgspec.to_builtins(row.errors),
        "held_back": None if row.held_back is None else msgspec.to_builtins(row.held_back),
        "file_bytes": row.file_bytes,
        "build_s": row.build_s,
        "notes": list(row.notes),
    }


def table(verdicts: Sequence[Verdict]) -> Table:
    """One row a case."""
    drawn = Table(title="The chosen form over the model as it was dropped in")
    for heading in ("case", "chosen", "x dropped in", "x ONNX Runtime", "on the held-back half", "s", ""):
        drawn.add_column(heading, justify="right" if heading.startswith("x") or heading == "s" else "left")
    for one in verdicts:
        over = "-" if one.over_onnxruntime is None else f"{one.over_onnxruntime:.2f}"
        result = "; ".join(one.missed) or "met"
        drawn.add_row(one.case, one.form, f"{one.speedup:.2f}", over, one.held_back, f"{one.seconds:.0f}", result)
    return drawn


def sweep_table(sweeps: Sequence[Sweep]) -> Table:
    """One row a model."""
    drawn = Table(title="The search beside a sweep of everything")
    for heading in (
        "model",
        "found",
        "best of all",
        "x",
        "best's x",
        "of its speed",
        "s",
        "sweep's s",
        "of its time",
        "",
    ):
        right = heading not in ("model", "found", "best of all", "")
        drawn.add_column(heading, justify="right" if right else "left")
    for one in sweeps:
        drawn.add_row(
            *(one.model, one.found, one.best, f"{one.found_speedup:.2f}", f"{one.best_speedup:.2f}"),
            *(f"{one.beside:.0%}", f"{one.search_s:.0f}", f"{one.sweep_s:.0f}", f"{one.share:.0%}"),
            "; ".join(one.missed) or "met",
        )
    return drawn


def plot(cases: Sequence[Case], found: Mapping[str, Findings], sweeps: Sequence[Sweep], path: Path) -> None:
    """Of each case speed over error, of all what was reached beside the goal, and the sweeps, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [case for case in cases if case.name in found]
    count = len(shown) + bool(shown) + 2 * bool(sweeps)
    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Any] = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    if shown:
        _draw_goals(panels.pop(0), shown, found)
    for case in shown:
        _draw_candidates(panels.pop(0), case, found[case.name])
    if sweeps:
        names = [one.model for one in sweeps]
        _draw_bars(panels.pop(0), names, [one.beside for one in sweeps], EVEN, "speed, of the best of all")
        _draw_bars(panels.pop(0), names, [one.share for one in sweeps], SHARE, "search's time, of the sweep's")
    figure.savefig(path, dpi=120)


def _draw_candidates(axes: Any, case: Case, findings: Findings) -> None:
    """Speed over the error that the budget is about; the form to be chosen is the highest that is not red."""
    for fate, colour in _COLOURS.items():
        points = [point for row in findings.rows if row.fate is fate and (point := _point(row, findings)) is not None]
        if points:
            axes.scatter(*zip(*points, strict=True), color=colour, label=str(fate), s=30 if fate is Fate.CHOSEN else 14)
    axes.axhline(case.goal, color="black", linestyle="dashed", label="goal")
    if (bound := _bound(findings)) is not None:
        axes.axvline(bound, color="tab:red", linestyle="dotted", label="budget")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(case.name)
    label = reading.metric_label(findings.budget)
    axes.set_xlabel(f"1 - {label}" if reading.more_is_better(findings.budget) else label)
    axes.set_ylabel("times as fast as dropped in")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")


def _point(row: Row, findings: Findings) -> tuple[float, float] | None:
    """Error and speed; None where one of them is not known."""
    value = reading.decided_by(row, findings.budget)
    if value is None or not isfinite(value) or not row.speedup:
        return None
    return _drawn(value, findings), row.speedup


def _bound(findings: Findings) -> float | None:
    """The largest error that is allowed; None where a log scale cannot show it."""
    budget = findings.budget
    if budget is None:
        return FLOAT_NOISE
    bound = budget.min if budget.min is not None else budget.max
    return None if bound is None or bound in (0.0, 1.0) else _drawn(bound, findings)


def _drawn(value: float, findings: Findings) -> float:
    return max(_LEAST_ERROR, 1.0 - value if reading.more_is_better(findings.budget) else value)


def _draw_goals(axes: Any, cases: Sequence[Case], found: Mapping[str, Findings]) -> None:
    speeds = [reading.chosen(found[case.name]).row.speedup or 0.0 for case in cases]
    places = range(len(cases))
    axes.bar(places, speeds, 0.7, label="chosen")
    for place, case in enumerate(cases):
        label = "goal" if place == 0 else None
        axes.hlines(case.goal, place - 0.45, place + 0.45, colors="black", linestyles="dashed", label=label)
    axes.set_xticks(places, [case.name for case in cases], rotation=30, ha="right")
    axes.set_yscale("log")
    axes.set_title("times as fast as dropped in")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(fontsize="small")


def _draw_bars(axes: Any, names: Sequence[str], values: Sequence[float], goal: float, title: str) -> None:
    axes.bar(range(len(names)), values, 0.6)
    axes.axhline(goal, color="black", linestyle="dashed", label="goal")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_title(title)
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(fontsize="small")
