"""A server for one model, started for the measurement and ended after it."""

import asyncio
import re
import signal
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from headrace.client.errors import ClientError

_READY = re.compile(rb"^ready: (http://\S+) (grpc://\S+) ", re.MULTILINE)
_START_S, _STOP_S = 300.0, 45.0
_POLL_S = 0.05
_TOLD_CHARACTERS = 1500


class OwnServer:
    """``headrace serve`` on free loopback ports, with one model of a repository and those that it uses.

    An async context manager; ``http`` and ``grpc`` are its addresses, known inside.
    """

    def __init__(self, repository: Path, model: str) -> None:
        self.http = self.grpc = ""
        self._repository = repository
        ports = (option for kind in ("http", "grpc", "metrics") for option in (f"--{kind}-port", "0"))
        self._command = [
            *("-m", "headrace", "serve", str(repository), *ports, "--host", "127.0.0.1"),
            *("--model-control", "explicit", "--load-model", model, "--log-level", "warning"),
        ]

    async def __aenter__(self) -> Self:
        self._log = tempfile.NamedTemporaryFile(prefix="headrace-bench-", suffix=".log")  # noqa: SIM115 - as long as us
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *self._command, stdout=self._log, stderr=self._log, start_new_session=True
        )
        try:
            async with asyncio.timeout(_START_S):
                self.http, self.grpc = await self._addresses()
        except TimeoutError:
            told = self._told()
            await self._stop()
            raise ClientError(f"the server was not ready within {_START_S:g} s: {told}") from None
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def _addresses(self) -> tuple[str, str]:
        while (found := _READY.search(self._output())) is None:
            if self._process.returncode is not None:
                raise ClientError(f"the server ended with {self._process.returncode}: {self._told()}")
            await asyncio.sleep(_POLL_S)
        http, grpc = found.groups()
        return http.decode(), grpc.decode()

    async def _stop(self) -> None:
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(_STOP_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()  # its workers notice that their socket is closed
                await self._process.wait()
        self._log.close()

    def _output(self) -> bytes:
        return Path(self._log.name).read_bytes()

    def _told(self) -> str:
        return self._output().decode(errors="replace").strip()[-_TOLD_CHARACTERS:] or "it said nothing"
