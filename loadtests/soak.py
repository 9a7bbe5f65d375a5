"""A long run at part of the load: ``python -m loadtests.soak`` tells whether memory stays flat and nothing goes wrong.

Several models are served side by side and asked over HTTP and gRPC, by regulars and by clients that come and go, give
up or ask for nonsense. Memory, CPU and descriptors of each process of the server are recorded all the time.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import onnxruntime
import typer
import uvloop
from rich.console import Console

from loadtests import cpu
from loadtests.answer import BadResponse
from loadtests.client import Client
from loadtests.dialect import Wire
from loadtests.drive import GrpcKind, Settings, make_client
from loadtests.http_client import get
from loadtests.inputs import tensor_of_array
from loadtests.latency import percentile
from loadtests.loops import ClosedLoop
from loadtests.machine import describe_machine, describe_versions
from loadtests.metrics import total
from loadtests.models import MODELS, place
from loadtests.recorder import MAX_PROBLEMS, Recorder
from loadtests.run import RESULTS
from loadtests.server import HOST, Server, ServerFailure
from loadtests.soak_processes import Reading, busy_ticks, read, read_tree
from loadtests.soak_report import Growth, Sample, Use, growth_table, growths, plot, stream_table
from loadtests.soak_traffic import EndlessLoop, Ledger, Mix, Stream
from loadtests.soak_visitors import Question, Visitors

MODEL_SHARES = {"identity": 0.45, "mlp": 0.40, "minilm": 0.15}
WIRE_SHARES = {Wire.HTTP_BINARY: 0.4, Wire.HTTP_JSON: 0.3, Wire.GRPC: 0.3}
STREAMS = tuple(
    Stream(model, wire, of_model * of_wire)
    for model, of_model in MODEL_SHARES.items()
    for wire, of_wire in WIRE_SHARES.items()
)
ROWS = (1, 2, 3, 5, 8)  # of the visitors' questions; the regulars' have one
TOKENS = (8, 17, 32)  # of those to a sentence encoder
SATURATING = 48  # clients of the closed loop that measures the capacity
SLOTS = 32  # requests of a stream under way at most
DRAIN_S = 30.0
SEED = 23
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_COUNTERS = (
    "headrace_worker_deaths_total",
    "headrace_worker_restarts_total",
    "headrace_worker_recycles_total",
    "headrace_retried_requests_total",
    "headrace_refused_requests_total",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, how much, and how often it is looked at."""

    minutes: float
    load: float  # of the capacity
    every_s: float
    capacity_windows: int
    capacity_s: float  # of each
    warmup_s: float
    capacity_per_s: float | None = None  # given beforehand: then it is not measured
    server_options: tuple[str, ...] = ()


@dataclass(slots=True)
class Soak:
    """What is known so far."""

    plan: Plan
    machine: Mapping[str, str | int | float] = field(default_factory=describe_machine)
    versions: Mapping[str, str] = field(default_factory=describe_versions)
    capacity_per_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    streams: list[dict[str, Any]] = field(default_factory=list)
    visitors: Counter[str] = field(default_factory=Counter)
    finished: bool = False

    @property
    def growths(self) -> list[Growth]:
        """Of each process."""
        return growths(self.samples)

    @property
    def counters(self) -> Mapping[str, float]:
        """The server's own, at last."""
        return self.samples[-1].counters if self.samples else {}

    def failed(self, problem: str, count: int = 1) -> None:
        """Something went wrong."""
        known = problem in self.errors or len(self.errors) < MAX_PROBLEMS
        self.errors[problem if known else "other problems"] += count

    def verdicts(self) -> Iterator[str]:
        """What is not as it should be."""
        if not self.finished:
            yield "it has not come to its end"
        if self.errors:
            yield f"{self.errors.total()} errors"
        rows = self.growths
        if not rows:
            yield "there are too few samples to tell whether memory is flat"
        yield from (f"{row.name} is not flat" for row in rows if not row.flat)
        yield from (f"{name} is {self.counters[name]:.0f}" for name in _COUNTERS[:3] if self.counters.get(name))


# ---- what is asked ----


def answers(model: str, repository: Path, inputs: Sequence[Mapping[str, Any]]) -> list[Question]:
    """What the model gives for each input without a server."""
    session = onnxruntime.InferenceSession(place(model, repository), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_outputs()]
    return [Question(model, row, dict(zip(names, session.run(names, row), strict=True))) for row in inputs]


def variations(model: str) -> list[dict[str, Any]]:
    """Inputs of several sizes, no two rows alike."""
    row = MODELS[model].sample()
    lengths = TOKENS if model == "minilm" else (None,)
    return [
        {
            name: np.concatenate([np.roll(array, shift, axis=-1) for shift in range(rows)])[:, :length]
            for name, array in row.items()
        }
        for rows in ROWS
        for length in lengths
    ]


def regulars(server: Server, questions: Mapping[str, Question], slots: int) -> list[Client]:
    """A client for each stream."""
    return [
        make_client(
            Settings(
                address=(HOST, server.grpc_port if stream.wire == Wire.GRPC else server.http_port),
                wire=Wire(stream.wire),
                model=stream.model,
                concurrency=slots,
                rate_per_s=None,
                seconds=0.0,
                warmup_s=0.0,
                server_pid=None,
                metrics_address=None,
                expected=questions[stream.model].expected,
                grpc_client=GrpcKind.LIGHT,
            ),
            [tensor_of_array(*entry) for entry in questions[stream.model].inputs.items()],
        )
        for stream in STREAMS
    ]


async def capacity(server: Server, questions: Mapping[str, Question], plan: Plan) -> float:
    """Requests/s of the mix when clients ask as soon as they are answered: the median of some windows.

    Raises:
        BadResponse: a request of it went wrong.
        OSError: nobody listens there.
    """
    mix = Mix(STREAMS, regulars(server, questions, SATURATING), SEED)
    loop: ClosedLoop | None = None
    await mix.open(lambda slot, problem: loop.done(slot, problem) if loop else None)
    rates = []
    for _ in range(plan.capacity_windows):
        from_ns = time.monotonic_ns() + int(plan.warmup_s * 1e9)
        recorder = Recorder(from_ns, from_ns + int(plan.capacity_s * 1e9), by_start=False)
        loop = ClosedLoop(mix, SATURATING, recorder)
        loop.start()
        await loop.idle.wait()
        if recorder.errors:
            raise BadResponse(f"at saturation: {dict(recorder.errors)}")
        rates.append(recorder.finished_in_window / plan.capacity_s)
    await mix.close()
    return median(rates)


# ---- what is recorded ----


class Watch:
    """Looks at every process once a window."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._started = self._at = time.monotonic()
        self._ticks: dict[tuple[int, int], int] = {}
        self._busy = busy_ticks()
        for reading in (*read_tree(server.pid), _ourselves()):
            self._use(reading, 1.0)

    async def sample(self, ledger: Ledger) -> Sample:
        """The window since the last one.

        Raises:
            ProcessLookupError: the server is gone.
            BadResponse: it does not tell its metrics.
            OSError: it does not listen.
        """
        page = (await get(HOST, self._server.metrics_port, "/metrics")).body.decode()
        now, busy = time.monotonic(), busy_ticks()
        seconds, self._at = now - self._at, now
        busy_cores, self._busy = (busy - self._busy) / _TICKS_PER_S / seconds, busy
        window, lags_ns = ledger.take()
        ordered, lags = sorted(window.latencies_ns), sorted(lags_ns)
        # Elsewhere than in the event loop: adding up the pages of a process takes some ms, which would be latency.
        tree = await asyncio.to_thread(read_tree, self._server.pid)
        return Sample(
            at_s=round(now - self._started, 3),
            seconds=round(seconds, 3),
            requests_per_s=window.finished_in_window / seconds,
            p50_ms=percentile(ordered, 0.5) * 1e-6 if ordered else 0.0,
            p99_ms=percentile(ordered, 0.99) * 1e-6 if ordered else 0.0,
            max_ms=ordered[-1] * 1e-6 if ordered else 0.0,
            lag_p99_ms=percentile(lags, 0.99) * 1e-6 if lags else 0.0,
            errors=dict(window.errors),
            busy=busy_cores,
            driver=self._use(_ourselves(), seconds),
            server=[self._use(reading, seconds) for reading in tree],
            counters={name: total(page, name) for name in _COUNTERS},
        )

    def _use(self, reading: Reading, seconds: float) -> Use:
        key = (reading.pid, reading.started_ticks)
        before = self._ticks.get(key, 0)
        self._ticks[key] = reading.ticks
        return Use(reading, (reading.ticks - before) / _TICKS_PER_S / seconds)


def _ourselves() -> Reading:
    return read(cpu.parse_stat(Path("/proc/self/stat").read_text()), "driver")


# ---- the run ----


async def soak(
    server: Server, questions: Mapping[str, Sequence[Question]], state: Soak, each: Callable[[Sample], None]
) -> None:
    """Measure the capacity, then ask for so long; ``state`` has everything even if it ends early.

    Raises:
        BadResponse: the server does not even answer the first requests, or does not tell its metrics.
        OSError: it does not listen, or is gone.
    """
    plan = state.plan
    firsts = {model: some[0] for model, some in questions.items()}
    state.capacity_per_s = plan.capacity_per_s or await capacity(server, firsts, plan)
    ledger = Ledger()
    clients = regulars(server, firsts, SLOTS)
    rate_per_s = plan.load * state.capacity_per_s
    loops = [
        EndlessLoop(client, SLOTS, stream.share * rate_per_s, SEED + place, ledger)
        for place, (stream, client) in enumerate(zip(STREAMS, clients, strict=True))
    ]
    for client, loop in zip(clients, loops, strict=True):
        await client.open(loop.done)
    visitors = Visitors(
        server.http_port,
        server.grpc_port,
        [(MODEL_SHARES[model], some) for model, some in questions.items()],
        ledger.failed,
        SEED,
    )
    visiting = asyncio.get_running_loop().create_task(visitors.run())
    watch = Watch(server)
    for loop in loops:
        loop.start()
    ends_at = time.monotonic() + plan.minutes * 60
    try:
        while (left_s := ends_at - time.monotonic()) > 0:
            await asyncio.wait([visiting], timeout=min(plan.every_s, left_s))
            if visiting.done():
                visiting.result()  # it never ends by itself, so this raises
            if left_s < plan.every_s / 2:
                continue  # a stub of a window says little, and what is in it comes with the last
            state.samples.append(await watch.sample(ledger))
            _tell_streams(state, loops, visitors)
            each(state.samples[-1])
        visiting.cancel()
        await asyncio.wait([visiting])
        await _drain(loops, ledger)
        state.finished = True
    finally:
        visiting.cancel()
        for loop in loops:
            loop.close()
        _tell_streams(state, loops, visitors)
        for problem, count in ledger.window.errors.items():
            state.failed(problem, count)
        for client in clients:
            await client.close()


async def _drain(loops: Sequence[EndlessLoop], ledger: Ledger) -> None:
    for loop in loops:
        loop.stop()
    with suppress(TimeoutError):  # what is missing then is counted
        await asyncio.wait_for(asyncio.gather(*(loop.idle.wait() for loop in loops)), DRAIN_S)
    if unanswered := sum(loop.unanswered() for loop in loops):
        ledger.failed(f"no answer {DRAIN_S:.0f} s after the end", unanswered)


def _tell_streams(state: Soak, loops: Sequence[EndlessLoop], visitors: Visitors) -> None:
    state.visitors = visitors.counts
    state.streams = [
        {
            "name": stream.name,
            "count": loop.histogram.count,
            **{
                name: loop.histogram.percentile_ms(fraction)
                for name, fraction in (("p50_ms", 0.5), ("p99_ms", 0.99), ("p999_ms", 0.999))
            },
        }
        for stream, loop in zip(STREAMS, loops, strict=True)
    ]


# ---- what is kept ----


def write(path: Path, state: Soak) -> None:
    """Everything that was measured, as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "loadtests.soak", *sys.argv[1:]],
        "machine": state.machine,
        "versions": state.versions,
        "plan": asdict(state.plan),
        "finished": state.finished,
        "not_as_it_should_be": list(state.verdicts()),
        "capacity_per_s": state.capacity_per_s,
        "errors": dict(state.errors),
        "visitors": dict(state.visitors),
        "streams": state.streams,
        "growths": [{**asdict(row), "share_per_hour": row.share_per_hour, "flat": row.flat} for row in state.growths],
        "samples": [_rounded(asdict(sample)) for sample in state.samples],
    }
    path.write_text(json.dumps(document, separators=(",", ":")) + "\n")


def _rounded(value: Any) -> Any:
    """Four digits behind the point are enough of anything here, and an hour of samples is a third as long."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return list(map(_rounded, value))
    return round(value, 4) if isinstance(value, float) else value


def main(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="three quarters of a minute, looked at every 3 s")] = False,
    minutes: Annotated[float, typer.Option(min=0.1, help="how long")] = 60.0,
    load: Annotated[float, typer.Option(min=0.01, max=1.0, help="of the capacity")] = 0.5,
    capacity_per_s: Annotated[
        float | None, typer.Option("--capacity", min=1.0, help="requests/s, where it is known; else it is measured")
    ] = None,
    every: Annotated[float, typer.Option(min=1.0, help="seconds between two looks")] = 10.0,
    server_option: Annotated[list[str] | None, typer.Option(help="handed to `headrace serve`")] = None,
    name: Annotated[str | None, typer.Option(help="of the files in loadtests/results; default local/DATE")] = None,
) -> None:
    """Serve several models and ask them for an hour; tell whether memory was flat and every answer right."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    options = tuple(server_option or ())
    plan = Plan(minutes, load, every, 6, 5.0, 1.0, capacity_per_s, options)
    if quick:
        plan = Plan(0.75, load, 3.0, 2, 2.0, 1.0, capacity_per_s, options)
    path = RESULTS / f"{name or datetime.now(UTC).strftime('local/soak-%Y%m%d-%H%M%S')}.json"
    state = Soak(plan)
    looks = max(1, round(60 / plan.every_s))

    def each(sample: Sample) -> None:
        for problem, count in sample.errors.items():
            state.failed(problem, count)
        if len(state.samples) % looks == 1 or quick:
            write(path, state)  # an hour is too long to lose
            memory = ", ".join(f"{use.reading.name} {use.reading.rss_mib:.0f}" for use in sample.server)
            console.print(
                f"{sample.at_s / 60:5.1f} min: {sample.requests_per_s:,.0f}/s of {plan.load:.0%} of"
                f" {state.capacity_per_s:,.0f}, p99 {sample.p99_ms:.1f} ms, MiB: {memory},"
                f" {state.errors.total()} errors",
                highlight=False,
            )

    with tempfile.TemporaryDirectory(prefix="headrace-soak-") as folder:
        repository = Path(folder) / "repository"
        questions = {
            model: answers(model, repository, [MODELS[model].sample(), *variations(model)]) for model in MODEL_SHARES
        }
        try:
            with Server(repository, Path(folder) / "server.log", plan.server_options) as server:
                uvloop.run(soak(server, questions, state, each))
        except (ServerFailure, BadResponse, OSError) as error:
            state.failed(f"{type(error).__name__}: {error}")
    write(path, state)
    if state.samples:
        seconds = state.samples[-1].at_s
        title = f"{seconds / 60:.0f} minutes at {plan.load:.0%} of {state.capacity_per_s:,.0f} requests/s"
        console.print(growth_table(state.growths))
        console.print(stream_table(state.streams, title))
        plot(state.samples, title, path.with_suffix(".png"))
    console.print(f"besides: {', '.join(f'{count:,} {kind}' for kind, count in sorted(state.visitors.items()))}")
    console.print(f"the server's own: {', '.join(f'{name} {value:.0f}' for name, value in state.counters.items())}")
    for problem, count in state.errors.items():
        console.print(f"{count} x {problem}", markup=False, highlight=False)
    wrong = list(state.verdicts())
    console.print(f"not as it should be: {'; '.join(wrong)}" if wrong else "flat, and no error", markup=False)
    console.print(f"written to {path}", highlight=False)
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
