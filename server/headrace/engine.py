"""One request to its response or responses: look up, validate, enqueue. Front ends call this and nothing below it."""

import asyncio
from collections.abc import Sequence
from time import monotonic_ns
from typing import Any

from headrace.batching.pending import OutputForm, Pending
from headrace.batching.queue_policy import MAX_TIMEOUT_US
from headrace.batching.response_stream import ResponseStream, single_response
from headrace.batching.split import SplitRequest
from headrace.batching.streamed import StreamedRequest
from headrace.cached_answers import CachedAnswers
from headrace.core.errors import (
    DeadlineExceeded,
    HeadraceError,
    InvalidRequest,
    NotReady,
    Overloaded,
    Unsupported,
)
from headrace.core.request import InferRequest, InferResponse
from headrace.core.rows import slice_rows
from headrace.core.validation import ModelInputs
from headrace.output_form import output_form
from headrace.pipeline import Pipeline
from headrace.recording.recorder import Recorder
from headrace.repository.repository import Repository, Served
from headrace.repository.served_ensemble import ServedEnsemble
from headrace.response_cache import Cache
from headrace.streamed_pipeline import StreamedPipeline
from headrace.traced_request import follow
from headrace.tracing import Tracer

# Requests smaller than this are bounded well enough by the number that may wait; larger ones are counted.
COUNTED_BYTES = 64 * 1024
MAX_PARTS = 1024  # batches that one request may take

Answer = asyncio.Future[InferResponse]


class Engine:
    """Accepts requests for whatever the repository serves, up to ``max_inflight_bytes`` of large inputs."""

    def __init__(
        self,
        repository: Repository,
        max_inflight_bytes: int,
        cache: Cache | None = None,
        tracer: Tracer | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.repository = repository
        self.inflight_bytes = 0
        self._max_inflight_bytes = max_inflight_bytes
        self._cached = CachedAnswers(cache, repository, self._run, self.infer) if cache is not None else None
        self._tracer = tracer
        self._recorder = recorder
        self._stopping = False
        self._loop = asyncio.get_running_loop()

    def stop_accepting(self) -> None:
        """Refuse every request from now on; those that were accepted are still answered."""
        self._stopping = True

    def infer(self, request: InferRequest) -> Answer:
        """Accept a request. Cancelling the future takes it back: it is dropped when it has not run yet.

        Raises:
            HeadraceError: at once, for a request that cannot be accepted. The future fails with one otherwise.
        """
        served = self._served(request)
        if served.decoupled:
            raise Unsupported(
                f"model '{request.model}' has a decoupled transaction policy: it answers with any number of responses, "
                "so it is asked through ModelStreamInfer, generate_stream or infer_stream"
            )
        inputs = self._checked(served, request)
        if served.cached and self._cached is not None:
            return self._cached.infer(served, request, inputs)
        return self._run(served, request, inputs)

    def stream(self, request: InferRequest) -> ResponseStream:
        """Accept a request for any model; its responses come as they are made. Cancel the stream to take it back.

        Raises:
            HeadraceError: as ``infer``.
        """
        served = self._served(request)
        if not served.decoupled:
            return single_response(self.infer(request))
        inputs = self._checked(served, request)
        size = self._room_for(served, request)
        try:
            priority, deadline_ns, late_ns = _terms(served, request)
            if isinstance(served, ServedEnsemble):
                form = output_form(self.repository, served, request)
                pipeline = StreamedPipeline(served, request, inputs, deadline_ns, form, self.stream)
                if size >= COUNTED_BYTES:
                    self._count(size, pipeline.task, ())
                if self._recorder is not None and self._recorder.active:
                    self._recorder.take(served, inputs)
                return pipeline.stream
            if inputs.rows > served.max_batch_size > 0:  # its responses could not be joined
                raise InvalidRequest(
                    f"model '{request.model}': the request has {inputs.rows} rows, expected at most "
                    f"{served.max_batch_size} (max_batch_size), as the model is decoupled"
                )
            served.queue.make_room(priority, deadline_ns, inputs.rows, late_ns)
            form = output_form(self.repository, served, request)
        except HeadraceError as error:
            _count_refusal(served, error)
            raise
        pending = StreamedRequest(
            request,
            inputs,
            served.version,
            served.statistics,
            self._loop,
            priority=priority,
            deadline_ns=deadline_ns,
            late_ns=late_ns,
        )
        pending.form = form
        served.queue.put_part(pending)
        if self._tracer is not None and self._tracer.active:
            follow(self._tracer, pending)
        if self._recorder is not None and self._recorder.active:
            self._recorder.take(served, inputs)
        if size >= COUNTED_BYTES:
            self._count(size, pending.future, [pending])
        return pending.stream

    def count_unreadable(self, model: str, version: str) -> None:
        """A front end could not read a request for this model; it counts among the model's failures."""
        served = self.repository.find(model, version)
        if served is not None:
            served.statistics.failed("OTHER", 0)

    # -- accepting ----------------------------------------------------------------------------------------

    def _served(self, request: InferRequest) -> Served:
        if self._stopping or request.callers:
            self._check_callers(request)
        return self.repository.lookup(request.model, request.version)

    def _check_callers(self, request: InferRequest) -> None:
        if self._stopping and not request.callers:  # what was accepted is answered, with all that it takes
            raise NotReady("the server is stopping and takes no new requests")
        if request.model in request.callers:
            chain = " -> ".join((*request.callers, request.model))
            raise InvalidRequest(
                f"model '{request.model}' is called on behalf of itself ({chain}): it would wait for ever"
            )

    @staticmethod
    def _checked(served: Served, request: InferRequest) -> ModelInputs:
        try:
            return served.checker.check(request)
        except InvalidRequest:
            served.statistics.failed("OTHER", 0)
            raise

    def _room_for(self, served: Served, request: InferRequest) -> int:
        """The bytes of the request's inputs, for which there is room."""
        size = 0
        for tensor in request.inputs:
            size += len(tensor.data)
        full = self.inflight_bytes and self.inflight_bytes + size > self._max_inflight_bytes
        if size >= COUNTED_BYTES and full and not self._is_step(request):
            error = Overloaded(
                f"model '{request.model}': the server holds {self.inflight_bytes} bytes of unanswered requests and "
                f"takes at most {self._max_inflight_bytes} (--max-inflight-bytes)",
                "inflight_bytes",
            )
            _count_refusal(served, error)
            raise error
        return size

    def _is_step(self, request: InferRequest) -> bool:
        """Whether it is one of an ensemble's, for which there was room: that counts too, and would leave it none."""
        return bool(request.callers) and isinstance(self.repository.find(request.callers[-1], ""), ServedEnsemble)

    def _count(self, size: int, future: asyncio.Future[Any], queued: Sequence[Pending]) -> None:
        """Count the bytes of a large request, which is ``queued`` so, until it is answered or nobody waits for it."""
        self.inflight_bytes += size
        future.add_done_callback(lambda _: self._forget(size, queued))

    def _forget(self, size: int, queued: Sequence[Pending]) -> None:
        self.inflight_bytes -= size
        for pending in queued:
            pending.let_go()

    # -- running ------------------------------------------------------------------------------------------

    def _run(self, served: Served, request: InferRequest, inputs: ModelInputs) -> Answer:
        size = self._room_for(served, request)
        queued: Sequence[Pending] = ()
        try:
            priority, deadline_ns, late_ns = _terms(served, request)
            if isinstance(served, ServedEnsemble):
                future = Pipeline(
                    served, request, inputs, deadline_ns, output_form(self.repository, served, request), self.infer
                ).future
            else:
                future, queued = self._enqueue(served, request, inputs, priority, deadline_ns, late_ns)
        except HeadraceError as error:
            _count_refusal(served, error)
            raise
        if self._recorder is not None and self._recorder.active:
            self._recorder.take(served, inputs)
        if size >= COUNTED_BYTES:
            self._count(size, future, queued)
        return future

    def _enqueue(
        self,
        served: Served,
        request: InferRequest,
        inputs: ModelInputs,
        priority: int,
        deadline_ns: int,
        late_ns: int,
    ) -> tuple[Answer, Sequence[Pending]]:
        """The answer, and what was put into the queue for it."""
        # Before anything is made of the request, so that a refused one leaves nothing.
        queue = served.queue
        queue.make_room(priority, deadline_ns, inputs.rows, late_ns)
        if queue.objective is not None:
            queue.admit(inputs.key, inputs.rows, priority)
        form = output_form(self.repository, served, request) if request.outputs else None
        largest = served.max_batch_size
        if largest and inputs.rows > largest and served.folder.sequence is None:
            return self._enqueue_in_parts(served, request, inputs, priority, deadline_ns, late_ns, form)
        pending = Pending(
            request,
            inputs,
            served.version,
            served.statistics,
            self._loop,
            priority=priority,
            deadline_ns=deadline_ns,
            late_ns=late_ns,
        )
        pending.form = form
        if self._tracer is not None and self._tracer.active:
            follow(self._tracer, pending)
        queue.put_part(pending)
        return pending.future, (pending,)

    def _enqueue_in_parts(
        self,
        served: Served,
        request: InferRequest,
        inputs: ModelInputs,
        priority: int,
        deadline_ns: int,
        late_ns: int,
        form: OutputForm | None,
    ) -> tuple[Answer, Sequence[Pending]]:
        if inputs.rows > MAX_PARTS * served.max_batch_size:
            raise InvalidRequest(
                f"model '{request.model}': the request has {inputs.rows} rows, expected at most "
                f"{MAX_PARTS * served.max_batch_size} ({MAX_PARTS} batches of {served.max_batch_size}); send several"
            )
        parts = [
            Pending(
                request,
                part,
                served.version,
                None,
                self._loop,
                priority=priority,
                deadline_ns=deadline_ns,
                late_ns=late_ns,
            )
            for part in slice_rows(inputs, served.max_batch_size)
        ]
        for part in parts:
            part.form = form
            served.queue.put_part(part)
        return SplitRequest(request, served.version, parts, served.statistics).future, parts


def _terms(served: Served, request: InferRequest) -> tuple[int, int, int]:
    """The request's priority, until when it has to be answered, and from when on it is late; 0 for never.

    Raises:
        InvalidRequest: it asks for a priority or a timeout that there is not.
    """
    parameters = request.parameters
    if not parameters and not served.default_timeout_us:
        return served.default_priority, request.deadline_ns, 0
    priority = served.priority(parameters, for_another=bool(request.callers))
    policy = served.policies.get(priority, served.policy)
    given_us = parameters.get("timeout", 0)
    if not given_us and not policy.default_timeout_us:
        return priority, request.deadline_ns, 0
    if isinstance(given_us, bool) or not isinstance(given_us, int) or given_us < 0:
        raise InvalidRequest(
            f"model '{request.model}': parameter 'timeout' is {given_us!r}, expected a positive number of microseconds"
        )
    return priority, *policy.time_limits(min(given_us, MAX_TIMEOUT_US), request.deadline_ns, monotonic_ns())


def _count_refusal(served: Served, error: HeadraceError) -> None:
    """A request was not accepted: note it in the model's statistics."""
    if isinstance(error, Overloaded):
        served.statistics.refused(error.reason)
    elif isinstance(error, DeadlineExceeded):
        served.statistics.refused("expired")
    else:
        served.statistics.failed("OTHER", 0)
