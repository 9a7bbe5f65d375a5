"""How many threads a model gets: a light one gains nothing from a second, and would pay for waking it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

from headrace_backends.base import Array
from headrace_backends.made_up import made_up
from headrace_backends.specs import FoundTensor

LIGHT_MODEL_MS = 1.0  # a model whose single row takes no longer than this on one thread is light

_TIMED_RUNS = 3  # at most: other processes may make one of them slow
_TIMED_MS = 100.0  # a model that took so long already is heavy, however busy the machine is
_FREE_SIZE = 64  # of a free dimension: tokens, or pixels to a side. Fewer would make a heavy model look light


@dataclass(frozen=True, slots=True)
class ThreadChoice:
    """``count`` threads for the framework, of which one execution keeps ``busy`` so (``Backend.cpu_threads``)."""

    count: int
    busy: int
    note: str | None = None


def first_choice(available: int, asked: int | None) -> int:
    """The threads to measure a model on: as many as are asked for, as far as there are so many; else one."""
    return min(asked or 1, available)


def choose(available: int, asked: int | None, row_ms: float | None) -> ThreadChoice:
    """What a model gets whose row takes ``row_ms`` (None: not known) on ``first_choice`` threads.

    There is a note only where there was a choice.
    """
    free = asked is None and available > 1
    heavy = available if asked is None else min(asked, available)
    if row_ms is None:
        note = f"{heavy} threads: what a row takes is not known, because none could be made up"
        return ThreadChoice(heavy, heavy, note if free else None)
    if row_ms > LIGHT_MODEL_MS:
        return ThreadChoice(heavy, heavy, f"{heavy} threads: one row takes {_told(row_ms)} on one" if free else None)
    light = first_choice(available, asked)
    return ThreadChoice(light, 0, f"light: one row takes {_told(row_ms)}, so one thread" if free else None)


def time_row(run: Callable[[dict[str, Array]], Any], inputs: Sequence[FoundTensor], *, batches: bool) -> float | None:
    """Milliseconds that one made-up row takes, or the whole input where rows are not merged.

    None where the model refuses what is made up, for whatever reason: real inputs decide about that.
    """
    for free_size in (_FREE_SIZE, None, 8):
        row = made_up(inputs, 1 if batches else None, free_size)
        if row is None:
            continue
        try:
            return _quickest_ms(run, row)
        except Exception:  # noqa: BLE001, S112 - a framework may raise anything here; None says that it did
            continue
    return None


def _quickest_ms(run: Callable[[dict[str, Array]], Any], row: Mapping[str, Array]) -> float:
    run(dict(row))  # the first run allocates
    times: list[float] = []
    while (
        len(times) < _TIMED_RUNS and sum(times) < _TIMED_MS and min(times, default=LIGHT_MODEL_MS + 1) > LIGHT_MODEL_MS
    ):
        started_ns = perf_counter_ns()
        run(dict(row))
        times.append((perf_counter_ns() - started_ns) * 1e-6)
    return min(times)


def _told(milliseconds: float) -> str:
    return f"{milliseconds:.2f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"
