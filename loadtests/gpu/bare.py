"""The same work without a server: a backend's own loop, and the engine by itself, to measure the served forms by."""

import time
from collections.abc import Callable
from typing import Any

from headrace_backends.base import Backend
from loadtests.gpu.subjects import CHECKED, MAX_ROWS, Array, Subject, compare, first_rows

_ROTATION = 4  # inputs that take turns, so that nothing is answered from a cache
_AT_ONCE = 10  # launches of an engine before it is waited for


def check(backend: Backend, subject: Subject, wanted: Array) -> dict[str, float]:
    """How far the answers are off, the worst of several sizes of batch."""
    inputs = subject.inputs(MAX_ROWS, CHECKED)
    found = []
    for rows in (1, 3, MAX_ROWS, 3, 1, 3, 1, MAX_ROWS):  # graphs of several sizes in turn
        answer = backend.execute(first_rows(inputs, min(rows, len(wanted))), ())
        assert not isinstance(answer, list | tuple)
        (array,) = answer.values()  # whatever the exporter called it
        found.append(compare(array, wanted))
    return {
        "error": max(one["error"] for one in found),
        "top1": min(one["top1"] for one in found),
        "cosine": min(one["cosine"] for one in found),
    }


def rows_per_s(backend: Backend, subject: Subject, rows: int, seconds: float) -> float:
    """How many rows a loop of ``execute`` gets through, copies there and back included."""
    inputs = [subject.inputs(rows, seed) for seed in range(_ROTATION)]
    return rows * calls_per_s(lambda turn: backend.execute(inputs[turn % _ROTATION], ()), seconds)


def calls_per_s(call: Callable[[int], object], seconds: float, warm_ups: int = 3 * _ROTATION) -> float:
    """How often a second something that waits for its own end is done, after some times that are not counted."""
    for turn in range(warm_ups):
        call(turn)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds or not done:
        call(done)
        done += 1
    return done / (time.perf_counter() - started)


def engine_ms(backend: Any, subject: Subject, seconds: float) -> float:
    """What an engine of TensorRT takes for the largest batch without copies: many launches, one wait.

    Raises:
        AssertionError: what it has run last is no such batch, which is all that can be launched again.
    """
    execution = backend._execution  # noqa: SLF001 - no client can ask for that
    contexts = execution._contexts  # noqa: SLF001
    made = contexts.of(0) if hasattr(contexts, "of") else contexts[0]
    rows = made.context.get_tensor_shape(next(iter(subject.free)))[0]
    assert rows == MAX_ROWS, f"the engine has run a batch of {rows} rows last"

    def run(_: int) -> None:
        for _ in range(_AT_ONCE):
            assert made.context.execute_async_v3(execution._stream)  # noqa: SLF001
        execution._device.wait(execution._stream)  # noqa: SLF001

    return 1000 / (calls_per_s(run, seconds, warm_ups=3) * _AT_ONCE)
