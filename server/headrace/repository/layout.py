"""What lies in a model repository: its models, their configuration, labels and version folders, as found on disk."""

import contextlib
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from headrace.core.errors import InvalidRequest
from headrace.core.fingerprint import print_files
from headrace.core.passed_over import is_passed_over
from headrace.core.plain_text import plain
from headrace.core.sequence import SequenceSpec
from headrace.repository.config_problems import ConfigError
from headrace.repository.model_config import ModelConfig, parse_config
from headrace.repository.pbtxt import parse_pbtxt
from headrace.repository.sequence_config import MAX_STATE_BYTES, StateConfig
from headrace.repository.small_files import Unusable, list_names, may_come_back, read_bytes, read_text, why_unread
from headrace.repository.version_files import NoModelFile, VersionFiles, read_version
from headrace_backends.registry import backend_by_name

__all__ = [
    "ModelFolder",
    "VersionFiles",
    "has_model",
    "is_model_name",
    "list_models",
    "located",
    "passed_over",
    "read_folder",
    "selected_versions",
    "version_number",
]

CONFIG_FILES = ("config.yaml", "config.pbtxt")
MAX_NAME_BYTES = 255  # of a folder
MAX_CONFIG_BYTES = 1 << 20
MAX_LABEL_BYTES = 64 << 20
INITIAL_STATES = "initial_state"  # the folder where Triton looks for the files that states begin with

_VERSION = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)  # an int64 on the wire
# .xml, .json, .h5 and .pkl are not only models, unless they are called model.*; .py never.
_LOOSE_ENDINGS = (".onnx", ".pt2", ".pt", ".plan", ".engine", ".savedmodel", ".keras", ".tflite", ".skops", ".joblib")
_MISSPELLED_CONFIGS = ("config.yml", "config.json", "config.pbtxt.txt", "config.yaml.txt")


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
    sequence: SequenceSpec | None = None  # as configured, with the states that sequences begin with
    on_disk: frozenset[int] = frozenset()  # every version that has a folder, whatever state that is in
    out_of_reach: frozenset[int] = frozenset()  # the broken ones that are there and could not be read just now
    incomplete: bool = False  # a version, or the model file of one, is not there: it may be on its way
    model_problems: tuple[str, ...] = ()
    config_print: str = ""  # changes when the configuration or a file that it names does

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
        return sorted(entry.name for entry in entries if is_model_name(entry.name) and _is_model(Path(entry.path)))


def passed_over(repository: Path) -> list[str]:
    """The folders that are none of the repository's models though their names are no reason for that, sorted."""
    models = set(list_models(repository))
    return [
        name
        for name in list_names(repository)
        if name not in models and is_model_name(name) and (repository / name).is_dir()
    ]


def located(model: str, repository: Path) -> tuple[Path, str]:
    """The repository and the name of a model that is given by its name, or by the path of its folder."""
    path = Path(model)
    return (path.parent, path.name) if "/" in model and path.is_dir() else (repository, model)


def has_model(repository: Path, name: str) -> bool:
    """Whether ``list_models`` would name this one, without looking at all the others."""
    return is_model_name(name) and _is_model(repository / name)


def is_model_name(name: str) -> bool:
    """Whether a model may have this name: that of a plain folder."""
    plain = "/" not in name and "\0" not in name and name not in ("", ".", "..")
    return plain and _is_utf8(name) and len(name.encode()) <= MAX_NAME_BYTES and not is_passed_over(name)


def version_number(name: str) -> int | None:
    """The version that a folder of this name holds, or None where it holds none."""
    return int(name) if _VERSION.fullmatch(name) else None


def read_folder(path: Path, config: ModelConfig | None = None, config_print: str = "") -> ModelFolder:
    """The model in the folder ``path``. Whatever is wrong with it is in the result, never raised.

    A ``config`` stands in for the folder's own, and ``config_print`` for the print of its file.
    """
    try:
        names = list_names(path)
    except OSError as error:
        return ModelFolder(path.name, path, model_problems=(why_unread(error),))
    on_disk, unread = _version_folders(path, names)
    broken = {version: why_unread(error) for version, error in unread.items()}
    # Prints are taken before the files are read: what changes in between is noticed the next time.
    own_print = config_print or print_files(path, CONFIG_FILES)
    problems: list[str] = []
    if config is None:
        config, problems = _read_config(path, names)
    if config is None:  # how its versions are to be read is unknown
        return ModelFolder(path.name, path, on_disk=on_disk, model_problems=tuple(problems), config_print=own_print)
    named = _named_files(config)
    if named:
        own_print += print_files(path, named)
    labels, label_problems = _read_labels(path, config)
    sequence, state_problems = _read_sequence(path, config)
    problems += [*label_problems, *state_problems]
    if config.ensemble and not on_disk:  # there is nothing that a version's folder could hold
        on_disk = frozenset({1})
    if not on_disk:
        problems.append(
            f"has no version: expected a folder named 1, 2, ... with a model file in it{_where_it_belongs(path, names)}"
        )
    versions: dict[int, VersionFiles] = {}
    incomplete = not on_disk
    for version in sorted(on_disk - broken.keys()):
        try:
            versions[version] = read_version(path / str(version), version, config)
        except OSError as error:
            unread[version], broken[version] = error, why_unread(error)
        except Unusable as error:
            broken[version] = str(error)
            incomplete |= isinstance(error, NoModelFile)
    out_of_reach = frozenset(version for version, error in unread.items() if may_come_back(error))
    return ModelFolder(
        path.name,
        path,
        config,
        labels,
        versions,
        broken,
        sequence,
        on_disk,
        out_of_reach,
        incomplete,
        tuple(problems),
        own_print,
    )


def selected_versions(folder: ModelFolder) -> list[int]:
    """The versions to serve, by the folder's version policy, among those that can be; oldest first."""
    if folder.model_problems:
        return []
    usable = sorted(folder.versions)
    policy = folder.config.versions
    if policy.only is not None:
        return [version for version in usable if version in policy.only]
    return usable[-policy.latest :] if policy.latest is not None else usable


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)  # how Python spells other bytes


def _is_model(path: Path) -> bool:
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return False
        names = list_names(path)
        return any(
            name in CONFIG_FILES or (_VERSION.fullmatch(name) and (path / name).is_dir()) for name in names
        ) or bool(_loose_files(path, names))
    except FileNotFoundError:
        return path.is_symlink()  # one that leads nowhere; its reader will say so
    except OSError:  # whoever reads it will say why it cannot be
        return True


def _where_it_belongs(path: Path, names: list[str]) -> str:
    """What to do about model files outside a version folder."""
    loose = _loose_files(path, names)
    if not loose:
        return ""
    if version_number(path.name) is not None:
        model = path.absolute().parent
        return f"; if {model.name} is the model, the repository is {model.parent}"
    return f"; move {plain(loose[0])} to {path.name}/1/"


def _loose_files(path: Path, names: list[str]) -> list[str]:
    """Model files that somebody has put beside the version folders, or into one whose name is no version."""
    found = [name for name in names if _is_loose(name)]
    for name in names:
        if not is_passed_over(name) and not _VERSION.fullmatch(name) and (path / name).is_dir():
            with contextlib.suppress(OSError):  # one that may not be read: what is in it is no hint then
                inner = list_names(path / name)
                found += [f"{name}/{one}" for one in inner if _is_loose(one)]
    return found


def _is_loose(name: str) -> bool:
    called_model = name.startswith("model.") and backend_by_name(name) not in (None, "python")
    return called_model or PurePath(name).suffix in _LOOSE_ENDINGS


# ---- the configuration and the files that it names ----


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
        text = read_text(path / name, MAX_CONFIG_BYTES)
        return parse_config(text) if name == "config.yaml" else parse_pbtxt(text, path.name), []
    except ConfigError as error:
        return None, [f"{name}: {problem}" for problem in error.problems]
    except Unusable as error:
        return None, [f"{name}: {error}"]


def _read_labels(path: Path, config: ModelConfig) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    labels: dict[str, tuple[str, ...]] = {}
    problems: list[str] = []
    for output in config.outputs:
        if output.labels is None:
            continue
        try:
            labels[output.name] = _lines(read_text(path / output.labels, MAX_LABEL_BYTES))
        except Unusable as error:
            problems.append(f"{output.labels}: {error}; it is to have the labels of output '{output.name}'")
    return labels, problems


def _lines(text: str) -> tuple[str, ...]:
    """Lines as every editor counts them; ``str.splitlines`` breaks at characters that a label may have."""
    return tuple(line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")) if text else ()


def _named_files(config: ModelConfig) -> list[str]:
    """Where the files that the configuration names are, or may be."""
    places = {output.labels for output in config.outputs if output.labels}
    for state in _states(config):
        if state.initial is not None:
            places |= {state.initial, f"{INITIAL_STATES}/{state.initial}"}
    return sorted(places)


def _states(config: ModelConfig) -> tuple[StateConfig, ...]:
    return config.sequence.states if config.sequence is not None else ()


def _read_sequence(path: Path, config: ModelConfig) -> tuple[SequenceSpec | None, list[str]]:
    if config.sequence is None:
        return None, []
    initials: dict[str, bytes] = {}
    problems: list[str] = []
    for state in _states(config):
        if state.initial is None:
            continue
        preferred = path / INITIAL_STATES / state.initial
        file = preferred if preferred.exists() else path / state.initial
        try:
            initials[state.initial] = read_bytes(file, MAX_STATE_BYTES)
            state.check_initial(initials[state.initial])
        except (Unusable, InvalidRequest) as error:
            problems.append(f"{state.initial}: {error}; sequences are to begin with it as state '{state.input}'")
    return config.sequence.spec(initials), problems


# ---- versions ----


def _version_folders(path: Path, names: list[str]) -> tuple[frozenset[int], dict[int, OSError]]:
    """The versions that have a folder, and which of those are out of reach, and why."""
    versions: set[int] = set()
    unread: dict[int, OSError] = {}
    for name in filter(_VERSION.fullmatch, names):
        try:
            if stat.S_ISDIR((path / name).stat().st_mode):
                versions.add(int(name))
        except OSError as error:
            versions.add(int(name))
            unread[int(name)] = error
    return frozenset(versions), unread
