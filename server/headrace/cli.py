"""The command line: serve, check, explain, infer, bench, record and optimize.

A command imports what it needs when it is called: all of it together takes half a second.
"""

import asyncio
import dataclasses
import inspect
import signal
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer

import headrace
from headrace.config import Settings
from headrace.log import set_up_logging
from headrace.optimizing_flags import optimize
from headrace.recording_command import record
from headrace_backends.optimize.plan_cache import default_plan_cache

app = typer.Typer(
    name="headrace",
    help="Serve the deep-learning models of a folder over HTTP and gRPC (Open Inference Protocol).",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The ``headrace`` command."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headrace {headrace.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Serve the deep-learning models of a folder over HTTP and gRPC (Open Inference Protocol)."""


def _from_settings(command: Callable[[Settings], None]) -> Callable[..., None]:
    """A command with a flag for each of the settings, and an environment variable beside it."""
    parameters = []
    for field in dataclasses.fields(Settings):
        variable = f"HEADRACE_{field.name.upper()}"
        details = dict(field.metadata)
        repeatable = get_origin(field.type) is tuple
        annotation: Any = list[str] if repeatable else field.type
        if field.name == "repository":
            info: Any = typer.Argument(envvar=variable, help=details.pop("help"), show_default=True)
        else:
            info = typer.Option(f"--{field.name.replace('_', '-')}", envvar=variable, **details)
        default = [] if repeatable else field.default
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, info]
            )
        )

    def run(**values: Any) -> None:
        for name, value in values.items():
            if isinstance(value, list):
                values[name] = tuple(value)
        command(Settings(**values))

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # what typer reads
    return run


def _serve(settings: Settings) -> None:
    """Serve every model of a folder until SIGTERM or Ctrl-C.

    Each option can also be given as an environment variable, shown beside it.
    """
    import uvloop

    from headrace.app import serve
    from headrace.starting import CannotStart

    set_up_logging(settings.log_format, settings.log_level, "front")
    try:
        uvloop.run(serve(settings, _announcer(settings)))
    except CannotStart as error:
        typer.echo(f"headrace: {error}", err=True)
        raise typer.Exit(1) from None


def _announcer(settings: Settings) -> Callable[[str], None]:
    """Where the lines for people go: standard output, unless that is to be machine-readable."""
    if settings.log_format == "json":
        import logging

        return logging.getLogger("headrace").info
    return lambda line: print(line, flush=True)  # noqa: T201 - this is the command's output


app.command("serve")(_from_settings(_serve))


class BenchProtocol(StrEnum):
    """What ``bench`` asks over."""

    HTTP = "http"
    GRPC = "grpc"


RepositoryArgument = Annotated[
    Path, typer.Argument(envvar="HEADRACE_REPOSITORY", help="The folder that holds the models.")
]


@app.command()
def check(
    repository: RepositoryArgument = Path("model_repository"),
    gpu: Annotated[
        bool,
        typer.Option("--gpu", help="Look at the machine instead: driver, GPUs, and what the backends need for them."),
    ] = False,
) -> None:
    """Read every configuration and load every model file once, serve nothing; exit 1 on any problem."""
    set_up_logging("text", "error", "check")
    if gpu:
        from headrace.gpu_check import check_gpu

        _exit(asyncio.run(check_gpu(typer.echo)))
        return
    from headrace.inspection import check_repository

    _exit(asyncio.run(check_repository(repository, typer.echo, show_progress=sys.stderr.isatty())))


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="The model's name in the repository.")],
    repository: Annotated[
        Path, typer.Option("--repository", "-r", envvar="HEADRACE_REPOSITORY", help="The folder that holds it.")
    ] = Path("model_repository"),
    url: Annotated[
        str,
        typer.Option(
            "--url", "-u", help="Ask this running server, http://HOST:PORT, what it has learned and decided instead."
        ),
    ] = "",
    plan_cache: Annotated[
        Path, typer.Option("--plan-cache", envvar="HEADRACE_PLAN_CACHE", help="The folder that holds the plans.")
    ] = default_plan_cache(),  # noqa: B008 - the default as the help shows it
) -> None:
    """Say what would be served of a model and why: backend, tensors, batching, threads, plan, and what was refused.

    With --url, say how a running server batches it: the latencies it has learned, its objective and its decisions, and
    by which plan it is served.
    """
    set_up_logging("text", "error", "explain")
    if url:
        from headrace.running_model import explain_running

        _exit(explain_running(url, model, typer.echo))
        return
    from headrace.inspection import explain_model

    _exit(asyncio.run(explain_model(repository, model, typer.echo, plan_cache)))


@app.command()
def infer(
    model: Annotated[str, typer.Argument(help="The model's name on the server.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="NAME=VALUE",
            help="An input: JSON (x='[[1, 2]]'), plain text for BYTES, or @FILE: .npy, .npz (@FILE:KEY), .json, "
            "any file for BYTES. Once for each.",
        ),
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="NAME[=@FILE]",
            help="An output that is wanted, all unless given; with a file (.npy, .json, any for one BYTES) also saved.",
        ),
    ] = None,
    parameters: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="A parameter of the request.")
    ] = None,
    version: Annotated[str, typer.Option("--version", help="The model's version; the newest unless given.")] = "",
    url: Annotated[
        str, typer.Option("--url", "-u", help="The server: http://HOST:PORT or grpc://HOST:PORT.")
    ] = "http://127.0.0.1:8000",
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds to wait for the answer.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Send one request to a running server and print its answer; exit 1 on any error."""
    from headrace.client.command import InferArguments, run

    arguments = InferArguments(
        model,
        tuple(inputs or ()),
        tuple(outputs or ()),
        tuple(parameters or ()),
        version,
        url,
        timeout_s,
        as_json,
    )
    _exit(run(arguments, typer.echo, lambda line: typer.echo(line, err=True)))


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="The model's name on the server, or in --repository.")],
    repository: Annotated[
        Path | None,
        typer.Option("--repository", "-r", help="Start a server for this model of this folder, and end it afterwards."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", "-u", help="A server's HTTP address; http://127.0.0.1:8000 unless given."),
    ] = None,
    grpc_url: Annotated[
        str | None, typer.Option("--grpc-url", help="Its gRPC address; grpc://127.0.0.1:8001 unless given.")
    ] = None,
    protocols: Annotated[
        list[BenchProtocol] | None,
        typer.Option("--protocol", help="Only this one; both unless given, or only one of the addresses is."),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="NAME=VALUE",
            help="An input, as `headrace infer` takes it: JSON, text or @FILE. Once for each; made up from the model's "
            "metadata unless given.",
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shape", metavar="NAME=1x32", help="The shape of an input that is made up; dimensions of any size are 1."
        ),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows in each request.")] = 1,
    parameters: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="A parameter of each request.")
    ] = None,
    version: Annotated[str, typer.Option("--version", help="The model's version; the newest unless given.")] = "",
    clients: Annotated[
        list[int] | None,
        typer.Option(
            "--concurrency", "-c", min=1, help="Just so many clients, repeatable; the knee is sought unless given."
        ),
    ] = None,
    most_clients: Annotated[
        int, typer.Option("--max-concurrency", min=1, max=4096, help="The most clients to try.")
    ] = 256,
    seconds: Annotated[float, typer.Option("--seconds", min=0.05, help="Measured for each number of clients.")] = 2.0,
    warmup_s: Annotated[float, typer.Option("--warmup", min=0.0, help="Seconds of load before that.")] = 0.5,
    max_seconds: Annotated[
        float, typer.Option("--max-seconds", min=1.0, help="For each protocol; the step under way then is the last.")
    ] = 120.0,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds to wait for the last answers.")
    ] = 30.0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw throughput and latency; needs matplotlib.")
    ] = None,
) -> None:
    """Put a served model under load over HTTP and gRPC, and find how many clients it can serve at its best.

    One client, then two, four and so on, each of whom waits for an answer before it asks again, until more of them
    bring no more answers a second. Printed for each number of clients: throughput, latency percentiles, the mean batch
    that the server made of the requests, errors, and what this program itself took of a CPU: where that nears 100 %,
    it is what holds the numbers down. The knee is the fewest clients that reach 95 % of the best throughput; beyond it
    they only wait longer.

    A measurement takes CPU from a server on the same machine. Exit status 1 when nothing was answered.
    """
    import uvloop

    from headrace.bench.command import BenchArguments, run
    from headrace.bench.sweep import Limits

    arguments = BenchArguments(
        model,
        repository,
        url,
        grpc_url,
        tuple(dict.fromkeys(protocol.value for protocol in protocols or ())),
        tuple(inputs or ()),
        tuple(shapes or ()),
        rows,
        tuple(parameters or ()),
        version,
        tuple(sorted(set(clients or ()))),
        most_clients,
        Limits(warmup_s, seconds, timeout_s, max_seconds),
        json_file,
        plot_file,
    )
    show_progress = sys.stderr.isatty()
    try:
        problems = uvloop.run(
            run(arguments, typer.echo, lambda line: typer.echo(line, err=True), show_progress=show_progress)
        )
    except asyncio.CancelledError:  # by SIGTERM
        raise typer.Exit(128 + signal.SIGTERM) from None
    _exit(problems)


app.command()(record)
app.command()(optimize)


def _exit(problems: int) -> None:
    if problems:
        sys.stdout.flush()
        raise typer.Exit(1)
