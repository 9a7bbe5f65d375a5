"""A server of our own: started on free ports, ready before it is driven, ended by SIGTERM."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from loadtests.cpu import read_processes, tree_times

HOST = "127.0.0.1"
_LOG_TAIL_BYTES = 4000


class ServerFailure(Exception):
    """The server did not start, did not get ready or did not end well; the message has its last lines."""


class ServerProcess:
    """Any server as a subprocess: a context manager, ready inside it, gone after it with every process it made.

    ``ready_path`` is one that answers 200 once requests are taken. ``code`` is what it must exit with after SIGTERM,
    None where that is not ours to judge.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        http_port: int,
        ready_path: str,
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        code: int | None = None,
        ready_timeout_s: float = 180.0,
        stop_timeout_s: float = 45.0,
    ) -> None:
        self.command = list(command)
        self.http_port = http_port
        self._log = log
        self._ready_path = ready_path
        self._environment = environment
        self._folder = folder
        self._code = code
        self._ready_timeout_s = ready_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._paused = False

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=self._folder,
                start_new_session=True,  # Ctrl-C is for us, who then end it; and the group tells who belongs to it
            )
        try:
            self._wait_until_ready()
        except BaseException:
            members = self._members()
            self._process.kill()
            self._process.wait()
            self._kill(members)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        members = self._members()
        if self._paused:
            self._signal(signal.SIGCONT)
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            if self._code is not None:
                raise ServerFailure(self._told(f"still ran {self._stop_timeout_s} s after SIGTERM")) from error
            code = self._code
        finally:
            self._kill(members)
        if self._code is not None and code != self._code and error is None:
            raise ServerFailure(self._told(f"exited with {code} after SIGTERM, expected {self._code}"))

    @property
    def pid(self) -> int:
        """The root of the server's process tree."""
        return self._process.pid

    @property
    def answers(self) -> bool:
        """Whether it runs and takes requests."""
        return self._process.poll() is None and self._answers(self._ready_path)

    def pause(self) -> None:
        """Stop every process of the tree: it takes no CPU until ``resume``."""
        self._signal(signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """Let it go on, and wait until it answers again.

        Raises:
            ServerFailure: it does not.
        """
        if self._paused:
            self._signal(signal.SIGCONT)
            self._paused = False
            self._wait_until_ready()

    def _signal(self, number: signal.Signals) -> None:
        for pid, _ in self._members():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        while not self._answers(self._ready_path):
            if self._process.poll() is not None:
                raise ServerFailure(self._told(f"exited with {self._process.returncode} before it was ready"))
            if time.monotonic() > deadline:
                raise ServerFailure(self._told(f"was not ready after {self._ready_timeout_s} s"))
            time.sleep(0.1)

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.http_port}{path}", timeout=10) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _told(self, problem: str) -> str:
        tail = self._log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        return f"the server {problem}; it was started as {' '.join(self.command)} and said at last:\n{tail}"

    def _members(self) -> frozenset[tuple[int, int]]:
        """Every process of the tree: one that outlives its parent cannot be found from it any more."""
        try:
            return tree_times(self._process.pid, read_processes()).members
        except ProcessLookupError:
            return frozenset()

    def _kill(self, members: frozenset[tuple[int, int]]) -> None:
        """Kill whoever still runs of the tree or the group; a pid that has come again belongs to somebody else."""
        for process in read_processes():
            if (process.pid, process.started_ticks) in members:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


class Server(ServerProcess):
    """``headrace serve``, which has to exit with 0."""

    def __init__(
        self,
        repository: Path,
        log: Path,
        options: Sequence[str] = (),
        *,
        ready_timeout_s: float = 180.0,
        stop_timeout_s: float = 45.0,
    ) -> None:
        http_port, self.grpc_port, self.metrics_port = free_ports(3)
        command = [
            *(sys.executable, "-m", "headrace", "serve", str(repository), "--host", HOST),
            *("--http-port", str(http_port), "--grpc-port", str(self.grpc_port)),
            *("--metrics-port", str(self.metrics_port), *options),
        ]
        super().__init__(
            command,
            log,
            http_port,
            "/v2/health/ready",
            code=0,
            ready_timeout_s=ready_timeout_s,
            stop_timeout_s=stop_timeout_s,
        )

    def require_model(self, model: str) -> None:
        """Check that one model is served.

        Raises:
            ServerFailure: it is not.
        """
        if not self._answers(f"/v2/models/{model}/ready"):
            raise ServerFailure(self._told(f"is ready, but model '{model}' is not"))


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; held together, so that they differ."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    try:
        return [int(held.getsockname()[1]) for held in sockets]
    finally:
        for held in sockets:
            held.close()
