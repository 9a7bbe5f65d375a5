"""A pipeline of three models under load: ``python -m loadtests.pipeline`` compares who calls the steps."""

import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Annotated, Any, TypeVar

import grpc
import numpy as np
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from headrace.core.tensor import DATATYPE_BY_NAME, Array, Tensor, from_wire
from headrace.wire import pb
from loadtests import cpu, grpc_message
from loadtests.http_client import HttpConnection, get
from loadtests.http_message import HEADER_LENGTH, BadResponse, encode_request, header_value
from loadtests.http_response import Response
from loadtests.inputs import tensor_of_array
from loadtests.latency import LatencySummary, summarize
from loadtests.limit import usable_cpus
from loadtests.machine import describe_machine, describe_versions
from loadtests.metrics import mean_batch_rows
from loadtests.pipeline_models import (
    NETS,
    TOLERANCE,
    Cost,
    caller_of,
    ensemble_of,
    expected_scores,
    make_pictures,
    measure_steps,
    place_pipeline,
)
from loadtests.run import RESULTS
from loadtests.server import HOST, Server, ServerFailure

PICTURES = 36
GOAL_RATIO = 1.15
ANSWER_TIMEOUT_S = 60.0

Ask = Callable[[int], Awaitable[Array]]  # the number of a picture to its scores
Result = TypeVar("Result")


class Way(StrEnum):
    """Who calls the steps, and how requests travel."""

    ENSEMBLE_HTTP = "ensemble http"
    ENSEMBLE_GRPC = "ensemble grpc"
    CALLER_HTTP = "python model http"
    CLIENT_HTTP = "client http"  # three requests, one after the other


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the matrix."""

    net: str
    concurrency: int
    way: Way


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


# ---- one cell: a process of its own drives the server ----


@dataclass(frozen=True, slots=True)
class Job:
    """What the driver of one cell needs to know."""

    cell: Cell
    http_port: int
    grpc_port: int
    metrics_port: int
    server_pid: int
    seconds: float
    warmup_s: float
    pictures: tuple[bytes, ...]
    scores: Array  # of each picture


@dataclass(frozen=True, slots=True)
class Measured:
    """One cell, from the first request after the warm-up to the last answer: nothing is cut off at either end.

    CPU time is that of a request, ``batch_rows`` the rows an execution of each step, None where none is known.
    """

    requests: int
    requests_per_s: float
    latency: LatencySummary
    errors: dict[str, int]
    server_cpu_us: float
    client_cpu_us: float
    batch_rows: dict[str, float | None]
    server_processes_gone: int


class _Line:
    """A kept connection to ask on, one request at a time."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[Response] | None = None

    async def open(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        _, self._connection = await loop.create_connection(lambda: HttpConnection(self._done, self._failed), HOST, port)

    async def ask(self, request: bytes) -> dict[str, Tensor]:
        """The answer's outputs by name."""
        if not self._connection.connected:
            raise BadResponse("the server has closed the connection")
        self._answer = asyncio.get_running_loop().create_future()
        self._connection.write(request)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return outputs_of(await self._answer)
        except TimeoutError:
            self._connection.close()  # the answer may come yet, and would be taken for the next one's
            raise

    def _done(self, response: Response) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(response)

    def _failed(self, problem: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BadResponse(problem))


def outputs_of(response: Response) -> dict[str, Tensor]:
    """The outputs of a binary answer.

    Raises:
        BadResponse: it is an error, or its parts do not fit together.
    """
    length = header_value(response.head, HEADER_LENGTH)
    if response.status != 200 or length is None:
        raise BadResponse(f"status {response.status}: {response.body[:160].decode(errors='replace')}")
    outputs, position = {}, int(length)
    for output in json.loads(response.body[:position])["outputs"]:
        end = position + int(output["parameters"]["binary_data_size"])
        data = memoryview(response.body)[position:end]
        datatype = DATATYPE_BY_NAME[output["datatype"]]
        outputs[output["name"]] = Tensor(output["name"], datatype, tuple(output["shape"]), data)
        position = end
    if position != len(response.body):
        raise BadResponse(f"the answer has {len(response.body)} bytes, its outputs tell of {position}")
    return outputs


async def _http_ask(job: Job, files: Sequence[Tensor]) -> Ask:
    line = _Line()
    await line.open(job.http_port)
    host, net = f"{HOST}:{job.http_port}", job.cell.net

    async def three_times(picture: int) -> Array:
        pixels = (await line.ask(encode_request(host, "decode", [files[picture]], binary=True)))["pixels"]
        data = Tensor("data", pixels.datatype, pixels.shape, pixels.data)
        logits = (await line.ask(encode_request(host, net, [data], binary=True)))["logits"]
        outputs = await line.ask(encode_request(host, "best", [logits], binary=True))
        return _array(outputs["scores"])

    if job.cell.way is Way.CLIENT_HTTP:
        return three_times
    model = ensemble_of(net) if job.cell.way is Way.ENSEMBLE_HTTP else caller_of(net)
    requests = [encode_request(host, model, [file], binary=True) for file in files]

    async def once(picture: int) -> Array:
        return _array((await line.ask(requests[picture]))["scores"])

    return once


def _array(tensor: Tensor) -> Array:
    return from_wire(tensor.data, tensor.datatype, tensor.shape)


def _grpc_ask(job: Job, files: Sequence[Tensor]) -> Ask:
    # A subchannel of its own: without it every channel of the process would share one connection.
    channel = grpc.aio.insecure_channel(f"{HOST}:{job.grpc_port}", options=(("grpc.use_local_subchannel_pool", 1),))
    infer = channel.unary_unary(grpc_message.METHOD, None, None)
    requests = [grpc_message.encode_request(ensemble_of(job.cell.net), [file]) for file in files]

    async def once(picture: int) -> Array:
        try:
            answer = pb.ModelInferResponse.FromString(await infer(requests[picture], timeout=ANSWER_TIMEOUT_S))
        except grpc.aio.AioRpcError as error:
            raise BadResponse(f"{error.code().name}: {(error.details() or '')[:160]}") from None
        place = [output.name for output in answer.outputs].index("scores")
        return np.frombuffer(answer.raw_output_contents[place], np.float32).reshape(answer.outputs[place].shape)

    return once


class _Tally:
    """What came of the requests of one phase."""

    def __init__(self) -> None:
        self.latencies_ns: list[int] = []
        self.errors: Counter[str] = Counter()

    async def one(self, ask: Ask, picture: int, expected: Array) -> None:
        """Ask once; count it as good only if the answer is right."""
        started_ns = time.monotonic_ns()
        try:
            scores = await ask(picture)
        except (BadResponse, OSError, TimeoutError, KeyError, ValueError) as error:
            self.errors[f"{type(error).__name__}: {error}"] += 1
            await asyncio.sleep(0.01)  # a server that refuses must not turn the driver into a busy loop
            return
        self.latencies_ns.append(time.monotonic_ns() - started_ns)
        if scores.shape != (1, len(expected)) or not np.allclose(scores[0], expected, rtol=0, atol=TOLERANCE):
            self.errors["the scores are not those of the picture"] += 1


async def _phase(job: Job, asks: Sequence[Ask], seconds: float) -> _Tally:
    """All clients at once, each asking until the time is over; gone on with when all are answered."""
    tally, numbers = _Tally(), count()
    end_ns = time.monotonic_ns() + int(seconds * 1e9)

    async def client(ask: Ask) -> None:
        while time.monotonic_ns() < end_ns:
            picture = next(numbers) % len(job.pictures)
            await tally.one(ask, picture, job.scores[picture])

    await asyncio.gather(*map(client, asks))
    return tally


async def _drive(job: Job) -> Measured:
    files = [tensor_of_array("file", np.array([[picture]], np.object_)) for picture in job.pictures]
    over_grpc = job.cell.way is Way.ENSEMBLE_GRPC
    asks = [_grpc_ask(job, files) if over_grpc else await _http_ask(job, files) for _ in range(job.cell.concurrency)]
    await _phase(job, asks, job.warmup_s)
    page = (await get(HOST, job.metrics_port, "/metrics")).body.decode()
    tree = cpu.tree_times(job.server_pid, cpu.read_processes())
    started_ns, own_ns = time.monotonic_ns(), time.process_time_ns()
    tally = await _phase(job, asks, job.seconds)
    elapsed_ns, own_ns = time.monotonic_ns() - started_ns, time.process_time_ns() - own_ns
    tree_after = cpu.tree_times(job.server_pid, cpu.read_processes())
    page_after = (await get(HOST, job.metrics_port, "/metrics")).body.decode()
    requests = len(tally.latencies_ns)
    if not requests:
        raise BadResponse(f"{job.cell}: no answer within {job.seconds} s: {'; '.join(tally.errors)}")
    return Measured(
        requests=requests,
        requests_per_s=requests / elapsed_ns * 1e9,
        latency=summarize(tally.latencies_ns),
        errors=dict(tally.errors),
        server_cpu_us=(tree_after.cpu_us - tree.cpu_us) / requests,
        client_cpu_us=own_ns / requests / 1e3,
        batch_rows={model: mean_batch_rows(page, page_after, model) for model in ("decode", job.cell.net, "best")},
        server_processes_gone=cpu.left(tree, tree_after),
    )


def drive(job: Job) -> Measured:
    """Measure one cell.

    Raises:
        BadResponse: nothing was answered.
        OSError: nobody listens there, or the server's process is gone.
    """
    return uvloop.run(_drive(job))


# ---- the whole ----


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


# ---- what a person reads ----


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
    plan: Plan,
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
        "plan": asdict(plan),
        "medians": [asdict(row) for row in rows],
        "ensemble_over_three_calls": [asdict(one) for one in comparisons],
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


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
    write(path, plan, runs, rows, comparisons, server_command)
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
