"""The command ``optimize``: from a model of a repository, or a model file, to a plan and its report."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from headrace.core.cpus import usable_cpus
from headrace.core.device import CPU
from headrace.core.model import Signature
from headrace.repository.declared import declared_signature
from headrace.repository.layout import has_model, list_models, read_folder, selected_versions
from headrace.repository.optimize_config import OptimizeConfig
from headrace.repository.planned import OWN_CODE, device_for, device_of, why_no_plan
from headrace.repository.plans import digest_of
from headrace_backends.base import BackendUnavailable, LoadError
from headrace_backends.importers.conversion_cache import NOTE_FILE
from headrace_backends.optimize.accuracy import Budget, MetricFailed
from headrace_backends.optimize.basis import model_digest, searched_versions, versions
from headrace_backends.optimize.calibration import BadCalibration, made_up_examples, read_examples
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.form import TRAINED, Technique
from headrace_backends.optimize.goal import Aim, Goal
from headrace_backends.optimize.hardware import hardware, why_not_on
from headrace_backends.optimize.imported import as_onnx, is_imported
from headrace_backends.optimize.listener import Listener
from headrace_backends.optimize.plan import BadPlan, Basis, Plan, read_plan
from headrace_backends.optimize.plan_cache import PlanCache
from headrace_backends.optimize.replay import write_replay
from headrace_backends.optimize.report import write_report
from headrace_backends.optimize.search import Outcome, Search, SearchFailed
from headrace_backends.optimize.search_key import file_key, search_key
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.summary import lines
from headrace_backends.optimize.work_folder import Busy, claimed
from headrace_backends.optimize.workshop import Workshop
from headrace_backends.registry import backend_of_file
from headrace_backends.specs import FoundTensor

NOTHING_BETTER = 3  # exit status: the plan says that the model is best served as it was dropped in
DEFAULT_TIME_LIMIT_S = 600.0
RECORDED = "recorded"  # the folder of recorded traffic, in that of the plans
_FEW_EXAMPLES = 64
_UNFINISHED = ".work-"  # begins the names of folders in which searches work, beside a model's plans

Say = Callable[[str], None]


class CannotOptimize(Exception):
    """There is nothing that could be optimised; the message says why."""


@dataclass(frozen=True, slots=True)
class OptimizeArguments:
    """The command line. None is what the model's configuration says, or the default."""

    target: str  # a model's name, or the path of a model file
    repository: Path
    plan_cache: Path
    version: str = ""
    device: str | None = None  # of a file; where a model runs, its configuration says
    output: Path | None = None  # where a file's plan goes
    calibration: Path | None = None
    budget: Budget | None = None
    allow: tuple[Technique, ...] | None = None
    aim: Aim | None = None
    p99_ms: float | None = None
    training: Path | None = None
    time_limit_s: float | None = None
    exhaustive: bool = False
    anew: bool = False
    beside_server: bool = False  # which tries again where nothing came of it


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done: the subject, the goal, the examples, and where the plan goes."""

    subject: Subject
    goal: Goal
    calibration: Path | None
    digest: str
    cache: PlanCache | None  # None: a file's plan goes to ``folder``
    folder: Path
    work: Path  # where files are made, unless another search does so there
    imported: bool = False  # the model was of another framework, so that its plan needs the ONNX file in any case
    changed: Callable[[], bool] = lambda: False  # whether the model's files are others by now


def run(arguments: OptimizeArguments, listener: Listener, say: Say, complain: Say) -> int:
    """Optimise, and write the plan and its report. Returns the exit status; what fails is complained of."""
    try:
        job = job_of(arguments)
        untrained = sorted(job.goal.allow & TRAINED) if job.subject.training is None else []
        if untrained:
            say(f"there is no training code (--training FILE.py), so nothing is tried of {', '.join(untrained)}")
        with claimed(job.work.parent, job.work.name, _UNFINISHED if job.cache else "") as work:
            if arguments.anew:
                shutil.rmtree(work, ignore_errors=True)
            outcome = _search(job, work, listener, say)
            if job.changed():
                shutil.rmtree(work, ignore_errors=True)  # it is made of both
                raise CannotOptimize(
                    f"the files of '{job.subject.name}' have changed during the search, so nothing is known of them; "
                    "start it again"
                )
            unchanged = outcome.chosen.form == job.subject.reference
            if unchanged and arguments.beside_server and not outcome.findings.complete:
                complain("headrace: its time was over before anything better was found; the next run goes on from here")
                return 1
            folder = _keep(job, outcome, work)
    except (
        *(CannotOptimize, SearchFailed, BadCalibration, MetricFailed, BackendUnavailable, LoadError, Busy),
        OSError,  # as where the disk is full
    ) as error:
        complain(f"headrace: {error}")
        return 1
    if job.cache is None:
        with suppress(OSError):  # there is unfinished work of others in it
            job.work.parent.rmdir()
    for line in lines(outcome.findings):
        say(line)
    say(f"plan:   {folder / 'plan.json'}")
    say(f"report: {folder / 'report.html'}")
    return NOTHING_BETTER if unchanged else 0


def _search(job: Job, work: Path, listener: Listener, say: Say) -> Outcome:
    cpus = usable_cpus()
    return Search(
        job.subject,
        job.goal,
        lambda signature: _examples(job, signature, say),
        Workshop(work, job.subject, cpus),
        listener,
        cpus,
        hardware(),
        searched_versions(on_gpu=job.subject.device != CPU),
    ).run()


def job_of(arguments: OptimizeArguments) -> Job:
    """What the arguments and the model's configuration ask for.

    Raises:
        CannotOptimize: there is no such model, or nothing about it that could be changed.
        LoadError: the file is none of a model.
    """
    path = Path(arguments.target)
    if arguments.training is not None and not arguments.training.is_file():
        raise CannotOptimize(f"there is no training code '{arguments.training}'")
    if path.is_file():
        return _file_job(arguments, path.resolve())
    if arguments.device is not None:
        raise CannotOptimize(
            f"--device is for a model file, and there is no file '{arguments.target}'; where a model of the repository "
            "runs, and is optimised, its configuration says: instances: [{device: 'gpu:0'}]"
        )
    if not has_model(arguments.repository, arguments.target):
        there = ", ".join(list_models(arguments.repository)) if arguments.repository.is_dir() else "no such folder"
        raise CannotOptimize(
            f"there is no model '{arguments.target}' in '{arguments.repository}' ({there}), and no such file"
        )
    return _model_job(arguments)


def _file_job(arguments: OptimizeArguments, path: Path) -> Job:
    output = (arguments.output or Path.cwd() / f"{path.stem}-optimized").resolve()
    if output == path.parent:
        raise CannotOptimize(f"--output is '{output}', where '{path.name}' lies: it could be written over")
    backend = backend_of_file(path)
    device = device_for(arguments.device or CPU, backend)
    subject = Subject(path.stem, "1", path, backend, path.parent, training=arguments.training, device=device)
    _refuse_unfit(subject)
    goal = _goal(arguments, OptimizeConfig())
    files = file_key(path)
    work = output / "work" / _key(subject, goal, files, arguments.calibration)
    digest, imported = model_digest(path, {} if device == CPU else {"device": device}), is_imported(backend)
    return Job(
        *(as_onnx(subject), goal, arguments.calibration, digest, None, output, work, imported),
        changed=lambda: file_key(path) != files,
    )


def _model_job(arguments: OptimizeArguments) -> Job:
    folder = read_folder(arguments.repository.resolve() / arguments.target)
    if folder.model_problems:
        raise CannotOptimize(f"model '{folder.name}': {'; '.join(folder.model_problems)}")
    served = selected_versions(folder)
    asked = arguments.version or (served[-1] if served else "")
    number = int(asked) if str(asked).isdecimal() else None
    if number is None or number not in folder.versions:
        reasons = "; ".join(folder.problems) or f"it has {sorted(folder.versions)}"
        raise CannotOptimize(f"model '{folder.name}' has no version {arguments.version or 'to serve'}: {reasons}")
    files, config = folder.versions[number], folder.config
    why_not = why_no_plan(config)
    if why_not:
        raise CannotOptimize(f"model '{folder.name}' cannot be optimised: {why_not}")
    wanted = config.optimize or OptimizeConfig()
    declared = declared_signature(folder)
    training = arguments.training or (folder.path / wanted.training if wanted.training else None)
    subject = Subject(
        folder.name,
        str(number),
        files.model_path,
        files.backend,
        folder.path,
        dict(config.parameters),
        declared.inputs,
        declared.outputs,
        config.max_batch_size,
        training,
        device_of(config, files.backend),
    )
    _refuse_unfit(subject)
    goal = _goal(arguments, wanted, several="instances" not in config.model_fields_set)
    digest = digest_of(folder, number)
    calibration = arguments.calibration or (folder.path / wanted.calibration if wanted.calibration else None)
    recorded = arguments.plan_cache / RECORDED / f"{folder.name}.npz"
    if calibration is None and recorded.is_file():
        calibration = recorded
    cache = PlanCache(arguments.plan_cache)
    place = cache.place(folder.name, str(number))
    work = place / f"{_UNFINISHED}{_key(subject, goal, digest, calibration)}"
    return Job(
        *(as_onnx(subject), goal, calibration, digest, cache, place, work, is_imported(subject.backend)),
        changed=lambda: digest_of(folder, number) != digest,
    )


def _key(subject: Subject, goal: Goal, model: str, calibration: Path | None) -> str:
    there = calibration is not None and calibration.exists()
    examples = [model_digest(calibration, {})] if calibration is not None and there else []
    return search_key(subject, goal, usable_cpus(), model, examples)


def _refuse_unfit(subject: Subject) -> None:
    if subject.backend in OWN_CODE:
        raise CannotOptimize(f"model '{subject.name}' is run by the backend {subject.backend}: its code is the owner's")
    why_not = why_not_on(subject.device, hardware().gpu)
    if why_not:
        raise CannotOptimize(f"model '{subject.name}' is to run on '{subject.device}', and {why_not}")


def _goal(arguments: OptimizeArguments, wanted: OptimizeConfig, *, several: bool = True) -> Goal:
    budget = arguments.budget or (wanted.budget.budget() if wanted.budget is not None else None)
    allow = frozenset(wanted.allow if arguments.allow is None else arguments.allow)
    if allow and budget is None:
        raise CannotOptimize(
            f"what changes answers is allowed ({', '.join(sorted(allow))}), so a budget is needed, for instance "
            "--budget 'cosine>=0.99'"
        )
    objective = wanted.objective
    return Goal(
        budget,
        allow,
        arguments.aim or objective.goal,
        arguments.p99_ms or objective.p99_ms,
        arguments.time_limit_s or wanted.time_limit_s or DEFAULT_TIME_LIMIT_S,
        arguments.exhaustive,
        several,
    )


def _examples(job: Job, signature: Signature, say: Say) -> Examples:
    """Real examples where there are some; else made-up ones, which is said.

    Raises:
        BadCalibration: the file is no good, or none can be made up.
    """
    if job.calibration is not None:
        recorded = job.calibration.parent.name == RECORDED
        found = read_examples(job.calibration, signature, "recorded traffic" if recorded else "")
        if job.goal.allow and len(found) < _FEW_EXAMPLES:
            half = len(found) - len(found) // 2
            say(
                f"there are only {len(found)} examples: the {half} that are held back tell little of what changes "
                "answers; some hundred are better"
            )
        return found
    examples = made_up_examples([FoundTensor(spec) for spec in signature.inputs], signature)
    if examples is None:
        raise BadCalibration("the model's inputs cannot be made up, so it needs real examples: --calibration FILE.npz")
    if job.goal.allow:
        say(
            "no real examples: nothing that changes answers is tried. Give some with --calibration or "
            "`optimize: {calibration: FILE.npz}`, or record traffic with `headrace record`"
        )
    return examples


def _keep(job: Job, outcome: Outcome, work: Path) -> Path:
    """Put the plan where it is found, and remove the work where all is done. Returns the plan's folder."""
    subject, findings, chosen = job.subject, outcome.findings, outcome.chosen
    made_in = work / "plan"
    shutil.rmtree(made_in, ignore_errors=True)
    made_in.mkdir(parents=True)
    artifact = ""
    if chosen.form.steps or job.imported:
        not_its = shutil.ignore_patterns("done.json", NOTE_FILE)
        shutil.copytree(outcome.artifact.parent, made_in, dirs_exist_ok=True, ignore=not_its)
        artifact = outcome.artifact.name
    write_replay(made_in / "replay.npz", outcome.inputs, outcome.answers)
    assert chosen.held_back is not None, "whatever is chosen has been judged"
    plan = Plan(
        subject.name,
        subject.version,
        Basis(job.digest, hardware(), versions(chosen.form.backend)),
        chosen.form,
        artifact,
        {},
        job.goal.budget,
        tuple(sorted(job.goal.allow)),
        str(job.goal),
        findings.examples,
        chosen.held_back,
        chosen.speedup or 1.0,
        chosen.curve,
        findings.reference.curve,
        datetime.now(UTC).isoformat(timespec="seconds"),
        signature=outcome.signature,
    )
    write_report(findings, made_in)
    cache = job.cache or PlanCache(work / "plans")
    _, folder = cache.put(made_in, plan)
    if job.cache is None:  # a file: what people look for lies on top
        _replace(job.folder, folder)
        folder = job.folder
    shutil.rmtree(made_in, ignore_errors=True)
    if findings.complete:  # else the same command goes on from here
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _replace(folder: Path, made: Path) -> None:
    """Have what was made in the place of an earlier plan, of which no file stays."""
    try:
        earlier = read_plan(folder).files
    except BadPlan:
        earlier = {}
    for name in earlier:
        if (folder / name).resolve().is_relative_to(folder):
            (folder / name).unlink(missing_ok=True)
    shutil.copytree(made, folder, dirs_exist_ok=True)
    shutil.rmtree(made)
