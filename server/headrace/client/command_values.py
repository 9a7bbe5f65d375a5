"""Values given on a command line, as the tensors that a model takes."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from headrace.client.answers import ModelMetadata, TensorMetadata
from headrace.core.request import Parameter
from headrace.core.tensor import Array, DataType


class BadArgument(Exception):
    """The command line asks for something that cannot be; the message says what."""


def parse_pairs(given: Iterable[str], what: str) -> dict[str, str]:
    """The texts of NAME=VALUE, by name.

    Raises:
        BadArgument: one is not of that form, or a name is given twice.
    """
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise BadArgument(f"--{what} {text} is not of the form NAME=VALUE")
        if name in pairs:
            raise BadArgument(f"--{what} {name} is given twice")
        pairs[name] = value
    return pairs


def parse_parameter(text: str) -> Parameter:
    """A parameter's value: JSON's true, false or number, else the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float | str) else text


def read_input(name: str, text: str, metadata: ModelMetadata) -> Any:
    """The value of one ``--input``: an array, or what JSON makes of it; BYTES are an array always.

    ``@FILE`` is read as its ending says; for BYTES any other file is one element, and so is plain text, in which
    ``@@`` at the start stands for ``@``.

    Raises:
        BadArgument: the model has no such input, or the value cannot be read.
    """
    spec = _declared(name, metadata)
    is_text = spec.datatype == DataType.BYTES
    try:
        if text.startswith("@") and not text.startswith("@@"):
            value = _read_file(text[1:], is_text)
        elif is_text:
            value = text.removeprefix("@") if text.startswith("@@") else text
        else:
            value = json.loads(text)
    except OSError as error:
        raise BadArgument(f"--input {name}: cannot read {text[1:]}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise BadArgument(
            f"--input {name}: {text[:60]!r} is not JSON ({error}); the model takes {_shown(spec)} here"
        ) from error
    except ValueError as error:
        raise BadArgument(f"--input {name}: {text}: {error}; the model takes {_shown(spec)} here") from error
    return np.array(value, np.object_) if is_text and not isinstance(value, np.ndarray) else value


def fit_batch(name: str, value: Any, metadata: ModelMetadata, *, batches: bool) -> tuple[Any, str | None]:
    """``value`` with the dimensions that it lacks, and what to tell the user of it, or None.

    Those are the batch dimension where just this one is missing and the model ``batches``; and, for a single number
    or text, all those of an input that may have one element.
    """
    shape = _declared(name, metadata).shape
    rank = _rank(value)
    one_element = rank == 0 and shape and all(size in (-1, 1) for size in shape)
    if not one_element and not (batches and rank == len(shape) - 1 and shape[:1] == (-1,)):
        return value, None
    added = len(shape) - rank
    if isinstance(value, np.ndarray):
        value = value.reshape((1,) * added + value.shape)
    else:
        for _ in range(added):
            value = [value]
    what = "the batch dimension" if added == 1 and not one_element else f"shape {[1] * added}"
    return value, f"input '{name}' is given {what}, as the model takes {_shown(_declared(name, metadata))}"


def check_complete(given: Mapping[str, str], metadata: ModelMetadata) -> None:
    """Refuse a command line without any input of a model that has some; whether others are optional is not told."""
    if not given and metadata.inputs:
        wanted = "; ".join(f"--input {spec.name}=... for {_shown(spec)}" for spec in metadata.inputs)
        raise BadArgument(f"no input is given, expected {wanted}")


def _declared(name: str, metadata: ModelMetadata) -> TensorMetadata:
    for spec in metadata.inputs:
        if spec.name == name:
            return spec
    known = ", ".join(map(_shown, metadata.inputs)) or "none"
    raise BadArgument(f"model '{metadata.name}' has no input '{name}'; its inputs are: {known}")


def _read_file(text: str, is_text: bool) -> Any:
    path, _, key = text.rpartition(":") if ".npz:" in text else (text, "", "")
    suffix = Path(path).suffix.lower()
    if suffix in (".npy", ".npz"):
        return _read_numpy(path, key)
    raw = Path(path).read_bytes()
    if suffix == ".json":
        return json.loads(raw)
    if is_text:
        return raw
    raise ValueError("only .npy, .npz and .json files hold numbers")


def _read_numpy(path: str, key: str) -> Array:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        names = loaded.files
        if not key and len(names) == 1:
            key = names[0]
        if key not in names:
            raise ValueError(f"it holds the arrays {', '.join(names)}; name one as @{path}:NAME")
        array: Array = loaded[key]
        return array


def _rank(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.ndim
    rank = 0
    while isinstance(value, list):
        rank += 1
        value = value[0] if value else None
    return rank


def _shown(spec: TensorMetadata) -> str:
    return f"{spec.name} {spec.datatype}{list(spec.shape)}"
