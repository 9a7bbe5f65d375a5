"""The flags of ``headrace optimize``, and from them to a job with a listener that suits the terminal."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from headrace_backends.optimize.form import Technique
from headrace_backends.optimize.plan_cache import default_plan_cache


def optimize(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_FILE",
            help="A model's name in --repository, or the path of its folder or of a model file.",
        ),
    ],
    repository: Annotated[
        Path, typer.Option("--repository", "-r", envvar="HEADRACE_REPOSITORY", help="The folder that holds the model.")
    ] = Path("model_repository"),
    version: Annotated[str, typer.Option("--version", help="The model's version. Default: the newest.")] = "",
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="For a model file: where it is to be fast, cpu or gpu:N. Where a model of the repository runs, its "
            "configuration says. Default: cpu; gpu:0 for an engine of TensorRT.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", "-c", help="Real inputs: a .npz with an array for each input, or a folder of such files."
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            "-b",
            help="How far answers may be from the model's own: cosine>=0.99, top1_agreement>=0.99, "
            "max_abs<=0.01, judge.py:accuracy>=0.97 ...",
        ),
    ] = "",
    allow: Annotated[
        list[Technique] | None,
        typer.Option(
            "--allow",
            "-a",
            help="A technique that changes answers and may be tried, within --budget; may be repeated.",
        ),
    ] = None,
    objective: Annotated[
        Literal["latency", "throughput"] | None,
        typer.Option("--objective", help="What to improve: the time of one request, or requests a second."),
    ] = None,
    p99_ms: Annotated[
        float | None,
        typer.Option(
            "--p99-ms", min=0.001, help="Improve throughput, with 99 in 100 answers within this many milliseconds."
        ),
    ] = None,
    training: Annotated[
        Path | None, typer.Option("--training", help="Your training code, for prune, distill, qat and sparse.")
    ] = None,
    time_limit_s: Annotated[
        float | None, typer.Option("--time-limit", min=1, help="Seconds to search for. Default: 600.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="For a model file: the folder to write to. Default: ./NAME-optimized."),
    ] = None,
    plan_cache: Annotated[
        Path | None,
        typer.Option(
            "--plan-cache",
            envvar="HEADRACE_PLAN_CACHE",
            help="For a model in a repository: the folder of plans, the same as the server's.",
        ),
    ] = None,
    exhaustive: Annotated[
        bool,
        typer.Option("--exhaustive", help="Measure every candidate to the end. Slow; for checking the search itself."),
    ] = False,
    anew: Annotated[
        bool, typer.Option("--anew", help="Start from the beginning instead of continuing a search that was stopped.")
    ] = False,
    apply_url: Annotated[
        str, typer.Option("--url", "-u", help="With --apply: the running server, http://HOST:PORT.")
    ] = "http://127.0.0.1:8000",
    apply: Annotated[
        bool, typer.Option("--apply", help="Have the running server at --url use the plan at once.")
    ] = False,
    background: Annotated[
        bool, typer.Option("--background", help="Tell progress as lines for a program.", hidden=True)
    ] = False,
) -> None:
    """Find the fastest form of a model that stays within its accuracy budget; write the plan and its report.

    Candidates (runtimes, graph optimisations, precisions, quantisation, pruning, threads, instances) are made and
    measured one after the other, each in a process of its own and always beside the original model. Without --budget
    and --allow, and without `optimize:` in the model's configuration, only forms with the same answers are tried. Half
    of the examples is held back to decide with. A server uses the plan from its next load of the model on, or at once
    with --apply.

    Exit status: 0 a plan was made, 3 nothing is better than the original model, 1 it failed. Ctrl-C stops the search;
    the same command continues it.
    """
    from headrace.optimizing import OptimizeArguments, run
    from headrace.repository.layout import located
    from headrace_backends.optimize.accuracy import Budget
    from headrace_backends.optimize.live import listener_for

    try:
        bound = Budget.parse(budget) if budget else None
    except ValueError as error:
        typer.echo(f"headrace: {error}", err=True)
        raise typer.Exit(1) from None
    if apply and Path(target).is_file():
        typer.echo(f"headrace: --apply is for a model of the server's repository, and '{target}' is a file", err=True)
        raise typer.Exit(1)
    repository, target = located(target, repository)
    arguments = OptimizeArguments(
        target,
        repository,
        plan_cache or default_plan_cache(),
        version,
        device,
        output,
        calibration,
        bound,
        tuple(allow) if allow is not None else None,
        objective or ("throughput" if p99_ms else None),
        p99_ms,
        training,
        time_limit_s,
        exhaustive,
        anew,
        background,
    )
    listener = listener_for(sys.stdout, background=background)
    try:
        status = run(arguments, listener, typer.echo, partial(typer.echo, err=True))
    except KeyboardInterrupt:
        typer.echo("headrace: stopped; the same command continues the search", err=True)
        raise typer.Exit(130) from None
    if apply and status in (0, 3):
        from headrace.applying import CannotApply, apply_plan

        try:
            for line in apply_plan(apply_url, target):
                typer.echo(line)
        except CannotApply as error:
            typer.echo(f"headrace: {error}", err=True)
            raise typer.Exit(1) from None
    if status:
        sys.stdout.flush()
        raise typer.Exit(status)
