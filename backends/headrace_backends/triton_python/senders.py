"""Where a model sends its responses to a request, from any of its threads, while ``execute`` runs or later."""

from collections.abc import Callable
from threading import Event, Lock
from typing import Protocol

from headrace.core.errors import InternalError
from headrace_backends.base import Answer, ResponseStream
from headrace_backends.triton_python.chores import Chores
from headrace_backends.triton_python.errors import TritonError, TritonModelException
from headrace_backends.triton_python.responses import InferenceResponse

FINAL = 1  # TRITONSERVER_RESPONSE_COMPLETE_FINAL
_CLOSED = "the response sender is closed: the final flag was sent, or execute failed"
_ABANDONED = "the model let go of the request's response sender without a final response"


class Responder(Protocol):
    """Who passes the responses to one request on."""

    @property
    def done(self) -> bool:
        """Whether nothing more is owed."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for responses any more."""

    def send(self, response: InferenceResponse | None, *, final: bool) -> None:
        """Pass a response on, or that there will be no more."""

    def abandon(self) -> None:
        """The model can send no more, so what is owed is an error."""


class InferenceResponseSender:
    """The model's handle on a request that is to be answered."""

    __slots__ = ("_chores", "_responder")

    def __init__(self, responder: Responder, chores: Chores) -> None:
        self._responder = responder
        self._chores = chores

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        """Give a response, or with the final flag the last one; that flag alone ends the responses."""
        if flags not in {0, FINAL}:
            raise TritonModelException(
                f"flags is {flags!r}, expected 0 or {FINAL} (TRITONSERVER_RESPONSE_COMPLETE_FINAL)"
            )
        if response is None and not flags:
            raise TritonModelException("send() has neither a response nor the final flag")
        if response is not None and not isinstance(response, InferenceResponse):
            raise TypeError(f"response is {type(response).__name__}, expected pb_utils.InferenceResponse")
        self._responder.send(response, final=flags == FINAL)

    def is_cancelled(self) -> bool:
        """Whether the client has left; the final flag is owed all the same."""
        return self._responder.cancelled

    def __del__(self) -> None:
        # May run in the middle of anything, so nothing is done here that waits or takes a lock.
        if not self._responder.done:
            self._chores.add(self._responder.abandon)


class OneResponse:
    """The response to a request of a model that is not decoupled, waited for by the thread that runs the batch."""

    cancelled = False  # batches run to their end

    def __init__(self) -> None:
        self._lock = Lock()
        self._given = Event()
        self._response: InferenceResponse | None = None
        self._closed = False

    @property
    def done(self) -> bool:
        """Whether there is a response."""
        return self._response is not None

    def send(self, response: InferenceResponse | None, *, final: bool) -> None:
        """Take the response. The final flag may come along or after it."""
        with self._lock:
            if self._closed:
                raise TritonModelException(_CLOSED)
            if response is not None and self._response is not None:
                raise TritonModelException("the model is not decoupled, so it gives one response a request, not two")
            if response is None and self._response is None:
                raise TritonModelException("the model is not decoupled, so a response comes before the final flag")
            self._response = self._response or response
            self._closed = final
        self._given.set()

    def abandon(self) -> None:
        """Have the request fail."""
        self._response = self._response or InferenceResponse(error=TritonError(_ABANDONED))
        self._given.set()

    def wait(self) -> InferenceResponse:
        """The response, as soon as there is one; a model that never sends is ended by its execution timeout."""
        self._given.wait()
        assert self._response is not None, "it was given"
        return self._response


class StreamedResponses:
    """The responses to a request of a decoupled model, sent on as they come."""

    def __init__(self, stream: ResponseStream, answer_of: Callable[[InferenceResponse], Answer]) -> None:
        self._stream = stream
        self._answer_of = answer_of
        self._lock = Lock()  # so that a response is not overtaken by the end that another thread sends
        self._closed = False

    @property
    def done(self) -> bool:
        """Whether the responses have ended."""
        return self._closed

    @property
    def cancelled(self) -> bool:
        """Whether the client has left."""
        return self._stream.cancelled

    def send(self, response: InferenceResponse | None, *, final: bool) -> None:
        """Send a response on, waiting while the client is far behind."""
        answer = None if response is None else self._answer_of(response)
        with self._lock:
            if self._closed:
                raise TritonModelException(_CLOSED)
            self._closed = final
            try:
                if answer is not None:
                    self._stream.send(answer)
            finally:
                if final:
                    self._stream.end()

    def abandon(self) -> None:
        """End with an error."""
        self.fail(InternalError(_ABANDONED))

    def fail(self, error: Exception) -> None:
        """End with an error, unless the responses have ended already."""
        if self.close():
            self._stream.end(error)

    def close(self) -> bool:
        """Let the model send no more; whether it could until now. Does not wait for a sending thread."""
        was_open, self._closed = not self._closed, True
        return was_open
