"""More models than memory: ``python -m loadtests.many_models`` tells what they cost, and how cold and hot ones do."""

import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from loadtests import cpu
from loadtests.http_client import HttpConnection, get
from loadtests.http_message import BadResponse
from loadtests.http_response import Response
from loadtests.latency import LatencySummary, summarize
from loadtests.machine import describe_machine, describe_versions
from loadtests.metrics import counter
from loadtests.run import RESULTS
from loadtests.server import HOST, Server, ServerFailure
from loadtests.small_models import WIDTH, answer, model_name, place_models, row

COLD_GAP_S = 0.05  # between an answer of one cold model and the request for the next
ANSWER_TIMEOUT_S = 60.0
MIB = 2**20

# What a model costs without a server: opened and run once by one thread, one after the other.
_ALONE = """
import sys, time
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
width, *paths = sys.argv[1:]
for path in paths:
    started = time.perf_counter_ns()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": numpy.zeros((1, int(width)), numpy.float32)})
    print(time.perf_counter_ns() - started)
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """How many models of what size, and what is asked of them."""

    models: int
    weight_kib: int  # of each
    resident_share: float  # of all weights, that may be in memory
    cold: int  # models that are asked for while they are away
    hot_rate: float  # requests a second to one model that stays
    seconds: float  # of hot requests alone
    idle_seconds: float
    server_options: tuple[str, ...] = ()

    @property
    def resident_bytes(self) -> int:
        """The limit."""
        return int(self.models * self.weight_kib * 1024 * self.resident_share)


@dataclass(frozen=True, slots=True)
class Footprint:
    """A server at rest. Memory is each process's proportional share, so that nothing counts twice."""

    ready_s: float
    front_mib: float
    workers_mib: float
    workers: int
    idle_cpu_percent: float  # of one CPU


@dataclass(frozen=True, slots=True)
class Result:
    """All that was measured.

    ``load`` is what the server took to load each of the cold models when they were asked for, ``alone`` what ONNX
    Runtime takes to open them.
    """

    everything: Footprint  # all models in memory
    limited: Footprint  # under the limit
    resident_models: int
    hot_everything: LatencySummary
    hot_alone: LatencySummary
    hot_beside_cold: LatencySummary
    cold: LatencySummary
    load: LatencySummary
    alone: LatencySummary
    errors: tuple[str, ...]


# ---- asking ----


class Asker:
    """One connection that is asked one thing at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection: HttpConnection | None = None
        self._answer: asyncio.Future[Response] | None = None

    async def ask(self, number: int) -> list[float]:
        """A model's answer.

        Raises:
            BadResponse: it has none, or an error.
            TimeoutError: it takes too long.
        """
        loop = asyncio.get_running_loop()
        if self._connection is None or not self._connection.connected:
            _, self._connection = await loop.create_connection(
                lambda: HttpConnection(self._answered, self._failed), HOST, self._port
            )
        self._answer = loop.create_future()
        self._connection.write(_request(number, self._port))
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            response = await self._answer
        if response.status != 200:
            raise BadResponse(f"{model_name(number)}: status {response.status}: {response.body.decode()}")
        data: list[float] = json.loads(response.body)["outputs"][0]["data"]
        return data

    def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None:
            self._connection.close()

    def _answered(self, response: Response) -> None:
        if self._answer is not None and not self._answer.done():  # else whoever asked has gone
            self._answer.set_result(response)

    def _failed(self, problem: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BadResponse(problem))


def _request(number: int, port: int) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "data": row(number).tolist()}
    body = json.dumps({"inputs": [tensor]}).encode()
    head = f"POST /v2/models/{model_name(number)}/infer HTTP/1.1\r\nHost: {HOST}:{port}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Hot:
    """A steady stream of requests to one model. Latency counts from the time that each was meant to leave."""

    def __init__(self, port: int, number: int, plan: Plan) -> None:
        self._asker = Asker(port)
        self._number = number
        self._rate = plan.hot_rate
        self._expected = answer(number, plan.weight_kib)
        self.latencies_ns: list[int] = []
        self.errors: list[str] = []

    async def run(self) -> None:
        """Ask until cancelled."""
        started_ns = time.perf_counter_ns()
        meant_ns = started_ns
        try:
            while True:
                meant_ns += int(1e9 / self._rate)
                await asyncio.sleep(max(0, meant_ns - time.perf_counter_ns()) * 1e-9)
                try:
                    if await self._asker.ask(self._number) != self._expected:
                        self.errors.append(f"{model_name(self._number)}: a wrong answer")
                except (BadResponse, TimeoutError, OSError) as error:
                    self.errors.append(str(error))
                self.latencies_ns.append(time.perf_counter_ns() - meant_ns)
        finally:
            self._asker.close()


async def _hot_for(port: int, number: int, plan: Plan) -> Hot:
    hot = Hot(port, number, plan)
    task = asyncio.get_running_loop().create_task(hot.run())
    await asyncio.wait([task], timeout=plan.seconds)
    task.cancel()
    await asyncio.wait([task])
    return hot


@dataclass(slots=True)
class Cold:
    """Models that are away, asked one after the other: how long each took to answer, and to be loaded of that."""

    numbers: list[int]
    latencies_ns: list[int] = field(default_factory=list)
    loads_ns: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    async def run(self, server: Server, plan: Plan) -> None:
        """Ask them all."""
        asker = Asker(server.http_port)
        for number in self.numbers:
            expected = answer(number, plan.weight_kib)
            await asyncio.sleep(COLD_GAP_S)
            started_ns = time.perf_counter_ns()
            try:
                said = await asker.ask(number)
            except (BadResponse, TimeoutError, OSError) as error:
                self.errors.append(str(error))
                continue
            self.latencies_ns.append(time.perf_counter_ns() - started_ns)
            if said != expected:
                self.errors.append(f"{model_name(number)}: a wrong answer")
        asker.close()
        page = (await get(HOST, server.metrics_port, "/metrics")).body.decode()
        loads = [counter(page, "nv_model_load_duration_secs", model_name(number)) for number in self.numbers]
        self.loads_ns = [int(seconds * 1e9) for seconds in loads if seconds is not None]


# ---- measuring ----


def footprint(server: Server, ready_s: float, idle_seconds: float) -> Footprint:
    """The server's memory and what CPU it uses while nobody asks anything."""
    before = cpu.tree_times(server.pid, cpu.read_processes())
    time.sleep(idle_seconds)
    after = cpu.tree_times(server.pid, cpu.read_processes())
    members = [pid for pid, _ in after.members]
    shares = {pid: _pss_mib(pid) for pid in members}
    return Footprint(
        ready_s,
        front_mib=shares.pop(server.pid),
        workers_mib=sum(shares.values()),
        workers=len(shares),
        idle_cpu_percent=(after.cpu_us - before.cpu_us) / idle_seconds / 1e4,
    )


def _pss_mib(pid: int) -> float:
    found = re.search(r"^Pss: +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None, "every process has a proportional set size"
    return int(found[1]) / 1024


async def _residents(port: int) -> set[int]:
    """The numbers of the models that are in memory."""
    page = (await get(HOST, port, "/metrics")).body.decode()
    return {
        int(number) for number in re.findall(r'^headrace_model_resident\{model="many_(\d+)".*\} 1$', page, re.MULTILINE)
    }


def load_alone(repository: Path, numbers: Sequence[int]) -> LatencySummary:
    """How long ONNX Runtime alone takes for these models."""
    paths = [str(repository / model_name(number) / "1" / "model.onnx") for number in numbers]
    said = subprocess.run(
        [sys.executable, "-c", _ALONE, str(WIDTH), *paths], capture_output=True, text=True, check=True
    )
    return summarize([int(line) for line in said.stdout.split()])


def _serve(repository: Path, log: Path, plan: Plan, *options: str) -> tuple[Server, float]:
    # Polling looks at every folder twice a second, which is not what is asked here.
    server = Server(
        repository, log, ("--model-control", "none", *options, *plan.server_options), ready_timeout_s=1200.0
    )
    return server, time.monotonic()


def measure(plan: Plan, folder: Path, tell: Any) -> Result:
    """Everything, with two servers one after the other.

    Raises:
        ServerFailure: one of them did not start, get ready or end well.
        ProcessLookupError: one ended meanwhile.
    """
    repository = folder / "repository"
    place_models(repository, plan.models, plan.weight_kib)
    tell(f"{plan.models} models of {plan.weight_kib} KiB; all in memory")
    server, started = _serve(repository, folder / "all.log", plan)
    with server:
        everything = footprint(server, time.monotonic() - started, plan.idle_seconds)
        hot_everything = uvloop.run(_hot_for(server.http_port, 0, plan))
    tell(f"at most {plan.resident_bytes // MIB} MiB of them in memory")
    server, started = _serve(repository, folder / "limited.log", plan, "--resident-bytes", str(plan.resident_bytes))
    with server:
        limited = footprint(server, time.monotonic() - started, plan.idle_seconds)
        hot, beside, cold, residents = uvloop.run(_under_limit(server, plan))
    return Result(
        everything,
        limited,
        residents,
        summarize(hot_everything.latencies_ns),
        summarize(hot.latencies_ns),
        summarize(beside.latencies_ns),
        summarize(cold.latencies_ns),
        summarize(cold.loads_ns),
        load_alone(repository, cold.numbers),
        (*hot_everything.errors, *hot.errors, *beside.errors, *cold.errors),
    )


async def _under_limit(server: Server, plan: Plan) -> tuple[Hot, Hot, Cold, int]:
    """The hot model alone and beside cold ones, those, and how many models were in memory before."""
    hot = await _hot_for(server.http_port, 0, plan)
    residents = await _residents(server.metrics_port)
    away = [number for number in range(plan.models) if number not in residents]
    cold = Cold(away[:: max(1, len(away) // plan.cold)][: plan.cold])
    if not cold.numbers:
        raise ServerFailure(f"all {plan.models} models are in memory, expected that some are away; lower the share")
    beside = Hot(server.http_port, 0, plan)
    task = asyncio.get_running_loop().create_task(beside.run())
    await cold.run(server, plan)
    task.cancel()
    await asyncio.wait([task])
    if not cold.latencies_ns:
        raise ServerFailure(f"no cold model has answered: {cold.errors[0]}")
    return hot, beside, cold, len(residents)


# ---- what a person reads ----


def tables(plan: Plan, result: Result) -> list[Table]:
    """The servers at rest, and the latencies."""
    rest = Table(title=f"{plan.models} models of {plan.weight_kib} KiB, nobody asking")
    for heading in ("", "ready s", "front MiB", "workers MiB", "workers", "idle CPU %"):
        rest.add_column(heading, justify="right" if heading else "left")
    limited = f"{result.resident_models} in {plan.resident_bytes // MIB} MiB"
    for name, one in (("all in memory", result.everything), (limited, result.limited)):
        rest.add_row(
            *(name, f"{one.ready_s:.1f}", f"{one.front_mib:.0f}", f"{one.workers_mib:.0f}"),
            *(str(one.workers), f"{one.idle_cpu_percent:.1f}"),
        )
    asked = Table(title="latencies in ms")
    for heading in ("", "requests", "p50", "p90", "p99", "max"):
        asked.add_column(heading, justify="right" if heading else "left")
    for name, summary in (
        ("hot, all in memory", result.hot_everything),
        ("hot, under the limit", result.hot_alone),
        ("hot, while cold ones come in", result.hot_beside_cold),
        ("cold", result.cold),
        ("of that, the load in its worker", result.load),
        ("ONNX Runtime alone: open and run", result.alone),
    ):
        asked.add_row(
            *(name, str(summary.count), f"{summary.p50_ms:.2f}", f"{summary.p90_ms:.2f}"),
            *(f"{summary.p99_ms:.2f}", f"{summary.max_ms:.2f}"),
        )
    return [rest, asked]


def write(path: Path, plan: Plan, result: Result) -> None:
    """Everything that was measured, as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "loadtests.many_models", *sys.argv[1:]],
        "machine": describe_machine(),
        "versions": describe_versions(),
        "plan": {**asdict(plan), "resident_bytes": plan.resident_bytes},
        "result": asdict(result),
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def main(
    *,
    models: Annotated[int, typer.Option(min=2, help="how many")] = 1400,
    weight_kib: Annotated[int, typer.Option(min=1, help="of each")] = 1024,
    resident_share: Annotated[float, typer.Option(min=0.001, max=1.0, help="of all weights, in memory")] = 0.1,
    cold: Annotated[int, typer.Option(min=1, help="models that are asked for while they are away")] = 100,
    hot_rate: Annotated[float, typer.Option(min=1, help="requests a second to one that stays")] = 100.0,
    seconds: Annotated[float, typer.Option(min=0.5, help="of hot requests alone")] = 10.0,
    idle_seconds: Annotated[float, typer.Option(min=0.5, help="in which nobody asks anything")] = 10.0,
    server_option: Annotated[list[str] | None, typer.Option(help="handed to `headrace serve`")] = None,
    name: Annotated[str | None, typer.Option(help="of the file in loadtests/results; default local/DATE")] = None,
) -> None:
    """Serve many models, all in memory and then under a limit; ask one steadily, and others while they are away."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    plan = Plan(models, weight_kib, resident_share, cold, hot_rate, seconds, idle_seconds, tuple(server_option or ()))

    def tell(said: str) -> None:
        console.print(said, highlight=False)

    try:
        with tempfile.TemporaryDirectory(prefix="headrace-many-") as folder:
            result = measure(plan, Path(folder), tell)
    except (ServerFailure, ProcessLookupError) as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from None
    path = RESULTS / f"{name or datetime.now(UTC).strftime('local/many-models-%Y%m%d-%H%M%S')}.json"
    write(path, plan, result)
    for table in tables(plan, result):
        console.print(table)
    for problem in dict.fromkeys(result.errors):
        console.print(f"{result.errors.count(problem)} x {problem}", markup=False, highlight=False)
    console.print(f"written to {path}", highlight=False)
    raise typer.Exit(1 if result.errors else 0)


if __name__ == "__main__":
    typer.run(main)
