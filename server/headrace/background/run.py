"""One run of the optimiser: a process of its own that takes only what nobody else wants, watched until it ends."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

import msgspec

from headrace.background.schedule import Result
from headrace.workers.cpus import usable_cpus

NOTHING_BETTER = 3  # the command's exit status where the plan is to leave everything as it is
PROGRESS = b"headrace-progress: "
MOST_LINE_BYTES = 64 * 1024  # what is longer is nothing for us
MOST_REASON = 500  # characters
CHUNK_BYTES = 64 * 1024
LAST_CHUNKS = 64  # read after a process has ended, of what it has written before
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")

Progress = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended; ``reason`` is for the log."""

    result: Result
    reason: str = ""


class Lines:
    """Cuts what a program writes into lines. Of endless ones nothing is kept."""

    def __init__(self, on_line: Callable[[bytes], None]) -> None:
        self._on_line = on_line
        self._begun = b""
        self._too_long = False

    def feed(self, chunk: bytes) -> None:
        """Some more of it."""
        *whole, rest = chunk.split(b"\n")
        for part in whole:
            line = self._begun + part
            if not self._too_long and len(line) <= MOST_LINE_BYTES:
                self._on_line(line)
            self._begun, self._too_long = b"", False
        self._begun += rest
        if len(self._begun) > MOST_LINE_BYTES:
            self._begun, self._too_long = b"", True

    def end(self) -> None:
        """There is no more."""
        if self._begun:
            self._on_line(self._begun)
            self._begun = b""


async def run_command(
    command: Sequence[str], time_limit_s: float, on_progress: Callable[[Progress], None] = lambda _: None
) -> Ended:
    """Run the optimiser's command to its end; when this is cancelled, it and all that it has started are killed.

    ``on_progress`` is told what it writes as ``headrace-progress: {...}``.
    """
    complaint = [""]

    def on_output(line: bytes) -> None:
        if line.startswith(PROGRESS) and (told := _progress(line.removeprefix(PROGRESS))) is not None:
            on_progress(told)

    def on_complaint(line: bytes) -> None:
        if text := line.decode(errors="replace").strip():
            complaint[0] = text[:MOST_REASON]

    try:
        process = _begin(command)
    except OSError as error:
        return Ended(Result.FAILED, f"it cannot be started: {error}")
    # Not asyncio's subprocesses: whether those end with the process or with the last holder of its pipes, which may be
    # a child of it, depends on the version of Python.
    assert process.stdout is not None, "they are pipes"
    assert process.stderr is not None, "they are pipes"
    written = _Pipe(process.stdout, Lines(on_output)), _Pipe(process.stderr, Lines(on_complaint))
    exited, watch = _exit_of(process)
    timed_out = False
    try:
        async with asyncio.timeout(time_limit_s):
            await exited
    except TimeoutError:
        timed_out = True
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the process itself, and whatever it has started
        try:
            if not exited.done():  # it dies as it ran, on a CPU that nobody else wants
                await asyncio.wait([exited])
        finally:
            watch()
            process.wait()
            for pipe in written:
                pipe.close()
    if timed_out:
        return Ended(Result.TIMED_OUT, f"it took longer than {time_limit_s:g} s")
    return _ended(process.returncode, complaint[0])


def _begin(command: Sequence[str]) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "headrace.background.launcher", str(os.getpid())]
    return subprocess.Popen(  # noqa: S603 - the server's own command
        [*launcher, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        # So that all of it can be killed at once. In a session of its own its idle policy would count among its own
        # processes only, and half of the CPUs would be its: sched(7), autogroup.
        process_group=0,
        env={**os.environ, **dict.fromkeys(_THREADS, str(usable_cpus()))},
    )


def _exit_of(process: subprocess.Popen[bytes]) -> tuple[asyncio.Future[None], Callable[[], None]]:
    """A future that resolves when the process has ended, and what takes the watch away."""
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[None] = loop.create_future()
    descriptor = os.pidfd_open(process.pid)

    def on_exit() -> None:
        loop.remove_reader(descriptor)
        if not exited.done():
            exited.set_result(None)

    def away() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)

    loop.add_reader(descriptor, on_exit)
    return exited, away


class _Pipe:
    """Reads what a process writes, until it is closed."""

    def __init__(self, pipe: IO[bytes], lines: Lines) -> None:
        self._pipe = pipe
        self._lines = lines
        os.set_blocking(pipe.fileno(), False)
        asyncio.get_running_loop().add_reader(pipe.fileno(), self._read)

    def close(self) -> None:
        """Take what is still there; who else holds the other end is cut off."""
        for _ in range(LAST_CHUNKS):
            if not self._read():
                break
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        self._lines.end()
        self._pipe.close()

    def _read(self) -> bool:
        """Whether there was something."""
        try:
            chunk = os.read(self._pipe.fileno(), CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not chunk:
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            return False
        self._lines.feed(chunk)
        return True


def _progress(text: bytes) -> Progress | None:
    try:
        return msgspec.json.decode(text, type=Progress)
    except (msgspec.DecodeError, RecursionError):
        return None


def _ended(status: int, complaint: str) -> Ended:
    if status == 0:
        return Ended(Result.PLANNED)
    if status == NOTHING_BETTER:
        return Ended(Result.NOTHING_BETTER)
    how = f"it was killed by signal {-status}" if status < 0 else f"it ended with exit status {status}"
    return Ended(Result.FAILED, f"{how}: {complaint}" if complaint else how)
