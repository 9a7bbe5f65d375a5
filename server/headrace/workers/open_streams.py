"""The decoupled requests that a worker is answering, from the front process's side."""

from collections.abc import Callable, Iterator
from time import monotonic

from headrace.batching.response_stream import WINDOW, WINDOW_BYTES
from headrace.batching.streamed import StreamedRequest
from headrace.core.errors import HeadraceError, InternalError, Kind, of_kind
from headrace.core.tensor import DATATYPE_BY_NAME, Tensor
from headrace.workers.frames import Begun, Cancel, Credit, Ended, Part

MAX_OPEN = 8192  # at once in one instance; further requests wait in the queue

Send = Callable[[Credit | Cancel], None]


class _Open:
    """One request, for how many more responses its client has room, and the bytes that it has not read yet."""

    __slots__ = ("ahead_bytes", "credit", "pending")

    def __init__(self, pending: StreamedRequest) -> None:
        self.pending = pending
        self.credit = WINDOW
        self.ahead_bytes = 0


class OpenStreams:
    """Those of one instance, by the number of the batch that each was."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.awaited_since = 0.0  # when, after a time in which no client had room, one had
        self._open: dict[int, _Open] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def awaited(self) -> bool:
        """Whether the worker owes somebody a response: nobody's slowness but its own keeps it from giving one."""
        return any(one.credit > 0 and one.ahead_bytes < WINDOW_BYTES for one in self._open.values())

    def begin(self, frame: Begun, pending: StreamedRequest, send: Send) -> None:
        """The worker has taken the request. ``send`` tells it of room, and of a client that has left."""
        sequence = frame.sequence
        one = self._open[sequence] = _Open(pending)
        pending.begun(frame.input_ns)

        def on_room(responses: int, nbytes: int) -> None:
            if sequence in self._open:
                if not self.awaited:
                    self.awaited_since = monotonic()
                one.credit += responses
                one.ahead_bytes -= nbytes
                send(Credit(sequence, responses, nbytes))

        def on_done(_: object) -> None:
            if sequence in self._open:
                send(Cancel(sequence))

        if not pending.dead:
            pending.stream.on_room = on_room
        pending.future.add_done_callback(on_done)

    def part(self, frame: Part) -> None:
        """One response has come."""
        one = self._open.get(frame.sequence)
        if one is None:
            return
        one.credit -= 1
        if frame.kind:
            one.pending.responded_badly(self._error(frame.kind, frame.message), frame.infer_ns)
            return
        nbytes = sum(len(tensor.data) for tensor in frame.outputs)
        one.ahead_bytes += nbytes
        outputs = tuple(
            Tensor(tensor.name, DATATYPE_BY_NAME[tensor.datatype], tensor.shape, tensor.data)
            for tensor in frame.outputs
        )
        one.pending.responded(outputs, frame.parameters, frame.infer_ns, nbytes)

    def end(self, frame: Ended) -> StreamedRequest | None:
        """The last response has come; gives back the request that is answered now."""
        one = self._open.pop(frame.sequence, None)
        if one is None:
            return None
        if frame.kind:
            one.pending.fail(self._error(frame.kind, frame.message))
        else:
            one.pending.ended()
        return one.pending

    def lose(self, cause: str) -> Iterator[StreamedRequest]:
        """The worker has died: whoever was being answered is told so, and given back."""
        lost = list(self._open.values())
        self._open.clear()
        for one in lost:
            one.pending.fail(
                InternalError(f"model '{self._model}': the worker died ({cause}) while the responses were streamed")
            )
            yield one.pending

    def _error(self, kind: str, message: str) -> HeadraceError:
        return of_kind(Kind(kind), f"model '{self._model}': {message}")
