"""Adaptive batching beside every fixed pair of size and delay, simulated: ``python -m loadtests.simulate``."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from loadtests.schedule import burst_offsets_ns, poisson_offsets_ns, ramp_offsets_ns
from loadtests.simulation import Setup, SimulatedModel, simulate

RESULTS = Path(__file__).parent / "results"
OBJECTIVE_MS = 50.0
WARM_S = 1.0  # of each run: curves are learned, nothing is counted
MOST_ARRIVALS = 20_000  # of a run, so that a light model's is shorter

MODELS = (
    SimulatedModel("mlp", 1.0, 0.1, 64),
    SimulatedModel("resnet50", 1.0, 4.0, 32),
    SimulatedModel("minilm", 4.0, 0.7, 64),
    SimulatedModel("gpu", 15.0, 0.2, 64),
)
NEIGHBOUR = 1.4

Offsets = Callable[[float, float, int], list[int]]
PATTERNS: dict[str, Offsets] = {
    "poisson": poisson_offsets_ns,
    "bursts": burst_offsets_ns,
    "short bursts": lambda rate, seconds, seed: burst_offsets_ns(rate, seconds, seed, burst_s=0.05),
    "long bursts": lambda rate, seconds, seed: burst_offsets_ns(rate, seconds, seed, burst_s=1.0),
    "ramp": ramp_offsets_ns,
    "neighbour": burst_offsets_ns,  # bursts, and a model that is slower half of the time
}
SIZES = (1, 2, 4, 8, 16, 32, 64)
DELAYS_MS = (0.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Job:
    """One setup under one load."""

    model: SimulatedModel
    pattern: str
    setup: Setup
    load: float
    seconds: float
    seed: int


@dataclass(frozen=True, slots=True)
class Result:
    """What one job gave."""

    model: str
    pattern: str
    setup: str
    admission: bool
    seed: int
    goodput: float
    kept: float
    mean_rows: float
    p50_ms: float
    p99_ms: float


def run_job(job: Job) -> Result:
    """Simulate one job."""
    rate = job.load * job.model.capacity_per_s(job.setup.objective_ms) * job.setup.instances
    seconds = WARM_S + min(job.seconds, MOST_ARRIVALS / rate)
    arrivals_ns = PATTERNS[job.pattern](rate, seconds, job.seed)
    outcome = simulate(job.setup, job.model, arrivals_ns, job.seed, int(WARM_S * 1e9))
    ordered = sorted(outcome.latencies_ns) or [0]
    return Result(
        model=job.model.name,
        pattern=job.pattern,
        setup=job.setup.name,
        admission=job.setup.adaptive or job.setup.admission,
        seed=job.seed,
        goodput=outcome.goodput,
        kept=outcome.kept,
        mean_rows=outcome.rows / max(1, outcome.batches),
        p50_ms=ordered[len(ordered) // 2] * 1e-6,
        p99_ms=ordered[int(0.99 * (len(ordered) - 1))] * 1e-6,
    )


def jobs(
    models: Sequence[SimulatedModel], patterns: Sequence[str], seeds: int, seconds: float, load: float, instances: int
) -> Iterator[Job]:
    """Adaptive and the whole grid, twice, for each model, pattern and seed."""
    for model in models:
        sizes = [size for size in SIZES if size <= model.max_rows]
        setups = [Setup(adaptive=True, max_rows=model.max_rows, objective_ms=OBJECTIVE_MS, instances=instances)]
        setups += [
            replace(setups[0], adaptive=False, admission=admission, max_rows=size, delay_ms=delay_ms)
            for admission in (True, False)
            for size in sizes
            for delay_ms in DELAYS_MS
        ]
        for pattern in patterns:
            served = replace(model, neighbour=NEIGHBOUR) if pattern == "neighbour" else model
            for setup in setups:
                for seed in range(1, seeds + 1):
                    yield Job(served, pattern, setup, load, seconds, seed)


@dataclass(frozen=True, slots=True)
class Row:
    """One model under one pattern: adaptive, and the best fixed pair with and without admission, means of the seeds."""

    model: str
    pattern: str
    adaptive: float
    kept: float
    kept_worst: float
    with_admission: float
    with_admission_name: str
    with_admission_kept: float
    without: float
    without_name: str


def summarize(results: Sequence[Result]) -> list[Row]:
    """The table's rows."""
    rows = []
    for model, pattern in dict.fromkeys((one.model, one.pattern) for one in results):
        mine = [one for one in results if (one.model, one.pattern) == (model, pattern)]
        adaptive = [one for one in mine if one.setup == "adaptive"]
        best = {
            admission: max(
                (
                    [one for one in mine if one.setup == name and one.admission is admission]
                    for name in dict.fromkeys(one.setup for one in mine if one.setup != "adaptive")
                ),
                key=lambda some: mean(one.goodput for one in some),
            )
            for admission in (True, False)
        }
        rows.append(
            Row(
                model=model,
                pattern=pattern,
                adaptive=mean(one.goodput for one in adaptive),
                kept=mean(one.kept for one in adaptive),
                kept_worst=min(one.kept for one in adaptive),
                with_admission=mean(one.goodput for one in best[True]),
                with_admission_name=best[True][0].setup,
                with_admission_kept=mean(one.kept for one in best[True]),
                without=mean(one.goodput for one in best[False]),
                without_name=best[False][0].setup,
            )
        )
    return rows


def _columns(results: Sequence[Result]) -> dict[str, list[Any]]:
    """All results as columns, which is a fraction of the text that rows would be."""
    columns: dict[str, list[Any]] = {}
    for one in results:
        for key, value in asdict(one).items():
            columns.setdefault(key, []).append(round(value, 5) if isinstance(value, float) else value)
    return columns


def table(rows: Sequence[Row], title: str) -> Table:
    """For a person."""
    drawn = Table(title=title)
    for heading in ("model", "arrivals"):
        drawn.add_column(heading)
    for heading in ("adaptive", "kept", "worst", "best fixed, no admission", "", "best fixed, admission", "kept", ""):
        drawn.add_column(heading, justify="right")
    for row in rows:
        drawn.add_row(
            *(row.model, row.pattern, f"{row.adaptive:.1%}", f"{row.kept:.2%}", f"{row.kept_worst:.2%}"),
            *(f"{row.without:.1%}", row.without_name),
            *(f"{row.with_admission:.1%}", f"{row.with_admission_kept:.2%}", row.with_admission_name),
        )
    return drawn


def plot(rows: Sequence[Row], path: Path) -> None:
    """Goodput of the three, a panel for each model, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row.model for row in rows))
    figure = Figure(figsize=(4.2 * len(models), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for index, model in enumerate(models):
        axes: Any = figure.add_subplot(1, len(models), index + 1)
        mine = [row for row in rows if row.model == model]
        series = (
            ("adaptive", [row.adaptive for row in mine], "#1b6ca8"),
            ("best fixed pair with the same admission", [row.with_admission for row in mine], "#9cc5e3"),
            ("best fixed pair without admission", [row.without for row in mine], "#d9a441"),
        )
        for offset, (name, values, colour) in enumerate(series):
            axes.bar([at + 0.27 * (offset - 1) for at in range(len(mine))], values, 0.27, label=name, color=colour)
        axes.set_xticks(range(len(mine)), [row.pattern for row in mine], rotation=35, ha="right")
        axes.set_ylim(0, 1)
        axes.set_title(model)
        axes.set_ylabel(f"answered within {OBJECTIVE_MS:g} ms, of all requests")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def main(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="two kinds of arrival, one seed: under a minute")] = False,
    model: Annotated[list[str] | None, typer.Option(help="may be repeated; all unless given")] = None,
    pattern: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(PATTERNS)}; may be repeated")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each, each with other arrivals and noise")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="simulated, counted time of a run")] = 15.0,
    load: Annotated[float, typer.Option(min=0.01, help="of the capacity within the objective")] = 0.9,
    instances: Annotated[int, typer.Option(min=1, help="of the model")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="that simulate at the same time")] = 2,
    name: Annotated[str | None, typer.Option(help="of the files in loadtests/results; default local/DATE")] = None,
) -> None:
    """Simulate every model under every kind of arrival, adaptive and with every fixed pair, and compare goodput."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    patterns = pattern or (["poisson", "bursts"] if quick else list(PATTERNS))
    models = [one for one in MODELS if not model or one.name in model]
    unknown = sorted({*patterns} - set(PATTERNS)) + sorted({*(model or ())} - {one.name for one in MODELS})
    if unknown:
        known = f"models {', '.join(one.name for one in MODELS)}, arrivals {', '.join(PATTERNS)}"
        console.print(f"error: {unknown} is not known; there are {known}")
        raise typer.Exit(1)
    todo = list(jobs(models, patterns, 1 if quick else seeds, 5.0 if quick else seconds, load, instances))
    with ProcessPoolExecutor(processes) as pool:
        results = list(pool.map(run_job, todo, chunksize=8))
    rows = summarize(results)
    title = f"Answered within {OBJECTIVE_MS:g} ms at {load:.0%} load, {instances} instance(s); kept: of those accepted"
    console.print(table(rows, title))
    path = RESULTS / f"{name or datetime.now(UTC).strftime('local/%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"command": sys.argv[1:], "rows": [asdict(row) for row in rows], "results": _columns(results)}
    path.write_text(json.dumps(document) + "\n")
    plot(rows, path.with_suffix(".png"))
    console.print(f"written to {path}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
