"""What a plan depends on: the model's files and tensors, the machine, the libraries. Found out without frameworks."""

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.passed_over import is_passed_over
from headrace_backends.distributions import installed
from headrace_backends.optimize.hardware import hardware
from headrace_backends.optimize.plan import Basis, Plan
from headrace_backends.registry import ENTRY_POINT_GROUP, canonical

_LIBRARIES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "ncnn": ("ncnn",),
    "torch": ("torch",),
    "tensorrt": ("tensorrt",),
    "litert": ("ai-edge-litert",),
    "tensorflow": ("onnxruntime", "tensorflow", "tf2onnx"),
    "sklearn": ("onnxruntime", "scikit-learn", "skl2onnx"),
    "xgboost": ("onnxruntime", "xgboost", "onnxmltools"),
    "python": (),
    "fake": (),
}
_DIGEST_BYTES = 16


def model_digest(path: Path, config: Mapping[str, Any]) -> str:
    """A hash of what the model is: the contents below ``path`` (a folder, or one file) and what is configured.

    ``config`` has what the configuration says of tensors, batch size, parameters and backend, in plain values. It reads
    every file, so a thread should do it where somebody waits.

    Raises:
        OSError: a file cannot be read.
    """
    running = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    running.update(msgspec.json.encode(config, order="deterministic"))
    for place, file in _files(path):
        running.update(f"\0{place}\0{file_digest(file)}".encode(errors="surrogateescape"))
    return running.hexdigest()


def file_digest(path: Path) -> str:
    """A hash of a file's contents.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).hexdigest()


def versions(backend: str) -> dict[str, str]:
    """The versions of the libraries that a backend runs models with, by name; "" is not installed."""
    name = canonical(backend)
    if name in _LIBRARIES:
        found = dict(map(installed, _LIBRARIES[name]))
        return found or {"python": platform.python_version()}
    points = [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name]
    return {point.dist.name: point.dist.version for point in points if point.dist is not None}


def searched_versions(*, on_gpu: bool = False) -> dict[str, str]:
    """The versions of everything that a search may choose, by name."""
    backends = ("onnxruntime", "tensorrt", "torch") if on_gpu else ("onnxruntime", "openvino", "ncnn", "torch")
    return {name: number for backend in backends for name, number in versions(backend).items()}


def version_of(distribution: str) -> str:
    """The version of an installed distribution, "" where there is none."""
    return installed(distribution)[1]


def present_basis(plan: Plan, digest: str) -> Basis:
    """What the plan would be made for if it were made now, of a model with this digest."""
    return Basis(digest, hardware(), versions(plan.form.backend))


def difference(made_for: Basis, now: Basis) -> str:
    """Why a plan that was made for one does not hold for the other; empty where it does."""
    if made_for.model != now.model:
        return "the model's files or its configuration have changed since"
    was, is_ = made_for.hardware, now.hardware
    for what, one, other in (
        ("CPU", was.cpu, is_.cpu),
        ("number of usable CPUs", str(was.cpus), str(is_.cpus)),
        ("GPU", was.gpu, is_.gpu),
    ):
        if one != other:
            return f"it was made for another machine: the {what} was {one or 'none'} and is {other or 'none'}"
    if was.features != is_.features:
        changed = ", ".join(sorted(set(was.features) ^ set(is_.features)))
        return f"it was made for another machine: the CPU differs in {changed}"
    for library in sorted({*made_for.versions, *now.versions}):
        one, other = made_for.versions.get(library, ""), now.versions.get(library, "")
        if one != other:
            return f"{library} was {one or 'not installed'} and is {other or 'not installed'}"
    return ""


def basis_key(basis: Basis) -> str:
    """A short name for a basis, the same in every run."""
    return hashlib.blake2b(msgspec.json.encode(basis, order="deterministic"), digest_size=10).hexdigest()


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Every file below, in order, but for hidden and temporary ones and caches: those say nothing of the model."""
    if not path.is_dir():
        yield path.name, path
        return
    walked: set[tuple[int, int]] = set()
    waiting = [(path, "")]
    while waiting:
        folder, place = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in walked:
            continue  # links may lead in circles
        walked.add((status.st_dev, status.st_ino))
        for name in sorted(os.listdir(folder), reverse=True):  # noqa: PTH208 - names are wanted
            if is_passed_over(name):
                continue
            if (folder / name).is_dir():
                waiting.append((folder / name, f"{place}{name}/"))
            else:
                yield f"{place}{name}", folder / name
