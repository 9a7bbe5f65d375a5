"""What a person reads of the pipeline's runs: medians, comparisons, verdicts, a table, a plot and a file."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from loadtests.machine import describe_machine, describe_versions
from loadtests.pipeline_drive import Cell, Measured, Way
from loadtests.pipeline_models import Cost

GOAL_RATIO = 1.15


@dataclass(frozen=True, slots=True)
class Run:
    """One cell in one repeat, and what the steps cost without a server right after it; or what went wrong."""

    cell: Cell
    repeat: int
    measured: Measured | None = None
    costs: tuple[Cost, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A cell's medians. CPU times are microseconds a request, ratios those of the server's to the steps' alone.

    ``ratio`` is to the steps in batches of the server's size, ``ratio_single`` to one picture at a time,
    ``ratio_together`` to as many callers at once as the machine has CPUs.
    """

    cell: Cell
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    batch_rows: float
    server_cpu_us: float
    client_cpu_us: float
    steps_cpu_us: float
    ratio: float
    ratio_single: float
    ratio_together: float
    errors: int


@dataclass(frozen=True, slots=True)
class Against:
    """The ensemble over the client's three calls at one place, medians of the ratios; below 1 is less."""

    net: str
    concurrency: int
    requests_per_s: float
    p50: float
    p99: float
    server_cpu: float
    all_cpu: float


def reached_rows(measured: Measured, net: str) -> int:
    """The batch size to hold the net's executions against."""
    return max(1, round(measured.batch_rows[net] or 1))


def cost_of(costs: Sequence[Cost], rows: int, *, together: bool = False) -> float:
    """The CPU time of a picture in batches of ``rows``: by one caller, or by the most that were measured."""
    fitting = [cost for cost in costs if cost.batch_rows == rows]
    return (max if together else min)(fitting, key=lambda cost: cost.callers).cpu_us


def summarize_cell(cell: Cell, runs: Sequence[Run]) -> Row | None:
    """The medians of one cell; None where every repeat failed."""
    good = [(run.measured, run.costs) for run in runs if run.cell == cell and run.measured is not None]
    if not good:
        return None
    of_server = [(measured.server_cpu_us, costs, reached_rows(measured, cell.net)) for measured, costs in good]
    return Row(
        cell=cell,
        requests_per_s=median(measured.requests_per_s for measured, _ in good),
        p50_ms=median(measured.latency.p50_ms for measured, _ in good),
        p99_ms=median(measured.latency.p99_ms for measured, _ in good),
        batch_rows=median(measured.batch_rows[cell.net] or 1 for measured, _ in good),
        server_cpu_us=median(cpu_us for cpu_us, _, _ in of_server),
        client_cpu_us=median(measured.client_cpu_us for measured, _ in good),
        steps_cpu_us=median(cost_of(costs, rows) for _, costs, rows in of_server),
        ratio=median(cpu_us / cost_of(costs, rows) for cpu_us, costs, rows in of_server),
        ratio_single=median(cpu_us / cost_of(costs, 1) for cpu_us, costs, _ in of_server),
        ratio_together=median(cpu_us / cost_of(costs, rows, together=True) for cpu_us, costs, rows in of_server),
        errors=sum(sum(measured.errors.values()) for measured, _ in good),
    )


def compare(net: str, concurrency: int, runs: Sequence[Run]) -> Against | None:
    """The ensemble over HTTP against three calls over HTTP, repeat by repeat; None where no repeat has both."""
    found = {(run.cell, run.repeat): run.measured for run in runs if run.measured is not None}
    repeats = sorted({run.repeat for run in runs})
    ways = [(Cell(net, concurrency, way)) for way in (Way.ENSEMBLE_HTTP, Way.CLIENT_HTTP)]
    pairs = [
        (one, other)
        for repeat in repeats
        if (one := found.get((ways[0], repeat))) is not None and (other := found.get((ways[1], repeat))) is not None
    ]
    if not pairs:
        return None
    return Against(
        net,
        concurrency,
        requests_per_s=median(one.requests_per_s / other.requests_per_s for one, other in pairs),
        p50=median(one.latency.p50_ms / other.latency.p50_ms for one, other in pairs),
        p99=median(one.latency.p99_ms / other.latency.p99_ms for one, other in pairs),
        server_cpu=median(one.server_cpu_us / other.server_cpu_us for one, other in pairs),
        all_cpu=median(
            (one.server_cpu_us + one.client_cpu_us) / (other.server_cpu_us + other.client_cpu_us)
            for one, other in pairs
        ),
    )


def table(rows: Sequence[Row]) -> Table:
    """The medians as a table."""
    drawn = Table(title="Medians over the repeats; CPU in us a request")
    for heading in ("net", "c", "who calls"):
        drawn.add_column(heading)
    for heading in ("requests/s", "p50 ms", "p99 ms", "batch", "server", "client", "steps", "ratio", "b=1", "together"):
        drawn.add_column(heading, justify="right")
    drawn.add_column("errors", justify="right")
    for row in rows:
        drawn.add_row(
            *(row.cell.net, str(row.cell.concurrency), row.cell.way.value, f"{row.requests_per_s:,.1f}"),
            *(f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}", f"{row.batch_rows:.1f}"),
            *(f"{row.server_cpu_us:,.0f}", f"{row.client_cpu_us:,.0f}", f"{row.steps_cpu_us:,.0f}"),
            *(f"{row.ratio:.3f}", f"{row.ratio_single:.3f}", f"{row.ratio_together:.3f}", str(row.errors)),
        )
    return drawn


def verdicts(rows: Sequence[Row], comparisons: Sequence[Against]) -> list[str]:
    """Each goal, and whether it was reached."""
    lines = []
    for row in rows:
        if row.cell.way in (Way.ENSEMBLE_HTTP, Way.ENSEMBLE_GRPC):
            said = "met" if row.ratio <= GOAL_RATIO else "missed"
            lines.append(
                f"{row.cell.net} c={row.cell.concurrency} {row.cell.way}: {row.ratio:.3f} of the steps' own CPU, "
                f"goal at most {GOAL_RATIO}: {said}"
            )
    for one in comparisons:
        better = one.requests_per_s > 1 and one.p50 < 1 and one.p99 < 1
        lines.append(
            f"{one.net} c={one.concurrency} ensemble over three calls: {one.requests_per_s:.2f} x requests/s, "
            f"{one.p50:.2f} x p50, {one.p99:.2f} x p99, {one.server_cpu:.2f} x server CPU, "
            f"{one.all_cpu:.2f} x CPU with the client's; goal better: {'met' if better else 'missed'}"
        )
    return lines


def plot(rows: Sequence[Row], path: Path) -> None:
    """CPU beside the steps' own, and throughput, a column of panels for each net, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    nets = list(dict.fromkeys(row.cell.net for row in rows))
    figure = Figure(figsize=(5.5 * len(nets), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    for index, net in enumerate(nets):
        ours = [row for row in rows if row.cell.net == net]
        upper: Any = figure.add_subplot(2, len(nets), index + 1)
        _draw(upper, ours, lambda row: row.server_cpu_us / 1e3, f"{net}: server CPU, ms a request")
        sizes = sorted({row.cell.concurrency for row in ours})
        for place, size in enumerate(sizes):
            steps_ms = median(row.steps_cpu_us for row in ours if row.cell.concurrency == size) / 1e3
            label = "steps alone" if place == 0 else None
            upper.hlines(steps_ms, place - 0.45, place + 0.45, colors="black", linestyles="dashed", label=label)
        lower: Any = figure.add_subplot(2, len(nets), len(nets) + index + 1)
        _draw(lower, ours, lambda row: row.requests_per_s, f"{net}: requests/s")
        lower.legend(
            *upper.get_legend_handles_labels(),
            fontsize="small",
            loc="upper center",
            bbox_to_anchor=(0.5, -0.15),
            ncols=3,
        )
    figure.savefig(path, dpi=120)


def _draw(axes: Any, rows: Sequence[Row], value: Callable[[Row], float], title: str) -> None:
    sizes = sorted({row.cell.concurrency for row in rows})
    width = 0.8 / len(Way)
    for index, way in enumerate(Way):
        ours = [row for row in rows if row.cell.way is way]
        places = [sizes.index(row.cell.concurrency) + (index - (len(Way) - 1) / 2) * width for row in ours]
        axes.bar(places, [value(row) for row in ours], width, label=way.value)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("concurrency")
    axes.set_title(title)
    axes.grid(visible=True, axis="y", alpha=0.3)


def write(
    path: Path,
    plan: dict[str, Any],
    runs: Sequence[Run],
    rows: Sequence[Row],
    comparisons: Sequence[Against],
    server_command: Sequence[str],
) -> None:
    """Everything that was measured, and the medians, as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "loadtests.pipeline", *sys.argv[1:]],
        "server_command": ["python", *server_command[1:]],
        "machine": describe_machine(),
        "versions": describe_versions(),
        "plan": plan,
        "medians": [asdict(row) for row in rows],
        "ensemble_over_three_calls": [asdict(one) for one in comparisons],
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
