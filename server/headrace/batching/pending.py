"""One request on its way through the queue and a worker, until its future is resolved."""

import asyncio
from collections.abc import Callable
from time import monotonic_ns

import msgspec

from headrace.core.errors import DeadlineExceeded, HeadraceError, InternalError, Kind, released
from headrace.core.request import InferRequest, InferResponse, Parameters
from headrace.core.statistics import Statistics
from headrace.core.tensor import Tensor
from headrace.core.validation import BatchKey, ModelInputs

# What is made of the outputs before the client gets them, as it asked.
OutputForm = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

NO_PARAMETERS: Parameters = {}

# A request without a deadline, or with one further off, ranks as if it had to be answered so long after its arrival:
# who is pressed for time goes first, but nobody is overtaken by what came a second later.
HORIZON_NS = 1_000_000_000

# Triton's reasons for nv_inference_request_failure.
_REASONS = {Kind.OVERLOADED: "REJECTED", Kind.DEADLINE: "REJECTED", Kind.CANCELLED: "CANCELED"}


def failure_reason(error: BaseException) -> str:
    """Triton's word for why a request failed."""
    return _REASONS.get(error.kind, "BACKEND") if isinstance(error, HeadraceError) else "OTHER"


def count_failure(statistics: Statistics, error: BaseException, duration_ns: int) -> None:
    """Note that a request ended with an error after so long."""
    if isinstance(error, DeadlineExceeded):
        statistics.refused("expired", duration_ns)
    else:
        statistics.failed(failure_reason(error), duration_ns)


def rank_of(queued_at_ns: int, deadline_ns: int, late_ns: int) -> int:
    """When a request is to be taken as overdue, for its place among others; 0 where it is not pressed for time."""
    horizon_ns = queued_at_ns + HORIZON_NS
    if late_ns:  # it has to be looked at when its time is over, however far off that is
        return min(late_ns, deadline_ns or late_ns, horizon_ns)
    return deadline_ns if 0 < deadline_ns < horizon_ns else 0


class Pending:
    """A request that was accepted. Its holder owes it an answer, an error at the least.

    ``dead`` is true as soon as nobody waits for the answer any more: the client left, or its time is up. Dead
    requests are dropped when a batch is formed. ``alone`` asks for a batch of its own, because a batch that it
    was in has failed or has killed its worker; ``deaths`` counts the latter, ``died_at_ns`` is the last one's time.
    ``rank_ns`` is its place among those of its priority, 0 for one that just waits its turn. From ``late_ns`` on, if
    that is not 0, it goes behind all others.
    ``form`` is applied to the outputs that were asked for. ``timings`` are the nanoseconds that inputs, model and
    outputs of its batch took, kept for one that is ``traced``.
    """

    counts = True  # whether its execution is an inference in the model's statistics

    __slots__ = (
        "_timer",
        "alone",
        "deaths",
        "died_at_ns",
        "form",
        "future",
        "inputs",
        "key",
        "late_ns",
        "priority",
        "queued_at_ns",
        "rank_ns",
        "request",
        "rows",
        "sequence",
        "slot",
        "statistics",
        "taken_at_ns",
        "timings",
        "traced",
        "version",
    )

    def __init__(
        self,
        request: InferRequest,
        inputs: ModelInputs,
        version: str,
        statistics: Statistics | None,
        loop: asyncio.AbstractEventLoop,
        *,
        priority: int = 0,
        deadline_ns: int = 0,
        late_ns: int = 0,
    ) -> None:
        self.request = request
        self.inputs = inputs
        self.version = version
        self.statistics = statistics
        self.future: asyncio.Future[InferResponse] = loop.create_future()
        self.rows = inputs.rows
        self.key: BatchKey = inputs.key
        self.priority = priority
        self.queued_at_ns = monotonic_ns()
        self.taken_at_ns = 0
        self.alone = False
        self.deaths = 0
        self.died_at_ns = 0
        self.form: OutputForm | None = None
        self.sequence = 0  # the number of its sequence among those of the model; 0 for none
        self.traced = False
        self.timings = (0, 0, 0)
        self.slot = -1  # the place that its sequence has in the instance, once it was taken
        self._timer: asyncio.TimerHandle | None = None
        self.late_ns = late_ns
        self.rank_ns = rank_of(self.queued_at_ns, deadline_ns, late_ns) if deadline_ns or late_ns else 0
        if deadline_ns:
            delay_s = max(0.0, (deadline_ns - self.queued_at_ns) * 1e-9)
            self._timer = loop.call_later(delay_s, self._expire, delay_s)

    @property
    def dead(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.future.done()

    def resolve(self, outputs: tuple[Tensor, ...], now_ns: int, parameters: Parameters = NO_PARAMETERS) -> bool:
        """Answer with the outputs that the model gave; the request's own choice of them is made here.

        Returns whether that is the answer: the client may have left, or have asked for what cannot be made of them.
        """
        if self._timer is not None:
            self._timer.cancel()
        if self.future.done():
            self._count_departure()
            return False
        request = self.request
        if request.outputs or self.form is not None:
            try:
                outputs = self.chosen(outputs)
            except HeadraceError as error:
                self.fail(released(error))
                return False
        if self.statistics is not None:
            self.statistics.succeeded(now_ns - self.queued_at_ns, self.taken_at_ns - self.queued_at_ns)
        self.future.set_result(InferResponse(request.model, self.version, request.id, outputs, parameters))
        return True

    def chosen(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs that the request asked for, in its order and form.

        Raises:
            HeadraceError: one of them is not there, or cannot be given in that form.
        """
        request = self.request
        if request.outputs:
            by_name = {tensor.name: tensor for tensor in outputs}
            try:
                outputs = tuple(by_name[output.name] for output in request.outputs)
            except KeyError as error:
                raise InternalError(f"model '{request.model}' did not give the output {error}") from None
        return outputs if self.form is None else self.form(outputs)

    def stop_clock(self) -> None:
        """Its deadline does not matter any more."""
        if self._timer is not None:
            self._timer.cancel()

    def fail(self, error: HeadraceError) -> None:
        """Answer with an error."""
        if self._timer is not None:
            self._timer.cancel()
        if self.future.done():
            self._count_departure()
            return
        if self.statistics is not None:
            count_failure(self.statistics, error, monotonic_ns() - self.queued_at_ns)
        self.future.set_exception(error)

    def bury(self) -> None:
        """Take note that this one was dropped, dead, when a batch was formed."""
        if self._timer is not None:
            self._timer.cancel()
        self._count_departure()

    def let_go(self) -> None:
        """Give up the memory of the inputs, where no worker was given them: they are not needed once it is ``dead``.

        It may stay in its queue for long, as nobody looks for dead ones before there is a batch to be formed.
        """
        if not self.taken_at_ns:
            self.inputs = ModelInputs((), self.rows, self.key)
            self.request = msgspec.structs.replace(self.request, inputs=())

    def _count_departure(self) -> None:
        """The client has left; that counts once, whenever it is noticed."""
        if self.future.cancelled() and self.statistics is not None:
            self.statistics.failed("CANCELED", monotonic_ns() - self.queued_at_ns)
            self.statistics = None

    def _expire(self, allowed_s: float) -> None:
        self.fail(
            DeadlineExceeded(
                f"Request timeout expired: model '{self.request.model}' did not answer within the "
                f"{allowed_s * 1e3:.4g} ms that the request had"
            )
        )
