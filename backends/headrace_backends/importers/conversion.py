"""One conversion, in a process of its own: what the framework takes is given back, and its crash is a reason."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.model import TensorSpec
from headrace_backends.base import LoadError, ModelSource
from headrace_backends.importers.conversion_cache import MODEL_FILE, ConversionCache, conversion_key, default_folder
from headrace_backends.importers.formats import SAVED_MODEL, Format
from headrace_backends.importers.pickle_consent import refuse_unagreed
from headrace_backends.optimize.basis import model_digest, version_of

TASK_FILE, ANSWER_FILE, LOG_FILE = "task.json", "answer.json", "log.txt"  # in the folder that is converted in
NO_CACHE = "off"

_MOST_TOLD = 600  # characters of what a converter said last
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",  # a conversion needs no GPU, and TensorFlow would take all of its memory
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",  # the framework's plain answers are what the converted model is compared with
}


class Task(msgspec.Struct, frozen=True):
    """What the converting process is told."""

    parent: int
    converter: str  # module:function
    source: str
    target: str
    parameters: dict[str, Any]
    inputs: tuple[TensorSpec, ...]  # as configured


class Answer(msgspec.Struct, frozen=True):
    """What it tells, notes or a refusal."""

    notes: list[str] = []
    error: str = ""


@dataclass(frozen=True, slots=True)
class Converted:
    """A model as ONNX, what there is to tell of that, and what holds the file while it is loaded."""

    path: Path
    notes: list[str]


def converted(source: ModelSource, made_of: Format, parameters: Mapping[str, Any], holding: ExitStack) -> Converted:
    """The model as an ONNX file: from the cache if it is there. A file outside of the cache is gone with ``holding``.

    Raises:
        BackendUnavailable: the converter is not installed.
        LoadError: it cannot be converted, its answers are not the framework's, or it is a pickle that nobody agreed to.
    """
    path = subject_of(source.path)
    ending = source.path.suffix.lower()
    if ending not in made_of.converters:
        expected = ", ".join(made_of.endings)
        raise LoadError(
            f"'{source.path.name}' is none of {made_of.framework}'s files, expected an ending of {expected}"
        )
    refuse_unagreed(source.path, parameters)  # before anything is asked to be installed for it
    versions = made_of.versions(ending)
    asked = parameters.get("conversion_cache")
    if asked is not None and not isinstance(asked, str):
        raise LoadError(f"parameters.conversion_cache is {asked!r}, expected a folder, or '{NO_CACHE}'")
    options = {name: value for name, value in parameters.items() if name in made_of.parameters}
    task = Task(os.getpid(), made_of.converters[ending], str(path), "", options, source.inputs)
    if asked == NO_CACHE:
        return _aside(task, source.threads, [], holding)
    try:
        return _cached(ConversionCache(Path(asked) if asked else default_folder()), task, versions, source.threads)
    except OSError as error:
        wrong = f"conversions cannot be kept ({error}); set parameters.conversion_cache to a folder that can be written"
        return _aside(task, source.threads, [wrong], holding)


def subject_of(path: Path) -> Path:
    """What is converted: of a SavedModel the whole folder, whichever of its names led to it."""
    return path.parent if path.name == SAVED_MODEL else path


def _cached(cache: ConversionCache, task: Task, versions: Mapping[str, str], threads: int) -> Converted:
    inputs = [[spec.name, str(spec.datatype), spec.shape] for spec in task.inputs]
    digest = model_digest(Path(task.source), {})
    made_by = {**versions, "headrace": version_of("headrace")}  # whose converters and proof become other ones too
    key = conversion_key(digest, made_by, {**task.parameters, "inputs": inputs, "converter": task.converter})
    with cache.converting(key) as folder:
        path, notes, wrong = cache.get(key)
        if path is not None:
            return Converted(path, [*notes, f"conversion {key} from the cache"])
        notes = _convert(task, folder, threads)
        path = cache.put(key, folder, notes)
        again = [f"{wrong}: made anew"] if wrong else []
        return Converted(path, [*notes, *again, "converted by " + _told(versions)])


def _aside(task: Task, threads: int, notes: list[str], holding: ExitStack) -> Converted:
    folder = Path(holding.enter_context(tempfile.TemporaryDirectory(prefix="headrace-conversion-")))
    return Converted(folder / MODEL_FILE, [*_convert(task, folder, threads), *notes])


def _convert(task: Task, folder: Path, threads: int) -> list[str]:
    """Have the model written into ``folder``, which holds nothing else afterwards. Returns what there is to tell."""
    task = msgspec.structs.replace(task, target=str(folder / MODEL_FILE))
    (folder / TASK_FILE).write_bytes(msgspec.json.encode(task))
    with (folder / LOG_FILE).open("wb") as log:
        ended = subprocess.run(  # noqa: S603 - ourselves
            [sys.executable, "-m", "headrace_backends.importers", str(folder)],
            cwd=folder,
            env={**os.environ, **_ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "TF_NUM_INTRAOP_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,  # the server's own limit for a load bounds it: this process and that one end together
        )
    answer = _read_answer(folder, ended.returncode, Path(task.source).name)
    if answer.error:
        raise LoadError(answer.error)
    for name in (TASK_FILE, ANSWER_FILE, LOG_FILE):
        (folder / name).unlink(missing_ok=True)
    return answer.notes


def _read_answer(folder: Path, status: int, name: str) -> Answer:
    try:
        answer = msgspec.json.decode((folder / ANSWER_FILE).read_bytes(), type=Answer)
    except (OSError, msgspec.MsgspecError):
        answer = None
    if answer is not None and (answer.error or ((folder / MODEL_FILE).is_file() and status == 0)):
        return answer
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    lines = [line.strip() for line in (folder / LOG_FILE).read_text(errors="replace").splitlines() if line.strip()]
    said = f"; it said last: {lines[-1][:_MOST_TOLD]}" if lines else ""
    raise LoadError(f"the process that converts '{name}' {how}{said}")


def _told(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
