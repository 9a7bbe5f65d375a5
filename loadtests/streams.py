"""Many streams and sequences at once: ``python -m loadtests.streams`` checks every answer and what memory is left."""

import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
import uvloop
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from loadtests import cpu
from loadtests.graph import IR_VERSION, OPSET
from loadtests.http_message import BadResponse
from loadtests.machine import describe_machine, describe_versions
from loadtests.run import RESULTS
from loadtests.server import HOST, Server, ServerFailure
from loadtests.stream_clients import (
    CLIENT_TIMEOUT_S,
    Arrive,
    Tally,
    grpc_sequence,
    grpc_stream,
    http_sequence,
    http_stream,
)

SETTLE_S = 5.0  # the longest wait for connections to be given up after the last answer
SLACK_MIB = 16.0  # what the memory after one round may be above that after the round before it
CHANNELS = 8
MIB = 2**20

_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)  # without it every channel would share one connection

_COUNTER = """
import numpy as np


class Model:
    inputs = [{"name": "count", "datatype": "INT32", "shape": [1]}]
    outputs = [{"name": "index", "datatype": "INT32", "shape": [1]}]
    max_batch_size = 0

    def infer(self, inputs):
        for index in range(int(inputs["count"][0])):
            yield {"index": np.array([index], np.int32)}
"""

_ADDER = """
max_batch_size: 64
batching: {max_queue_size: %d}
sequence:
  strategy: oldest
  max_candidates: %d
  max_idle_us: 600000000
  states: [{input: before, output: after, datatype: INT32, shape: [1]}]
"""


def place_models(repository: Path, most: int) -> None:
    """``counter`` yields 0, 1, 2 and so on; ``adder`` gives the sum of a sequence's numbers so far."""
    version = repository / "counter" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(_COUNTER)
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "before"], ["after"]), helper.make_node("Identity", ["after"], ["sum"])],
        "adder",
        [tensor(name, TensorProto.INT32, ["batch", 1]) for name in ("x", "before")],
        [tensor(name, TensorProto.INT32, ["batch", 1]) for name in ("sum", "after")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    version = repository / "adder" / "1"
    version.mkdir(parents=True)
    (version / "model.onnx").write_bytes(model.SerializeToString())
    (version.parent / "config.yaml").write_text(_ADDER % (2 * most, most))


# ---- what a phase needs ----


class Gate:
    """Opens when everybody has arrived or left, so that all are under way at the same time."""

    def __init__(self, parties: int) -> None:
        self._missing = set(range(parties))
        self._opened = asyncio.Event()
        self.arrived = 0

    async def arrive(self, who: int) -> None:
        """Be there, and wait for the others."""
        self.arrived += 1
        self.leave(who)
        await self._opened.wait()

    def leave(self, who: int) -> None:
        """Nobody need wait for this one any more."""
        self._missing.discard(who)
        if not self._missing:
            self._opened.set()


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the server's processes hold. Memory that several of them have mapped is counted in each."""

    rss_mib: float
    descriptors: int


def footprint(root: int) -> Footprint:
    """The tree below ``root`` now; a process that ends while we look is left out.

    Raises:
        ProcessLookupError: ``root`` is gone.
    """
    rss_bytes = descriptors = 0
    for pid, _ in cpu.tree_times(root, cpu.read_processes()).members:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            descriptors += sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        except (FileNotFoundError, ProcessLookupError):
            continue
        rss_bytes += pages * os.sysconf("SC_PAGE_SIZE")
    return Footprint(rss_bytes / MIB, descriptors)


# ---- phases and rounds ----


@dataclass(frozen=True, slots=True)
class Plan:
    """How many at once, and how much of each."""

    streams: int
    responses: int
    steps: int
    rounds: int
    server_options: tuple[str, ...] = ()


FULL = Plan(streams=1000, responses=50, steps=20, rounds=3)
QUICK = Plan(streams=200, responses=10, steps=5, rounds=3)
PHASES = ("streams http", "streams grpc", "sequences")  # the last half over HTTP and half over gRPC, at once


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase measured. ``at_once`` is how many were seen to be under way at the same time."""

    name: str
    round: int
    at_once: int
    responses: int
    responses_per_s: float
    errors: dict[str, int]
    before: Footprint
    most: Footprint
    after: Footprint


Client = Callable[[Arrive, Tally], Coroutine[Any, Any, None]]


def _clients(name: str, number: int, plan: Plan, server: Server, channels: Sequence[grpc.aio.Channel]) -> list[Client]:
    def client(index: int) -> Client:
        channel = channels[index % len(channels)]
        sequence = 1 + number * plan.streams + index
        if name == "streams http":
            return lambda arrive, tally: http_stream(server.http_port, plan.responses, arrive, tally)
        if name == "streams grpc":
            return lambda arrive, tally: grpc_stream(channel, plan.responses, arrive, tally)
        # Not by the index's lowest bit, which decides on the channel too.
        if index < plan.streams // 2:
            return lambda arrive, tally: http_sequence(server.http_port, sequence, plan.steps, arrive, tally)
        return lambda arrive, tally: grpc_sequence(channel, sequence, plan.steps, arrive, tally)

    return list(map(client, range(plan.streams)))


async def _one(client: Client, who: int, gate: Gate, tally: Tally) -> None:
    """One stream or sequence; whatever goes wrong is counted."""
    try:
        async with asyncio.timeout(CLIENT_TIMEOUT_S):
            await client(partial(gate.arrive, who), tally)
    except grpc.aio.AioRpcError as error:
        tally.errors[f"{error.code().name}: {(error.details() or '')[:160]}"] += 1
    except (BadResponse, OSError, EOFError, TimeoutError, KeyError, IndexError, ValueError) as error:
        tally.errors[f"{type(error).__name__}: {error}"[:200]] += 1
    finally:
        gate.leave(who)


async def _watch(root: int, seen: list[Footprint]) -> None:
    while True:
        seen.append(footprint(root))
        await asyncio.sleep(0.25)


async def _settled(root: int, descriptors: int) -> Footprint:
    """The footprint once the phase's connections are given up, or SETTLE_S later."""
    deadline = time.monotonic() + SETTLE_S
    while (now := footprint(root)).descriptors > descriptors and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)  # memory is given back after the descriptors
    return footprint(root) if now.descriptors <= descriptors else now


async def _phase(name: str, number: int, plan: Plan, server: Server) -> Phase:
    before = footprint(server.pid)
    seen = [before]
    gate, tally = Gate(plan.streams), Tally()
    channels = [grpc.aio.insecure_channel(f"{HOST}:{server.grpc_port}", options=_OPTIONS) for _ in range(CHANNELS)]
    watching = asyncio.get_running_loop().create_task(_watch(server.pid, seen))
    try:
        clients = _clients(name, number, plan, server, channels)
        started = time.monotonic()
        await asyncio.gather(*(_one(client, who, gate, tally) for who, client in enumerate(clients)))
        elapsed_s = time.monotonic() - started
    finally:
        watching.cancel()
        for channel in channels:
            await channel.close(None)
    most = Footprint(max(one.rss_mib for one in seen), max(one.descriptors for one in seen))
    after = await _settled(server.pid, before.descriptors)
    rate = tally.responses / elapsed_s
    return Phase(name, number, gate.arrived, tally.responses, rate, dict(tally.errors), before, most, after)


async def run_rounds(plan: Plan, server: Server, tell: Callable[[Phase], None]) -> list[Phase]:
    """Every phase in every round, one after the other.

    Raises:
        ProcessLookupError: the server is gone.
    """
    phases = []
    for number in range(1, plan.rounds + 1):
        for name in PHASES:
            phases.append(await _phase(name, number, plan, server))
            tell(phases[-1])
    return phases


# ---- what a person reads ----


def grown_mib(phases: Sequence[Phase]) -> float | None:
    """What the server holds after the last round more than after the one before it; None with less than three.

    The first is not compared: pools, caches and code are made in it that stay.
    """
    after = {phase.round: phase.after.rss_mib for phase in phases}
    last = max(after, default=0)
    return after[last] - after[last - 1] if last > 2 else None


def table(phases: Sequence[Phase]) -> Table:
    """A line for each phase."""
    drawn = Table(title="RSS of the server's processes in MiB, and their open descriptors")
    drawn.add_column("round")
    drawn.add_column("phase")
    for heading in ("at once", "responses", "responses/s", "RSS before", "most", "after", "descr. before", "most"):
        drawn.add_column(heading, justify="right")
    for heading in ("after", "errors"):
        drawn.add_column(heading, justify="right")
    for phase in phases:
        looks = phase.before, phase.most, phase.after
        drawn.add_row(
            *(str(phase.round), phase.name, f"{phase.at_once:,}", f"{phase.responses:,}"),
            f"{phase.responses_per_s:,.0f}",
            *(f"{look.rss_mib:,.1f}" for look in looks),
            *(str(look.descriptors) for look in looks),
            str(sum(phase.errors.values())),
        )
    return drawn


def write(path: Path, plan: Plan, phases: Sequence[Phase], server_command: Sequence[str]) -> None:
    """Everything that was measured, as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "loadtests.streams", *sys.argv[1:]],
        "server_command": ["python", *server_command[1:]],
        "machine": describe_machine(),
        "versions": describe_versions(),
        "plan": asdict(plan),
        "grown_mib": grown_mib(phases),
        "phases": [asdict(phase) for phase in phases],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _allow_descriptors(needed: int) -> None:
    """Raise our limit, which the server inherits.

    Raises:
        ServerFailure: it cannot be raised as far.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ServerFailure(f"at most {hard} descriptors may be open, expected {needed} for so many streams")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def run_plan(plan: Plan, tell: Callable[[Phase], None]) -> tuple[list[Phase], list[str]]:
    """Serve the models and carry the plan out; also gives the server's command line.

    Raises:
        ServerFailure: the server did not start, get ready or end well.
        ProcessLookupError: it ended meanwhile.
    """
    _allow_descriptors(2 * plan.streams + 200)
    with tempfile.TemporaryDirectory(prefix="headrace-streams-") as folder:
        repository = Path(folder) / "repository"
        place_models(repository, plan.streams)
        with Server(repository, Path(folder) / "server.log", plan.server_options) as server:
            for model in ("counter", "adder"):
                server.require_model(model)
            return uvloop.run(run_rounds(plan, server, tell)), server.command


def main(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="under a minute: fewer streams, less of each")] = False,
    streams: Annotated[int | None, typer.Option(min=2, help="streams, and sequences, at once")] = None,
    responses: Annotated[int | None, typer.Option(min=2, help="of each stream")] = None,
    steps: Annotated[int | None, typer.Option(min=2, help="of each sequence")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="memory is compared between the last two of three")] = None,
    server_option: Annotated[list[str] | None, typer.Option(help="handed to `headrace serve`")] = None,
    name: Annotated[str | None, typer.Option(help="of the file in loadtests/results; default local/DATE")] = None,
) -> None:
    """Keep many streams and sequences open at once, check what they say, and see what the server keeps of them."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    basis = QUICK if quick else FULL
    plan = Plan(
        streams=streams or basis.streams,
        responses=responses or basis.responses,
        steps=steps or basis.steps,
        rounds=rounds or basis.rounds,
        server_options=tuple(server_option or ()),
    )

    def tell(phase: Phase) -> None:
        console.print(f"round {phase.round}: {phase.name}, {phase.responses_per_s:,.0f} responses/s", highlight=False)

    try:
        phases, server_command = run_plan(plan, tell)
    except (ServerFailure, ProcessLookupError) as error:
        console.print(f"error: {error}", markup=False, highlight=False)
        raise typer.Exit(1) from None
    path = RESULTS / f"{name or datetime.now(UTC).strftime('local/streams-%Y%m%d-%H%M%S')}.json"
    write(path, plan, phases, server_command)
    console.print(table(phases))
    for phase in phases:
        for problem, times in phase.errors.items():
            console.print(f"round {phase.round}, {phase.name}: {times} x {problem}", markup=False, highlight=False)
    grown = grown_mib(phases)
    if grown is not None:
        said = "it came back" if grown <= SLACK_MIB else f"it did not come back: more than {SLACK_MIB} MiB"
        console.print(f"RSS after the last round over that after the one before: {grown:+.1f} MiB, {said}")
    console.print(f"written to {path}", highlight=False)
    raise typer.Exit(1 if any(phase.errors for phase in phases) else 0)


if __name__ == "__main__":
    typer.run(main)
