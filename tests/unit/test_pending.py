"""A request that was accepted is answered once, on every path."""

import asyncio
import gc
import weakref
from time import monotonic_ns

import numpy as np
import pytest

from headrace.batching.pending import Pending
from headrace.core.errors import DeadlineExceeded, InternalError, Kind, of_kind
from headrace.core.request import InferRequest, RequestedOutput
from headrace.core.statistics import Statistics
from headrace.core.tensor import DataType, Tensor
from headrace.core.validation import ModelInputs

MS = 1_000_000
X, Y, Z = (Tensor(name, DataType.UINT8, (1, 1), b"\x01") for name in "xyz")


@pytest.fixture
def statistics():
    return Statistics()


@pytest.fixture
def accept(statistics):
    """A function that accepts a request."""

    def accept(outputs=(), deadline_ns=0, **more):
        request = InferRequest("m", "", "r-1", (X,), tuple(map(RequestedOutput, outputs)))
        inputs = ModelInputs((X,), 1, None)
        more.setdefault("statistics", statistics)
        return Pending(request, inputs, "3", loop=asyncio.get_running_loop(), deadline_ns=deadline_ns, **more)

    return accept


async def test_an_answer_names_the_version_that_gave_it_and_every_output(accept):
    pending = accept()
    assert not pending.dead
    pending.resolve((Y, Z), monotonic_ns())
    response = await pending.future
    assert (response.model, response.version, response.id, response.outputs) == ("m", "3", "r-1", (Y, Z))
    assert pending.dead


async def test_outputs_come_as_asked_for_in_that_order(accept):
    pending = accept(outputs="zy")
    pending.resolve((X, Y, Z), 0)
    assert (await pending.future).outputs == (Z, Y)


async def test_times_are_counted_from_the_arrival_at_the_queue(accept, statistics):
    pending = accept()
    pending.queued_at_ns, pending.taken_at_ns = 100 * MS, 104 * MS
    pending.resolve((Y,), 110 * MS)
    assert (statistics.success, statistics.success_ns, statistics.queue_ns) == (1, 10 * MS, 4 * MS)


async def test_a_failure_reaches_the_waiting_one_as_it_is(accept):
    pending = accept()
    error = InternalError("model 'm': broken")
    pending.fail(error)
    with pytest.raises(InternalError) as caught:
        await pending.future
    assert caught.value is error


@pytest.mark.parametrize("kind", Kind)
async def test_failures_are_counted_under_tritons_reasons(accept, statistics, kind):
    pending = accept()
    pending.fail(of_kind(kind, "no"))
    assert pending.future.exception().kind is kind
    reasons = {Kind.OVERLOADED: "REJECTED", Kind.DEADLINE: "REJECTED", Kind.CANCELLED: "CANCELED"}
    assert statistics.failures == {reasons.get(kind, "BACKEND"): 1}


async def test_only_the_first_answer_counts(accept, statistics):
    answered, failed = accept(), accept()
    answered.resolve((Y,), 0)
    answered.fail(InternalError("late"))
    answered.resolve((Z,), 0)
    failed.fail(InternalError("first"))
    failed.resolve((Y,), 0)
    failed.fail(InternalError("late"))
    assert (await answered.future).outputs == (Y,)
    with pytest.raises(InternalError, match="first"):
        await failed.future
    assert (statistics.success, statistics.failures) == (1, {"BACKEND": 1})


async def test_a_client_that_left_makes_it_dead_and_nothing_of_it_is_answered(accept, statistics):
    pending = accept()
    pending.future.cancel()
    assert pending.dead
    pending.bury()
    pending.resolve((Y,), 0)
    pending.fail(InternalError("late"))
    assert pending.future.cancelled()
    assert (statistics.success, statistics.failures) == (0, {"CANCELED": 1})


async def test_time_that_is_up_is_an_error_that_says_how_much_there_was(accept, statistics):
    deadline_ns = monotonic_ns() + 50 * MS
    pending = accept(deadline_ns=deadline_ns)
    had_ms = max(0, deadline_ns - pending.queued_at_ns) / MS
    with pytest.raises(DeadlineExceeded, match=f"model 'm' did not answer within the {had_ms:.4g} ms"):
        await pending.future
    assert pending.dead
    pending.bury()
    assert statistics.failures == {"REJECTED": 1}, "and it is counted once"


async def test_a_deadline_in_the_past_is_up_at_once_but_not_before_the_caller_has_the_future(accept):
    pending = accept(deadline_ns=1)
    assert not pending.future.done()
    with pytest.raises(DeadlineExceeded):
        await pending.future


@pytest.mark.parametrize("end", ["resolve", "fail", "bury"])
async def test_an_ended_request_leaves_no_timer_behind(accept, end):
    pending = accept(deadline_ns=monotonic_ns() + 60_000 * MS)
    timer = pending._timer
    if end == "resolve":
        pending.resolve((Y,), 0)
    elif end == "fail":
        pending.fail(InternalError("no"))
        assert pending.future.exception()
    else:
        pending.future.cancel()
        pending.bury()
    assert timer.cancelled()


async def test_without_a_deadline_there_is_no_timer(accept):
    assert accept()._timer is None


async def test_a_part_of_a_request_is_not_counted_as_one(accept, statistics):
    answered, failed = accept(statistics=None), accept(statistics=None)
    answered.resolve((Y,), 0)
    failed.fail(InternalError("no"))
    assert failed.future.exception()
    assert (statistics.success, statistics.failures) == (0, {})


async def test_one_whose_outputs_cannot_be_given_is_held_by_nobody(accept):
    pending = accept(outputs="z")
    memory = np.zeros(1, np.uint8)
    freed = weakref.ref(memory)
    pending.inputs = ModelInputs((Tensor("x", DataType.UINT8, (1, 1), memory.data),), 1, None)
    gc.disable()
    try:
        pending.resolve((X, Y), 0)
        assert isinstance(pending.future.exception(), InternalError)
        del pending, memory
        assert freed() is None
    finally:
        gc.enable()
