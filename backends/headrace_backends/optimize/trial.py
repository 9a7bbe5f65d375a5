"""A candidate's own process, seen from the search: calls with a time limit, and a reason for every bad end."""

import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from headrace.core.device import CPU, visible_gpus
from headrace.core.environment import model_environment
from headrace.core.model import Signature
from headrace_backends.base import Array, ModelSource
from headrace_backends.optimize.deadline import Deadline
from headrace_backends.optimize.examples import Example

MOST_RUNS = 100_000
_MARGIN_S = 300.0  # on top of what a measurement is meant to take: a slow model has its batch run once at least


class TrialFailed(Exception):
    """The candidate could not do what was asked; the message is the reason for the report."""


class OutOfTime(TrialFailed):
    """It was not done when the search's deadline was over: this says nothing of the candidate."""

    def __init__(self) -> None:
        super().__init__("stopped: no time was left")


class Trial:
    """One process. ``log`` gets whatever it and its libraries print. A context manager: it is gone afterwards.

    Where there is a ``deadline`` the process is killed when that is over before an answer is there. No call is given up
    sooner than after ``patience_s``.
    """

    def __init__(
        self,
        log: Path,
        threads: int,
        deadline: Deadline | None = None,
        device: str = CPU,
        patience_s: float = 0.0,
    ) -> None:
        self._log = log
        self._deadline = deadline
        self._patience_s = patience_s
        try:
            visible = visible_gpus(device, os.environ.get("CUDA_VISIBLE_DEVICES"))
        except ValueError as error:
            raise TrialFailed(str(error)) from None
        ours, theirs = socket.socketpair()
        try:
            with theirs, log.open("ab") as output:
                self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                    [sys.executable, "-m", "headrace_backends.optimize.trial_process", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=model_environment(shared=False, threads=threads, visible_gpus=visible),
                )
        except OSError as error:
            ours.close()
            raise TrialFailed(f"its process cannot be started: {error}") from error
        self._connection = Connection(ours.detach())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def load(self, backend: str, source: ModelSource, timeout_s: float) -> tuple[Signature, list[str], float]:
        """Load a model as a worker would. Returns its signature, the backend's notes, and the seconds that it took."""
        loaded: tuple[Signature, list[str], float] = self._ask("load", (backend, source), timeout_s)
        return loaded

    def answer(self, requests: Sequence[Example], timeout_s: float) -> list[dict[str, Array]]:
        """Run requests or batches, one after the other."""
        answers: list[dict[str, Array]] = self._ask("answer", (list(requests),), timeout_s)
        return answers

    def clock(self, inputs: Example, seconds: float) -> list[int]:
        """The nanoseconds that each run of a batch takes, for so long and three times at least."""
        self.begin_clock(inputs, seconds)
        return self.end_clock(seconds)

    def begin_clock(self, inputs: Example, seconds: float) -> None:
        """As ``clock``, without waiting: several processes are clocked at once by this and ``end_clock``."""
        self._send("clock", (inputs, seconds, MOST_RUNS))

    def end_clock(self, seconds: float) -> list[int]:
        """The result of ``begin_clock``."""
        times: list[int] = self._receive(seconds + _MARGIN_S)
        return times

    def memory_bytes(self) -> int:
        """What the process holds in memory now."""
        held: int = self._ask("memory_bytes", (), _MARGIN_S)
        return held

    def call(self, target: str, timeout_s: float, **arguments: Any) -> Any:
        """Call ``module:function`` in the process."""
        return self._ask("call", (target, arguments), timeout_s)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._connection.close()
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()

    def _ask(self, name: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        self._send(name, arguments)
        return self._receive(timeout_s)

    def _send(self, name: str, arguments: tuple[Any, ...]) -> None:
        try:
            self._connection.send((name, arguments))
        except OSError:
            raise TrialFailed(self._how_it_ended()) from None

    def _receive(self, timeout_s: float) -> Any:
        timeout_s = max(timeout_s, self._patience_s)
        left_s = math.inf if self._deadline is None else self._deadline.left_s
        try:
            if not self._connection.poll(min(timeout_s, left_s)):
                self.close()
                raise OutOfTime if left_s < timeout_s else TrialFailed(f"hung: killed after {timeout_s:.0f} s")
            good, value = self._connection.recv()
        except (EOFError, OSError):
            raise TrialFailed(self._how_it_ended()) from None
        if not good:
            raise TrialFailed(value)
        return value

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return "its process closed the connection"
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", which is how the system ends processes when memory runs out" if name == "SIGKILL" else ""
            return f"crashed: its process was ended by {name}{hint}"
        return f"crashed: its process ended with exit code {code}: {_last_line(self._log)}"


def _last_line(log: Path) -> str:
    with log.open("rb") as file:  # it may be long
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"
