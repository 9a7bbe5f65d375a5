"""One request to one response: look up, validate, enqueue. Every front end calls this and nothing below it."""

import asyncio
from time import monotonic_ns

from headrace.batching.pending import Pending
from headrace.batching.split import SplitRequest
from headrace.core.errors import InvalidRequest, NotReady, Overloaded
from headrace.core.request import InferRequest, InferResponse
from headrace.core.rows import slice_rows
from headrace.core.validation import ModelInputs
from headrace.repository.repository import Repository
from headrace.repository.served import ServedVersion

# Requests smaller than this are bounded well enough by the number that may wait; larger ones are counted.
COUNTED_BYTES = 64 * 1024
MAX_PARTS = 1024  # batches that one request may take
MAX_TIMEOUT_US = 10**15  # thirty years: a longer timeout is none


class Engine:
    """Accepts requests for whatever the repository serves, up to ``max_inflight_bytes`` of large inputs."""

    def __init__(self, repository: Repository, max_inflight_bytes: int) -> None:
        self.repository = repository
        self.inflight_bytes = 0
        self._max_inflight_bytes = max_inflight_bytes
        self._stopping = False
        self._loop = asyncio.get_running_loop()

    def stop_accepting(self) -> None:
        """Refuse every request from now on; those that were accepted are still answered."""
        self._stopping = True

    def infer(self, request: InferRequest) -> asyncio.Future[InferResponse]:
        """Accept a request. Cancelling the future takes it back: it is dropped when it has not run yet.

        Raises:
            HeadraceError: at once, for a request that cannot be accepted. The future fails with one otherwise.
        """
        if self._stopping:
            raise NotReady("the server is stopping and takes no new requests")
        served = self.repository.lookup(request.model, request.version)
        try:
            inputs = served.checker.check(request)
        except InvalidRequest:
            served.statistics.failed("OTHER", 0)
            raise
        deadline_ns = _deadline_ns(request, served.default_timeout_us)
        size = sum(len(tensor.data) for tensor in request.inputs)
        if size >= COUNTED_BYTES and self.inflight_bytes and self.inflight_bytes + size > self._max_inflight_bytes:
            served.statistics.failed("REJECTED", 0)
            raise Overloaded(
                f"model '{request.model}': the server holds {self.inflight_bytes} bytes of unanswered requests and "
                f"takes at most {self._max_inflight_bytes} (--max-inflight-bytes)"
            )
        try:
            future = self._enqueue(served, request, inputs, deadline_ns)
        except Overloaded:
            served.statistics.failed("REJECTED", 0)
            raise
        if size >= COUNTED_BYTES:
            self.inflight_bytes += size
            future.add_done_callback(lambda _: self._forget(size))
        return future

    def count_unreadable(self, model: str, version: str) -> None:
        """A front end could not read a request for this model; it counts among the model's failures."""
        served = self.repository.find(model, version)
        if served is not None:
            served.statistics.failed("OTHER", 0)

    def _forget(self, size: int) -> None:
        self.inflight_bytes -= size

    def _enqueue(
        self, served: ServedVersion, request: InferRequest, inputs: ModelInputs, deadline_ns: int
    ) -> asyncio.Future[InferResponse]:
        priority = served.priority(request.parameters) if request.parameters else served.default_priority
        served.queue.make_room()  # before anything is made of the request, so that a refused one leaves nothing
        largest = served.max_batch_size
        if largest and inputs.rows > largest:
            return self._enqueue_in_parts(served, request, inputs, deadline_ns, priority)
        pending = Pending(
            request, inputs, served.version, served.statistics, self._loop, priority=priority, deadline_ns=deadline_ns
        )
        served.queue.put_part(pending)
        return pending.future

    def _enqueue_in_parts(
        self, served: ServedVersion, request: InferRequest, inputs: ModelInputs, deadline_ns: int, priority: int
    ) -> asyncio.Future[InferResponse]:
        if inputs.rows > MAX_PARTS * served.max_batch_size:
            raise InvalidRequest(
                f"model '{request.model}': the request has {inputs.rows} rows, expected at most "
                f"{MAX_PARTS * served.max_batch_size} ({MAX_PARTS} batches of {served.max_batch_size}); send several"
            )
        parts = [
            Pending(request, part, served.version, None, self._loop, priority=priority, deadline_ns=deadline_ns)
            for part in slice_rows(inputs, served.max_batch_size)
        ]
        for part in parts:
            served.queue.put_part(part)
        return SplitRequest(request, served.version, parts, served.statistics).future


def _deadline_ns(request: InferRequest, default_timeout_us: int) -> int:
    """The earlier of the transport's deadline and the ``timeout`` parameter (or the model's default)."""
    timeout_us = default_timeout_us
    if request.parameters:
        given = request.parameters.get("timeout", 0)
        if given:
            if isinstance(given, bool) or not isinstance(given, int) or given < 0:
                raise InvalidRequest(f"parameter 'timeout' is {given!r}, expected a positive number of microseconds")
            timeout_us = min(given, MAX_TIMEOUT_US)
    if not timeout_us:
        return request.deadline_ns
    own_ns = monotonic_ns() + timeout_us * 1000
    return min(own_ns, request.deadline_ns) if request.deadline_ns else own_ns
