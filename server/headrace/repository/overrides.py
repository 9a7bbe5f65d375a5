"""What a load request may bring along: a configuration and files, in place of those in the repository."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from headrace.core.errors import InternalError, InvalidRequest
from headrace.repository.config_problems import ConfigError
from headrace.repository.layout import MAX_NAME_BYTES, ModelFolder, is_model_name, read_folder, version_number
from headrace.repository.model_config import ModelConfig
from headrace.repository.pbtxt import parse_json

MAX_PLACE_BYTES = 1024  # of a file's path; with the folder before it well below what the system allows


@dataclass(frozen=True, slots=True)
class Override:
    """A model as a load request has it. ``print`` changes with the configuration.

    ``files`` are by their place below the model's folder. Without any, those in the repository are used.
    """

    config: ModelConfig
    print: str
    files: Mapping[str, bytes]


def read_override(name: str, config: str, files: Mapping[str, bytes]) -> Override:
    """The override that a load request for the model ``name`` has.

    Raises:
        InvalidRequest: with everything that is wrong with it.
    """
    if not config:
        raise InvalidRequest(f"failed to load '{name}': files are given without the parameter config, which they need")
    problems = [] if is_model_name(name) else [f"{name!r} cannot be the name of a model"]
    problems += _place_problems(files)
    parsed = ModelConfig()
    try:
        parsed = parse_json(config, name)
    except ConfigError as error:
        problems += [f"config: {problem}" for problem in error.problems]
    if problems:
        raise InvalidRequest(f"failed to load '{name}': {'; '.join(problems)}")
    return Override(parsed, f"override {blake2b(config.encode(), digest_size=16).hexdigest()}", dict(files))


def write_files(name: str, files: Mapping[str, bytes]) -> Path:
    """The files in a private folder of their own, until ``remove_files``; the model's folder is returned.

    Raises:
        InternalError: they cannot be written.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="headrace-load-")) / name
        try:
            for place, content in files.items():
                file = folder / place
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        except BaseException:
            remove_files(folder)
            raise
    except OSError as error:
        raise InternalError(f"failed to load '{name}': its files cannot be kept: {error.strerror or error}") from error
    return folder


def remove_files(folder: Path) -> None:
    """Remove what ``write_files`` has made."""
    shutil.rmtree(folder.parent, ignore_errors=True)


def overridden_folder(override: Override, path: Path) -> ModelFolder:
    """The model as it is to be served, with its files in ``path``."""
    return read_folder(path, override.config, override.print)


def _place_problems(files: Mapping[str, bytes]) -> Iterator[str]:
    for place in files:
        problem = _place_problem(place)
        if problem:
            yield f"Invalid file path {place[:80]!r}: {problem}, expected a version and a path in it, as 1/model.onnx"
        for above in PurePosixPath(place).parents:
            if str(above) in files:
                yield f"file {place[:80]!r}: {str(above)!r} is a file too, and cannot be its folder"


def _place_problem(place: str) -> str:
    version, slash, rest = place.partition("/")
    if not slash or version_number(version) is None:
        return "has no version in front"
    if "\0" in place or any("\ud800" <= letter <= "\udfff" for letter in place):
        return "is no name of a file"
    parts = rest.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "is not a plain path"
    if len(place.encode()) > MAX_PLACE_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return "is too long"
    return ""
