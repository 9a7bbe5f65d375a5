"""One request to an ensemble with a decoupled step, over made-up steps."""

import asyncio
import gc
import weakref
from types import SimpleNamespace

import pytest

from headrace.batching.response_stream import WINDOW, WINDOW_BYTES, ResponseStream
from headrace.core.ensemble import Step, plan_ensemble
from headrace.core.model import Signature, TensorSpec
from headrace.core.request import InferRequest, InferResponse
from headrace.core.statistics import Statistics
from headrace.core.tensor import DataType, Tensor
from headrace.core.validation import ModelInputs
from headrace.streamed_pipeline import StreamedPipeline

COUNT = Signature((TensorSpec("n", DataType.UINT8, (-1,)),), (TensorSpec("i", DataType.UINT8, (-1,)),), decoupled=True)
PLAN = plan_ensemble("e", [Step("count", "", {"n": "n"}, {"i": "i"})], (), (), {("count", ""): COUNT})
N = Tensor("n", DataType.UINT8, (1,), b"\3")


class Whole:
    """A request, the ensemble that it is for, and the stream of its first step; others answer at once."""

    def __init__(self, plan=PLAN, deadline_ns=0):
        self.served = SimpleNamespace(plan=plan, statistics=Statistics(), version="1", running=0, idle=0)
        self.asked = []
        self.served.notice_idle = self._count
        self.step = ResponseStream(decoupled=True)
        request = InferRequest("e", "", "", (N,))
        inputs = ModelInputs((N,), 1, None)
        self.pipeline = StreamedPipeline(self.served, request, inputs, deadline_ns, None, self._ask)
        self.stream = self.pipeline.stream

    def _ask(self, request):
        self.asked.append(request)
        if len(self.asked) == 1:
            return self.step
        answer = ResponseStream(decoupled=False)
        answer.put(InferResponse(request.model, "1", "", (Tensor("d", DataType.UINT8, (1,), b"\2"),)))
        answer.end()
        return answer

    def _count(self):
        self.served.idle += 1

    def respond(self, nbytes=1):
        self.step.put(InferResponse("count", "1", "", (Tensor("i", DataType.UINT8, (nbytes,), bytes(nbytes)),)))


async def settle():
    for _ in range(20 * WINDOW):
        await asyncio.sleep(0)


@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_is_forgotten_also_before_anything_has_begun(begun):
    whole = Whole()
    if begun:
        await settle()
    assert whole.served.running == 1
    whole.stream.cancel()
    await settle()
    assert (whole.served.running, whole.served.idle) == (0, 1)
    assert whole.served.statistics.failures == {"CANCELED": 1}


async def test_the_end_of_the_step_is_the_end_of_the_whole():
    whole = Whole()
    whole.respond()
    whole.step.end()
    assert [item.outputs[0].name async for item in whole.stream] == ["i"]
    await settle()
    assert (whole.served.running, whole.served.statistics.success) == (0, 1)


@pytest.mark.parametrize(("nbytes", "ahead"), [(1, WINDOW), (WINDOW_BYTES // 2, 2), (3 * WINDOW_BYTES, 1)])
async def test_no_more_is_made_than_the_client_has_room_for(nbytes, ahead):
    whole = Whole()
    for _ in range(3 * WINDOW):
        whole.respond(nbytes)
    await settle()
    assert len(whole.stream._items) == ahead
    for _ in range(2 * WINDOW):
        await anext(whole.stream)
        await settle()
        assert len(whole.stream._items) <= ahead
    whole.stream.cancel()
    await settle()


async def test_a_deadline_holds_until_the_first_response():
    double = Signature((TensorSpec("i", DataType.UINT8, (-1,)),), (TensorSpec("d", DataType.UINT8, (-1,)),))
    steps = [Step("count", "", {"n": "n"}, {"i": "i"}), Step("double", "", {"i": "i"}, {"d": "d"})]
    whole = Whole(plan_ensemble("e", steps, (), (), {("count", ""): COUNT, ("double", ""): double}), deadline_ns=9)
    for _ in range(3):
        whole.respond()
    whole.step.end()
    assert [item.outputs[0].name async for item in whole.stream] == ["d"] * 3
    assert [asked.deadline_ns for asked in whole.asked] == [9, 9, 0, 0]


@pytest.mark.parametrize("how", ["ended", "left", "left before it has begun"])
async def test_one_that_is_over_is_held_by_nobody(how):
    whole = Whole()
    gone = weakref.ref(whole.pipeline)
    gc.disable()
    try:
        if how != "left before it has begun":
            whole.respond()
            await anext(whole.stream)
        if how == "ended":
            whole.step.end()
        else:
            whole.stream.cancel()
        await settle()
        assert whole.served.running == 0
        whole.pipeline = whole.stream = None
        assert gone() is None
    finally:
        gc.enable()
