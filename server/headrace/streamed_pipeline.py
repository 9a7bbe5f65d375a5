"""One request to an ensemble with a decoupled step: each of that step's responses runs through the steps behind it."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from time import monotonic_ns

from headrace.batching.pending import OutputForm, count_failure
from headrace.batching.response_stream import WINDOW, WINDOW_BYTES, ResponseStream, StreamItem
from headrace.batching.room import Room
from headrace.core.errors import HeadraceError, InternalError
from headrace.core.request import InferRequest, InferResponse
from headrace.core.tensor import Tensor
from headrace.core.validation import ModelInputs
from headrace.pipeline import step_request
from headrace.repository.served_ensemble import ServedEnsemble

log = logging.getLogger(__name__)

Stream = Callable[[InferRequest], ResponseStream]


class StreamedPipeline:
    """``stream`` has the whole's responses, and ``task`` ends with them. Steps run one after the other, as planned.

    A step is not asked for its next response before the one before it has gone through all others, so a slow client
    slows the model down. An error in any step is the last response. A deadline holds until the first one.
    """

    def __init__(
        self,
        served: ServedEnsemble,
        request: InferRequest,
        inputs: ModelInputs,
        deadline_ns: int,
        form: OutputForm | None,
        ask: Stream,
    ) -> None:
        self.stream = ResponseStream(decoupled=True)
        self._served = served
        self._request = request
        self._rows = inputs.rows
        self._deadline_ns = deadline_ns
        self._form = form
        self._ask = ask
        self._started_ns = monotonic_ns()
        self._wanted = [one.name for one in request.outputs] or [one.name for one in served.plan.signature.outputs]
        self._room = Room(WINDOW, WINDOW_BYTES)
        self.stream.on_room = self._room.give
        served.running += 1
        tensors = {tensor.name: tensor for tensor in inputs.tensors if tensor is not None}
        task = self.task = asyncio.get_running_loop().create_task(self._run(tensors))
        # Not in the task: one that is cancelled before its first step never comes to its end.
        task.add_done_callback(self._on_end)

        def on_cancel() -> None:
            task.cancel()

        self.stream.on_cancel = on_cancel

    async def _run(self, tensors: dict[str, Tensor]) -> None:
        statistics = self._served.statistics
        try:
            async with aclosing(self._responses(0, tensors)) as responses:
                async for item in responses:
                    await self._room.wait()
                    nbytes = _nbytes(item)
                    self._room.take(nbytes)
                    self.stream.put(item, nbytes)
                    self._deadline_ns = 0
                    if isinstance(item, HeadraceError):
                        count_failure(statistics, item, monotonic_ns() - self._started_ns)
                        return
            duration_ns = monotonic_ns() - self._started_ns
            statistics.executed(1, self._rows, 0, duration_ns, 0)
            statistics.succeeded(duration_ns, 0)
        except Exception as error:
            log.exception("model %s failed", self._request.model)
            statistics.failed("OTHER", monotonic_ns() - self._started_ns)
            self.stream.put(InternalError(f"model '{self._request.model}': {error}"))

    def _on_end(self, task: asyncio.Task[None]) -> None:
        del self.task  # one that was cancelled has its frames, and by them all tensors: nobody here is to have it
        if task.cancelled():
            self._served.statistics.failed("CANCELED", monotonic_ns() - self._started_ns)
        self.stream.end()
        self._served.running -= 1
        self._served.notice_idle()

    async def _responses(self, index: int, tensors: dict[str, Tensor]) -> AsyncGenerator[StreamItem, None]:
        """What comes of these tensors from step ``index`` on."""
        if index == len(self._served.plan.steps):
            yield self._response(tensors)
            return
        planned = self._served.plan.steps[index]
        try:
            stream = self._ask(step_request(planned, tensors, self._request, self._deadline_ns))
        except HeadraceError as error:
            yield error
            return
        try:
            async for item in stream:
                if isinstance(item, HeadraceError):
                    yield item
                    return
                made = {
                    name: Tensor(name, tensor.datatype, tensor.shape, tensor.data)
                    for tensor in item.outputs
                    for name in (planned.step.outputs[tensor.name],)
                }
                async with aclosing(self._responses(index + 1, {**tensors, **made})) as responses:
                    async for further in responses:
                        yield further
                        if isinstance(further, HeadraceError):
                            return
        finally:
            stream.cancel()

    def _response(self, tensors: dict[str, Tensor]) -> StreamItem:
        request = self._request
        outputs = tuple(tensors[name] for name in self._wanted if name in tensors)
        try:
            if self._form is not None:
                outputs = self._form(outputs)
        except HeadraceError as error:
            return error
        return InferResponse(request.model, self._served.version, request.id, outputs)


def _nbytes(item: StreamItem) -> int:
    return sum(len(tensor.data) for tensor in item.outputs) if isinstance(item, InferResponse) else 0
