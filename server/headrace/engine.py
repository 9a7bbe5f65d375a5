"""One request to its response or responses: look up, validate, enqueue. Front ends call this and nothing below it."""

import asyncio
from collections.abc import Sequence
from time import monotonic_ns

from headrace.batching.pending import OutputForm, Pending
from headrace.batching.queue_policy import MAX_TIMEOUT_US
from headrace.batching.response_stream import ResponseStream
from headrace.batching.split import SplitRequest
from headrace.batching.streamed import StreamedRequest
from headrace.core.classification import classification_count, classify
from headrace.core.errors import (
    DeadlineExceeded,
    HeadraceError,
    InternalError,
    InvalidRequest,
    NotReady,
    Overloaded,
    Unsupported,
)
from headrace.core.request import InferRequest, InferResponse
from headrace.core.rows import slice_rows
from headrace.core.tensor import Tensor
from headrace.core.validation import ModelInputs
from headrace.pipeline import Pipeline
from headrace.recording.recorder import Recorder
from headrace.repository.repository import Repository, Served
from headrace.repository.served_ensemble import ServedEnsemble
from headrace.response_cache import Cache, Outputs, cache_key
from headrace.streamed_pipeline import StreamedPipeline
from headrace.tracing import Trace, Tracer

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
        self._cache = cache
        self._tracer = tracer
        self._recorder = recorder
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        if cache is not None:
            repository.on_retired = lambda served: cache.forget(served.folder.name, self._identity(served))

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
        if served.cached and self._cache is not None:
            return self._infer_cached(self._cache, served, request, inputs)
        return self._run(served, request, inputs)

    def stream(self, request: InferRequest) -> ResponseStream:
        """Accept a request for any model; its responses come as they are made. Cancel the stream to take it back.

        Raises:
            HeadraceError: as ``infer``.
        """
        served = self._served(request)
        if not served.decoupled:
            return _single(self.infer(request))
        inputs = self._checked(served, request)
        size = self._room_for(served, request)
        try:
            priority, deadline_ns, late_ns = _terms(served, request)
            if isinstance(served, ServedEnsemble):
                form = _form(self.repository, served, request)
                stream = StreamedPipeline(served, request, inputs, deadline_ns, form, self.stream).stream
                if self._recorder is not None and self._recorder.active:
                    self._recorder.take(served, inputs)
                return stream
            served.queue.make_room(priority, deadline_ns, inputs.rows, late_ns)
        except (Overloaded, DeadlineExceeded, InvalidRequest) as error:
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
        pending.form = _form(self.repository, served, request)
        served.queue.put_part(pending)
        if self._tracer is not None and self._tracer.active:
            self._trace(self._tracer, pending)
        if self._recorder is not None and self._recorder.active:
            self._recorder.take(served, inputs)
        if size >= COUNTED_BYTES:
            self._count(size, pending.future)
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
        if size >= COUNTED_BYTES and self.inflight_bytes and self.inflight_bytes + size > self._max_inflight_bytes:
            error = Overloaded(
                f"model '{request.model}': the server holds {self.inflight_bytes} bytes of unanswered requests and "
                f"takes at most {self._max_inflight_bytes} (--max-inflight-bytes)",
                "inflight_bytes",
            )
            _count_refusal(served, error)
            raise error
        return size

    def _count(self, size: int, future: Answer) -> None:
        """Count a large request's bytes until it is answered."""
        self.inflight_bytes += size
        future.add_done_callback(lambda _: self._forget(size))

    def _forget(self, size: int) -> None:
        self.inflight_bytes -= size

    # -- running ------------------------------------------------------------------------------------------

    def _run(self, served: Served, request: InferRequest, inputs: ModelInputs) -> Answer:
        size = self._room_for(served, request)
        try:
            priority, deadline_ns, late_ns = _terms(served, request)
            if isinstance(served, ServedEnsemble):
                future = Pipeline(
                    served, request, inputs, deadline_ns, _form(self.repository, served, request), self.infer
                ).future
            else:
                future = self._enqueue(served, request, inputs, priority, deadline_ns, late_ns)
        except (Overloaded, DeadlineExceeded, InvalidRequest) as error:
            _count_refusal(served, error)
            raise
        if self._recorder is not None and self._recorder.active:
            self._recorder.take(served, inputs)
        if size >= COUNTED_BYTES:
            self._count(size, future)
        return future

    def _enqueue(
        self,
        served: Served,
        request: InferRequest,
        inputs: ModelInputs,
        priority: int,
        deadline_ns: int,
        late_ns: int,
    ) -> Answer:
        # Before anything is made of the request, so that a refused one leaves nothing.
        queue = served.queue
        queue.make_room(priority, deadline_ns, inputs.rows, late_ns)
        if queue.objective is not None:
            queue.admit(inputs.key, inputs.rows, priority)
        form = _form(self.repository, served, request) if request.outputs else None
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
            self._trace(self._tracer, pending)
        served.queue.put_part(pending)
        return pending.future

    def _enqueue_in_parts(
        self,
        served: Served,
        request: InferRequest,
        inputs: ModelInputs,
        priority: int,
        deadline_ns: int,
        late_ns: int,
        form: OutputForm | None,
    ) -> Answer:
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
        return SplitRequest(request, served.version, parts, served.statistics).future

    @staticmethod
    def _trace(tracer: Tracer, pending: Pending) -> None:
        trace = tracer.sample(pending.request.model, pending.version, pending.request.id)
        if trace is not None:
            _follow(trace, pending)

    # -- the response cache -------------------------------------------------------------------------------

    def _infer_cached(self, cache: Cache, served: Served, request: InferRequest, inputs: ModelInputs) -> Answer:
        started_ns = monotonic_ns()
        key = cache_key(request.model, self._identity(served), inputs.tensors, request.outputs, request.parameters)
        found = cache.get(key)
        if found is None:
            return self._run_and_keep(cache, key, served, request, inputs, monotonic_ns() - started_ns)
        if isinstance(found, tuple):
            future: Answer = self._loop.create_future()
            future.set_result(_from_cache(served, request, found, started_ns))
            return future

        async def look_elsewhere() -> InferResponse:
            outputs = await found
            if outputs is not None:
                return _from_cache(served, request, outputs, started_ns)
            return await self._run_and_keep(cache, key, served, request, inputs, monotonic_ns() - started_ns)

        return self._loop.create_task(look_elsewhere())

    def _identity(self, served: Served) -> str:
        """What changes when the same request may have another answer."""
        identity = f"{served.version}/{served.print}"
        if isinstance(served, ServedEnsemble):
            parts = [self.repository.find(*planned.step.part) for planned in served.plan.steps]
            identity = "|".join([identity, *(self._identity(part) for part in parts if part is not None)])
        return identity

    def _run_and_keep(
        self, cache: Cache, key: bytes, served: Served, request: InferRequest, inputs: ModelInputs, lookup_ns: int
    ) -> Answer:
        future = self._run(served, request, inputs)

        def keep(done: Answer) -> None:
            started_ns = monotonic_ns()
            if not done.cancelled() and done.exception() is None and not done.result().parameters:
                cache.put(key, done.result().outputs)
            served.statistics.cache_miss(lookup_ns + monotonic_ns() - started_ns)

        future.add_done_callback(keep)
        return future


def _from_cache(served: Served, request: InferRequest, outputs: Outputs, started_ns: int) -> InferResponse:
    served.statistics.cache_hit(monotonic_ns() - started_ns)
    return InferResponse(request.model, served.version, request.id, outputs)


def _single(future: Answer) -> ResponseStream:
    """The stream of a model that answers once."""
    stream = ResponseStream(decoupled=False)

    def on_cancel() -> None:
        future.cancel()

    stream.on_cancel = on_cancel

    def on_done(done: Answer) -> None:
        if not done.cancelled():
            error = done.exception()
            if error is None:
                stream.put(done.result())
            else:
                stream.put(error if isinstance(error, HeadraceError) else InternalError(str(error)))
        stream.end()

    future.add_done_callback(on_done)
    return stream


def _form(repository: Repository, served: Served, request: InferRequest) -> OutputForm | None:
    """What is to be made of the outputs before the client gets them: classes, where it asked for them."""
    counts = {
        output.name: count
        for output in request.outputs
        if output.parameters and (count := classification_count(output, request.model))
    }
    if not counts:
        return None
    batched = served.max_batch_size > 0
    labels = {name: _labels(repository, served, name) for name in counts}

    def form(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            classify(tensor, counts[tensor.name], batched, labels[tensor.name], request.model)
            if tensor.name in counts
            else tensor
            for tensor in outputs
        )

    return form


def _labels(repository: Repository, served: Served, output: str) -> Sequence[str]:
    """The labels of an output; where an ensemble has none of its own, those of the model that makes it."""
    own = served.info.labels.get(output)
    if own is not None or not isinstance(served, ServedEnsemble):
        return own or ()
    for planned in served.plan.steps:
        part = repository.find(*planned.step.part)
        for name, tensor in planned.step.outputs.items():
            if tensor == output and part is not None:
                return _labels(repository, part, name)
    return ()


def _follow(trace: Trace, pending: Pending) -> None:
    """Note what happens to a request, and have it written when it is answered."""
    pending.traced = True
    trace.mark("REQUEST_START", pending.queued_at_ns)
    trace.mark("QUEUE_START", pending.queued_at_ns)
    trace.tensors("TENSOR_QUEUE_INPUT", pending.request.inputs)

    def on_done(done: Answer) -> None:
        now_ns = monotonic_ns()
        if not done.cancelled() and done.exception() is None:
            at_ns = pending.taken_at_ns
            trace.mark("COMPUTE_START", at_ns)
            names = ("COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END")
            for name, took_ns in zip(names, pending.timings, strict=True):
                at_ns += took_ns
                trace.mark(name, at_ns)
            trace.tensors("TENSOR_BACKEND_OUTPUT", done.result().outputs)
        trace.mark("REQUEST_END", now_ns)
        trace.end()

    pending.future.add_done_callback(on_done)


def _terms(served: Served, request: InferRequest) -> tuple[int, int, int]:
    """The request's priority, until when it has to be answered, and from when on it is late; 0 for never.

    Raises:
        InvalidRequest: it asks for a priority or a timeout that there is not.
    """
    parameters = request.parameters
    if not parameters and not served.default_timeout_us:
        return served.default_priority, request.deadline_ns, 0
    priority = served.priority(parameters)
    policy = served.policies.get(priority, served.policy)
    given_us = parameters.get("timeout", 0)
    if not given_us and not policy.default_timeout_us:
        return priority, request.deadline_ns, 0
    if isinstance(given_us, bool) or not isinstance(given_us, int) or given_us < 0:
        raise InvalidRequest(f"parameter 'timeout' is {given_us!r}, expected a positive number of microseconds")
    return priority, *policy.time_limits(min(given_us, MAX_TIMEOUT_US), request.deadline_ns, monotonic_ns())


def _count_refusal(served: Served, error: HeadraceError) -> None:
    """A request was not accepted: note it in the model's statistics."""
    if isinstance(error, Overloaded):
        served.statistics.refused(error.reason)
    elif isinstance(error, DeadlineExceeded):
        served.statistics.refused("expired")
    else:
        served.statistics.failed("OTHER", 0)
