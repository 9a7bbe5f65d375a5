"""Starting a worker process, and being told of its end."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass

from headrace.core.environment import model_environment
from headrace.workers import channel

WORKER = "headrace.workers.main"


@dataclass(frozen=True, slots=True)
class Spawned:
    """A worker process, our end of its socket, and a future that resolves when it has ended."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    exited: asyncio.Future[None]


def spawn(
    name: str,
    *,
    shared: bool,
    threads: int,
    log_format: str,
    cpus: Collection[int] | None = None,
    visible_gpus: str | None = None,
    module: str = WORKER,
) -> Spawned:
    """Start a worker process, on these CPUs only and seeing these GPUs only if any are named.

    Its ``module`` is given the socket's descriptor, the name and the format of its log.

    Raises:
        OSError: the system gives none now; nothing is left of the attempt.
    """
    ours, theirs = channel.pair()
    try:
        with theirs:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", module, str(theirs.fileno()), name, log_format],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=model_environment(shared=shared, threads=threads, visible_gpus=visible_gpus),
            )
        if cpus is not None:
            with contextlib.suppress(OSError):  # it has ended already, or the CPUs are not this process's any more
                os.sched_setaffinity(process.pid, cpus)  # before it has any other thread, as those inherit it
        try:
            return Spawned(process, ours, _end_of(process))
        except OSError:
            process.kill()
            process.wait()
            raise
    except OSError:
        ours.close()
        raise


def _end_of(process: subprocess.Popen[bytes]) -> asyncio.Future[None]:
    """Resolves when the process has ended.

    The process descriptor tells of the death, not the socket's end: children of a python model may have inherited
    the socket and hold it open.
    """
    loop = asyncio.get_running_loop()
    exited: asyncio.Future[None] = loop.create_future()
    descriptor = os.pidfd_open(process.pid)

    def on_exit() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        exited.set_result(None)

    loop.add_reader(descriptor, on_exit)
    return exited


def cause_of_end(status: int) -> str:
    """How a process ended, in words, by the status that it was waited for with."""
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-status).name}"
    return f"signal {-status}"
