"""A request to a decoupled model on its way: as any other until it is begun, then answered part by part."""

import asyncio
import logging
from time import monotonic_ns

from headrace.batching.pending import Pending
from headrace.batching.response_stream import ResponseStream
from headrace.core.errors import HeadraceError, InternalError
from headrace.core.request import InferRequest, InferResponse, Parameters
from headrace.core.statistics import Outcome, Statistics
from headrace.core.tensor import Tensor
from headrace.core.validation import ModelInputs

log = logging.getLogger(__name__)


class StreamedRequest(Pending):
    """Its future is resolved when the last response has come, or why there are no more; ``stream`` has the responses.

    A deadline holds until the first response: how long all of them take is the model's affair.
    """

    __slots__ = ("_infer_ns", "_input_ns", "_responses", "stream")

    def __init__(
        self,
        request: InferRequest,
        inputs: ModelInputs,
        version: str,
        statistics: Statistics,
        loop: asyncio.AbstractEventLoop,
        *,
        priority: int = 0,
        deadline_ns: int = 0,
        late_ns: int = 0,
    ) -> None:
        super().__init__(
            request, inputs, version, statistics, loop, priority=priority, deadline_ns=deadline_ns, late_ns=late_ns
        )
        self.stream = ResponseStream(decoupled=True)
        self.stream.on_cancel = self._on_cancel
        self.future.add_done_callback(self._on_done)
        self._responses = 0
        self._input_ns = 0
        self._infer_ns = 0

    def begun(self, input_ns: int) -> None:
        """The model has taken it."""
        self._input_ns = input_ns

    def responded(self, outputs: tuple[Tensor, ...], parameters: Parameters, infer_ns: int, nbytes: int = 0) -> None:
        """One response, of those outputs that it has. What the request did not ask for is left out.

        ``nbytes`` is what the worker counts it as, for its window.
        """
        self._count(infer_ns, "success" if outputs else "empty_response")
        if self.future.done():
            return
        request = self.request
        try:
            given = self.chosen(outputs)
        except HeadraceError as error:
            self.stream.put(error, nbytes)
            return
        except Exception:
            log.exception("model %s: a response could not be given the form that was asked for", request.model)
            failure = InternalError(f"model '{request.model}': the response could not be given its form")
            self.stream.put(failure, nbytes)
            return
        self.stream.put(InferResponse(request.model, self.version, request.id, given, parameters), nbytes)

    def responded_badly(self, error: HeadraceError, infer_ns: int) -> None:
        """An error in the place of a response; more may follow."""
        self._count(infer_ns, "fail")
        if not self.future.done():
            self.stream.put(error)

    def ended(self) -> None:
        """There are no more responses."""
        self.stop_clock()
        statistics = self.statistics
        if self.future.done():
            if self.future.cancelled() and statistics is not None:
                statistics.responded(self._responses, 0, 0, "cancel")
            self.bury()
            return
        self.timings = (self._input_ns, self._infer_ns, 0)
        if statistics is not None:
            now_ns = monotonic_ns()
            statistics.executed(1, self.rows, self._input_ns, self._infer_ns, 0)
            statistics.succeeded(now_ns - self.queued_at_ns, self.taken_at_ns - self.queued_at_ns)
        self.future.set_result(InferResponse(self.request.model, self.version, self.request.id, ()))

    def chosen(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As for any request, but that a response need not have every output."""
        asked = self.request.outputs
        if asked:
            by_name = {tensor.name: tensor for tensor in outputs}
            outputs = tuple(by_name[output.name] for output in asked if output.name in by_name)
        return outputs if self.form is None else self.form(outputs)

    def _count(self, infer_ns: int, outcome: Outcome) -> None:
        self.stop_clock()
        self._infer_ns += infer_ns
        if self.statistics is not None:
            if not self._responses:
                self.statistics.first_responded(monotonic_ns() - self.queued_at_ns)
            self.statistics.responded(self._responses, infer_ns, 0, outcome)
        self._responses += 1

    def _on_cancel(self) -> None:
        self.future.cancel()

    def _on_done(self, future: asyncio.Future[InferResponse]) -> None:
        if future.cancelled():
            self.stream.cancel()
            return
        error = future.exception()
        if error is not None:
            self.stream.put(error if isinstance(error, HeadraceError) else InternalError(str(error)))
        self.stream.end()
