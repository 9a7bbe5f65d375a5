"""What the configuration's ``parameters`` ask of a backend, checked."""

import re
from collections.abc import Collection, Mapping
from typing import Any, overload

from headrace_backends.base import LoadError, ModelSource

MAX_GRAPHS = 64  # that one instance captures where cuda_graphs asks for them; each holds a little memory of the GPU


def refuse_unknown(backend: str, parameters: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise LoadError where a parameter has a name that the backend does not know."""
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise LoadError(
            f"the backend {backend} has no parameter {', '.join(map(repr, unknown))}; it has {', '.join(known)}"
        )


def refuse_gpu(backend: str, source: ModelSource) -> None:
    """Raise LoadError where the model is to be on a GPU and the backend runs on CPUs alone."""
    if source.gpu is not None:
        raise LoadError(f"device '{source.device}' is not one for the backend {backend}, expected cpu")


def one_of(parameters: Mapping[str, Any], name: str, choices: Collection[str], default: str) -> str:
    """A parameter that is one of a few words; ``default`` where nothing is said."""
    asked = parameters.get(name, default)
    if asked not in tuple(choices):  # which also takes what cannot be hashed
        raise LoadError(f"parameters.{name} is {asked!r}, expected one of {', '.join(choices)}")
    return str(asked)


def intra_op_threads(parameters: Mapping[str, Any]) -> int | None:
    """How many threads one run may use, None where nothing is said. Triton's files have numbers as text."""
    asked = parameters.get("intra_op_threads")
    if asked is None:
        return None
    if isinstance(asked, bool) or not re.fullmatch(r"[1-9]\d{0,3}", str(asked)):
        raise LoadError(f"parameters.intra_op_threads is {asked!r}, expected a whole number from 1")
    return int(asked)


@overload
def flag(parameters: Mapping[str, Any], name: str) -> bool: ...


@overload
def flag(parameters: Mapping[str, Any], name: str, default: None) -> bool | None: ...


def flag(parameters: Mapping[str, Any], name: str, default: bool | None = False) -> bool | None:
    """A parameter that is true or false; ``default`` where nothing is said."""
    if name not in parameters:
        return default
    text = str(parameters[name]).lower()
    if text not in {"true", "false"}:
        raise LoadError(f"parameters.{name} is {parameters[name]!r}, expected true or false")
    return text == "true"
