"""``headrace record``: have a running server record real inputs of a model, watch it, and fetch the file."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from headrace.server_api import ApiError, ServerApi

POLL_S = 0.25

Say = Callable[[str], None]


class NothingRecorded(Exception):
    """There is no file; the message says why."""


@dataclass(frozen=True, slots=True)
class RecordArguments:
    """What the command was asked for."""

    model: str
    version: str = ""
    url: str = "http://127.0.0.1:8000"
    requests: int = 256
    seconds: float = 60.0
    output: Path | None = None
    headers: tuple[str, ...] = ()  # NAME=VALUE


def record(
    model: Annotated[str, typer.Argument(help="The model's name on the server.")],
    url: Annotated[str, typer.Option("--url", "-u", help="The server: http://HOST:PORT.")] = "http://127.0.0.1:8000",
    requests: Annotated[
        int, typer.Option("--requests", min=1, help="Number of examples to keep, a fair sample of all that come.")
    ] = 256,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Seconds to record for.")] = 60.0,
    version: Annotated[str, typer.Option("--version", help="The model's version. Default: the newest.")] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.npz", help="Also fetch the file and save it here.")
    ] = None,
    headers: Annotated[
        list[str] | None,
        typer.Option(
            "--header",
            "-H",
            metavar="NAME=VALUE",
            help="A header to send, where the server restricts this API; may be repeated.",
        ),
    ] = None,
) -> None:
    """Record real inputs of a model on a running server, for its optimiser to calibrate and judge with.

    The server must have been started with --allow-recording. It keeps the file in its plan cache. Ctrl-C ends the
    recording early; what has been recorded by then is kept. Exit status 1 when nothing was recorded.
    """
    arguments = RecordArguments(model, version, url, requests, seconds, output, tuple(headers or ()))
    try:
        run(arguments, typer.echo, _shown if sys.stderr.isatty() else None)
    except (NothingRecorded, ApiError) as error:
        typer.echo(f"headrace: {error}", err=True)
        raise typer.Exit(1) from None


def run(arguments: RecordArguments, say: Say, show: Say | None) -> None:
    """Record, and say what was. ``show`` is given a line that stands for the one before, as time goes by.

    Raises:
        NothingRecorded: nothing worth a file came.
        ApiError: the server refuses, or does not answer.
    """
    server = ServerApi(arguments.url, arguments.headers)
    version = f"/versions/{quote(arguments.version, safe='')}" if arguments.version else ""
    model = f"/v2/models/{quote(arguments.model, safe='')}"
    path = f"{model}{version}/recording"
    status = server.ask("POST", path, {"requests": arguments.requests, "seconds": arguments.seconds})
    try:
        say(
            f"recording model {status['model']} version {status['version']} for {status['seconds']:g} s: at most "
            f"{status['most_examples']} examples, {status['most_bytes']} bytes"
        )
        while status["state"] in ("recording", "writing"):
            if show is not None:
                show(_progress(status))
            time.sleep(min(POLL_S, max(0.02, status["seconds_left"])))
            status = server.ask("GET", path)
    except KeyboardInterrupt:
        status = server.ask("DELETE", path)
    finally:
        if show is not None:
            show("")
    if status["state"] != "written":
        raise NothingRecorded(f"nothing was recorded of model '{arguments.model}': {status['reason']}")
    say(
        f"{status['requests_seen']} request(s) came, {status['examples_kept']} example(s) are kept"
        + (f", {status['examples_left_out']} left out" if status["examples_left_out"] else "")
    )
    say(f"on the server: {status['file']}")
    if arguments.output is not None:
        say(f"saved: {arguments.output} ({server.fetch(f'{model}/recording/file', arguments.output)} bytes)")


def _progress(status: dict[str, Any]) -> str:
    return (
        f"{status['seconds_left']:5.0f} s left, {status['requests_seen']} request(s) seen, "
        f"{status['examples_kept']} example(s) kept, {status['bytes_kept'] / 1e6:.1f} MB"
    )


def _shown(line: str) -> None:
    typer.echo(f"\r\x1b[K{line}", err=True, nl=False)
