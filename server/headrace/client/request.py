"""One inference request as the caller means it, checked before either protocol sees it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.client.answers import ModelMetadata
from headrace.client.errors import InvalidRequestError
from headrace.client.tensors import to_tensors
from headrace.core.request import InferRequest, Parameter, Parameters, RequestedOutput

Inputs = Mapping[str, Any]  # arrays, or numbers, strings and lists of them
Outputs = Iterable[str] | Mapping[str, Mapping[str, Parameter]]  # names, or the parameters of each by its name

_MAX_ID = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Sequence:
    """Which sequence of a stateful model a request belongs to, and whether it is its first or its last."""

    id: int | str
    start: bool = False
    end: bool = False

    def __post_init__(self) -> None:
        fits = 0 < self.id <= _MAX_ID if type(self.id) is int else isinstance(self.id, str) and self.id
        if not fits:
            raise InvalidRequestError(
                None, f"the sequence's id is {self.id!r}, expected a number from 1 to 2**64 - 1 or a text"
            )

    @property
    def parameters(self) -> Parameters:
        """The same as the protocol's parameters."""
        return {"sequence_id": self.id, "sequence_start": self.start, "sequence_end": self.end}


def build_request(
    model: str,
    inputs: Inputs,
    metadata: ModelMetadata | None,
    *,
    outputs: Outputs = (),
    version: str = "",
    id: str = "",  # noqa: A002 - the protocol's name
    parameters: Mapping[str, Parameter] | None = None,
    sequence: Sequence | None = None,
) -> InferRequest:
    """The request; ``metadata`` is needed where ``tensors.needs_metadata`` says so.

    Raises:
        InvalidRequestError: it cannot be said in the protocol.
    """
    own = {**(parameters or {}), **(sequence.parameters if sequence else {})}
    return InferRequest(
        _name(model, "model"),
        _text(version, f"model '{model}': version"),
        _text(id, f"model '{model}': id"),
        to_tensors(model, inputs, metadata),
        _requested(model, outputs),
        _checked(f"model '{model}'", own),
    )


def _name(text: str, what: str) -> str:
    if not isinstance(text, str) or not text:
        raise InvalidRequestError(None, f"the {what}'s name is {text!r}, expected a text")
    return text


def _text(value: str, what: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(None, f"{what} is {value!r}, expected a text")
    return value


def _requested(model: str, outputs: Outputs) -> tuple[RequestedOutput, ...]:
    if isinstance(outputs, str):
        raise InvalidRequestError(None, f"model '{model}': outputs is the text '{outputs}', expected a list of names")
    named: Mapping[str, Mapping[str, Parameter]] = (
        outputs if isinstance(outputs, Mapping) else {name: {} for name in outputs}
    )
    return tuple(
        RequestedOutput(_name(name, "output"), _checked(f"model '{model}': output '{name}'", parameters))
        for name, parameters in named.items()
    )


def _checked(where: str, parameters: Mapping[str, Parameter]) -> Parameters:
    for name, value in parameters.items():
        fits = isinstance(value, bool | str) or (
            -(1 << 63) <= value <= _MAX_ID
            if isinstance(value, int)
            else isinstance(value, float) and math.isfinite(value)
        )
        if not fits:
            raise InvalidRequestError(
                None, f"{where}: parameter '{name}' is {value!r}, expected a text, a bool or a number of 64 bits"
            )
    return dict(parameters)
