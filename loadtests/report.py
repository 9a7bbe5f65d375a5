"""Raw runs made into what a person reads: medians over the repeats, a table and a plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from loadtests.limit import Point, best


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the matrix: a closed loop, or an open one at a ``share`` of what the slowest server can do."""

    model: str
    protocol: str
    concurrency: int
    share: float = 0.0

    @property
    def clients(self) -> str:
        """For tables: how many there are, or what they ask."""
        return f"{self.share:.0%}" if self.share else str(self.concurrency)


@dataclass(frozen=True, slots=True)
class Run:
    """One cell in one repeat: drive's JSON, or the message it failed with."""

    cell: Cell
    repeat: int
    result: dict[str, Any] | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """A cell's medians. ``ratio`` is rows/s over the limit of the same repeat.

    ``same_ratio`` is the same over the limit with the layout of threads that is served.
    """

    cell: Cell
    repeats: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    batch_rows: float | None
    server_cpu_us: float | None
    limit_rows_per_s: float
    ratio: float
    same_ratio: float
    driver_cpu_share: float
    errors: int


Limits = dict[tuple[str, int], list[Point]]  # by model and repeat


def summarize_cell(cell: Cell, runs: Sequence[Run], limits: Limits, instances: int = 1) -> Row | None:
    """The medians of one cell, whose model has so many instances; None where every repeat failed."""
    good = [(run.repeat, run.result) for run in runs if run.cell == cell and run.result is not None]
    if not good:
        return None
    results = [result for _, result in good]
    limit = [best(limits[cell.model, repeat], cell.concurrency).rows_per_s for repeat, _ in good]
    same = [best(limits[cell.model, repeat], cell.concurrency, instances).rows_per_s for repeat, _ in good]
    rates = [float(result["requests_per_s"]) for result in results]
    return Row(
        cell=cell,
        repeats=len(good),
        requests_per_s=median(rates),
        p50_ms=median(result["latency"]["p50_ms"] for result in results),
        p99_ms=median(result["latency"]["p99_ms"] for result in results),
        batch_rows=_median_known([result["mean_batch_rows"] for result in results]),
        server_cpu_us=_median_known([result["server_cpu_us"] for result in results]),
        limit_rows_per_s=median(limit),
        ratio=median(rate / most for rate, most in zip(rates, limit, strict=True)),
        same_ratio=median(rate / most for rate, most in zip(rates, same, strict=True)),
        driver_cpu_share=median(result["driver_cpu_share"] for result in results),
        errors=sum(sum(result["errors"].values()) for result in results),
    )


def _median_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def table(cells: Sequence[Cell], rows: Sequence[Row]) -> Table:
    """The medians as a table; a cell without a row failed in every repeat."""
    found = {row.cell: row for row in rows}
    drawn = Table(title="Medians over the repeats")
    for heading in ("model", "protocol"):
        drawn.add_column(heading)
    for heading in (
        "c",
        "requests/s",
        "p50 ms",
        "p99 ms",
        "batch",
        "CPU us",
        "limit",
        "ratio",
        "same",
        "driver",
        "errors",
    ):
        drawn.add_column(heading, justify="right")
    for cell in cells:
        row = found.get(cell)
        drawn.add_row(cell.model, cell.protocol, str(cell.concurrency), *(_figures(row) if row else ["failed"]))
    return drawn


def _figures(row: Row) -> list[str]:
    return [
        f"{row.requests_per_s:,.1f}",
        f"{row.p50_ms:.2f}",
        f"{row.p99_ms:.2f}",
        "-" if row.batch_rows is None else f"{row.batch_rows:.1f}",
        "-" if row.server_cpu_us is None else f"{row.server_cpu_us:,.0f}",
        f"{row.limit_rows_per_s:,.1f}",
        f"{row.ratio:.1%}",
        f"{row.same_ratio:.1%}",
        f"{row.driver_cpu_share:.0%}",
        str(row.errors),
    ]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Throughput beside the in-process limit, a panel for each model, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row.cell.model for row in rows))
    figure = Figure(figsize=(4.5 * len(models), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for index, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), index + 1)
        _draw_panel(axes, model, [row for row in rows if row.cell.model == model])
    figure.savefig(path, dpi=120)


def _draw_panel(axes: Any, model: str, rows: Sequence[Row]) -> None:
    protocols = list(dict.fromkeys(row.cell.protocol for row in rows))
    sizes = sorted({row.cell.concurrency for row in rows})
    for protocol in protocols:
        ours = [row for row in rows if row.cell.protocol == protocol]
        places = [sizes.index(row.cell.concurrency) for row in ours]
        axes.plot(places, [row.requests_per_s for row in ours], marker="o", label=protocol)
    # Every protocol has the same limit, a step for each concurrency.
    limits = {row.cell.concurrency: row.limit_rows_per_s for row in rows}
    for place, size in enumerate(sizes):
        label = "in-process limit" if place == 0 else None
        axes.hlines(limits[size], place - 0.4, place + 0.4, colors="black", linestyles="dashed", label=label)
    axes.set_yscale("log")
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("concurrency")
    axes.set_ylabel("requests/s")
    axes.set_title(model)
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
