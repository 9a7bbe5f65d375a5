"""What is noted of a request that is traced, with a trace that keeps it."""

import asyncio
from time import monotonic_ns

import pytest

from headrace.batching.pending import Pending
from headrace.core.errors import InternalError
from headrace.core.request import InferRequest
from headrace.core.tensor import DataType, Tensor
from headrace.core.validation import ModelInputs
from headrace.traced_request import follow

X = Tensor("x", DataType.UINT8, (1,), b"\1")
Y = Tensor("y", DataType.UINT8, (1,), b"\2")


class Trace:
    """Keeps what is noted, and how often it was ended."""

    def __init__(self):
        self.points = []
        self.noted = []
        self.ends = 0

    def mark(self, name, ns):
        self.points.append((name, ns))

    def tensors(self, activity, tensors):
        self.noted.append((activity, tuple(tensors)))

    def end(self):
        self.ends += 1


class Tracer:
    """Samples every request, or none."""

    def __init__(self, trace):
        self.trace = trace
        self.asked = []

    def sample(self, model, version, request_id):
        self.asked.append((model, version, request_id))
        return self.trace


@pytest.fixture
async def pending():
    request = InferRequest("m", "", "r-1", (X,))
    return Pending(request, ModelInputs((X,), 1, None), "3", None, asyncio.get_running_loop())


async def test_a_request_that_is_not_sampled_is_left_alone(pending):
    tracer = Tracer(None)
    follow(tracer, pending)
    assert tracer.asked == [("m", "3", "r-1")]
    assert not pending.traced


async def test_the_points_of_a_request_that_is_answered(pending):
    trace = Trace()
    follow(Tracer(trace), pending)
    assert pending.traced
    queued_ns = pending.queued_at_ns
    assert trace.points == [("REQUEST_START", queued_ns), ("QUEUE_START", queued_ns)]
    pending.taken_at_ns = queued_ns + 10
    pending.timings = (1, 20, 300)
    pending.resolve((Y,), monotonic_ns())
    await asyncio.sleep(0)
    assert trace.points[2:6] == [
        ("COMPUTE_START", queued_ns + 10),
        ("COMPUTE_INPUT_END", queued_ns + 11),
        ("COMPUTE_OUTPUT_START", queued_ns + 31),
        ("COMPUTE_END", queued_ns + 331),
    ]
    (name, ended_ns) = trace.points[6]
    assert name == "REQUEST_END"
    assert queued_ns <= ended_ns <= monotonic_ns()
    assert trace.noted == [("TENSOR_QUEUE_INPUT", (X,)), ("TENSOR_BACKEND_OUTPUT", (Y,))]
    assert trace.ends == 1


@pytest.mark.parametrize("leaves", [True, False])
async def test_one_that_failed_or_whose_client_has_left_was_not_computed(pending, leaves):
    trace = Trace()
    follow(Tracer(trace), pending)
    if leaves:
        pending.future.cancel()
    else:
        pending.fail(InternalError("broken"))
    await asyncio.sleep(0)
    assert [name for name, _ in trace.points] == ["REQUEST_START", "QUEUE_START", "REQUEST_END"]
    assert (len(trace.noted), trace.ends) == (1, 1)
