"""A comparison's raw runs made into what a person reads: medians, ratios, a table and plots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from loadtests.report import Cell

OURS = "headrace"


class Metric(StrEnum):
    """What is compared, named as in ``Figures``."""

    THROUGHPUT = "requests_per_s"
    P50 = "p50_ms"
    P99 = "p99_ms"
    CPU = "server_cpu_us"

    @property
    def label(self) -> str:
        """For tables and plots."""
        return {"requests_per_s": "requests/s", "p50_ms": "p50 ms", "p99_ms": "p99 ms", "server_cpu_us": "CPU us"}[self]


@dataclass(frozen=True, slots=True)
class Run:
    """One server in one cell of one repeat: drive's JSON, or the message it failed with."""

    server: str
    cell: Cell
    repeat: int
    result: dict[str, Any] | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """A server's medians in one cell."""

    server: str
    cell: Cell
    repeats: int
    figures: Mapping[Metric, float | None]
    batch_rows: float | None
    driver_cpu_share: float
    errors: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """Headrace's value over the rival's of the same repeat, then the median: above 1 is good for throughput only."""

    rival: str
    cell: Cell
    values: Mapping[Metric, float | None]

    def of(self, metric: Metric) -> float | None:
        """None where it could not be measured on both sides."""
        return self.values[metric]


def figure(result: Mapping[str, Any], metric: Metric) -> float | None:
    """One number out of drive's JSON."""
    value = result["latency"][metric] if metric in (Metric.P50, Metric.P99) else result[metric]
    return None if value is None else float(value)


def summarize(server: str, cell: Cell, runs: Sequence[Run]) -> Row | None:
    """The medians; None where every repeat failed."""
    results = [run.result for run in runs if run.server == server and run.cell == cell and run.result is not None]
    if not results:
        return None
    return Row(
        server=server,
        cell=cell,
        repeats=len(results),
        figures={metric: _median([figure(result, metric) for result in results]) for metric in Metric},
        batch_rows=_median([result["mean_batch_rows"] for result in results]),
        driver_cpu_share=median(result["driver_cpu_share"] for result in results),
        errors=sum(sum(result["errors"].values()) for result in results),
    )


def compare(rival: str, cell: Cell, runs: Sequence[Run]) -> Ratio | None:
    """Headrace beside one rival; None without a repeat that measured both."""
    found = {(run.server, run.repeat): run.result for run in runs if run.cell == cell and run.result is not None}
    pairs = [
        (found[OURS, repeat], result)
        for (server, repeat), result in found.items()
        if server == rival and (OURS, repeat) in found
    ]
    if not pairs:
        return None
    values = {
        metric: _median([_over(figure(ours, metric), figure(theirs, metric)) for ours, theirs in pairs])
        for metric in Metric
    }
    return Ratio(rival, cell, values)


def _over(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or not theirs else ours / theirs


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def table(cells: Sequence[tuple[str, Cell]], rows: Sequence[Row], ratios: Sequence[Ratio]) -> Table:
    """Medians, and beside each peer's what Headrace's are of them. A place without a row failed in every repeat."""
    rows_by_place = {(row.server, row.cell): row for row in rows}
    ratios_by_place = {(ratio.rival, ratio.cell): ratio for ratio in ratios}
    drawn = Table(title="Medians over the repeats, and Headrace's over each peer's")
    for heading in ("model", "protocol", "c", "server"):
        drawn.add_column(heading, justify="right" if heading == "c" else "left", no_wrap=True)
    for heading in (*(metric.label for metric in Metric), "batch", "driver", "errors"):
        drawn.add_column(heading, justify="right")
    for metric in Metric:
        drawn.add_column(f"x {metric.label}", justify="right")
    last = None
    for server, cell in cells:
        if last not in (None, cell):
            drawn.add_section()
        last = cell
        row, ratio = rows_by_place.get((server, cell)), ratios_by_place.get((server, cell))
        place = (cell.model, cell.protocol, cell.clients, server)
        drawn.add_row(*place, *(_figures(row) if row else ["failed"]), *(_ratios(ratio) if row and ratio else []))
    return drawn


def _figures(row: Row) -> list[str]:
    forms = {Metric.THROUGHPUT: ",.1f", Metric.P50: ".2f", Metric.P99: ".2f", Metric.CPU: ",.0f"}
    return [
        *(_or_dash(row.figures[metric], form) for metric, form in forms.items()),
        _or_dash(row.batch_rows, ".1f"),
        f"{row.driver_cpu_share:.0%}",
        str(row.errors),
    ]


def _ratios(ratio: Ratio) -> list[str]:
    return [_or_dash(ratio.of(metric), ".2f") for metric in Metric]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def plot(rows: Sequence[Row], path: Path) -> list[Path]:
    """A PNG file for each protocol beside ``path``: a column for each model, a line for each server."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    servers = list(dict.fromkeys(row.server for row in rows))
    for protocol in dict.fromkeys(row.cell.protocol for row in rows):
        ours = [row for row in rows if row.cell.protocol == protocol and not row.cell.share]
        models = list(dict.fromkeys(row.cell.model for row in ours))
        sheet = Figure(figsize=(1 + 3.6 * len(models), 11), layout="constrained")
        FigureCanvasAgg(sheet)
        panels = sheet.subplots(len(Metric), len(models), squeeze=False, sharex="col")
        for column, model in enumerate(models):
            for line, metric in enumerate(Metric):
                shown = [row for row in ours if row.cell.model == model]
                _draw_panel(panels[line][column], metric, shown, servers)
            panels[0][column].set_title(f"{model}, {protocol}")
            panels[-1][column].set_xlabel("concurrency")
        handles = {}
        for panel in panels.flat:
            handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        sheet.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles) or 1)
        written.append(path.with_name(f"{path.stem}-{protocol}.png"))
        sheet.savefig(written[-1], dpi=110)
    return written


def _draw_panel(panel: Any, metric: Metric, rows: Sequence[Row], servers: Sequence[str]) -> None:
    sizes = sorted({row.cell.concurrency for row in rows})
    for index, server in enumerate(servers):
        points = [
            (sizes.index(row.cell.concurrency), value)
            for row in rows
            if row.server == server and (value := row.figures[metric]) is not None
        ]
        if points:
            width = 2.5 if server == OURS else 1.2
            panel.plot(*zip(*points, strict=True), marker="o", label=server, color=f"C{index}", linewidth=width)
    panel.set_yscale("log")
    panel.set_ylabel(metric.label)
    panel.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    panel.grid(visible=True, axis="y", alpha=0.3)
