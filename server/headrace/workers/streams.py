"""The decoupled requests that a worker is answering: each is given responses, in turn, while its client has room."""

import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import monotonic, monotonic_ns, sleep

from headrace.batching.response_stream import WINDOW, WINDOW_BYTES
from headrace.core.errors import HeadraceError, Kind, Overloaded
from headrace.core.model import Signature
from headrace.core.tensor import Array
from headrace.workers import frames
from headrace.workers.calls import Calls
from headrace.workers.conversation import Conversation
from headrace.workers.device_loss import DeviceLoss
from headrace.workers.slot_memory import checked_parameters, described, wire_form
from headrace_backends.base import Answer, Backend, RequestInfo

log = logging.getLogger("headrace.worker")

# As the window, for responses that are sent on the worker's main thread, as from within ``begin``: waiting there holds
# up everybody else. A client so far behind is given a moment to read half of that, which one that reads does in less,
# as a model may well make responses faster than they can be delivered. Otherwise the request ends.
AHEAD = 1024
AHEAD_BYTES = 64 * 1024 * 1024
PATIENCE_S = 1.0
_LOOK_EVERY_S = 0.001


class Stream:
    """One decoupled request in the worker: the model's ``ResponseStream``. Made on the worker's main thread."""

    def __init__(
        self,
        sequence: int,
        request: RequestInfo,
        signature: Signature,
        conversation: Conversation,
        on_end: Callable[[int], None],
        before_end: Callable[[], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self.request = request
        self.cancelled = False
        self.ended = False
        self.credit = WINDOW
        self.ahead_bytes = 0
        self._sequence = sequence
        self._specs = {spec.name: spec for spec in signature.outputs}
        self._conversation = conversation
        self._on_end = on_end
        self._before_end = before_end
        self._on_error = on_error
        self._main = threading.get_ident()
        self._since_ns = monotonic_ns()
        self._ending = threading.Lock()  # held to say something, so that the end is the last that is said

    @property
    def waits(self) -> bool:
        """Whether the client is far behind."""
        return self._is_behind(WINDOW, WINDOW_BYTES)

    def send(self, answer: Answer) -> None:
        """Give one response; waits while the client is far behind, on the worker's main thread only for a moment.

        Raises:
            TypeError: an output is not as declared, or a parameter is of no kind that the protocol has.
            RuntimeError: the stream has ended, or an output has an unknown name.
        """
        made = self._part(answer)
        nbytes = sum(len(tensor.data) for tensor in made.outputs)
        part = frames.encode(made)
        if threading.get_ident() == self._main:
            if self.waits:
                self._wait_a_moment()
            self._conversation.wait_until(lambda: self._take(nbytes))
        else:
            self._conversation.wait_until(lambda: not self.waits and self._take(nbytes))
        if self.cancelled:
            return
        with self._ending:
            if self.ended:
                raise RuntimeError("a response was sent after the last one")
            self._conversation.send_encoded(part)
        self._since_ns = monotonic_ns()
        if answer.error is not None:
            self._on_error(answer.error)

    def end(self, error: BaseException | None = None) -> None:
        """There will be no more responses, because of ``error`` if there is one. Only the first call counts."""
        kind, message = described(error) if error is not None else ("", "")
        self._before_end()
        with self._ending:
            ended, self.ended = self.ended, True
            if not ended:
                self._conversation.send(frames.Ended(self._sequence, kind, message))
        if not ended:
            self._on_end(self._sequence)
        if error is not None:
            self._on_error(error)

    def _take(self, nbytes: int) -> bool:
        """Count one more response. Called with the conversation held, as credit is given."""
        self.credit -= 1
        self.ahead_bytes += nbytes
        return True

    def _wait_a_moment(self) -> None:
        """Let a client that is too far behind catch up, and have the request end when it does not."""
        self._conversation.poll()  # it may have read or left, and perhaps no other thread looks
        if not self._is_behind(AHEAD, AHEAD_BYTES):
            return
        until = monotonic() + PATIENCE_S
        while self._is_behind(AHEAD // 2, AHEAD_BYTES // 2):
            if monotonic() >= until:
                self.end(
                    Overloaded(
                        f"the client has not read {WINDOW - self.credit} responses of {self.ahead_bytes} bytes, and "
                        "the model goes on making them; sent from a thread of its own they would wait"
                    )
                )
                self.cancelled = True
                return
            sleep(_LOOK_EVERY_S)
            self._conversation.poll()

    def _is_behind(self, responses: int, nbytes: int) -> bool:
        """Whether there is a client that has so much to read."""
        behind = WINDOW - self.credit >= responses or self.ahead_bytes >= nbytes
        return behind and not (self.cancelled or self.ended)

    def _part(self, answer: Answer) -> frames.Part:
        infer_ns = monotonic_ns() - self._since_ns
        parameters = checked_parameters(answer.parameters)
        if answer.error is not None:
            kind, message = described(answer.error)
            return frames.Part(self._sequence, (), parameters, infer_ns, kind, message)
        tensors = []
        for name, array in answer.outputs.items():
            spec = self._specs.get(name)
            if spec is None:
                raise RuntimeError(f"it gave the output '{name}', expected some of {list(self._specs)}")
            data, datatype = wire_form(spec, array)
            tensors.append(frames.NamedTensor(name, str(datatype), tuple(array.shape), data))  # type: ignore[arg-type] # any buffer is encoded as bytes
        return frames.Part(self._sequence, tuple(tensors), parameters, infer_ns)


@dataclass(frozen=True, slots=True)
class _Turn:
    """A request that is answered by an iterator."""

    name: str
    sequence: int
    stream: Stream
    iterator: Iterator[Answer]
    calls: Calls


class Streams:
    """All decoupled requests under way in a worker. Iterators take turns, one response at a time.

    Those whose clients are far behind stand aside, so that a response costs the same however many there are.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._open: dict[int, Stream] = {}
        self._ready: deque[_Turn] = deque()
        self._aside: dict[int, _Turn] = {}
        self.loss = DeviceLoss()

    def begin(
        self,
        name: str,
        backend: Backend,
        calls: Calls,
        sequence: int,
        request: RequestInfo,
        inputs: dict[str, Array],
        before_end: Callable[[], None],
    ) -> None:
        """Have the model begin to answer a request. ``inputs`` stay as they are.

        ``before_end`` is called when the last response was given, by whichever thread that is.
        """
        note = partial(self.loss.note, name)
        stream = Stream(sequence, request, backend.signature, self._conversation, self._forget, before_end, note)
        self._open[sequence] = stream
        try:
            iterator = backend.begin(inputs, stream)
        except BaseException as error:  # noqa: BLE001 - a model's own code may raise anything
            self._fail(name, stream, error)
            return
        if iterator is not None:
            self._ready.append(_Turn(name, sequence, stream, iterator, calls))

    def credit(self, sequence: int, responses: int, nbytes: int) -> None:
        """The client has read. Called with the conversation held."""
        stream = self._open.get(sequence)
        if stream is not None:
            stream.credit += responses
            stream.ahead_bytes -= nbytes
            self._call_back(sequence)

    def cancel(self, sequence: int) -> None:
        """The client has left. Called with the conversation held."""
        stream = self._open.get(sequence)
        if stream is not None:
            stream.cancelled = True
            self._call_back(sequence)

    @property
    def runnable(self) -> bool:
        """Whether an iterator could be advanced now."""
        return bool(self._ready)

    def step(self) -> None:
        """Advance the next iterator whose client has room by one response, if there is one."""
        if not self._ready:
            return
        turn = self._ready.popleft()
        if turn.stream.waits or self._advance(turn):  # it may wait already, when its model sends things by itself too
            self._put_aside(turn)

    def _put_aside(self, turn: _Turn) -> None:
        """Have it stand aside for as long as its client is behind, if it is."""
        self._aside[turn.sequence] = turn
        if not turn.stream.waits:  # asked afterwards, because another thread may have read of room in between
            self._call_back(turn.sequence)

    def _call_back(self, sequence: int) -> None:
        turn = self._aside.pop(sequence, None)
        if turn is not None:
            self._ready.append(turn)

    def _forget(self, sequence: int) -> None:
        self._open.pop(sequence, None)
        self._call_back(sequence)

    def _advance(self, turn: _Turn) -> bool:
        """Whether more may come."""
        stream = turn.stream
        turn.calls.on_behalf_of = turn.sequence
        try:
            if stream.cancelled or stream.ended:
                close = getattr(turn.iterator, "close", None)
                if close is not None:
                    close()
                stream.end()
                return False
            answer = next(turn.iterator, None)
            if answer is None:
                stream.end()
                return False
            stream.send(answer)
        except BaseException as error:  # noqa: BLE001 - a model's own code may raise anything
            self._fail(turn.name, stream, error)
            return False
        finally:
            turn.calls.on_behalf_of = 0
        return True

    def _fail(self, name: str, stream: Stream, error: BaseException) -> None:
        if not isinstance(error, HeadraceError) or error.kind is Kind.INTERNAL:
            log.error("model %s: %s", name, "".join(traceback.format_exception(error)))
        stream.end(error)
