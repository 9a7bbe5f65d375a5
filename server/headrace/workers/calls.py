"""A model's calls of other models, from the worker's side: asked over the conversation, answered in shared memory."""

import contextlib
import itertools
import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from headrace.core.errors import InternalError, InvalidRequest, Kind, of_kind
from headrace.core.tensor import DATATYPE_BY_NAME, Array, Buffer, datatype_of, from_wire, to_wire
from headrace.workers import frames
from headrace.workers.arena import Segment, aligned
from headrace.workers.channel import close_all
from headrace.workers.conversation import Conversation
from headrace.workers.frames import CALL_WINDOW, CALL_WINDOW_BYTES, TensorFrame
from headrace.workers.slot_memory import lay_out
from headrace_backends.base import Answer, ModelCall


class _Waiting:
    """A call that is not answered to its end."""

    __slots__ = ("answers", "ended")

    def __init__(self) -> None:
        self.answers: deque[tuple[frames.CallAnswer, Segment | None]] = deque()
        self.ended = False


class OpenCalls:
    """Hands each CallAnswer to the call that it belongs to. One for a worker.

    It has no lock: a call may be closed by a destructor, in the middle of anything.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def open(self) -> tuple[int, _Waiting]:
        """A number for a new call, and where its answers will be."""
        number, waiting = next(self._numbers), _Waiting()
        self._waiting[number] = waiting
        return number, waiting

    def close(self, number: int) -> None:
        """Nobody waits for this call any more."""
        self._waiting.pop(number, None)

    def answer(self, frame: frames.CallAnswer, descriptors: Sequence[int]) -> None:
        """An answer has come. Called with the conversation held."""
        waiting = self._waiting.get(frame.call)
        if waiting is not None:
            waiting.answers.append((frame, _memory(frame, descriptors)))


class Calls:
    """What one model is given to call others: ``ModelCalls`` of headrace_backends/base.py."""

    def __init__(self, conversation: Conversation, open_calls: OpenCalls, instance: int) -> None:
        self._conversation = conversation
        self._open_calls = open_calls
        self._instance = instance
        self.on_behalf_of = 0  # the batch or stream that the model is at; 0 between them
        self._main = threading.get_ident()  # the worker's main thread: only there it is certain what is being done

    def infer(self, call: ModelCall) -> Answer:
        """Run another model and return its one response."""
        number, waiting = self._open_calls.open()
        try:
            self._send(number, call, streams=False)
            return self._next(waiting)
        finally:
            self._open_calls.close(number)

    def stream(self, call: ModelCall) -> Iterator[Answer]:
        """Run another model and yield its responses as they come; closing the iterator takes the request back."""
        number, waiting = self._open_calls.open()
        try:
            self._send(number, call, streams=True)
        except BaseException:
            self._open_calls.close(number)
            raise
        return _Responses(self._conversation, self._open_calls, number, waiting)

    def is_ready(self, model: str, version: str) -> bool:
        """Whether a request for it would be run now."""
        answer = self._ask("is_ready", model, version=version)
        return bool(answer.parameters.get("ready"))

    def load(self, model: str, config: str, files: Mapping[str, bytes]) -> None:
        """Have the server load a model."""
        if config:
            try:
                json.loads(config)
            except ValueError as error:
                raise InvalidRequest(f"the configuration given for model '{model}' is no JSON: {error}") from None
        self._ask("load", model, config=config, files=dict(files))

    def unload(self, model: str, *, dependents: bool) -> None:
        """Have the server let go of a model."""
        self._ask("unload", model, dependents=dependents)

    def _ask(
        self,
        verb: Literal["is_ready", "load", "unload"],
        model: str,
        *,
        version: str = "",
        config: str = "",
        files: dict[str, bytes] | None = None,
        dependents: bool = False,
    ) -> Answer:
        number, waiting = self._open_calls.open()
        try:
            ask = frames.Ask(number, verb, model, version, config, files or {}, dependents)
            self._conversation.send_encoded(_readable(ask))
            return self._next(waiting)
        finally:
            self._open_calls.close(number)

    def _next(self, waiting: _Waiting) -> Answer:
        self._conversation.wait_until(lambda: bool(waiting.answers))
        frame, segment = waiting.answers.popleft()
        if frame.kind:
            raise of_kind(Kind(frame.kind), frame.message)
        return _answer(frame, segment)

    def _send(self, number: int, call: ModelCall, *, streams: bool) -> None:
        tensors, buffers = _placed(call)
        needed = sum(aligned(len(buffer)) for buffer in buffers)
        frame = frames.Call(
            number,
            self._instance,
            self.on_behalf_of if threading.get_ident() == self._main else 0,
            call.model,
            call.version,
            tensors,
            call.outputs,
            call.id,
            call.parameters,
            call.timeout_us,
            streams,
            needed,
        )
        data = _readable(frame)
        descriptors: list[int] = []
        try:
            if needed:
                segment, descriptor = Segment.create(needed)
                descriptors.append(descriptor)
                lay_out(segment.view, buffers)
            self._conversation.send_encoded(data, descriptors)
        finally:
            close_all(descriptors)


class _Responses:
    """The responses to a streamed call.

    It is no generator, because one that was never advanced would not notice that it is closed.
    """

    def __init__(self, conversation: Conversation, open_calls: OpenCalls, number: int, waiting: _Waiting) -> None:
        self._conversation = conversation
        self._open_calls = open_calls
        self._number = number
        self._waiting = waiting
        self._taken = 0  # since the front was told last
        self._taken_bytes = 0
        self._closed = False

    def __iter__(self) -> "_Responses":
        return self

    def __next__(self) -> Answer:
        if self._closed:
            raise StopIteration
        try:
            answer = self._next()
        except BaseException:
            self.close()
            raise
        if answer is None:
            self.close()
            raise StopIteration
        return answer

    def close(self) -> None:
        """Take the request back, if there may be more responses."""
        if not self._closed:
            self._closed = True
            self._open_calls.close(self._number)
            if not self._waiting.ended:
                self._conversation.send(frames.CallEnd(self._number))

    def __del__(self) -> None:
        with contextlib.suppress(OSError):  # the front process is gone
            self.close()

    def _next(self) -> Answer | None:
        waiting = self._waiting
        if waiting.ended:
            return None
        self._conversation.wait_until(lambda: bool(waiting.answers) or self._closed)
        if self._closed:  # by another thread, meanwhile
            return None
        frame, segment = waiting.answers.popleft()
        waiting.ended = frame.last
        if not frame.last:
            self._taken += 1
            self._taken_bytes += frame.segment_bytes
            if self._taken >= CALL_WINDOW // 2 or self._taken_bytes >= CALL_WINDOW_BYTES // 4:
                self._conversation.send(frames.CallCredit(self._number, self._taken, self._taken_bytes))
                self._taken = self._taken_bytes = 0
        if frame.kind:
            return Answer(error=of_kind(Kind(frame.kind), frame.message))
        if frame.last and not frame.outputs:
            return None
        return _answer(frame, segment)


def _memory(frame: frames.CallAnswer, descriptors: Sequence[int]) -> Segment | None:
    """Where the outputs lie; None where they are none, or this process has no room for them."""
    if not descriptors:
        return None
    try:
        return Segment(descriptors[0], frame.segment_bytes)
    except (OSError, ValueError):
        return None


def _readable(frame: frames.Call | frames.Ask) -> bytes:
    """The frame as it is sent. What a model's code has put into it is held against what a frame may have.

    Raises:
        InvalidRequest: the front process could not read it, so nobody would answer.
    """
    try:
        data = frames.encode(frame)
        frames.decode_from_worker(data)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"model '{frame.model}': the call cannot be sent: {error}") from None
    return data


def _placed(call: ModelCall) -> tuple[tuple[tuple[str, TensorFrame], ...], list[Buffer]]:
    """Where each input will lie, and its bytes."""
    tensors: list[tuple[str, TensorFrame]] = []
    buffers: list[Buffer] = []
    offset = 0
    for name, array in call.inputs.items():
        datatype = datatype_of(array)
        if datatype is None:
            raise InvalidRequest(
                f"model '{call.model}': input '{name}' has numpy dtype {array.dtype}, which the protocol does not have"
            )
        try:
            data = to_wire(array)
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest(f"model '{call.model}': input '{name}' {error}") from None
        tensors.append((name, TensorFrame(offset, len(data), tuple(array.shape), str(datatype))))
        buffers.append(data)
        offset += aligned(len(data))
    return tuple(tensors), buffers


def _answer(frame: frames.CallAnswer, segment: Segment | None) -> Answer:
    """The response's arrays, over memory that is theirs alone."""
    outputs: dict[str, Array] = {}
    for name, tensor in frame.outputs:
        datatype = DATATYPE_BY_NAME[tensor.datatype]
        if not tensor.nbytes:
            outputs[name] = np.empty(tensor.shape, dtype=from_wire(b"", datatype, (0,)).dtype)
            continue
        if segment is None:
            raise InternalError("the memory of another model's answer could not be received")
        outputs[name] = from_wire(segment.view[tensor.offset : tensor.offset + tensor.nbytes], datatype, tensor.shape)
    return Answer(outputs, frame.parameters)
