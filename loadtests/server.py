"""A Headrace of our own: started on free ports, ready before it is driven, ended by SIGTERM."""

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"
_LOG_TAIL_BYTES = 4000


class ServerFailure(Exception):
    """The server did not start, did not get ready or did not end well; the message has its last lines."""


class Server:
    """``headrace serve`` as a subprocess: a context manager, ready inside it, checked for exit code 0 after it."""

    def __init__(
        self,
        repository: Path,
        log: Path,
        options: Sequence[str] = (),
        *,
        ready_timeout_s: float = 180.0,
        stop_timeout_s: float = 45.0,
    ) -> None:
        self._log = log
        self._ready_timeout_s = ready_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self.command = [
            *(sys.executable, "-m", "headrace", "serve", str(repository), "--host", HOST),
            *("--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)),
            *("--metrics-port", str(self.metrics_port), *options),
        ]

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_ready()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise ServerFailure(self._told(f"still ran {self._stop_timeout_s} s after SIGTERM")) from error
        if code != 0 and error is None:
            raise ServerFailure(self._told(f"exited with {code} after SIGTERM, expected 0"))

    @property
    def pid(self) -> int:
        """The root of the server's process tree."""
        return self._process.pid

    def require_model(self, model: str) -> None:
        """Check that one model is served.

        Raises:
            ServerFailure: it is not.
        """
        if not self._answers(f"/v2/models/{model}/ready"):
            raise ServerFailure(self._told(f"is ready, but model '{model}' is not"))

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._ready_timeout_s
        while not self._answers("/v2/health/ready"):
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


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; held together, so that they differ."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    try:
        return [int(held.getsockname()[1]) for held in sockets]
    finally:
        for held in sockets:
            held.close()
