"""What ONNX Runtime gives in-process, without any server: ``python -m loadtests.limit model.onnx --npy x=row.npy``."""

import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from headrace.core.tensor import Array

Feeds = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement: ``callers`` threads at a time in a session of ``session_threads`` each."""

    batch_rows: int
    callers: int
    session_threads: int
    rows_per_s: float
    cpu_us_per_row: float


def layouts(threads: int) -> list[tuple[int, int]]:
    """Callers and session threads: all threads behind one call, or a call on each.

    Both use the same cores. Which is faster depends on the model, so a limit has to try both.
    """
    return [(1, threads)] if threads == 1 else [(1, threads), (threads, 1)]


def measure(path: Path, row: Feeds, batches: Sequence[int], threads: int, seconds: float) -> list[Point]:
    """Every layout at every batch size, ``seconds`` each. Call it in a process with nothing else to do."""
    points = []
    for layout in layouts(threads):
        session = _session(path, layout[1])
        for rows in batches:
            feeds = {name: np.repeat(array, rows, axis=0) for name, array in row.items()}
            points.append(_measure_one(session, feeds, rows, layout, seconds))
    return points


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _measure_one(session: Any, feeds: Feeds, rows: int, layout: tuple[int, int], seconds: float) -> Point:
    callers, session_threads = layout
    session.run(None, feeds)  # the first call of a shape plans its memory

    def call_until(end: float) -> int:
        calls = 0
        while time.monotonic() < end:
            session.run(None, feeds)
            calls += 1
        return calls

    with ThreadPoolExecutor(callers) as pool:
        started, cpu_started = time.monotonic(), time.process_time()
        calls = sum(pool.map(call_until, [started + seconds] * callers))
        elapsed, cpu_s = time.monotonic() - started, time.process_time() - cpu_started
    done = calls * rows
    return Point(rows, callers, session_threads, done / elapsed, cpu_s / done * 1e6)


def best(points: Sequence[Point], most_rows: int, callers: int | None = None) -> Point:
    """The fastest point whose batch ``most_rows`` requests of one row can fill; the smallest when none can.

    With ``callers``, of the points with so many alone.
    """
    points = [point for point in points if callers in (None, point.callers)]
    fitting = [point for point in points if point.batch_rows <= most_rows]
    smallest = min(point.batch_rows for point in points)
    candidates = fitting or [point for point in points if point.batch_rows == smallest]
    return max(candidates, key=lambda point: point.rows_per_s)


def usable_cpus() -> int:
    """The CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def main(
    *,
    model: Annotated[Path, typer.Argument(help="an ONNX file whose inputs all have a leading batch dimension")],
    npy: Annotated[list[str], typer.Option(help="one row of an input, as x=row.npy; once for each input")],
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="default 1, 8 and 32")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="default: all usable CPUs")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="for each point")] = 2.0,
    output: Annotated[Path | None, typer.Option(help="write the points to this JSON file")] = None,
) -> None:
    """Measure rows/s and CPU a row at several batch sizes and thread layouts."""
    row = {}
    for text in npy:
        name, equals, path = text.partition("=")
        if not equals or not Path(path).is_file():
            print(f"error: the array '{text}' was given; expected NAME=FILE.npy", file=sys.stderr)
            raise typer.Exit(1)
        row[name] = np.load(path, allow_pickle=False)
    points = measure(model, row, batch_size or [1, 8, 32], threads or usable_cpus(), seconds)
    for point in points:
        print(
            f"batch {point.batch_rows:4d}  {point.callers} x {point.session_threads} threads"
            f"  {point.rows_per_s:12,.1f} rows/s  {point.cpu_us_per_row:12,.1f} us CPU a row"
        )
    if output is not None:
        output.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
