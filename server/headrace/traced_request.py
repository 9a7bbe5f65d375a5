"""A request that is traced: what is noted of it on its way, from its place in the queue to its answer."""

import asyncio
from time import monotonic_ns

from headrace.batching.pending import Pending
from headrace.core.request import InferResponse
from headrace.tracing import Trace, Tracer


def follow(tracer: Tracer, pending: Pending) -> None:
    """Note what happens to a request that is about to be queued, if its turn to be traced has come."""
    trace = tracer.sample(pending.request.model, pending.version, pending.request.id)
    if trace is not None:
        _note(trace, pending)


def _note(trace: Trace, pending: Pending) -> None:
    """Everything from here on; it is written when the request is answered."""
    pending.traced = True
    trace.mark("REQUEST_START", pending.queued_at_ns)
    trace.mark("QUEUE_START", pending.queued_at_ns)
    trace.tensors("TENSOR_QUEUE_INPUT", pending.request.inputs)

    def on_done(done: asyncio.Future[InferResponse]) -> None:
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
