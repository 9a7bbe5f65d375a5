"""What lies in a model repository: its models, their configuration, labels and version folders, as found on disk."""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePath
from typing import NamedTuple

from headrace.repository.model_config import ConfigError, ModelConfig, parse_config
from headrace.repository.pbtxt import parse_pbtxt
from headrace_backends.registry import ENDINGS, canonical, model_files

CONFIG_FILES = ("config.yaml", "config.pbtxt")
MAX_NAME_BYTES = 255  # of a folder
MAX_CONFIG_BYTES = 1 << 20
MAX_LABEL_BYTES = 64 << 20

_VERSION = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)  # an int64 on the wire
_LOOSE_ENDINGS = (".onnx", ".pt2", ".pt", ".plan")  # .py and .xml are not only models
_MISSPELLED_CONFIGS = ("config.yml", "config.json", "config.pbtxt.txt", "config.yaml.txt")


class _Unusable(Exception):
    """Something on disk that cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class VersionFiles:
    """One version's files. ``model_path`` is the folder itself where the backend has no file of its own kind."""

    version: int
    backend: str
    model_path: Path
    print: str  # changes when a file below the version's folder does
    model_bytes: int  # of all files below the version's folder


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """One model as it lies on disk.

    With ``model_problems`` none of its versions can be served. A version in ``broken_versions`` cannot, and its
    reason is there; the others are in ``versions``.
    """

    name: str
    path: Path
    config: ModelConfig = field(default_factory=ModelConfig)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by output
    versions: dict[int, VersionFiles] = field(default_factory=dict)
    broken_versions: dict[int, str] = field(default_factory=dict)
    on_disk: frozenset[int] = frozenset()  # every version that has a folder, whatever state that is in
    model_problems: tuple[str, ...] = ()
    config_print: str = ""  # changes when the configuration or a file of labels does

    @property
    def missing_versions(self) -> dict[int, str]:
        """Versions that the configuration asks for by number and that are not there, each with that reason."""
        reason = "is wanted by the configuration's versions, and there is no such folder"
        return {version: reason for version in self.config.versions.only or () if version not in self.on_disk}

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that is wrong, each led by the file or folder that it is about."""
        broken = (f"{version}: {reason}" for version, reason in sorted(self.broken_versions.items()))
        missing = (f"{version}: {reason}" for version, reason in self.missing_versions.items())
        return (*self.model_problems, *broken, *missing)


def list_models(repository: Path) -> list[str]:
    """The names of the repository's models, sorted.

    A folder is a model if it has a configuration or a version, or cannot be read to tell. Hidden and temporary
    ones are none, nor is one whose name is not UTF-8, since no client could ask for it.

    Raises:
        OSError: the repository cannot be read, which is not the same as that it is empty.
    """
    with os.scandir(repository) as entries:
        return sorted(
            entry.name
            for entry in entries
            if _is_utf8(entry.name) and not _is_passed_over(entry.name) and _is_model(Path(entry.path))
        )


def has_model(repository: Path, name: str) -> bool:
    """Whether ``list_models`` would name this one, without looking at all the others."""
    plain = "/" not in name and "\0" not in name and name not in ("", ".", "..")
    return (
        plain
        and _is_utf8(name)
        and len(name.encode()) <= MAX_NAME_BYTES
        and not _is_passed_over(name)
        and _is_model(repository / name)
    )


def read_folder(path: Path) -> ModelFolder:
    """The model in the folder ``path``. Whatever is wrong with it is in the result, never raised."""
    try:
        names = _names(path)
    except OSError as error:
        return ModelFolder(path.name, path, model_problems=(f"{path.name}: {_reason(error)}",))
    on_disk, broken = _version_folders(path, names)
    # Prints are taken before the files are read: what changes in between is noticed the next time.
    config_print = _print_files(path, CONFIG_FILES)
    config, problems = _read_config(path, names)
    if config is None:  # how its versions are to be read is unknown
        return ModelFolder(path.name, path, on_disk=on_disk, model_problems=tuple(problems), config_print=config_print)
    label_files = sorted({output.labels for output in config.outputs if output.labels})
    if label_files:
        config_print = _print_files(path, (*CONFIG_FILES, *label_files))
    labels, label_problems = _read_labels(path, config)
    problems += label_problems
    if not on_disk:
        loose = _loose_files(path, names)
        advice = f"; move {loose[0]} to {path.name}/1/" if loose else ""
        problems.append(
            f"{path.name}: has no version: expected a folder named 1, 2, ... with a model file in it{advice}"
        )
    versions: dict[int, VersionFiles] = {}
    for version in sorted(on_disk - broken.keys()):
        try:
            versions[version] = _read_version(path / str(version), version, config)
        except OSError as error:
            broken[version] = _reason(error)
        except _Unusable as error:
            broken[version] = str(error)
    return ModelFolder(path.name, path, config, labels, versions, broken, on_disk, tuple(problems), config_print)


def selected_versions(folder: ModelFolder) -> list[int]:
    """The versions to serve, by the folder's version policy, among those that can be; oldest first."""
    if folder.model_problems:
        return []
    usable = sorted(folder.versions)
    policy = folder.config.versions
    if policy.only is not None:
        return [version for version in usable if version in policy.only]
    return usable[-policy.latest :] if policy.latest is not None else usable


def fingerprint(path: Path) -> str:
    """A print of every file below ``path``: its place, size, time of change and inode, but not its contents.

    Hidden and temporary files and Python's caches do not count: what writes them does not mean to change a model.
    """
    return _digest(_stamps(path))


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))  # noqa: PTH208 - names are wanted, and paths cost four times as much


def _is_passed_over(name: str) -> bool:
    return name.startswith(".") or name.endswith((".tmp", ".part", "~")) or name == "__pycache__"


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)  # how Python spells other bytes


def _is_model(path: Path) -> bool:
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return False
        names = _names(path)
        return any(
            name in CONFIG_FILES or (_VERSION.fullmatch(name) and (path / name).is_dir()) for name in names
        ) or bool(_loose_files(path, names))
    except FileNotFoundError:
        return path.is_symlink()  # one that leads nowhere; its reader will say so
    except OSError:  # whoever reads it will say why it cannot be
        return True


def _loose_files(path: Path, names: list[str]) -> list[str]:
    """Model files that somebody has put beside the version folders, or into one whose name is no version."""
    found = [name for name in names if PurePath(name).suffix in _LOOSE_ENDINGS]
    for name in names:
        if not _is_passed_over(name) and not _VERSION.fullmatch(name) and (path / name).is_dir():
            found += [f"{name}/{inner}" for inner in _names(path / name) if PurePath(inner).suffix in _LOOSE_ENDINGS]
    return found


# ---- configuration and labels ----


def _read_config(path: Path, names: list[str]) -> tuple[ModelConfig | None, list[str]]:
    """The configuration, or None where it is of no use, and what is wrong."""
    present = [name for name in CONFIG_FILES if name in names]
    if len(present) > 1:
        return None, [f"{' and '.join(present)} are both present, expected one of them"]
    if not present:
        return ModelConfig(), [
            f"{name}: is not read, expected config.yaml or config.pbtxt"
            for name in _MISSPELLED_CONFIGS
            if name in names
        ]
    (name,) = present
    try:
        text = _read_text(path / name, MAX_CONFIG_BYTES)
        return parse_config(text) if name == "config.yaml" else parse_pbtxt(text, path.name), []
    except ConfigError as error:
        return None, [f"{name}: {problem}" for problem in error.problems]
    except _Unusable as error:
        return None, [f"{name}: {error}"]


def _read_labels(path: Path, config: ModelConfig) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    labels: dict[str, tuple[str, ...]] = {}
    problems: list[str] = []
    for output in config.outputs:
        if output.labels is None:
            continue
        try:
            labels[output.name] = _lines(_read_text(path / output.labels, MAX_LABEL_BYTES))
        except _Unusable as error:
            problems.append(f"{output.labels}: {error}; it is to have the labels of output '{output.name}'")
    return labels, problems


def _lines(text: str) -> tuple[str, ...]:
    """Lines as every editor counts them; ``str.splitlines`` breaks at characters that a label may have."""
    return tuple(line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")) if text else ()


def _read_text(path: Path, limit_bytes: int) -> str:
    """A file's text.

    Raises:
        _Unusable: it is no ordinary file, too large, not UTF-8 or out of reach.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _Unusable("is not an ordinary file")
            raw = file.read(limit_bytes + 1)
    except OSError as error:
        raise _Unusable(_reason(error)) from error
    if len(raw) > limit_bytes:
        raise _Unusable(f"is larger than {limit_bytes} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unusable(f"is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe would else be waited for


# ---- versions ----


def _version_folders(path: Path, names: list[str]) -> tuple[frozenset[int], dict[int, str]]:
    """The versions that have a folder, and which of those are out of reach, and why."""
    versions: set[int] = set()
    broken: dict[int, str] = {}
    for name in filter(_VERSION.fullmatch, names):
        try:
            if stat.S_ISDIR((path / name).stat().st_mode):
                versions.add(int(name))
        except OSError as error:
            versions.add(int(name))
            broken[int(name)] = _reason(error)
    return frozenset(versions), broken


def _read_version(folder: Path, version: int, config: ModelConfig) -> VersionFiles:
    """One version's files.

    Raises:
        _Unusable: it has no model file, or more than one.
        OSError: the folder is out of reach.
    """
    stamps = list(_stamps(folder))
    backend, model_path = _find_model(folder, config)
    return VersionFiles(version, backend, model_path, _digest(stamps), sum(stamp.size_bytes for stamp in stamps))


def _find_model(folder: Path, config: ModelConfig) -> tuple[str, Path]:
    """The backend and the model file of a version.

    Raises:
        _Unusable: there is none, or more than one.
        OSError: the folder or the file is out of reach.
    """
    backend = canonical(config.backend) if config.backend else None
    if config.model_file is not None:
        return backend or _backend_of(config.model_file), _existing(folder / config.model_file)
    if backend is not None and backend not in ENDINGS.values():
        return backend, folder  # a plugin, or the fake: it knows what it looks for
    candidates = [
        name
        for name in _names(folder)
        if not _is_passed_over(name) and _ending_backend(name) in ({backend} if backend else ENDINGS.values())
    ]
    name = _preferred(candidates, backend)
    return backend or _backend_of(name), _existing(folder / name)


def _preferred(candidates: list[str], backend: str | None) -> str:
    """The model file among those of known endings: one named model.*, else the only one.

    Raises:
        _Unusable: there is none, or more than one.
    """
    named = [name for name in candidates if name.startswith("model.")]
    backends = {_ending_backend(name) for name in named}
    if len(backends) == 1:
        ranked = [name for name in model_files(backends.pop() or "") if name in named]
        if ranked:
            return ranked[0]
    remaining = named or candidates
    if len(remaining) == 1:
        return remaining[0]
    if remaining:
        raise _Unusable(f"has several model files ({', '.join(remaining)}); set backend or model_file to choose")
    if backend is not None:
        expected = model_files(backend)
        raise _Unusable(f"has no model file for backend '{backend}', expected {' or '.join(expected)}")
    raise _Unusable(f"has no model file, expected model.* with an ending of {', '.join(ENDINGS)}")


def _ending_backend(name: str) -> str | None:
    return ENDINGS.get(Path(name).suffix.lower())


def _backend_of(name: str) -> str:
    backend = _ending_backend(name)
    if backend is None:
        raise _Unusable(f"has the model file '{name}', whose ending tells no backend; set backend")
    return backend


def _existing(path: Path) -> Path:
    try:
        path.stat()
    except OSError as error:
        raise _Unusable(f"its model file '{path.name}' {_reason(error)}") from error
    return path


def _reason(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


# ---- prints ----


class _Stamp(NamedTuple):
    place: str
    size_bytes: int
    changed: str


def _print_files(folder: Path, names: Iterable[str]) -> str:
    return _digest(_stamp(folder / name, name) for name in names)


def _digest(stamps: Iterable[_Stamp]) -> str:
    digest = blake2b(digest_size=16)
    for stamp in stamps:
        digest.update(os.fsencode(f"{stamp.place}\0{stamp.size_bytes}\0{stamp.changed}\0"))
    return digest.hexdigest()


def _stamps(root: Path) -> Iterator[_Stamp]:
    """A stamp for each file below ``root``. A folder is walked once, so links may lead in circles."""
    walked: set[tuple[int, int]] = set()
    waiting = [(root, "")]
    while waiting:
        path, place = waiting.pop()
        try:
            status = path.stat()
            if not stat.S_ISDIR(status.st_mode):
                yield _file_stamp(place, status)
                continue
            if (status.st_dev, status.st_ino) in walked:
                yield _Stamp(place, 0, f"folder {status.st_ino}")
                continue
            walked.add((status.st_dev, status.st_ino))
            names = _names(path)
        except OSError as error:
            yield _Stamp(place, 0, f"error {error.errno}")
            continue
        waiting += [(path / name, f"{place}/{name}") for name in reversed(names) if not _is_passed_over(name)]


def _stamp(path: Path, place: str) -> _Stamp:
    try:
        status = path.stat()
    except OSError as error:
        return _Stamp(place, 0, f"error {error.errno}")
    return _file_stamp(place, status)


def _file_stamp(place: str, status: os.stat_result) -> _Stamp:
    return _Stamp(place, status.st_size, f"{status.st_mtime_ns} {status.st_ino}")
