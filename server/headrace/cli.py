"""The command line: serve, check, explain, infer, bench, record and optimize.

A command imports what it needs when it is called: all of it together takes half a second.
"""

import asyncio
import dataclasses
import inspect
import logging
import os
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
    for (
        command
    ) in app.registered_commands:  # typer would keep the line ends of a docstring, whatever the terminal's width
        paragraphs = (inspect.getdoc(command.callback) or "").split("\n\n")
        command.help = "\n\n".join(" ".join(one.split()) for one in paragraphs)
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headrace {headrace.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
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
        return logging.getLogger("headrace").info
    return _say


def _say(line: str) -> None:
    """Print a line. Where standard output does not take it, the server goes on, and drains, without."""
    encoding = sys.stdout.encoding or "utf-8"
    written = line.encode(encoding, "backslashreplace").decode(encoding)  # a tensor's name may be in any script
    try:
        print(written, flush=True)  # noqa: T201 - this is the command's output
    except OSError as error:  # the disk is full, or whoever read the pipe has gone
        logging.getLogger("headrace").warning("standard output cannot be written to, so nothing more is: %s", error)
        # What is left in the buffer would make the exit status 120.
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - for the rest of the process


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
    context: typer.Context,
    repository: RepositoryArgument = Path("model_repository"),
    named: Annotated[
        Path | None, typer.Option("--repository", "-r", help="The same, as the other commands have it.")
    ] = None,
    gpu: Annotated[
        bool,
        typer.Option("--gpu", help="Check the machine instead: driver, GPUs, and what backends need for them."),
    ] = False,
) -> None:
    """Load every model of a folder once, without serving it, and list what is wrong. Exit status 1 on any problem."""
    _log_errors("check")
    if named is not None:
        source = context.get_parameter_source("repository")
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter("is given twice, as an argument and with --repository", param_hint="REPOSITORY")
        repository = named
    if gpu:
        from headrace.gpu_check import check_gpu

        _exit(asyncio.run(check_gpu(typer.echo)))
        return
    from headrace.inspection import check_repository

    _exit(asyncio.run(check_repository(repository, typer.echo, show_progress=sys.stderr.isatty())))


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="The model's name in the repository, or the path of its folder.")],
    repository: Annotated[
        Path, typer.Option("--repository", "-r", envvar="HEADRACE_REPOSITORY", help="The folder that holds it.")
    ] = Path("model_repository"),
    url: Annotated[
        str,
        typer.Option("--url", "-u", help="Ask this running server instead, http://HOST:PORT."),
    ] = "",
    plan_cache: Annotated[
        Path, typer.Option("--plan-cache", envvar="HEADRACE_PLAN_CACHE", help="The folder that holds the plans.")
    ] = default_plan_cache(),  # noqa: B008 - the default as the help shows it
) -> None:
    """Show how a model is served and why: backend, tensors, batching, threads, plan, and what was refused.

    Loads the model from the folder; no server is needed. With --url, show instead what a running server has measured
    and decided about the model: batch latencies, objective, batch sizes, and the plan in use.
    """
    _log_errors("explain")
    if url:
        from headrace.running_model import explain_running

        _exit(explain_running(url, model, typer.echo))
        return
    from headrace.inspection import explain_model
    from headrace.repository.layout import located

    _exit(asyncio.run(explain_model(*located(model, repository), typer.echo, plan_cache)))


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
            "any file for BYTES. Repeat it for each input.",
        ),
    ] = None,
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="NAME[=@FILE]",
            help="Ask for this output only; may be repeated. Default: all. With =@FILE (.npy, .json, any for one "
            "BYTES) it is saved there too.",
        ),
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="A request parameter; may be repeated."),
    ] = None,
    version: Annotated[str, typer.Option("--version", help="The model's version. Default: the newest.")] = "",
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
        typer.Option("--repository", "-r", help="Start a server for the model of this folder, and stop it afterwards."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", "-u", help="HTTP address of a running server. Default: http://127.0.0.1:8000."),
    ] = None,
    grpc_url: Annotated[
        str | None, typer.Option("--grpc-url", help="Its gRPC address. Default: grpc://127.0.0.1:8001.")
    ] = None,
    protocols: Annotated[
        list[BenchProtocol] | None,
        typer.Option("--protocol", help="Measure this protocol only. Default: both, or that of the given address."),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="NAME=VALUE",
            help="An input, as `headrace infer` takes it: JSON, text or @FILE. Repeat it for each input. Default: made "
            "up from the model's metadata.",
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="NAME=1x32",
            help="Shape of a made-up input. Default: the model's, with 1 for dimensions of any size.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows in each request.")] = 1,
    parameters: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="A parameter of each request; may be repeated."),
    ] = None,
    version: Annotated[str, typer.Option("--version", help="The model's version. Default: the newest.")] = "",
    clients: Annotated[
        list[int] | None,
        typer.Option(
            "--concurrency",
            "-c",
            min=1,
            help="Measure with this many clients; may be repeated. Default: more and more, until the knee is found.",
        ),
    ] = None,
    most_clients: Annotated[
        int, typer.Option("--max-concurrency", min=1, max=4096, help="The largest number of clients to try.")
    ] = 256,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.05, help="Seconds to measure, for each number of clients.")
    ] = 2.0,
    warmup_s: Annotated[
        float, typer.Option("--warmup", min=0.0, help="Seconds of load before each measurement.")
    ] = 0.5,
    max_seconds: Annotated[
        float,
        typer.Option(
            "--max-seconds", min=1.0, help="Seconds, for each protocol, after which no more clients are added."
        ),
    ] = 120.0,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, help="Seconds to wait for the last answers of each measurement.")
    ] = 30.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers to this file.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw throughput and latency; needs matplotlib.")
    ] = None,
) -> None:
    """Put a served model under load over HTTP and gRPC, and find how many clients it can serve.

    It starts with one client, then two, four and so on, until more clients bring no more answers a second. Each client
    waits for its answer before it asks again. For each number of clients it prints throughput, latency percentiles, the
    mean batch size on the server, errors, and the CPU share of this program: near 100 %, this program is the limit and
    not the server. The knee is the smallest number of clients that reaches 95 % of the best throughput; beyond it,
    clients only wait longer.

    On the same machine the measurement takes CPU from the server. Exit status 1 when nothing was answered.
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


def _log_errors(command: str) -> None:
    """Log errors, except what the repository says of models: the command itself prints that."""
    set_up_logging("text", "error", command)
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: bool(record.exc_info) or not record.name.startswith("headrace.repository"))


def _exit(problems: int) -> None:
    if problems:
        sys.stdout.flush()
        raise typer.Exit(1)
