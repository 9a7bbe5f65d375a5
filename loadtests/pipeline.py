"""A pipeline of three models under load: ``python -m loadtests.pipeline`` compares who calls the steps."""

import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from loadtests.http_message import BadResponse
from loadtests.limit import usable_cpus
from loadtests.pipeline_drive import Cell, Job, Way, drive
from loadtests.pipeline_models import (
    NETS,
    caller_of,
    ensemble_of,
    expected_scores,
    make_pictures,
    measure_steps,
    place_pipeline,
)
from loadtests.pipeline_report import Run, compare, plot, reached_rows, summarize_cell, table, verdicts, write
from loadtests.run import RESULTS
from loadtests.server import Server, ServerFailure

PICTURES = 36

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure and for how long. ``steps_s`` is that of each batch size without a server."""

    nets: tuple[str, ...]
    concurrencies: tuple[int, ...]
    repeats: int
    seconds: float
    warmup_s: float
    steps_s: float
    threads: int
    server_options: tuple[str, ...] = ()

    def cells(self, repeat: int) -> list[Cell]:
        """One repeat in order: every second one backwards, and another way first in each."""
        ways = list(Way)
        first = repeat // 2 % len(ways)
        cells = [
            Cell(net, concurrency, way)
            for net in self.nets
            for concurrency in self.concurrencies
            for way in (*ways[first:], *ways[:first])
        ]
        return cells[::-1] if repeat % 2 else cells


FULL = Plan(tuple(NETS), (1, 4, 8), repeats=3, seconds=5.0, warmup_s=1.0, steps_s=1.5, threads=1)
QUICK = Plan(("mobilenet",), (1, 4), repeats=1, seconds=2.0, warmup_s=1.0, steps_s=0.5, threads=1)


def _apart(function: Callable[..., Result], *arguments: object) -> Result:
    """Call it in a fresh process, so that nothing warms another up or counts as another's CPU time."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run_plan(plan: Plan, console: Console) -> tuple[list[Run], list[str]]:
    """Build, serve and measure; also gives the server's command line.

    Raises:
        ServerFailure: the server did not start, get ready or end well.
    """
    runs: list[Run] = []
    cpus = usable_cpus()
    with tempfile.TemporaryDirectory(prefix="headrace-pipeline-") as folder:
        repository = Path(folder) / "repository"
        place_pipeline(repository, plan.nets, plan.threads)
        pictures = tuple(make_pictures(PICTURES))
        scores = {net: _apart(expected_scores, repository, net, plan.threads, pictures) for net in plan.nets}
        with Server(repository, Path(folder) / "server.log", plan.server_options) as server:
            for net in plan.nets:
                server.require_model(ensemble_of(net))
                server.require_model(caller_of(net))
            for repeat in range(plan.repeats):
                for cell in plan.cells(repeat):
                    console.print(f"repeat {repeat + 1}: {cell.net} c={cell.concurrency} {cell.way}", highlight=False)
                    ports = server.http_port, server.grpc_port, server.metrics_port
                    job = Job(cell, *ports, server.pid, plan.seconds, plan.warmup_s, pictures, scores[cell.net])
                    try:
                        measured = _apart(drive, job)
                    except (BadResponse, OSError) as error:
                        runs.append(Run(cell, repeat, problem=f"{type(error).__name__}: {error}"))
                        continue
                    sizes = sorted({1, reached_rows(measured, cell.net)})
                    callers = min(cell.concurrency, cpus)
                    how = repository, cell.net, plan.threads, pictures, sizes, callers, plan.steps_s
                    runs.append(Run(cell, repeat, measured, tuple(_apart(measure_steps, *how))))
        return runs, server.command


def main(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="about a minute: one net, fewer clients, one repeat")] = False,
    net: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(NETS)}; may be repeated")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="may be repeated")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="times that the whole matrix is measured")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="length of each measured window")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="of the net's session; default all usable CPUs")] = None,
    server_option: Annotated[list[str] | None, typer.Option(help="handed to `headrace serve`")] = None,
    name: Annotated[str | None, typer.Option(help="of the files in loadtests/results; default local/DATE")] = None,
) -> None:
    """Serve a pipeline, have it called in every way, measure its steps without a server beside it, compare."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    basis = QUICK if quick else FULL
    plan = Plan(
        nets=tuple(dict.fromkeys(net or basis.nets)),
        concurrencies=tuple(sorted(set(concurrency or basis.concurrencies))),
        repeats=repeats or basis.repeats,
        seconds=seconds or basis.seconds,
        warmup_s=basis.warmup_s,
        steps_s=basis.steps_s,
        threads=threads or usable_cpus(),
        server_options=tuple(server_option or ()),
    )
    try:
        runs, server_command = run_plan(plan, console)
    except (ServerFailure, ValueError) as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from None
    rows = [row for cell in plan.cells(0) if (row := summarize_cell(cell, runs)) is not None]
    places = [(net, size) for net in plan.nets for size in plan.concurrencies]
    comparisons = [one for place in places if (one := compare(*place, runs)) is not None]
    path = RESULTS / f"{name or datetime.now(UTC).strftime('local/pipeline-%Y%m%d-%H%M%S')}.json"
    write(path, asdict(plan), runs, rows, comparisons, server_command)
    console.print(table(rows))
    for line in verdicts(rows, comparisons):
        console.print(line, markup=False, highlight=False)
    failures = [run for run in runs if run.problem is not None]
    for run in failures:
        console.print(f"failed: {run.cell} in repeat {run.repeat}: {run.problem}", markup=False, highlight=False)
    if rows:
        plot(rows, path.with_suffix(".png"))
    console.print(f"written to {path}", highlight=False)
    raise typer.Exit(1 if failures or any(row.errors for row in rows) else 0)


if __name__ == "__main__":
    typer.run(main)
