"""A latency objective under real, bursty load: ``python -m loadtests.objective``.

A server is started for each setting: adaptive, and a grid of fixed pairs of batch size and delay, each with and without
the admission that the objective brings. All get the same bursts at the same share of the measured capacity.
"""

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console
from rich.table import Table

from headrace.core.tensor import Tensor
from loadtests import http_message
from loadtests.http_client import HttpClient, get
from loadtests.inputs import tensor_of_file, tensor_of_shape
from loadtests.latency import percentile
from loadtests.loops import ClosedLoop, OpenLoop
from loadtests.machine import describe_machine, describe_versions
from loadtests.metrics import counter, mean_batch_rows
from loadtests.models import MODELS, place, save_sample
from loadtests.recorder import Recorder
from loadtests.schedule import burst_offsets_ns
from loadtests.server import HOST, Server, ServerFailure

RESULTS = Path(__file__).parent / "results"
SLEEPER = "sleeper"  # the fake backend: it takes its time and no CPU
SLEEPER_CONFIG = "backend: fake\nparameters: {fake_delay_ms: 4, fake_row_delay_ms: 0.7}\n"
SLOTS = 512  # requests under way at most
SATURATING = 128  # clients of the closed loop that measures the capacity
DRAIN_S = 30.0
SEED = 11


@dataclass(frozen=True, slots=True)
class Setting:
    """How the model is served. ``size`` None is adaptive."""

    size: int | None
    delay_ms: float = 0.0
    admission: bool = True

    @property
    def name(self) -> str:
        """For the table."""
        if self.size is None:
            return "adaptive"
        return f"{self.size} rows, {self.delay_ms:g} ms" + (", admission" if self.admission else "")

    def config(self, objective_ms: float) -> str:
        """The lines that it adds to ``config.yaml``."""
        if self.size is None:
            return f"batching: {{p99_objective_ms: {objective_ms:g}}}\n"
        objective = f", p99_objective_ms: {objective_ms:g}" if self.admission else ""
        delay_us = int(self.delay_ms * 1000)
        return f"max_batch_size: {self.size}\nbatching: {{max_queue_delay_us: {delay_us}{objective}}}\n"


class Tally(Recorder):
    """A recorder that tells refusals, which are honest, from errors."""

    __slots__ = ("refused",)

    def __init__(self, from_ns: int, to_ns: int, *, by_start: bool) -> None:
        super().__init__(from_ns, to_ns, by_start=by_start)
        self.refused = 0

    def failed(self, problem: str, count: int = 1) -> None:
        """As ``Recorder.failed``."""
        if problem.startswith("status 503"):
            self.refused += count
        else:
            super().failed(problem, count)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one setting did. ``late_share`` is by the server's own count, None where it keeps none."""

    setting: str
    offered: int
    refused: int
    timely: int
    late: int
    errors: dict[str, int]
    p50_ms: float
    p99_ms: float
    mean_batch_rows: float | None
    late_share: float | None

    @property
    def goodput(self) -> float:
        """Of all requests, those that were answered within the objective."""
        return self.timely / max(1, self.offered)

    @property
    def kept(self) -> float:
        """Of the accepted requests."""
        return self.timely / max(1, self.timely + self.late)


@dataclass(slots=True)
class Bench:
    """One model and its load."""

    model: str
    objective_ms: float
    seconds: float
    warmup_s: float
    work: Path
    tensors: Sequence[Tensor] = field(init=False)

    def prepare(self) -> None:
        """Make the model and its request."""
        folder = self.work / "model"
        if self.model == SLEEPER:
            (folder / "1").mkdir(parents=True)
            (folder / "config.yaml").write_text(SLEEPER_CONFIG)
            self.tensors = [tensor_of_shape("x=FP32:1x16")]
        else:
            place(self.model, self.work / "made")
            shutil.copytree(self.work / "made" / self.model, folder)
            sample = save_sample(self.model, self.work / "samples")
            self.tensors = [tensor_of_file(f"{name}={path}") for name, path in sample.items()]

    def repository(self, setting: Setting | None) -> Path:
        """A repository of the model alone, served so; None for as it is."""
        repository = self.work / f"repository-{setting.name if setting else 'plain'}".replace(" ", "-")
        shutil.copytree(self.work / "model", repository / self.model)
        if setting is not None:
            path = repository / self.model / "config.yaml"
            path.write_text((path.read_text() if path.exists() else "") + setting.config(self.objective_ms))
        return repository

    def client(self, port: int, slots: int) -> HttpClient:
        """Connections that send the model's request."""
        request = http_message.encode_request(f"{HOST}:{port}", self.model, self.tensors, binary=True)
        return HttpClient(HOST, port, request, slots, exact=True)

    async def capacity(self, port: int) -> float:
        """Requests/s of a saturated server."""
        start_ns = time.monotonic_ns() + int(self.warmup_s * 1e9)
        recorder = Recorder(start_ns, start_ns + int(self.seconds * 1e9), by_start=False)
        client = self.client(port, SATURATING)
        loop: ClosedLoop | None = None
        await client.open(lambda slot, problem: loop.done(slot, problem) if loop else None)
        loop = ClosedLoop(client, SATURATING, recorder)
        loop.start()
        await loop.idle.wait()
        await client.close()
        return recorder.finished_in_window / self.seconds

    async def measure(self, setting: Setting, port: int, rate_per_s: float) -> Measured:
        """Bursts at this mean rate."""
        client = self.client(port, SLOTS)
        loop: OpenLoop | None = None
        await client.open(lambda slot, problem: loop.done(slot, problem) if loop else None)
        begin_ns = time.monotonic_ns()
        from_ns = begin_ns + int(self.warmup_s * 1e9)
        recorder = Tally(from_ns, from_ns + int(self.seconds * 1e9), by_start=True)
        offsets_ns = burst_offsets_ns(rate_per_s, self.warmup_s + self.seconds, SEED)
        loop = OpenLoop(client, SLOTS, recorder, [begin_ns + offset_ns for offset_ns in offsets_ns])
        loop.start()
        await asyncio.sleep(self.warmup_s)
        before = await _page(port)
        with suppress(TimeoutError):  # what is missing then is counted
            await asyncio.wait_for(loop.idle.wait(), self.seconds + DRAIN_S)
        after = await _page(port)
        if unanswered := loop.unanswered():
            recorder.failed(f"no answer {DRAIN_S:.0f} s after the end", unanswered)
        loop.close()
        await client.close()
        return self._measured(setting, recorder, before, after)

    def _measured(self, setting: Setting, recorder: Tally, before: str, after: str) -> Measured:
        ordered = sorted(recorder.latencies_ns)
        timely = sum(latency <= self.objective_ms * 1e6 for latency in ordered)
        counts = [
            (counter(after, name, self.model) or 0) - (counter(before, name, self.model) or 0)
            for name in ("headrace_objective_timely_total", "headrace_objective_late_total")
        ]
        return Measured(
            setting=setting.name,
            offered=len(ordered) + recorder.refused + sum(recorder.errors.values()),
            refused=recorder.refused,
            timely=timely,
            late=len(ordered) - timely,
            errors=dict(recorder.errors),
            p50_ms=percentile(ordered, 0.5) * 1e-6 if ordered else 0.0,
            p99_ms=percentile(ordered, 0.99) * 1e-6 if ordered else 0.0,
            mean_batch_rows=mean_batch_rows(before, after, self.model),
            late_share=counts[1] / sum(counts) if sum(counts) else None,
        )


async def _page(port: int) -> str:
    return (await get(HOST, port, "/metrics")).body.decode()


def settings(sizes: Sequence[int], delays_ms: Sequence[float]) -> Iterator[Setting]:
    """Adaptive first, then the grid, each pair with and without admission."""
    yield Setting(None)
    for size in sizes:
        for delay_ms in delays_ms:
            for admission in (False, True):
                yield Setting(size, delay_ms, admission)


def table(model: str, rows: Sequence[Measured], title: str) -> Table:
    """For a person."""
    drawn = Table(title=f"{model}: {title}")
    drawn.add_column("setting")
    for heading in ("goodput", "kept", "late, by the server", "refused", "p50 ms", "p99 ms", "batch", "errors"):
        drawn.add_column(heading, justify="right")
    for row in rows:
        drawn.add_row(
            *(row.setting, f"{row.goodput:.1%}", f"{row.kept:.2%}"),
            "-" if row.late_share is None else f"{row.late_share:.2%}",
            *(f"{row.refused / max(1, row.offered):.1%}", f"{row.p50_ms:.1f}", f"{row.p99_ms:.1f}"),
            "-" if row.mean_batch_rows is None else f"{row.mean_batch_rows:.1f}",
            str(sum(row.errors.values())),
        )
    return drawn


def main(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="one fixed pair, 3 s each: under half a minute")] = False,
    model: Annotated[str, typer.Option(help=f"of {SLEEPER}, {', '.join(MODELS)}")] = "minilm",
    objective_ms: Annotated[float, typer.Option(min=0.1, help="from arrival to answer")] = 50.0,
    load: Annotated[float, typer.Option(min=0.01, help="of the measured capacity, on average")] = 0.9,
    size: Annotated[list[int] | None, typer.Option(min=1, help="of the grid, in rows; may be repeated")] = None,
    delay_ms: Annotated[list[float] | None, typer.Option(min=0, help="of the grid; may be repeated")] = None,
    seconds: Annotated[float, typer.Option(min=0.5, help="length of each measured window")] = 20.0,
    name: Annotated[str | None, typer.Option(help="of the file in loadtests/results; default local/DATE")] = None,
) -> None:
    """Measure the capacity of a model, then every setting under bursts, and print who keeps the objective."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    if model not in (SLEEPER, *MODELS):
        console.print(f"error: no model '{model}'; there are {SLEEPER}, {', '.join(MODELS)}")
        raise typer.Exit(1)
    sizes, delays = (
        size or ([16] if quick else [1, 2, 4, 8, 16, 32]),
        delay_ms or ([0.0] if quick else [0.0, 2.0, 10.0]),
    )
    seconds = min(seconds, 3.0) if quick else seconds
    with tempfile.TemporaryDirectory(prefix="headrace-objective-") as folder:
        bench = Bench(model, objective_ms, seconds, 1.0 if quick else 5.0, Path(folder))
        bench.prepare()
        rows: list[Measured] = []
        try:
            with Server(bench.repository(None), Path(folder) / "plain.log") as server:
                capacity = uvloop.run(bench.capacity(server.http_port))
            console.print(f"{model}: {capacity:,.0f} requests/s with {SATURATING} clients", highlight=False)
            for setting in settings(sizes, delays):
                with Server(bench.repository(setting), Path(folder) / "server.log") as server:
                    rows.append(uvloop.run(bench.measure(setting, server.http_port, load * capacity)))
                console.print(f"  {setting.name}: {rows[-1].goodput:.1%} in time", highlight=False)
        except ServerFailure as error:
            console.print(f"error: {error}", markup=False, highlight=False)
            raise typer.Exit(1) from None
    title = f"bursts at {load:.0%} of {capacity:,.0f} requests/s, objective {objective_ms:g} ms"
    console.print(table(model, rows, title))
    path = RESULTS / f"{name or datetime.now(UTC).strftime('local/%Y%m%d-%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "model": model,
        "objective_ms": objective_ms,
        "load": load,
        "capacity_per_s": capacity,
        "settings": [{**asdict(row), "goodput": row.goodput, "kept": row.kept} for row in rows],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"written to {path}", highlight=False)
    raise typer.Exit(1 if any(row.errors for row in rows) else 0)


if __name__ == "__main__":
    typer.run(main)
