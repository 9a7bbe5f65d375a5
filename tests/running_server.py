"""A real server in a process of its own, for the tests that need one."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

READY_TIMEOUT_S = 180
TIMEOUT_S = 90  # for what comes at once, unless the machine is busy with something else
NO_PLANS = f"{tempfile.gettempdir()}/headrace-test-plans-{os.getpid()}"  # where whoever runs the tests has none


class RunningServer:
    """``headrace serve`` on free ports over one repository; a context manager that ends it.

    ``program`` are the interpreter's arguments where it is served by other means.
    """

    def __init__(
        self,
        repository: Path,
        *flags: str,
        env: dict[str, str] | None = None,
        program: tuple[str, ...] = ("-m", "headrace", "serve"),
    ) -> None:
        self.repository = Path(repository)
        self._log = tempfile.NamedTemporaryFile(prefix="headrace-test-", suffix=".log")  # noqa: SIM115
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        self.process = subprocess.Popen(
            [sys.executable, *program, str(repository), *ports, *flags],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "HEADRACE_PLAN_CACHE": NO_PLANS, **(env or {})},
        )
        self.http = self.grpc = self.metrics = ""  # HOST:PORT each

    def __enter__(self) -> Self:
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.process.poll() is None:
                self.stop()
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            self._log.close()

    @property
    def output(self) -> str:
        """Everything that the server has printed and logged."""
        return Path(self._log.name).read_text()

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait for the line that says where the server listens."""
        pattern = r"^ready: http://(\S+) grpc://(\S+) metrics http://(\S+)/metrics$"
        found = self.wait_for(lambda: re.search(pattern, self.output, re.MULTILINE), timeout_s)
        self.http, self.grpc, self.metrics = found.groups()

    def wait_for(self, condition, timeout_s: float = TIMEOUT_S):
        """Wait until ``condition()`` is true and return what it gave."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = condition()
            if found:
                return found
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.output}")
            time.sleep(0.05)
        raise AssertionError(f"waited {timeout_s} s in vain; the server said:\n{self.output}")

    def workers(self) -> list[psutil.Process]:
        """The worker processes that live now; one that ends while it is looked at does not."""
        return [child for child in psutil.Process(self.process.pid).children(recursive=True) if _lives(child)]

    def kill_workers(self) -> None:
        """SIGKILL to all of them."""
        for worker in self.workers():
            with suppress(psutil.NoSuchProcess):
                worker.kill()

    def request(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None):
        """A plain HTTP request: status, headers and parsed body (bytes where it is not JSON)."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.http}{path}", data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                status, answer_headers, answer = response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, answer_headers, answer = error.code, error.headers, error.read()
        if answer_headers.get("content-type", "").startswith("application/json"):
            return status, answer_headers, json.loads(answer)
        return status, answer_headers, answer

    def get(self, path: str):
        """Status and body of a GET."""
        status, _, body = self.request("GET", path)
        return status, body

    def post(self, path: str, body: object = None):
        """Status and body of a POST."""
        status, _, answer = self.request("POST", path, body)
        return status, answer

    def model_ready(self, name: str) -> bool:
        """Whether the model can take requests now."""
        return self.get(f"/v2/models/{name}/ready")[0] == 200

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=TIMEOUT_S) as response:
            text = response.read().decode()
        for line in text.splitlines():
            if line.startswith((f"{name}{{", f"{name} ")):
                series, _, value = line.rpartition(" ")
                if all(f'{key}="{wanted}"' in series for key, wanted in labels.items()):
                    return float(value)
        raise AssertionError(f"no series {name} {labels}")

    def stop(self, timeout_s: float = TIMEOUT_S) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait()


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
