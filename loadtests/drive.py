"""Drive one model of a running server: ``python -m loadtests.drive --url 127.0.0.1:8000 --model mlp ...``."""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from headrace.core.tensor import Tensor
from loadtests import cpu, grpc_message, time_slice
from loadtests.answer import BadResponse, Outputs
from loadtests.client import Client
from loadtests.dialect import Dialect, Wire, grpc_check, http_check, http_request
from loadtests.grpc_client import GrpcClient
from loadtests.h2_client import H2Client
from loadtests.http_client import HttpClient, get
from loadtests.inputs import array_of_file, tensor_of_file, tensor_of_shape
from loadtests.latency import LatencySummary, summarize
from loadtests.loops import ClosedLoop, OpenLoop
from loadtests.metrics import mean_batch_rows
from loadtests.recorder import Recorder
from loadtests.schedule import poisson_offsets_ns

DRAIN_S = 30.0
SCHEDULE_SEED = 7


class GrpcKind(StrEnum):
    """Whose gRPC client: the library that most clients use, or ours, which costs a fraction of it."""

    GRPCIO = "grpcio"
    LIGHT = "light"


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. ``rate_per_s`` None is a closed loop; addresses are host and port.

    ``path`` None is the open protocol's; the first answer must have the outputs ``expected``, which may be none.
    """

    address: tuple[str, int]
    wire: Wire
    model: str
    concurrency: int
    rate_per_s: float | None
    seconds: float
    warmup_s: float
    server_pid: int | None
    metrics_address: tuple[str, int] | None
    dialect: Dialect = Dialect.V2
    path: str | None = None
    expected: Outputs = field(default_factory=dict)
    grpc_client: GrpcKind = GrpcKind.GRPCIO


@dataclass(frozen=True, slots=True)
class Result:
    """What one run measured; None is what could not be known. README.md says what each number means."""

    requests_per_s: float
    latency: LatencySummary
    errors: dict[str, int]
    mean_batch_rows: float | None
    server_cpu_us: float | None
    server_processes_gone: int
    driver_cpu_share: float
    send_lag: LatencySummary | None


@dataclass(frozen=True, slots=True)
class _Moment:
    """The state of the server and the driver at one end of the window."""

    page: str | None
    tree: cpu.TreeTimes | None
    answered: int
    driver_cpu_ns: int
    at_ns: int


async def drive(settings: Settings, tensors: Sequence[Tensor], client: Client | None = None) -> Result:
    """Warm up, measure, drain; with a client that sends ``tensors``, or one that has its request already.

    Raises:
        BadResponse: the first answer is no good, or the window passed without a good one.
        OSError: nobody listens there, or the server's process is gone.
    """
    client = client or make_client(settings, tensors)
    loop: ClosedLoop | OpenLoop | None = None
    try:
        await client.open(lambda slot, problem: loop.done(slot, problem) if loop else None)
        start_ns = time.monotonic_ns()
        from_ns = start_ns + int(settings.warmup_s * 1e9)
        recorder = Recorder(from_ns, from_ns + int(settings.seconds * 1e9), by_start=settings.rate_per_s is not None)
        loop = _make_loop(settings, client, recorder, start_ns)
        loop.start()
        await _sleep_until(recorder.from_ns)
        before = await _look(settings, recorder, scrape_first=True)
        await _sleep_until(recorder.to_ns)
        after = await _look(settings, recorder, scrape_first=False)
        with suppress(TimeoutError):  # what is missing then is counted
            await asyncio.wait_for(loop.idle.wait(), DRAIN_S)
        if unanswered := loop.unanswered():
            recorder.failed(f"no answer {DRAIN_S:.0f} s after the end", unanswered)
    finally:
        if loop is not None:
            loop.close()
        await client.close()
    return _result(settings, recorder, loop, before, after)


def make_client(settings: Settings, tensors: Sequence[Tensor]) -> Client:
    """The client that speaks the run's protocol, its request made."""
    host, port = settings.address
    wire, dialect, expected = settings.wire, settings.dialect, settings.expected
    if wire is Wire.GRPC:
        message = grpc_message.encode_request(settings.model, tensors)
        kind = H2Client if settings.grpc_client is GrpcKind.LIGHT else GrpcClient
        return kind(host, port, message, settings.concurrency, grpc_check(expected))
    request = http_request(dialect, wire, f"{host}:{port}", settings.path, settings.model, tensors)
    exact = wire is Wire.HTTP_BINARY
    check = http_check(dialect, wire, expected)
    return HttpClient(host, port, request, settings.concurrency, exact=exact, check=check)


def _make_loop(settings: Settings, client: Client, recorder: Recorder, start_ns: int) -> ClosedLoop | OpenLoop:
    if settings.rate_per_s is None:
        return ClosedLoop(client, settings.concurrency, recorder)
    offsets_ns = poisson_offsets_ns(settings.rate_per_s, settings.warmup_s + settings.seconds, SCHEDULE_SEED)
    times_ns = [start_ns + offset_ns for offset_ns in offsets_ns]
    return OpenLoop(client, settings.concurrency, recorder, times_ns)


async def _sleep_until(at_ns: int) -> None:
    await asyncio.sleep(max(at_ns - time.monotonic_ns(), 0) / 1e9)


async def _look(settings: Settings, recorder: Recorder, *, scrape_first: bool) -> _Moment:
    """The scrapes lie outside the two looks at the CPU, so that the server's work for them is not counted."""
    page = await _scrape(settings) if scrape_first else None
    tree = cpu.tree_times(settings.server_pid, cpu.read_processes()) if settings.server_pid else None
    answered, driver_cpu_ns, at_ns = recorder.answered, time.process_time_ns(), time.monotonic_ns()
    if not scrape_first:
        page = await _scrape(settings)
    return _Moment(page, tree, answered, driver_cpu_ns, at_ns)


async def _scrape(settings: Settings) -> str | None:
    if settings.metrics_address is None:
        return None
    try:
        response = await get(*settings.metrics_address, "/metrics")
    except (OSError, BadResponse) as error:
        print(f"no metrics from {settings.metrics_address}: {error}", file=sys.stderr)
        return None
    return response.body.decode() if response.status == 200 else None


def _result(
    settings: Settings, recorder: Recorder, loop: ClosedLoop | OpenLoop, before: _Moment, after: _Moment
) -> Result:
    if not recorder.latencies_ns:
        seen = "; ".join(recorder.errors) or "no answer at all"
        raise BadResponse(f"model '{settings.model}': no good answer within {settings.seconds} s: {seen}")
    answered = after.answered - before.answered
    cpu_us = after.tree.cpu_us - before.tree.cpu_us if before.tree and after.tree else None
    batch = mean_batch_rows(before.page, after.page, settings.model) if before.page and after.page else None
    return Result(
        requests_per_s=recorder.finished_in_window / settings.seconds,
        latency=summarize(recorder.latencies_ns),
        errors=dict(recorder.errors),
        mean_batch_rows=batch,
        server_cpu_us=cpu_us / answered if cpu_us is not None and answered else None,
        server_processes_gone=cpu.left(before.tree, after.tree) if before.tree and after.tree else 0,
        driver_cpu_share=(after.driver_cpu_ns - before.driver_cpu_ns) / (after.at_ns - before.at_ns),
        send_lag=summarize(loop.lags_ns) if isinstance(loop, OpenLoop) else None,
    )


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``, an ``http://`` in front of it or not.

    Raises:
        ValueError: it is not of that form.
    """
    host, colon, port = text.removeprefix("http://").rstrip("/").rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ValueError(f"the address '{text}' was given; expected HOST:PORT, as 127.0.0.1:8000")
    return host.strip("[]"), int(port)


def describe(result: Result) -> str:
    """The result for a person."""
    latency = result.latency
    lines = [
        f"throughput   {result.requests_per_s:,.1f} requests/s",
        f"latency      p50 {latency.p50_ms:.3f}  p90 {latency.p90_ms:.3f}  p99 {latency.p99_ms:.3f} ms",
        f"             max {latency.max_ms:.3f} ms of {latency.count} requests",
        f"errors       {sum(result.errors.values())}",
        *(f"             {count} x {problem}" for problem, count in result.errors.items()),
        f"batch        {_or_unknown(result.mean_batch_rows, '.2f')} rows an execution",
        f"server CPU   {_or_unknown(result.server_cpu_us, '.1f')} us a request",
        f"driver CPU   {result.driver_cpu_share:.0%} of one core",
    ]
    if result.server_processes_gone:
        lines.append(f"             {result.server_processes_gone} processes of the server ended meanwhile")
    if result.send_lag is not None:
        lines.append(f"send lag     p50 {result.send_lag.p50_ms:.3f}  p99 {result.send_lag.p99_ms:.3f} ms")
    return "\n".join(lines)


def _or_unknown(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def _tensors(model: str, shapes: Sequence[str], files: Sequence[str]) -> list[Tensor]:
    if not shapes and not files:
        raise ValueError(f"model '{model}' was given no input; expected --shape or --npy at least once")
    return [*map(tensor_of_shape, shapes), *map(tensor_of_file, files)]


def main(
    *,
    url: Annotated[str, typer.Option(help="HOST:PORT of the server, of its gRPC port for grpc")],
    model: Annotated[str, typer.Option(help="the model's name")],
    protocol: Annotated[Wire, typer.Option(help="how requests travel")] = Wire.HTTP_BINARY,
    shape: Annotated[
        list[str] | None, typer.Option(help="an input with random data, as x=FP32:1x784; may be repeated")
    ] = None,
    npy: Annotated[list[str] | None, typer.Option(help="an input from a file, as x=data.npy; may be repeated")] = None,
    dialect: Annotated[
        Dialect, typer.Option(help="over HTTP: v2, or plain: tensors' bytes as the body, or an object of lists")
    ] = Dialect.V2,
    path: Annotated[str | None, typer.Option(help="of the URL, as /inference; plain has none by itself")] = None,
    expect: Annotated[
        list[str] | None, typer.Option(help="what an output has to be, as y=data.npy; may be repeated")
    ] = None,
    grpc_client: Annotated[
        GrpcKind, typer.Option(help="grpcio, which costs some 250 us a call, or a light one of our own")
    ] = GrpcKind.GRPCIO,
    concurrency: Annotated[int, typer.Option(min=1, help="clients; with --rate, the most requests under way")] = 1,
    rate: Annotated[float | None, typer.Option(help="requests/s of an open loop (Poisson)")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="length of the measured window")] = 5.0,
    warmup: Annotated[float, typer.Option(min=0.0, help="seconds of load before it")] = 1.0,
    server_pid: Annotated[int | None, typer.Option(help="count the CPU of this process and its descendants")] = None,
    metrics_url: Annotated[
        str | None, typer.Option(help="HOST:PORT of GET /metrics; for HTTP --url unless given")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="write the raw result to this JSON file")] = None,
) -> None:
    """Put one model under load and print what it did."""
    try:
        tensors = _tensors(model, shape or (), npy or ())
        metrics_text = metrics_url or (url if protocol is not Wire.GRPC and dialect is Dialect.V2 else None)
        settings = Settings(
            address=parse_address(url),
            wire=protocol,
            model=model,
            concurrency=concurrency,
            rate_per_s=rate,
            seconds=seconds,
            warmup_s=warmup,
            server_pid=server_pid,
            metrics_address=parse_address(metrics_text) if metrics_text else None,
            dialect=dialect,
            path=path,
            expected=dict(map(array_of_file, expect or ())),
            grpc_client=grpc_client,
        )
        if server_pid is not None and seconds < cpu.MIN_SECONDS:
            print(f"CPU time comes in ticks of 10 ms: expect little of {seconds} s", file=sys.stderr)
        time_slice.shorten()
        result = uvloop.run(drive(settings, tensors))
    except (ValueError, OSError, BadResponse) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(describe(result))
    if output is not None:
        told = asdict(settings) | {"expected": sorted(settings.expected)}
        output.write_text(json.dumps({"settings": told, **asdict(result)}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
