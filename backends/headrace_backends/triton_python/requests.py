"""A request: one that a model is to answer, or one that it makes to another model."""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from headrace.core.errors import HeadraceError
from headrace.core.request import Parameter, Parameters
from headrace.core.tensor import Array
from headrace_backends.base import Answer, ModelCall, ModelCalls
from headrace_backends.triton_python.chores import Chores
from headrace_backends.triton_python.datatypes import as_bytes
from headrace_backends.triton_python.errors import TritonModelException
from headrace_backends.triton_python.responses import InferenceResponse, checked_parameters, response_of
from headrace_backends.triton_python.senders import InferenceResponseSender, Responder
from headrace_backends.triton_python.tensor import Tensor

SEQUENCE_START = 1  # TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
SEQUENCE_END = 2
RELEASE_ALL = 1  # TRITONSERVER_REQUEST_RELEASE_ALL
RELEASE_RESCHEDULE = 2

# Parameters with a meaning of their own, which a model reads by methods and not as parameters.
_RESERVED = frozenset({"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output"})


class MemoryType(IntEnum):
    """Where a model would like to have the outputs of a call."""

    TRITONSERVER_MEMORY_GPU = 0
    TRITONSERVER_MEMORY_CPU = 1


class PreferredMemory:
    """A wish for the memory of a call's outputs. They come in the CPU's whatever it says."""

    def __init__(self, preferred_memory_type: MemoryType, preferred_device_id: int = 0) -> None:
        self.preferred_memory_type = MemoryType(preferred_memory_type)
        self.preferred_device_id = preferred_device_id


class InferenceTrace:
    """What a model hands on for tracing. This server's traces need no help of a model, so it is empty."""

    def get_context(self) -> str | None:
        """Nothing."""
        return None


@dataclass(frozen=True, slots=True)
class Calls:
    """How one model's code reaches other models: through ``server``, which may be none, on the threads of ``pool``."""

    server: ModelCalls | None
    pool: Executor

    def required(self, what: str) -> ModelCalls:
        """The server.

        Raises:
            TritonModelException: there is none.
        """
        if self.server is None:
            raise TritonModelException(f"{what} needs a running server, and the model was loaded without one")
        return self.server


class InferenceRequest:
    """Inputs for a model, and what is said along with them."""

    _calls: Calls  # of the model whose API this is: see ``request_class``

    def __init__(
        self,
        request_id: str | bytes = "",
        correlation_id: int | str = 0,
        inputs: Sequence[Tensor] = (),
        requested_output_names: Sequence[str | bytes] = (),
        model_name: str | bytes = "",
        model_version: int | str = -1,
        flags: int = 0,
        timeout: int = 0,
        preferred_memory: PreferredMemory | None = None,
        trace: InferenceTrace | None = None,
        parameters: Mapping[str, Parameter] | None = None,
        priority: int = 0,
    ) -> None:
        for tensor in inputs:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"inputs has a {type(tensor).__name__}, expected pb_utils.Tensor only")
        self._id = _text(request_id)
        self._correlation_id = correlation_id if isinstance(correlation_id, str) else int(correlation_id)
        self._inputs = list(inputs)
        self._outputs = [_text(name) for name in requested_output_names]
        self._model = _text(model_name)
        self._version = model_version
        self._flags = int(flags)
        self._timeout_us = int(timeout)
        self._preferred_memory = preferred_memory
        self._trace = trace or InferenceTrace()
        self._parameters = checked_parameters(parameters)
        self._priority = priority
        self._responder: Responder | None = None
        self._sender: InferenceResponseSender | None = None
        self._sender_taken = False

    def inputs(self) -> list[Tensor]:
        """The input tensors that were given."""
        return self._inputs

    def request_id(self) -> str:
        """The client's name for the request, which may be empty."""
        return self._id

    def correlation_id(self) -> int | str:
        """The sequence that it belongs to, 0 for none."""
        return self._correlation_id

    def requested_output_names(self) -> list[str]:
        """The outputs that are wanted."""
        return self._outputs

    def model_name(self) -> str:
        """The model that is asked."""
        return self._model

    def model_version(self) -> int | str:
        """Its version; -1 leaves the choice to the server."""
        return self._version

    def flags(self) -> int:
        """Whether it starts or ends a sequence, as the bits of TRITONSERVER_REQUEST_FLAG_*."""
        return self._flags

    def set_flags(self, flags: int) -> None:
        """Change the flags, of a request to another model."""
        self._flags = flags

    def timeout(self) -> int:
        """How long it may take, in microseconds; 0 is no bound."""
        return self._timeout_us

    def priority(self) -> int:
        """Its priority, 1 being the highest and 0 the default."""
        return self._priority

    def parameters(self) -> str:
        """The parameters as JSON text."""
        return json.dumps(self._parameters)

    def preferred_memory(self) -> PreferredMemory | None:
        """Where the outputs of a call are wished for."""
        return self._preferred_memory

    def trace(self) -> InferenceTrace:
        """What to hand on with a call."""
        return self._trace

    def is_cancelled(self) -> bool:
        """Whether the client has left."""
        return self._responder is not None and self._responder.cancelled

    def get_response_sender(self) -> InferenceResponseSender:
        """Where the responses go.

        Raises:
            TritonModelException: the model made this request itself.
        """
        if self._sender is None:
            raise TritonModelException("only a request that execute was given has a response sender")
        self._sender_taken = True
        return self._sender

    def set_release_flags(self, flags: int) -> None:
        """Say what is to become of the request after ``execute``: it is done with, nothing else is offered."""
        if flags != RELEASE_ALL:
            raise TritonModelException(
                f"release flags are {flags!r}, expected {RELEASE_ALL} (TRITONSERVER_REQUEST_RELEASE_ALL): "
                "rescheduling a request is not offered"
            )

    def exec(self, decoupled: bool = False) -> "InferenceResponse | ResponseIterator":
        """Have the other model run and wait for its response, or for the first of a decoupled one.

        What goes wrong over there is a response with an error, not an exception.
        """
        server = self._calls.required(f"a request to the model '{self._model}'")
        call = self._call()
        if decoupled:
            return ResponseIterator(_responses(server.stream, call), self._calls.pool)
        try:
            return response_of(server.infer(call))
        except HeadraceError as error:
            return response_of(Answer(error=error))

    def async_exec(self, decoupled: bool = False) -> "asyncio.Future[InferenceResponse | ResponseIterator]":
        """``exec`` as something to await; the call begins at once, and several run at the same time."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._calls.pool, self.exec, decoupled)

    def answered_by(self, responder: Responder, chores: Chores) -> None:
        """Make it a request that ``execute`` is given."""
        self._responder = responder
        self._sender = InferenceResponseSender(responder, chores)

    @property
    def sender_taken(self) -> bool:
        """Whether the model has asked for the response sender."""
        return self._sender_taken

    def _call(self) -> ModelCall:
        if not self._model:
            raise TritonModelException("a request to another model needs its model_name")
        version = str(self._version)
        parameters = dict(self._parameters)
        if self._correlation_id not in {0, ""}:
            parameters["sequence_id"] = self._correlation_id
            parameters["sequence_start"] = bool(self._flags & SEQUENCE_START)
            parameters["sequence_end"] = bool(self._flags & SEQUENCE_END)
        if self._priority:
            parameters["priority"] = self._priority
        return ModelCall(
            model=self._model,
            inputs={tensor.name(): _sent(tensor.as_numpy()) for tensor in self._inputs},
            version="" if version == "-1" else version,
            outputs=tuple(self._outputs),
            id=self._id,
            parameters=parameters,
            timeout_us=self._timeout_us,
        )


class ResponseIterator:
    """The responses of a decoupled model, as they come; for ``for`` and for ``async for``, once.

    The first has come when this is made, so that calls made one after the other run at the same time.
    """

    def __init__(self, responses: Iterator[InferenceResponse], pool: Executor) -> None:
        self._responses = responses
        self._pool = pool
        self._first = next(responses, None)

    def __iter__(self) -> "ResponseIterator":
        return self

    def __next__(self) -> InferenceResponse:
        first, self._first = self._first, None
        return next(self._responses) if first is None else first

    def __aiter__(self) -> "ResponseIterator":
        return self

    async def __anext__(self) -> InferenceResponse:
        response = await asyncio.get_running_loop().run_in_executor(self._pool, next, self, None)
        if response is None:
            raise StopAsyncIteration
        return response

    def cancel(self) -> None:
        """Want no more."""
        self._first = None
        close(self._responses)


def _responses(stream: Callable[[ModelCall], Iterator[Answer]], call: ModelCall) -> Iterator[InferenceResponse]:
    try:
        answers = stream(call)
        try:
            for answer in answers:
                yield response_of(answer)
        finally:
            close(answers)
    except HeadraceError as error:
        yield response_of(Answer(error=error))


def _sent(array: Array) -> Array:
    """An input as the other model is given it: text is what Triton makes of it, also of numbers that are objects."""
    return as_bytes(array) if array.dtype.kind in "OSU" else array


def _text(value: str | bytes) -> str:
    """Text of either kind: what a model has out of a BYTES tensor is bytes."""
    return value.decode() if isinstance(value, bytes) else value


def close(iterator: Iterator[Any]) -> None:
    """End an iterator before it is at its end, where it is of the kind that can be."""
    end = getattr(iterator, "close", None)
    if end is not None:
        end()


def request_class(calls: Calls) -> type[InferenceRequest]:
    """The class by which one model's code makes requests."""
    return type("InferenceRequest", (InferenceRequest,), {"_calls": calls})


def sequence_flags(parameters: Parameters) -> int:
    """The flags of a request with these parameters."""
    start, end = parameters.get("sequence_start"), parameters.get("sequence_end")
    return (SEQUENCE_START if start else 0) | (SEQUENCE_END if end else 0)


def own_parameters(parameters: Parameters) -> Parameters:
    """Those parameters that mean nothing to the server."""
    return {
        name: value for name, value in parameters.items() if name not in _RESERVED and not name.startswith("triton_")
    }
