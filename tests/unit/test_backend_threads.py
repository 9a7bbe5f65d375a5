"""How many threads a model gets: the choice, and how a row is timed."""

import pytest

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends import threads
from headrace_backends.base import InputError
from headrace_backends.specs import FoundTensor
from headrace_backends.threads import ThreadChoice, choose, first_choice, time_row


@pytest.mark.parametrize(
    ("available", "asked", "row_ms", "choice"),
    [
        (2, None, 0.03, ThreadChoice(1, 0, "light: one row takes 0.03 ms, so one thread")),
        (2, None, 1.0, ThreadChoice(1, 0, "light: one row takes 1.00 ms, so one thread")),
        (2, None, 45.2, ThreadChoice(2, 2, "2 threads: one row takes 45 ms on one")),
        (2, None, None, ThreadChoice(2, 2, "2 threads: what a row takes is not known, because none could be made up")),
        (1, None, 0.03, ThreadChoice(1, 0)),
        (1, None, 45.2, ThreadChoice(1, 1)),
        (1, None, None, ThreadChoice(1, 1)),
        (4, 2, 0.03, ThreadChoice(2, 0)),
        (4, 2, 45.2, ThreadChoice(2, 2)),
        (4, 9, 45.2, ThreadChoice(4, 4)),
        (4, 1, None, ThreadChoice(1, 1)),
    ],
)
def test_choice(available, asked, row_ms, choice):
    assert choose(available, asked, row_ms) == choice


def test_first_choice():
    assert [first_choice(4, asked) for asked in (None, 1, 3, 9)] == [1, 1, 3, 4]


class Clock:
    """A clock that goes on by what the next run takes."""

    def __init__(self, monkeypatch, *run_ms):
        self.now_ns = 0
        self.run_ms = list(run_ms)
        self.shapes = []
        monkeypatch.setattr(threads, "perf_counter_ns", lambda: self.now_ns)

    def run(self, arrays):
        self.shapes.append(arrays["x"].shape)
        self.now_ns += int(self.run_ms.pop(0) * 1e6)


def x(*shape):
    return [FoundTensor(TensorSpec("x", DataType.FP32, shape))]


@pytest.mark.parametrize(
    ("run_ms", "row_ms"),
    [
        ([90, 0.25], 0.25),  # the first run does not count; a second that is light settles it
        ([90, 4, 0.5], 0.5),  # one that is not may have been disturbed
        ([90, 5, 4, 6], 4),
        ([90, 300], 300),
    ],
)
def test_timing_takes_as_few_runs_as_settle_it(monkeypatch, run_ms, row_ms):
    clock = Clock(monkeypatch, *run_ms)
    assert time_row(clock.run, x(-1, 3), batches=True) == row_ms
    assert clock.run_ms == []
    assert set(clock.shapes) == {(1, 3)}


def test_free_dimensions_are_not_made_so_small_that_a_heavy_model_looks_light(monkeypatch):
    clock = Clock(monkeypatch, 0, 0)
    time_row(clock.run, x(-1, -1), batches=True)
    assert clock.shapes[0] == (1, 64)
    clock = Clock(monkeypatch, 0, 0)
    time_row(clock.run, x(-1, 2), batches=False)
    assert clock.shapes[0] == (64, 2)


def test_a_model_that_refuses_some_sizes_or_all(monkeypatch):
    def only(size):
        def run(arrays):
            if arrays["x"].shape[1] != size:
                raise InputError("size")

        return run

    Clock(monkeypatch)
    assert time_row(only(4), x(-1, -1), batches=True) == 0
    assert time_row(only(5), x(-1, -1), batches=True) is None
    assert time_row(only(4), [FoundTensor(TensorSpec("x", DataType.FP32, None))], batches=False) is None
