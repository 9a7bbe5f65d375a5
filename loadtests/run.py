"""The whole load test: ``python -m loadtests.run`` serves the load models and drives each in every way asked for."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loadtests.drive import Wire
from loadtests.limit import Point, usable_cpus
from loadtests.machine import describe_machine, describe_versions
from loadtests.models import MODELS, place, save_sample
from loadtests.optimize import search
from loadtests.report import Cell, Limits, Row, Run, plot, summarize_cell, table
from loadtests.server import HOST, Server, ServerFailure

RESULTS = Path(__file__).parent / "results"
SEARCH_S = 600  # for the plan of a model, where one is asked for
_MODEL_CACHE = Path(tempfile.gettempdir()) / "headrace-loadtest-models"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure and for how long."""

    models: tuple[str, ...]
    protocols: tuple[Wire, ...]
    concurrencies: tuple[int, ...]
    repeats: int
    seconds: float
    warmup_s: float
    limit_s: float
    threads: int
    instances: int = 1  # of each model; several have one thread each
    optimized: bool = False  # for throughput by `headrace optimize`, before they are served
    server_options: tuple[str, ...] = ()

    def cells(self, repeat: int) -> list[Cell]:
        """One repeat in order; every second one backwards, so that a machine that slows down hits both ends."""
        cells = [
            Cell(model, protocol.value, concurrency)
            for model in self.models
            for protocol in self.protocols
            for concurrency in self.concurrencies
        ]
        return cells[::-1] if repeat % 2 else cells


FULL = Plan(
    models=tuple(MODELS),
    protocols=tuple(Wire),
    concurrencies=(1, 8, 32),
    repeats=3,
    seconds=4.0,
    warmup_s=1.0,
    limit_s=1.0,
    threads=1,
)
QUICK = Plan(
    models=("identity", "mlp"),
    protocols=(Wire.HTTP_BINARY, Wire.GRPC),
    concurrencies=(1, 32),
    repeats=1,
    seconds=3.0,
    warmup_s=0.5,
    limit_s=0.5,
    threads=1,
)


class Bench:
    """Carries one plan out. Every measurement is a process of its own, so that none warms another up."""

    def __init__(self, plan: Plan, work: Path, samples: dict[str, dict[str, Path]], repository: Path) -> None:
        self._plan = plan
        self._work = work
        self._samples = samples
        self._repository = repository
        self.runs: list[Run] = []
        self.limits: Limits = {}
        self.chosen: dict[str, str] = {}  # what the optimiser says that it has chosen, by model

    def run(self, server: Server, step: Callable[[str], None]) -> None:
        """Measure every repeat; ``step`` is told what comes next."""
        for model in self._plan.models:
            server.require_model(model)
        for repeat in range(self._plan.repeats):
            measured: set[str] = set()
            for cell in self._plan.cells(repeat):
                if cell.model not in measured:  # beside its cells, for a neighbour's load to hit both
                    measured.add(cell.model)
                    step(f"{cell.model} in-process")
                    self.limits[cell.model, repeat] = self._measure_limit(cell.model)
                step(f"{cell.model} {cell.protocol} c={cell.concurrency}")
                self.runs.append(self._drive(cell, repeat, server))

    def steps(self) -> int:
        """How many measurements there are."""
        plan = self._plan
        return plan.repeats * len(plan.models) * (1 + len(plan.protocols) * len(plan.concurrencies))

    def _measure_limit(self, model: str) -> list[Point]:
        output = self._work / "limit.json"
        sizes = sorted({1, *self._plan.concurrencies})
        problem = run_module(
            "loadtests.limit",
            str(place(model, self._repository)),
            *self._inputs(model),
            *(part for size in sizes for part in ("--batch-size", str(size))),
            *("--threads", str(self._plan.threads), "--seconds", str(self._plan.limit_s), "--output", str(output)),
        )
        if problem is not None:
            raise ServerFailure(f"the in-process limit of model '{model}' could not be measured: {problem}")
        return [Point(**point) for point in json.loads(output.read_text())]

    def _drive(self, cell: Cell, repeat: int, server: Server) -> Run:
        output = self._work / "drive.json"
        port = server.grpc_port if cell.protocol == Wire.GRPC else server.http_port
        problem = run_module(
            "loadtests.drive",
            *("--url", f"{HOST}:{port}", "--protocol", cell.protocol, "--model", cell.model),
            *self._inputs(cell.model),
            *("--concurrency", str(cell.concurrency), "--seconds", str(self._plan.seconds)),
            *("--warmup", str(self._plan.warmup_s), "--server-pid", str(server.pid)),
            *("--metrics-url", f"{HOST}:{server.metrics_port}", "--output", str(output)),
        )
        result: dict[str, Any] | None = json.loads(output.read_text()) if problem is None else None
        return Run(cell, repeat, result, problem)

    def _inputs(self, model: str) -> Iterable[str]:
        for name, path in self._samples[model].items():
            yield from ("--npy", f"{name}={path}")


def run_module(module: str, *arguments: str, timeout_s: float | None = None) -> str | None:
    """Run one of our modules as a process; what it complained of if it failed, else None."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"no end after {timeout_s} s"
    return None if done.returncode == 0 else (done.stderr.strip()[-500:] or f"exit code {done.returncode}")


def optimize(model: str, repository: Path, plans: Path) -> str:
    """Have the model's plan made, if anything is faster than the model as it is. Returns what was chosen, and why.

    Raises:
        ServerFailure: the search failed.
    """
    try:
        findings, _ = search(model, repository, plans, SEARCH_S, "--objective", "throughput")
    except RuntimeError as error:
        raise ServerFailure(f"model '{model}' could not be optimised: {error}") from error
    return f"{findings.chosen.name}, {findings.chosen.layout}: {findings.why}"


def run_plan(plan: Plan, console: Console) -> tuple[Bench, list[str]]:
    """Build the models, serve them, measure, stop; also gives the server's command line.

    Raises:
        ServerFailure: the server or the in-process limit failed, so that there is nothing to compare.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-loadtest-") as folder:
        work = Path(folder)
        repository = work / "repository"
        repository.mkdir()
        for model in plan.models:
            place(model, _MODEL_CACHE)
            shutil.copytree(_MODEL_CACHE / model, repository / model)  # so that nothing but the plan's is served
            if plan.instances > 1:
                (repository / model / "config.yaml").write_text(
                    f"instances: [{{device: cpu, count: {plan.instances}}}]\nparameters: {{intra_op_threads: 1}}\n"
                )
        samples = {model: save_sample(model, work / "samples") for model in plan.models}
        bench = Bench(plan, work, samples, repository)
        options = plan.server_options
        if plan.optimized:
            for model in plan.models:
                console.print(f"optimising {model} for throughput")
                bench.chosen[model] = optimize(model, repository, work / "plans")
                console.print(f"  {bench.chosen[model]}", markup=False, highlight=False)
            options = ("--plan-cache", str(work / "plans"), *options)
        progress = Progress(
            *(TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn()),
            *(TimeElapsedColumn(), TimeRemainingColumn()),
            console=console,
        )
        with progress:
            task = progress.add_task("starting the server", total=bench.steps())
            began = iter(range(bench.steps()))

            def step(description: str) -> None:
                progress.update(task, description=description, completed=next(began))

            with Server(repository, work / "server.log", options) as server:
                bench.run(server, step)
            progress.update(task, description="done", completed=bench.steps())
        return bench, server.command


def write(path: Path, plan: Plan, bench: Bench, rows: Sequence[Row], server_command: Sequence[str]) -> None:
    """Everything that was measured, and the medians, as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "loadtests.run", *sys.argv[1:]],
        "server_command": ["python", *server_command[1:]],
        "machine": describe_machine(),
        "versions": describe_versions(),
        "plan": asdict(plan),
        "chosen": bench.chosen,
        "medians": [asdict(row) for row in rows],
        "limits": [
            {"model": model, "repeat": repeat, "points": [asdict(point) for point in points]}
            for (model, repeat), points in bench.limits.items()
        ],
        "runs": [asdict(run) for run in bench.runs],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def main(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="about a minute: fewer models, protocols and repeats")] = False,
    model: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(MODELS)}; may be repeated")] = None,
    protocol: Annotated[list[Wire] | None, typer.Option(help="may be repeated")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="may be repeated")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="times that the whole matrix is measured")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="length of each measured window")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="of the in-process limit; default all usable CPUs")] = None,
    one_thread_instances: Annotated[
        bool,
        typer.Option("--one-thread-instances", help="serve an instance of one thread for each of --threads"),
    ] = False,
    optimized: Annotated[
        bool,
        typer.Option("--optimized", help="serve the plans that `headrace optimize --objective throughput` makes first"),
    ] = False,
    server_option: Annotated[
        list[str] | None, typer.Option(help="handed to `headrace serve`, as --server-option=--log-format=json")
    ] = None,
    name: Annotated[str | None, typer.Option(help="of the files in loadtests/results; default local/DATE")] = None,
) -> None:
    """Serve the load models, drive them, measure ONNX Runtime in-process beside them, compare."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    basis = QUICK if quick else FULL
    unknown = sorted(set(model or ()) - set(MODELS))
    if unknown:
        console.print(f"error: no load model {unknown}; there are {', '.join(MODELS)}")
        raise typer.Exit(1)
    threads = threads or usable_cpus()
    seconds = seconds or basis.seconds
    plan = Plan(
        models=tuple(dict.fromkeys(model or basis.models)),
        protocols=tuple(dict.fromkeys(protocol or basis.protocols)),
        concurrencies=tuple(sorted(set(concurrency or basis.concurrencies))),
        repeats=repeats or basis.repeats,
        seconds=seconds,
        warmup_s=basis.warmup_s,
        limit_s=max(basis.limit_s, seconds / 4),
        threads=threads,
        instances=threads if one_thread_instances else 1,
        optimized=optimized,
        server_options=tuple(server_option or ()),
    )
    try:
        bench, server_command = run_plan(plan, console)
    except ServerFailure as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from None
    cells = plan.cells(0)
    rows = [row for cell in cells if (row := summarize_cell(cell, bench.runs, bench.limits, plan.instances))]
    path = RESULTS / f"{name or datetime.now(UTC).strftime('local/%Y%m%d-%H%M%S')}.json"
    write(path, plan, bench, rows, server_command)
    console.print(table(cells, rows))
    failures = [run for run in bench.runs if run.problem is not None]
    for run in failures:
        console.print(f"failed: {run.cell} in repeat {run.repeat}: {run.problem}", markup=False, highlight=False)
    if rows:
        plot(rows, path.with_suffix(".png"))
    console.print(f"written to {path}", highlight=False)
    raise typer.Exit(1 if failures or any(row.errors for row in rows) else 0)


if __name__ == "__main__":
    typer.run(main)
