"""One request to an ensemble: its steps run as soon as their tensors are there, those that can at once."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import partial
from time import monotonic_ns

from headrace.batching.pending import OutputForm, count_failure
from headrace.core.ensemble import EnsemblePlan, PlannedStep
from headrace.core.errors import Cancelled, DeadlineExceeded, HeadraceError, InternalError, released
from headrace.core.request import InferRequest, InferResponse, Parameters, RequestedOutput
from headrace.core.tensor import Tensor
from headrace.core.validation import ModelInputs
from headrace.repository.served_ensemble import ServedEnsemble

log = logging.getLogger(__name__)

Infer = Callable[[InferRequest], asyncio.Future[InferResponse]]

# How the client wants its own answer is no step's affair.
_OUTERMOST = frozenset({"binary_data_output", "timeout"})


def step_parameters(parameters: Parameters) -> Parameters:
    """What of a request's parameters goes on to the steps."""
    return {name: value for name, value in parameters.items() if name not in _OUTERMOST}


def step_request(
    planned: PlannedStep, tensors: Mapping[str, Tensor], request: InferRequest, deadline_ns: int
) -> InferRequest:
    """What a step's model is asked. An optional input that nobody gave is left out."""
    step = planned.step
    inputs = []
    for own, name in step.inputs.items():
        tensor = tensors.get(name)
        if tensor is not None:
            inputs.append(Tensor(own, tensor.datatype, tensor.shape, tensor.data))
    return InferRequest(
        step.model,
        step.version,
        request.id,
        tuple(inputs),
        tuple(RequestedOutput(own) for own in step.outputs),
        step_parameters(request.parameters),
        deadline_ns,
        (*request.callers, request.model),
        borrows=True,
    )


class Pipeline:
    """``future`` is the whole's answer.

    The first step that fails fails it, and the others are taken back; so are all when it is cancelled.
    """

    def __init__(
        self,
        served: ServedEnsemble,
        request: InferRequest,
        inputs: ModelInputs,
        deadline_ns: int,
        form: OutputForm | None,
        infer: Infer,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.future: asyncio.Future[InferResponse] = loop.create_future()
        self._served = served
        self._plan: EnsemblePlan = served.plan
        self._request = request
        self._rows = inputs.rows
        self._deadline_ns = deadline_ns
        self._form = form
        self._infer = infer
        self._started_ns = monotonic_ns()
        self._tensors = {tensor.name: tensor for tensor in inputs.tensors if tensor is not None}
        self._takers = dict(self._plan.takers)
        self._wanted = [one.name for one in request.outputs] or [one.name for one in self._plan.signature.outputs]
        self._waits_for = [len(planned.after) for planned in self._plan.steps]
        self._running: dict[int, asyncio.Future[InferResponse]] = {}
        self._missing = len(self._plan.steps)
        self._timer = None
        if deadline_ns:
            self._timer = loop.call_later(max(0.0, (deadline_ns - self._started_ns) * 1e-9), self._expire)
        served.running += 1
        self.future.add_done_callback(self._on_whole)
        for index, waits_for in enumerate(self._waits_for):
            if not waits_for and not self.future.done():
                self._start(index)

    def _start(self, index: int) -> None:
        planned = self._plan.steps[index]
        try:
            running = self._infer(step_request(planned, self._tensors, self._request, self._deadline_ns))
        except HeadraceError as error:
            self._fail(released(error))
            return
        except Exception as bug:  # noqa: BLE001 - whoever waits for the whole is told
            self._break(bug)
            return
        self._running[index] = running
        running.add_done_callback(partial(self._on_step, index))
        for name in planned.takes:
            self._takers[name] -= 1
            if not self._takers[name] and name not in self._wanted:
                self._tensors.pop(name, None)  # the step's request has it, and nobody else will ask

    def _on_step(self, index: int, step: asyncio.Future[InferResponse]) -> None:
        self._running.pop(index, None)
        if self.future.done():
            _ = step.cancelled() or step.exception()  # seen, so that asyncio does not report it
            return
        planned = self._plan.steps[index]
        if step.cancelled():
            self._fail(Cancelled(f"model '{self._request.model}': its step '{planned.step.model}' was taken back"))
            return
        error = step.exception()
        if error is not None:
            self._fail(error)
            return
        try:
            self._keep(planned, step.result())
            self._go_on(index)
        except Exception as bug:  # noqa: BLE001 - as in ``_start``
            self._break(bug)

    def _keep(self, planned: PlannedStep, response: InferResponse) -> None:
        for tensor in response.outputs:
            name = planned.step.outputs[tensor.name]
            if self._takers.get(name) or name in self._wanted:
                self._tensors[name] = Tensor(name, tensor.datatype, tensor.shape, tensor.data)

    def _go_on(self, index: int) -> None:
        """Start what has waited for this step, or answer."""
        self._missing -= 1
        if not self._missing:
            self._finish()
            return
        for later, other in enumerate(self._plan.steps):
            if index in other.after:
                self._waits_for[later] -= 1
                if not self._waits_for[later] and not self.future.done():
                    self._start(later)

    def _finish(self) -> None:
        request = self._request
        try:
            outputs = tuple(self._tensors[name] for name in self._wanted)
            if self._form is not None:
                outputs = self._form(outputs)
        except KeyError as error:
            self._fail(InternalError(f"model '{request.model}': no step gave the output {error}"))
            return
        except HeadraceError as error:
            self._fail(released(error))
            return
        duration_ns = monotonic_ns() - self._started_ns
        self._served.statistics.executed(1, self._rows, 0, duration_ns, 0)
        self._served.statistics.succeeded(duration_ns, 0)
        self.future.set_result(InferResponse(request.model, self._served.version, request.id, outputs))

    def _break(self, bug: Exception) -> None:
        """Something has gone wrong that nobody expected: the request fails rather than wait for ever."""
        if self.future.done():
            return
        log.error("a request to the ensemble %s failed", self._request.model, exc_info=bug)
        self._fail(InternalError(f"model '{self._request.model}': its steps could not be run: {bug}"))

    def _fail(self, error: BaseException) -> None:
        count_failure(self._served.statistics, error, monotonic_ns() - self._started_ns)
        self.future.set_exception(error)

    def _expire(self) -> None:
        if not self.future.done():
            waited_ms = (monotonic_ns() - self._started_ns) * 1e-6
            self._fail(
                DeadlineExceeded(
                    f"Request timeout expired: model '{self._request.model}' did not answer within {waited_ms:.1f} ms"
                )
            )

    def _on_whole(self, whole: asyncio.Future[InferResponse]) -> None:
        self._served.running -= 1
        self._served.notice_idle()
        if self._timer is not None:
            self._timer.cancel()
        if whole.cancelled():
            self._served.statistics.failed("CANCELED", monotonic_ns() - self._started_ns)
        self._tensors.clear()
        for step in list(self._running.values()):
            step.cancel()
