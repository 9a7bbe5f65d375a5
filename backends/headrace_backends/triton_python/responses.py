"""One response to a request, and how it is held against what the model's configuration promises."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headrace.core.errors import InternalError
from headrace.core.model import TensorSpec
from headrace.core.request import Parameter, Parameters
from headrace.core.tensor import NUMPY_DTYPES, Array, DataType, datatype_of
from headrace_backends.base import Answer
from headrace_backends.triton_python.datatypes import as_bytes
from headrace_backends.triton_python.errors import TritonError, ours, theirs
from headrace_backends.triton_python.tensor import Tensor, tensor_named


class InferenceResponse:
    """Output tensors or an error, and parameters for the client."""

    __slots__ = ("_error", "_parameters", "_tensors")

    def __init__(
        self,
        output_tensors: Sequence[Tensor] = (),
        error: TritonError | None = None,
        parameters: Mapping[str, Parameter] | None = None,
    ) -> None:
        self._tensors = list(output_tensors or ())
        for tensor in self._tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"output_tensors has a {type(tensor).__name__}, expected pb_utils.Tensor only")
        if error is not None and not isinstance(error, TritonError):
            raise TypeError(f"error is {type(error).__name__}, expected pb_utils.TritonError")
        self._error = error
        self._parameters = checked_parameters(parameters)

    def output_tensors(self) -> list[Tensor]:
        """The outputs, in the order given."""
        return self._tensors

    def has_error(self) -> bool:
        """Whether there is an error; then outputs do not count."""
        return self._error is not None

    def error(self) -> TritonError | None:
        """The error, if there is one."""
        return self._error

    def parameters(self) -> str:
        """The parameters as JSON text."""
        return json.dumps(self._parameters)

    def parameter_values(self) -> Parameters:
        """The parameters themselves."""
        return self._parameters


def checked_parameters(parameters: Mapping[str, Any] | None) -> Parameters:
    """A copy of the parameters.

    Raises:
        TypeError: one is not of those kinds that the protocol has.
    """
    checked: Parameters = {}
    for name, given in (parameters or {}).items():
        value = given.item() if isinstance(given, np.generic) else given
        if not isinstance(name, str) or not isinstance(value, bool | int | float | str):
            raise TypeError(f"parameter {name!r} is {given!r}, expected a name and a bool, number or str")
        checked[name] = value
    return checked


def response_of(answer: Answer) -> InferenceResponse:
    """What another model answered, as the model that called it sees it."""
    if answer.error is not None:
        return InferenceResponse(error=theirs(answer.error), parameters=answer.parameters)
    return InferenceResponse([Tensor(name, array) for name, array in answer.outputs.items()], None, answer.parameters)


def answer_of(
    response: InferenceResponse, outputs: Mapping[str, TensorSpec], requested: Sequence[str], rows: int | None
) -> Answer:
    """The answer that a response stands for; where it breaks the configuration's promise, that is its error.

    ``requested`` are the outputs that the client named, empty for all; ``rows`` is how many it must have, None where
    that is free. Tensors that are not wanted are left out, and dimensions past the first are the model's affair,
    both as Triton does.
    """
    error = response.error()
    if error is not None:
        return Answer(parameters=response.parameter_values(), error=ours(error))
    wanted = requested or tuple(outputs)
    given = [tensor.name() for tensor in response.output_tensors()]
    missing = [name for name in wanted if name not in given]
    if missing and (requested or not set(given) <= set(outputs)):
        return Answer(error=InternalError(f"the response has the outputs {given}, expected {list(wanted)}"))
    arrays: dict[str, Array] = {}
    for name in wanted:
        tensor = tensor_named(response.output_tensors(), name)
        if tensor is None:
            continue
        array = _fitted(tensor.as_numpy(), outputs[name].datatype)
        if array is None:
            problem = f"is an array of {tensor.as_numpy().dtype}, expected {outputs[name].datatype}"
        elif rows is not None and array.shape[:1] != (rows,):
            problem = f"has shape {list(array.shape)}, expected {rows} rows, as many as the request has"
        else:
            arrays[name] = array
            continue
        return Answer(error=InternalError(f"output '{name}' {problem}"))
    return Answer(arrays, response.parameter_values())


def _fitted(array: Array, datatype: DataType) -> Array | None:
    """The array as the datatype that it must have, None where it is another.

    Whole numbers that fit are converted: models make int64 of sums without meaning it, and Triton lets that pass.
    """
    if datatype is DataType.BYTES:
        return as_bytes(array) if array.dtype.kind in "OSU" else None
    dtype = NUMPY_DTYPES[datatype]
    if datatype_of(array) is datatype:
        return array
    if array.dtype.kind not in "iu" or dtype.kind not in "iu":
        return None
    bounds = np.iinfo(dtype.name)
    if array.size and (int(array.min()) < bounds.min or int(array.max()) > bounds.max):
        return None
    return array.astype(dtype)
