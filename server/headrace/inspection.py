"""The commands that look at a repository without serving it: check and explain."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import typer

from headrace.announcement import no_model_line
from headrace.config import Settings
from headrace.core.model import TensorSpec
from headrace.plan_story import tell_plan
from headrace.repository.layout import ModelFolder, list_models, passed_over, read_folder, selected_versions
from headrace.repository.lifecycle import State
from headrace.repository.model_config import BatchingConfig
from headrace.repository.plans import Plans
from headrace.repository.repository import IndexEntry, Repository, Served
from headrace.repository.served import ServedVersion
from headrace.starting import CannotStart, check_folder
from headrace.worker_side import build_supervisor
from headrace.workers.instance import Instance
from headrace.workers.supervisor import Supervisor
from headrace_backends.optimize.plan_cache import PlanCache

Say = Callable[[str], None]
AT_ONCE = 32  # models loaded and let go again in one go


async def check_repository(path: Path, say: Say, *, show_progress: bool) -> int:
    """Load every model once; say what is wrong with which. Returns how many are not fit to be served."""
    names = _names(path, say)
    if names is None:
        return 1
    bad = 0
    with typer.progressbar(length=len(names), label="checking", hidden=not show_progress) as progress:
        for start in range(0, len(names), AT_ONCE):
            some = names[start : start + AT_ONCE]
            async with _workshop(path) as (repository, _):
                await repository.load_all(some)
                for name in some:
                    folder = read_folder(path / name)
                    problems = [*_problems(repository, folder), *_optimize_problems(folder)]
                    bad += bool(problems)
                    for problem in problems:
                        say(f"{name}: {problem}")
                progress.update(len(some))
    for name in passed_over(path):
        say(f"{name}: is passed over: it has no version (a folder named 1, 2, ...) and no configuration")
    if not names:
        say(no_model_line(path))
    say(f"{len(names)} model(s), {bad} with problems")
    return bad


async def explain_model(path: Path, name: str, say: Say, plan_cache: Path) -> int:
    """Load one model and say what it would be served as, and why. Returns 1 when it would not be served.

    Plans that turn out to be wrong are told of and left as they are.
    """
    names = _names(path, say)
    if names is None:
        return 1
    if name not in names:
        say(f"there is no model '{name}' in '{path}'; there are: {', '.join(names) or 'none'}")
        return 1
    plans = Plans(PlanCache(plan_cache), marks=False)
    async with _workshop(path, plans) as (repository, supervisor):
        await repository.load_all([name])
        folder = read_folder(path / name)
        say(f"model {name} in {folder.path}")
        _explain_folder(folder, say)
        mine = (one for one in repository.served() if one.folder.name == name)
        for served in sorted(mine, key=lambda one: one.files.version):
            _explain_version(served, supervisor, say)
            if isinstance(served, ServedVersion):
                for line in tell_plan(served.planned, plans.choice(name, served.version)):
                    say(f"  {line}")
        problems = _problems(repository, folder)
        for problem in problems:
            say(f"refused: {problem}")
        for problem in _optimize_problems(folder):
            say(f"not there: {problem}")
        return min(1, len(problems))


def _names(path: Path, say: Say) -> list[str] | None:
    try:
        check_folder(path)
    except CannotStart as error:
        say(str(error))
        return None
    return list_models(path)


def _problems(repository: Repository, folder: ModelFolder) -> list[str]:
    return [_problem(entry) for entry in repository.entries(folder.name) if entry.state != State.READY]


def _optimize_problems(folder: ModelFolder) -> list[str]:
    """What the optimiser would miss; the model is served all the same."""
    optimize = folder.config.optimize
    return optimize.problems(folder.path) if optimize is not None else []


def _problem(entry: IndexEntry) -> str:
    return f"version {entry.version}: {entry.reason}" if entry.version else entry.reason


def _explain_folder(folder: ModelFolder, say: Say) -> None:
    config = folder.config
    selected = selected_versions(folder)
    if config.versions.only is not None:
        policy = f"only {list(config.versions.only)}"
    elif config.versions.latest is not None:
        policy = f"the latest {config.versions.latest}"
    else:
        policy = "all"
    others = sorted(set(folder.versions) - set(selected))
    say(f"  versions: {selected or 'none'} are served (policy: {policy})" + (f"; {others} are not" if others else ""))


def _explain_version(served: Served, supervisor: Supervisor, say: Say) -> None:
    config, info, path = served.folder.config, served.info, served.files.model_path
    if config.ensemble:  # it has no file
        chosen = "configured"
        read = rows = no_rows = "as its models have it"
        say(f"version {served.version}")
    else:
        chosen = "configured" if config.backend else f"from the file's ending '{path.suffix}'"
        read, no_rows = "read from the file", "found while it was loaded"
        rows = read if info.backend == "python" else "inferred from the shapes"
        say(f"version {served.version}: {path}")
    say(f"  backend: {info.backend} ({chosen})")
    for kind, specs, configured in (
        ("input", info.signature.inputs, config.inputs),
        ("output", info.signature.outputs, config.outputs),
    ):
        for spec in specs:
            say(f"  {kind}: {_tensor(spec)} ({'configured' if configured else read})")
    if info.signature.max_batch_size:
        planned = served.planned if isinstance(served, ServedVersion) else None
        if planned is not None and planned.plan.form.max_batch_size:
            how = "as planned"
        else:
            how = "configured" if config.max_batch_size is not None else rows
        say(f"  batching: up to {info.signature.max_batch_size} rows ({how})")
        if not config.ensemble:  # which has no queue
            say(_queue(config.batching))
    else:
        say(f"  batching: none ({'configured' if config.max_batch_size == 0 else no_rows})")
    if config.batching.p99_objective_ms is not None:
        say(
            f"  objective: {config.batching.p99_objective_ms:g} ms for 99 in 100 requests (configured); "
            "those that would come later are refused"
        )
    for instance in served.instances:
        say(
            f"  instance: {instance.load.device}, at most {instance.load.threads} thread(s) of "
            f"{supervisor.cpus()} usable CPU(s), loaded in {_seconds(instance):.2f} s"
        )
    for note in served.notes:
        say(f"  note: {note}")


def _queue(batching: BatchingConfig) -> str:
    if batching.adaptive:
        how = "sizes and delays are chosen by the objective, as batches tell what they take"
    else:
        how = f"delay {batching.max_queue_delay_us} us, preferred sizes {list(batching.preferred_sizes)}"
    return f"  queue: {how}, at most {batching.max_queue_size} requests waiting"


def _seconds(instance: Instance) -> float:
    return instance.loaded.seconds if instance.loaded is not None else 0.0


def _tensor(spec: TensorSpec) -> str:
    return spec.describe() + (" optional" if spec.optional else "")


@contextlib.asynccontextmanager
async def _workshop(path: Path, plans: Plans | None = None) -> AsyncIterator[tuple[Repository, Supervisor]]:
    """A repository over worker processes, without front ends."""
    supervisor = build_supervisor(Settings(repository=path, model_control="none"))
    supervisor.start()
    repository = Repository(path, supervisor, "none", plans=plans)
    try:
        yield repository, supervisor
    finally:
        await asyncio.shield(repository.close())
        await supervisor.close()
