"""One version's files, and which of them is the model."""

import stat
from dataclasses import dataclass
from pathlib import Path

from headrace.core.fingerprint import digest, stamps
from headrace.core.passed_over import is_passed_over
from headrace.repository.model_config import ModelConfig
from headrace.repository.small_files import Unusable, list_names, may_come_back, read_beginning, why_unread
from headrace_backends.registry import (
    CONTENT_BYTES,
    ENDINGS,
    FOLDER_ENDINGS,
    backend_by_name,
    canonical,
    content_fits,
    gives_way,
    model_files,
    reads,
)


@dataclass(frozen=True, slots=True)
class VersionFiles:
    """One version's files. ``model_path`` is the folder itself where the backend has no file of its own kind."""

    version: int
    backend: str
    model_path: Path
    print: str  # changes when a file below the version's folder does
    model_bytes: int  # of all files below the version's folder


ENSEMBLE = "ensemble"  # in place of a backend
MAX_NAMED = 5  # of the files in a folder that has no model
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class NoModelFile(Unusable):
    """A version without a model file; perhaps it is on its way."""


def read_version(folder: Path, version: int, config: ModelConfig) -> VersionFiles:
    """One version's files.

    Raises:
        Unusable: it has no model file, or more than one.
        OSError: the folder is out of reach.
    """
    found = list(stamps(folder))
    backend, model_path = (ENSEMBLE, folder) if config.ensemble else _find_model(folder, config)
    return VersionFiles(version, backend, model_path, digest(found), sum(stamp.size_bytes for stamp in found))


def _find_model(folder: Path, config: ModelConfig) -> tuple[str, Path]:
    """The backend and the model file of a version.

    Raises:
        Unusable: there is none, or more than one.
        OSError: the folder or the file is out of reach.
    """
    backend = canonical(config.backend) if config.backend else None
    if config.model_file is not None:
        return backend or _backend_of(config.model_file), _existing(folder / config.model_file)
    if backend is not None and backend not in ENDINGS.values():
        return backend, folder  # a plugin, or the fake: it knows what it looks for
    names = [name for name in list_names(folder) if not is_passed_over(name)]
    if backend is not None:
        candidates = [name for name in names if reads(backend, Path(name))]
    else:
        candidates = [name for name in names if backend_by_name(name) is not None]
        candidates = _first_rank(folder, candidates)
    if not candidates:
        raise NoModelFile(_none_among(list_names(folder), backend))
    name = _preferred(candidates, backend)
    return backend or _backend_of(name), _existing(folder / name)


def _first_rank(folder: Path, candidates: list[str]) -> list[str]:
    """Those that are models by themselves; where there are none, those that may belong to one, and are not."""
    first = [name for name in candidates if not gives_way(name)]
    return first or [name for name in candidates if content_fits(name, read_beginning(folder / name, CONTENT_BYTES))]


def _preferred(candidates: list[str], backend: str | None) -> str:
    """The model file among those of known names: one named model.*, else the only one.

    Raises:
        Unusable: there is more than one.
    """
    named = [name for name in candidates if name.startswith("model.")]
    backends = {backend} if backend else {backend_by_name(name) for name in named}
    if len(backends) == 1:
        ranked = [name for name in model_files(backends.pop() or "") if name in (named or candidates)]
        if ranked:
            return ranked[0]
    remaining = named or candidates
    if len(remaining) == 1:
        return remaining[0]
    raise Unusable(
        f"has several model files ({', '.join(remaining)}); set backend or model_file in the configuration "
        "to choose one"
    )


def _none_among(names: list[str], backend: str | None) -> str:
    """That none of these is a model file."""
    if backend is not None:
        missing = f"has no model file for backend '{backend}', expected {' or '.join(model_files(backend))}"
    else:
        missing = f"has no model file, expected model.* with an ending of {', '.join(ENDINGS)}"
    if not names:
        return f"{missing}; the folder is empty"
    there = [
        f"{name} (which does not begin as a model of XGBoost)"
        if backend is None and backend_by_name(name) and not is_passed_over(name)  # so it is not for its ending
        else name
        for name in names[:MAX_NAMED]
    ]
    return f"{missing}; found: {', '.join(there)}{', ...' if len(names) > MAX_NAMED else ''}"


def _backend_of(name: str) -> str:
    backend = backend_by_name(name)
    if backend is None:
        raise Unusable(f"has the model file '{name}', whose ending tells no backend; set backend")
    return backend


def _existing(path: Path) -> Path:
    """The model file at ``path``; of an ONNX model with more files it may be a folder that has all of them."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if may_come_back(error):
            raise
        raise NoModelFile(f"its model file '{path.name}' {why_unread(error)}") from error
    if stat.S_ISDIR(mode):
        return _in_folder(path)
    if not stat.S_ISREG(mode):
        raise Unusable(f"its model file '{path.name}' is not an ordinary file")
    if read_beginning(path, len(_LFS_POINTER)) == _LFS_POINTER:
        raise Unusable(f"its model file '{path.name}' is a pointer of Git LFS and not the model: run git lfs pull")
    return path


def _in_folder(path: Path) -> Path:
    """The model file where there is a folder at ``path``."""
    ending = path.suffix.lower()
    if ending == ".onnx":
        inner = path / "model.onnx"
        if inner.is_file():
            return _existing(inner)
        raise NoModelFile(f"its model file '{path.name}' is a folder, expected a file model.onnx in it")
    if ending in ENDINGS and ending not in FOLDER_ENDINGS:
        raise Unusable(f"its model file '{path.name}' is a folder, expected a file")
    return path
