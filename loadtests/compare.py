"""Headrace beside its peers: ``python -m loadtests.compare`` serves the load models with each, drives each in turn."""

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loadtests.compare_goals import MOST_UNDER_WAY, PART_LOAD, goal_table, goals, judge
from loadtests.compare_report import OURS, Run, compare, plot, summarize, table
from loadtests.contenders import CONTENDERS, Running, job_of, model_cache
from loadtests.cpu import read_processes, tree_times
from loadtests.dialect import Wire
from loadtests.drive import DRAIN_S, GrpcKind
from loadtests.environment import EnvironmentFailure, environment, requirements
from loadtests.machine import describe_machine, describe_versions
from loadtests.models import MODELS, place
from loadtests.report import Cell
from loadtests.run import RESULTS, run_module
from loadtests.server import HOST, ServerFailure

IDLE_S = 1.5
IDLE_SHARE_LIMIT = 0.02  # of one core; a server that takes more unasked is stopped while others are measured
_PROCESS_START_S = 1.2  # of a driver, for the estimate only
_SERVER_START_S = 5.0


@dataclass(frozen=True, slots=True)
class Load:
    """How one model is driven: by closed loops, then by open ones at ``shares`` of what the slowest server can do."""

    model: str
    concurrencies: tuple[int, ...]
    seconds: float
    shares: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What to compare and for how long."""

    servers: tuple[str, ...]
    loads: tuple[Load, ...]
    wires: tuple[Wire, ...]
    repeats: int
    warmup_s: float
    grpc_client: GrpcKind = GrpcKind.LIGHT

    def models(self, repeat: int) -> list[Load]:
        """One repeat's models in order: every second one backwards."""
        return list(self.loads[::-1] if repeat % 2 else self.loads)

    def turns(self, load: Load, repeat: int) -> list[tuple[str, Cell]]:
        """All measurements of one model in one repeat: cell by cell, in each the servers one after the other.

        Whom a cell begins with moves on from cell to cell and repeat to repeat, and every second repeat goes backwards,
        so that no server always has the same neighbour, or a machine that is slower for a while.
        """
        return self._turns(_closed(load, self.wires), repeat)

    def part_turns(self, load: Load, repeat: int) -> list[tuple[str, Cell]]:
        """The measurements at a part of the load, which come after the others; in the same kind of order."""
        return self._turns(_open(load, self.wires), repeat)

    def _turns(self, cells: Sequence[Cell], repeat: int) -> list[tuple[str, Cell]]:
        turns = []
        for index, cell in enumerate(cells):
            able = [server for server in self.servers if Wire(cell.protocol) in CONTENDERS[server].doors]
            first = (index + repeat) % len(able) if able else 0
            turns.extend((server, cell) for server in (*able[first:], *able[:first]))
        return turns[::-1] if repeat % 2 else turns

    def places(self) -> list[tuple[str, Cell]]:
        """Every server in every cell, in the order of tables."""
        return [
            (server, cell)
            for load in self.loads
            for cell in (*_closed(load, self.wires), *_open(load, self.wires))
            for server in self.servers
            if Wire(cell.protocol) in CONTENDERS[server].doors
        ]

    def seconds(self) -> float:
        """About how long it takes, environments and drained requests aside."""
        starts = self.repeats * len(self.loads) * (len(self.servers) * _SERVER_START_S + IDLE_S)
        each = {load.model: load.seconds + self.warmup_s + _PROCESS_START_S for load in self.loads}
        return starts + self.repeats * sum(each[cell.model] for _, cell in self.places())


def _closed(load: Load, wires: Sequence[Wire]) -> list[Cell]:
    return [Cell(load.model, wire.value, concurrency) for wire in wires for concurrency in load.concurrencies]


def _open(load: Load, wires: Sequence[Wire]) -> list[Cell]:
    return [Cell(load.model, wire.value, MOST_UNDER_WAY, share) for wire in wires for share in load.shares]


# A closed loop of 128 on ResNet-50 waits some six seconds for each answer and tells nothing that 32 have not told.
FULL = Plan(
    servers=tuple(CONTENDERS),
    loads=(
        Load("identity", (1, 8, 32, 64, 128), 3.0, (PART_LOAD,)),
        Load("mlp", (1, 8, 32, 64, 128), 3.0, (PART_LOAD,)),
        Load("minilm", (1, 8, 32, 128), 4.0, (PART_LOAD,)),
        Load("resnet50", (1, 8, 32), 10.0, (PART_LOAD,)),
    ),
    wires=tuple(Wire),
    repeats=3,
    warmup_s=1.0,
)
QUICK = Plan(
    servers=tuple(CONTENDERS),
    loads=(Load("identity", (32, 64), 3.0), Load("mlp", (32,), 3.0)),
    wires=tuple(Wire),
    repeats=1,
    warmup_s=0.5,
)
CHECK = Plan(
    servers=tuple(CONTENDERS),
    loads=tuple(Load(load.model, (1,), 1.0) for load in FULL.loads),
    wires=tuple(Wire),
    repeats=1,
    warmup_s=0.2,
)


@dataclass(slots=True)
class Comparison:
    """What a plan has measured so far. ``absent`` is why a server is missing, by server and model ('' for all)."""

    plan: Plan
    runs: list[Run] = field(default_factory=list)
    absent: dict[tuple[str, str], str] = field(default_factory=dict)
    idle_shares: dict[str, float] = field(default_factory=dict)


class Referee:
    """Carries one plan out. Every measurement is a process of its own."""

    def __init__(self, plan: Plan, work: Path, step: Callable[[str], None]) -> None:
        self._plan = plan
        self._work = work
        self._step = step
        self.comparison = Comparison(plan)

    def install(self) -> None:
        """Have every peer's environment; one that cannot be made is noted and left out."""
        for server in self._plan.servers:
            if server == OURS:
                continue
            self._step(f"environment of {server}")
            try:
                environment(server)
            except EnvironmentFailure as error:
                self.comparison.absent[server, ""] = str(error)

    def run(self, repeat: int) -> None:
        """Measure every model once. All servers of a model are up, and those not asked are idle or stopped."""
        for load in self._plan.models(repeat):
            with ExitStack() as stack:
                running = self._start(load, repeat, stack)
                inputs = self._inputs(load.model, running)
                restless = self._restless(running)
                for server in restless:
                    running[server].process.pause()
                turns = [*self._plan.turns(load, repeat), *self._plan.part_turns(load, repeat)]
                for server, cell in turns:
                    if server not in running:
                        continue
                    self._step(f"{repeat + 1}: {server} {cell.model} {cell.protocol} c={cell.clients}")
                    try:
                        running[server].process.resume()
                        result, problem = self._drive(server, running[server], inputs[server], load, cell)
                    except ServerFailure as error:
                        result, problem = None, str(error)
                    self.comparison.runs.append(Run(server, cell, repeat, result, problem))
                    if server in restless:
                        running[server].process.pause()
                self._step(f"{repeat + 1}: stopping the servers of {load.model}")

    def _start(self, load: Load, repeat: int, stack: ExitStack) -> dict[str, Running]:
        running = {}
        for server in self._plan.servers:
            if (server, "") in self.comparison.absent:
                continue
            self._step(f"{repeat + 1}: starting {server} with {load.model}")
            try:
                one = CONTENDERS[server].start(job_of(load.model, self._work / f"{repeat}-{load.model}-{server}"))
                stack.enter_context(one.process)
            except (ServerFailure, EnvironmentFailure, OSError, ValueError) as error:
                self.comparison.absent[server, load.model] = str(error)
                continue
            running[server] = one
        return running

    def _restless(self, running: dict[str, Running]) -> list[str]:
        """Those that take CPU while nobody asks them."""
        time.sleep(IDLE_S / 3)  # what a server does right after its start
        before, began = self._cpu_us(running), time.monotonic()
        time.sleep(IDLE_S * 2 / 3)
        after, elapsed_us = self._cpu_us(running), (time.monotonic() - began) * 1e6
        shares = {server: (after[server] - before[server]) / elapsed_us for server in running}
        for server, share in shares.items():
            self.comparison.idle_shares[server] = max(share, self.comparison.idle_shares.get(server, 0.0))
        return [server for server, share in shares.items() if share > IDLE_SHARE_LIMIT]

    @staticmethod
    def _cpu_us(running: dict[str, Running]) -> dict[str, int]:
        processes = read_processes()
        return {server: tree_times(one.process.pid, processes).cpu_us for server, one in running.items()}

    def _inputs(self, model: str, servers: Iterable[str]) -> dict[str, list[str]]:
        """The driver's options for each server: the row that is sent and the answer that is right."""
        row = MODELS[model].sample()
        session = onnxruntime.InferenceSession(place(model, model_cache()), providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_outputs()]
        expected = dict(zip(names, session.run(names, row), strict=True))
        options: dict[str, list[str]] = {}
        for server in servers:
            folder = self._work / "samples" / server
            folder.mkdir(parents=True, exist_ok=True)
            options[server] = []
            for kind, arrays in (("--npy", CONTENDERS[server].sample(row)), ("--expect", expected)):
                for name, array in arrays.items():
                    path = folder / f"{model}.{name}.npy"
                    np.save(path, array)
                    options[server] += [kind, f"{name}={path}"]
        return options

    def _drive(
        self, server: str, one: Running, inputs: Iterable[str], load: Load, cell: Cell
    ) -> tuple[dict[str, Any] | None, str | None]:
        """The JSON of the driver, or the message it failed with."""
        output = self._work / "drive.json"
        wire = Wire(cell.protocol)
        door = CONTENDERS[server].doors[wire]
        port = one.grpc_port if wire is Wire.GRPC else one.process.http_port
        metrics = ["--metrics-url", f"{HOST}:{one.metrics_port}"] if one.metrics_port else []
        path = ["--path", door.path] if door.path else []
        rate = self._rate(cell) if cell.share else None
        if cell.share and rate is None:
            return None, "no server has shown what it can do"
        problem = run_module(
            "loadtests.drive",
            *(("--rate", f"{rate:.3f}") if rate else ()),
            *("--url", f"{HOST}:{port}", "--protocol", wire.value, "--model", cell.model, "--dialect", door.dialect),
            *(*path, *inputs, *metrics, "--grpc-client", self._plan.grpc_client),
            *("--concurrency", str(cell.concurrency), "--seconds", str(load.seconds)),
            *("--warmup", str(self._plan.warmup_s), "--server-pid", str(one.process.pid), "--output", str(output)),
            timeout_s=load.seconds + self._plan.warmup_s + 2 * DRAIN_S,
        )
        return (json.loads(output.read_text()), None) if problem is None else (None, problem)

    def _rate(self, cell: Cell) -> float | None:
        """Requests a second that are this share of what the slowest server has answered in a closed loop, lately."""
        best: dict[str, float] = {}
        for run in self.comparison.runs:
            same = (run.cell.model, run.cell.protocol) == (cell.model, cell.protocol) and not run.cell.share
            if same and run.result is not None:
                best[run.server] = max(best.get(run.server, 0.0), run.result["requests_per_s"])
        return cell.share * min(best.values()) if best else None


def write(path: Path, comparison: Comparison) -> None:
    """Everything that was measured so far, as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "loadtests.compare", *sys.argv[1:]],
        "machine": describe_machine(),
        "versions": describe_versions(),
        "peer_versions": {server: requirements(server).split() for server in comparison.plan.servers if server != OURS},
        "plan": asdict(comparison.plan),
        "absent": [
            {"server": server, "model": model, "reason": reason}
            for (server, model), reason in comparison.absent.items()
        ],
        "idle_cpu_shares": comparison.idle_shares,
        "runs": [asdict(run) for run in comparison.runs],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def show(comparison: Comparison, console: Console, path: Path | None) -> bool:
    """Print the tables and draw the plots; whether every measurement succeeded."""
    plan, runs = comparison.plan, comparison.runs
    places = plan.places()
    rows = [row for server, cell in places if (row := summarize(server, cell, runs)) is not None]
    ratios = [ratio for server, cell in places if server != OURS and (ratio := compare(server, cell, runs)) is not None]
    console.print(table(places, rows, ratios))
    cells = {cell for _, cell in places}
    wanted = [
        goal for goal in goals({name: tuple(CONTENDERS[name].doors) for name in plan.servers}) if goal.cell in cells
    ]
    if wanted and OURS in plan.servers:
        drivers = {row.cell: row.driver_cpu_share for row in rows if row.server == OURS}
        console.print(goal_table([judge(goal, ratios) for goal in wanted], drivers))
    for (server, model), reason in comparison.absent.items():
        console.print(f"absent: {server} {model or '(all models)'}: {reason}", markup=False, highlight=False)
    failures = [run for run in runs if run.problem is not None]
    for run in failures:
        told = f"failed: {run.server} {run.cell} in repeat {run.repeat + 1}: {run.problem}"
        console.print(told, markup=False, highlight=False)
    for server, share in comparison.idle_shares.items():
        if share > IDLE_SHARE_LIMIT:
            told = f"restless: {server} took {share:.1%} of a core unasked, so it was stopped between its turns"
            console.print(told, highlight=False)
    if path is not None and rows:
        for picture in plot(rows, path):
            console.print(f"drawn to {picture}", highlight=False)
    return not (failures or comparison.absent or any(row.errors for row in rows))


def run_plan(plan: Plan, console: Console, path: Path | None) -> Comparison:
    """Install, serve, measure, stop. After each repeat what there is is written to ``path``."""
    with tempfile.TemporaryDirectory(prefix="headrace-compare-") as folder:
        progress = Progress(
            *(TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn()),
            *(TimeElapsedColumn(), TimeRemainingColumn()),
            console=console,
        )
        with progress:
            total = plan.repeats * len(plan.places())
            task = progress.add_task("starting", total=total)

            def step(description: str) -> None:
                progress.update(task, description=description, completed=len(referee.comparison.runs))

            referee = Referee(plan, Path(folder), step)
            referee.install()
            for repeat in range(plan.repeats):
                referee.run(repeat)
                if path is not None:
                    write(path, referee.comparison)
            progress.update(task, description="done", completed=total)
        return referee.comparison


def make_plan(
    basis: Plan,
    servers: Sequence[str],
    models: Sequence[str],
    wires: Sequence[Wire],
    concurrencies: Sequence[int],
    repeats: int | None,
    seconds: float | None,
    grpc_client: GrpcKind = GrpcKind.LIGHT,
    shares: Sequence[float] | None = None,
) -> Plan:
    """The basis, narrowed or changed by what was asked for.

    Raises:
        ValueError: there is no such server or model.
    """
    for kind, asked, known in (("server", servers, CONTENDERS), ("load model", models, MODELS)):
        if unknown := sorted(set(asked) - set(known)):
            raise ValueError(f"no {kind} {', '.join(unknown)}; there are {', '.join(known)}")
    given = {load.model: load for load in (*FULL.loads, *basis.loads)}
    chosen = [given[model] for model in dict.fromkeys(models or [load.model for load in basis.loads])]
    return Plan(
        # Headrace is what the others are compared with, so it is always there.
        servers=tuple(dict.fromkeys((OURS, *servers))) if servers else basis.servers,
        loads=tuple(
            Load(
                load.model,
                tuple(sorted(set(concurrencies or load.concurrencies))),
                seconds or load.seconds,
                load.shares if shares is None else tuple(shares),
            )
            for load in chosen
        ),
        wires=tuple(dict.fromkeys(wires or basis.wires)),
        repeats=repeats or basis.repeats,
        warmup_s=basis.warmup_s,
        grpc_client=grpc_client,
    )


def main(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="two small models, few clients, one repeat")] = False,
    check: Annotated[bool, typer.Option("--check", help="only whether every server answers rightly; c=1, 1 s")] = False,
    server: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(CONTENDERS)}; may be repeated")] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(MODELS)}; may be repeated")] = None,
    protocol: Annotated[list[Wire] | None, typer.Option(help="may be repeated")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="may be repeated")] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(min=0.01, max=0.99, help="also an open loop at so much of what the slowest server can do"),
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="times that the whole matrix is measured")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="length of each measured window")] = None,
    grpc_client: Annotated[
        GrpcKind, typer.Option(help="light, our own, or grpcio, which costs more than most servers")
    ] = GrpcKind.LIGHT,
    name: Annotated[str | None, typer.Option(help="of the files in loadtests/results; default local/DATE")] = None,
) -> None:
    """Serve the load models with Headrace and its peers, drive them in turn, compare."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended on the way out
    console = Console(width=None if sys.stdout.isatty() else 190, record=True)
    basis = CHECK if check else QUICK if quick else FULL
    try:
        plan = make_plan(
            *(
                basis,
                server or (),
                model or (),
                protocol or (),
                concurrency or (),
                repeats,
                seconds,
                grpc_client,
                share,
            ),
        )
    except ValueError as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from None
    console.print(f"about {plan.seconds() / 60:.0f} minutes, once the peers are installed", highlight=False)
    default = datetime.now(UTC).strftime("local/compare-%Y%m%d-%H%M%S")
    path = None if check and name is None else RESULTS / f"{name or default}.json"
    comparison = run_plan(plan, console, path)
    good = show(comparison, console, path)
    if path is not None:
        path.with_suffix(".txt").write_text(console.export_text())
        console.print(f"written to {path}", highlight=False)
    raise typer.Exit(0 if good else 1)


if __name__ == "__main__":
    typer.run(main)
