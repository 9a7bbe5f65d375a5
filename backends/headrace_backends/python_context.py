"""What a Python model is told when it loads, and how it uses other models."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headrace.core.request import Parameter
from headrace.core.tensor import datatype_of
from headrace_backends.base import Answer, Array, ModelCall, ModelCalls


@dataclass(frozen=True, slots=True)
class ModelContext:
    """What ``Model.load`` is told: ``path`` is the version's folder, for the files that lie beside model.py.

    Its methods may be used from ``load`` on, by any thread of the model.
    """

    name: str
    version: str
    path: Path
    parameters: Mapping[str, Any]
    device: str
    threads: int
    calls: ModelCalls | None = field(default=None, repr=False)

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        parameters: Mapping[str, Parameter] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, Array]:
        """Run another model of the same server and wait for its outputs.

        Raises:
            HeadraceError: what a client would be told; let through, it is what this model's client is told.
        """
        call = _call(model, inputs, version, outputs, parameters, timeout_s)
        return _outputs(self._server(model).infer(call))

    def stream(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        parameters: Mapping[str, Parameter] | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[dict[str, Array]]:
        """Run another model and yield the outputs of its responses as they come; raises as ``infer`` does."""
        call = _call(model, inputs, version, outputs, parameters, timeout_s)
        return _streamed(self._server(model).stream(call))

    def _server(self, model: str) -> ModelCalls:
        if self.calls is None:
            raise RuntimeError(f"the model '{model}' cannot be called: this one was loaded without a server")
        return self.calls


def _call(
    model: str,
    inputs: Mapping[str, Array],
    version: str,
    outputs: Sequence[str],
    parameters: Mapping[str, Parameter] | None,
    timeout_s: float | None,
) -> ModelCall:
    for name, array in inputs.items():
        if not isinstance(array, np.ndarray) or datatype_of(array) is None:
            got = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
            raise TypeError(f"input '{name}' for the model '{model}' is {got}, expected an array the protocol has")
    if timeout_s is not None and not timeout_s > 0:
        raise ValueError(f"timeout_s for the model '{model}' is {timeout_s}, expected more than 0")
    timeout_us = 0 if timeout_s is None else max(1, round(timeout_s * 1e6))
    return ModelCall(
        model, dict(inputs), str(version), tuple(outputs), parameters=dict(parameters or {}), timeout_us=timeout_us
    )


def _outputs(answer: Answer) -> dict[str, Array]:
    if answer.error is not None:
        raise answer.error
    return dict(answer.outputs)


def _streamed(answers: Iterator[Answer]) -> Iterator[dict[str, Array]]:
    try:
        for answer in answers:
            yield _outputs(answer)
    finally:
        # A generator that is closed takes the call back; what is no generator has nothing to take back.
        close = getattr(answers, "close", None)
        if close is not None:
            close()
