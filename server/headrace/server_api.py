"""The HTTP API of a running server, as far as commands ask it for more than inference."""

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

CHUNK_BYTES = 1 << 20


class ApiError(Exception):
    """The server refuses, or does not answer; the message says which and why. ``status`` is 0 where there is none."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ServerApi:
    """One server. ``headers`` are NAME=VALUE each, for APIs that are restricted; ``timeout_s`` bounds every wait."""

    def __init__(self, url: str, headers: Sequence[str] = (), timeout_s: float = 30.0) -> None:
        self._url = url.rstrip("/")
        self._headers: dict[str, str] = {}
        self._timeout_s = timeout_s
        for header in headers:
            name, equals, value = header.partition("=")
            if not equals or not name:
                raise ApiError(f"--header is '{header}', expected NAME=VALUE")
            self._headers[name] = value

    def ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """The answer to one request, both of them JSON objects.

        Raises:
            ApiError: there is none, or it is an error.
        """
        data = None if body is None else msgspec.json.encode(body)
        with self._opened(method, path, data) as response:
            try:
                return msgspec.json.decode(response.read(), type=dict[str, Any])
            except (msgspec.DecodeError, OSError) as error:
                raise ApiError(f"{self._url}{path} is no path of a Headrace server: {error}") from error

    def fetch(self, path: str, output: Path) -> int:
        """Save what is at a path in a file that this user alone may read. Returns its bytes.

        Raises:
            ApiError: there is nothing, or it cannot be saved.
        """
        saved = 0
        with self._opened("GET", path, None) as response:
            try:
                with os.fdopen(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                    while chunk := response.read(CHUNK_BYTES):
                        file.write(chunk)
                        saved += len(chunk)
            except OSError as error:
                raise ApiError(f"{self._url}{path} could not be saved as {output}: {error}") from error
        return saved

    @contextlib.contextmanager
    def _opened(self, method: str, path: str, data: bytes | None) -> Iterator[IO[bytes]]:
        url = f"{self._url}{path}"
        try:
            request = urllib.request.Request(url, data, self._headers, method=method)  # noqa: S310 - the user's own URL
            response = urllib.request.urlopen(request, timeout=self._timeout_s)  # noqa: S310 - the user's own URL
        except urllib.error.HTTPError as error:
            with error:
                raise ApiError(_message(error.read(), error.code), error.code) from None
        except (OSError, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise ApiError(f"no server answers at {url}: {reason}") from None
        with response:
            yield response


def _message(body: bytes, status: int) -> str:
    try:
        return msgspec.json.decode(body, type=dict[str, str])["error"]
    except (msgspec.DecodeError, KeyError):
        return f"the server answered {status}"
