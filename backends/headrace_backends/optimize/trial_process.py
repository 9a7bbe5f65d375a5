"""The process in which a candidate is made, loaded and run. It may crash, hang or be killed: nobody else notices."""

import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np

from headrace.core.errors import HeadraceError
from headrace.core.model import Signature
from headrace.core.parent_death import die_with_parent
from headrace.core.process_memory import process_memory
from headrace_backends.base import Array, Backend, BackendUnavailable, LoadError, ModelSource, RequestInfo
from headrace_backends.optimize.examples import Example
from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.registry import resolve

_FEWEST_RUNS = 3
_SLOW_NS = 1_000_000_000  # a run that takes so long is told enough by one in each round


class Bench:
    """What the other side may call, by name. Holds one loaded model at most."""

    def __init__(self) -> None:
        self._backend: Backend | None = None

    def load(self, backend: str, source: ModelSource) -> tuple[Signature, list[str], float]:
        """Load a model as a worker would. Returns its signature, the backend's notes, and the seconds that it took."""
        kind = resolve(backend)
        started_ns = perf_counter_ns()
        self._backend = kind.load(source)
        return self._backend.signature, self._backend.notes(), (perf_counter_ns() - started_ns) * 1e-9

    def answer(self, requests: list[Example]) -> list[dict[str, Array]]:
        """Run requests or batches, one after the other."""
        return [{name: np.array(array) for name, array in self._run(inputs).items()} for inputs in requests]

    def clock(self, inputs: Example, seconds: float, most: int) -> list[int]:
        """Run a batch again and again for so long. Returns the nanoseconds of each run."""
        times: list[int] = []
        until_ns = perf_counter_ns() + int(seconds * 1e9)
        fewest = _FEWEST_RUNS
        while len(times) < most and (len(times) < fewest or perf_counter_ns() < until_ns):
            started_ns = perf_counter_ns()
            self._run(inputs)
            times.append(perf_counter_ns() - started_ns)
            if times[0] > _SLOW_NS:
                fewest = 1
        return times

    def memory_bytes(self) -> int:
        """What this process holds in memory."""
        memory = process_memory(os.getpid())
        return memory.resident_bytes if memory is not None else 0

    def call(self, target: str, arguments: dict[str, Any]) -> Any:
        """Call ``module:function``: what needs a framework and a process of its own."""
        module, _, name = target.partition(":")
        return getattr(import_module(module), name)(**arguments)

    def _run(self, inputs: Example) -> Any:
        assert self._backend is not None, "load comes first"
        backend = self._backend
        if not backend.wants_requests:
            return backend.execute(inputs, ())
        rows = len(next(iter(inputs.values()))) if backend.signature.max_batch_size else 1
        answers = backend.execute(inputs, [RequestInfo(rows, "", {})])
        if isinstance(answers, list | tuple):
            if answers[0].error is not None:
                raise answers[0].error
            return answers[0].outputs
        return answers


def take_step(kind: str, task: dict[str, Any]) -> tuple[Path, list[str]]:
    """Take one step. Returns the new model's path and the step's notes."""
    from headrace_backends.optimize.steps.registry import step

    notes: list[str] = []
    return step(kind)(StepTask(**task, note=notes.append)), notes


def serve(connection: Connection) -> None:
    """Answer calls until the other side is gone."""
    bench = Bench()
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            reply = (True, getattr(bench, name)(*arguments))
        except (LoadError, BackendUnavailable, StepFailed, HeadraceError) as error:
            reply = (False, str(error))
        except MemoryError:
            reply = (False, "out of memory")
        except ImportError as error:
            reply = (False, f"not installed: {error}; pip install 'headrace[optimize]'")
        except Exception as error:  # noqa: BLE001 - a framework may raise anything: it is a row of the report
            text = " ".join(str(error).split())
            reply = (False, f"{type(error).__name__}: {text[:500]}")
        connection.send(reply)


def main() -> None:
    """Entry point: ``python -m headrace_backends.optimize.trial_process DESCRIPTOR``."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the search, which then ends this process
    with suppress(OSError):  # rather a candidate than the search, or a server beside it, where memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")
    np.seterr(all="ignore")
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
