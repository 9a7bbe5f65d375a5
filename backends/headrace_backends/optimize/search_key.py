"""What the rows and files of a search depend on: one that was stopped goes on only where all of that is the same."""

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import msgspec

from headrace.core.device import CPU
from headrace_backends.onnx_file import external_files
from headrace_backends.optimize.basis import model_digest, searched_versions, version_of, versions
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.hardware import hardware
from headrace_backends.optimize.subject import Subject

_STEPS_USE = ("headrace", "nncf", "onnx", "onnxslim", "torch-pruning")


def search_key(subject: Subject, goal: Goal, cpus: int, model: str, examples: Iterable[str]) -> str:
    """A short name, the same in every run. The time limit changes nothing of it.

    ``model`` is the digest of what is optimised, ``examples`` are those of what it is judged by.
    """
    on_gpu = subject.device != CPU
    told: list[object] = [model, list(examples), cpus, hardware()]
    told += [goal.budget, sorted(goal.allow), goal.aim, goal.p99_ms, goal.exhaustive]
    told += [subject.device] if on_gpu else []
    told += [searched_versions(on_gpu=on_gpu), versions(subject.backend), [version_of(name) for name in _STEPS_USE]]
    budget = goal.budget
    judge = subject.folder / budget.metric.split(":")[0] if budget is not None and budget.is_own else None
    for file in (subject.training, judge):
        told.append(model_digest(file, {}) if file is not None and file.exists() else None)
    return blake2b(msgspec.json.encode(told, order="deterministic"), digest_size=8).hexdigest()


def file_key(path: Path) -> str:
    """The digest of a model file with the weights that it keeps in files of their own, or of a model that is a folder.

    Raises:
        OSError: it cannot be read.
    """
    return ",".join(model_digest(one, {}) for one in (path, *_beside(path)))


def _beside(path: Path) -> list[Path]:
    names: Iterable[str] = ()
    if path.suffix.lower() == ".xml":
        names = [path.with_suffix(".bin").name]
    elif path.suffix.lower() == ".onnx" and path.is_file():
        names = sorted(external_files(path))
    return [path.parent / name for name in names if (path.parent / name).is_file()]
