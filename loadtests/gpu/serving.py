"""The server that the forms are loaded into one after the other: another one where it has died or does not answer."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from loadtests.gpu import machine, served
from loadtests.gpu.served import Address
from loadtests.server import Server, ServerFailure

SLACK_BYTES = 64 << 20  # that a driver may keep to itself
_READY_S, _STOP_S, _LOAD_S, _UNLOAD_S, _RETURN_S = 60.0, 20.0, 150.0, 20.0, 15.0
_OPTIONS = ("--model-control", "explicit", "--allow-client-shm")


class Serving:
    """A context manager around whichever server runs. ``ended_badly``: what was said of those that did not end well."""

    def __init__(self, repository: Path, log: Path) -> None:
        self.ended_badly: list[str] = []
        self._repository = repository
        self._log = log
        self._server: Server | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def address(self) -> Address:
        """Where the server is.

        Raises:
            ServerFailure: none can be started.
        """
        if self._server is not None and not self._server.answers:
            self._end()
        if self._server is None:
            server = Server(self._repository, self._log, _OPTIONS, ready_timeout_s=_READY_S, stop_timeout_s=_STOP_S)
            self._server = server.__enter__()
        return Address(self._server.http_port, self._server.metrics_port, self._server.pid)

    @contextmanager
    def loaded(self, model: str, left_s: float) -> Iterator[tuple[Address, dict[str, Any]]]:
        """Have a model loaded inside; what it took of the GPU's memory, and afterwards what has not come back.

        Raises:
            served.ChangeRefused: it cannot be loaded.
            OSError: the server does not answer; the next model has another one.
        """
        address = self.address()
        facts: dict[str, Any] = {"before_bytes": machine.used_bytes()}
        started = time.monotonic()
        with self._ended_if_silent():
            served.change(address, model, "load", min(_LOAD_S, max(left_s, 1.0)))
        facts["load_s"] = time.monotonic() - started
        try:
            yield address, facts
        finally:
            facts["loaded_bytes"] = machine.used_bytes()
            with self._ended_if_silent():
                served.change(address, model, "unload", _UNLOAD_S)
        facts["after_bytes"] = _settled(facts["before_bytes"])

    @contextmanager
    def _ended_if_silent(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._end()
            raise

    def _end(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            try:
                server.__exit__(None, None, None)
            except ServerFailure as failure:
                self.ended_badly.append(str(failure))


def _settled(before_bytes: int | None) -> int | None:
    """What is in use once it is no more than before, or has had its time to be."""
    ends = time.monotonic() + _RETURN_S
    while before_bytes is not None and time.monotonic() < ends:
        used = machine.used_bytes()
        if used is None or used <= before_bytes + SLACK_BYTES:
            break
        time.sleep(0.2)
    return machine.used_bytes()
