"""One request to one response, over a made-up repository."""

import asyncio
import gc
import weakref
from time import monotonic_ns
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from headrace.batching.policy import BatchLimits
from headrace.batching.queue import BatchQueue
from headrace.batching.queue_policy import QueuePolicy
from headrace.core.ensemble import Step, plan_ensemble
from headrace.core.errors import DeadlineExceeded, InternalError, InvalidRequest, Kind, NotFound, NotReady, Overloaded
from headrace.core.model import Signature, TensorSpec
from headrace.core.request import InferRequest, RequestedOutput
from headrace.core.statistics import Statistics
from headrace.core.tensor import DataType, Tensor
from headrace.core.validation import InputChecker
from headrace.engine import COUNTED_BYTES, Engine
from headrace.repository.served_ensemble import ServedEnsemble

MS = 1_000_000
X = TensorSpec("x", DataType.UINT8, (-1, 2))


class Served:
    """A model version whose instances are the test itself."""

    version = "3"
    default_priority = 0
    decoupled = cached = False
    folder = SimpleNamespace(sequence=None)

    def __init__(self, max_batch_size=4, max_size=3, default_timeout_us=0, inputs=(X,), **more):
        self.max_batch_size = max_batch_size
        self.default_timeout_us = default_timeout_us
        self.policy = QueuePolicy(max_size, default_timeout_us)
        self.policies = {3: QueuePolicy(max_size, 60_000, delays=True), 4: QueuePolicy(max_size, 5000)}
        self.statistics = Statistics()
        self.checker = InputChecker("m", Signature(inputs, (TensorSpec("y", DataType.UINT8, None),), max_batch_size))
        self.queue = BatchQueue("m", BatchLimits(max(1, max_batch_size)), max_size, **more)

    def priority(self, parameters, *, for_another=False):
        return parameters.get("priority", 7)

    async def answer(self, shape=None):
        """Run the next batch: its one output is its input, in this shape if one is given."""
        batch = await asyncio.wait_for(self.queue.take(), 30)
        for one in batch:
            x = one.inputs.tensors[0]
            one.resolve((Tensor("y", x.datatype, x.shape if shape is None else shape, bytes(x.data)),), monotonic_ns())
        self.queue.finished(batch)
        return batch


class Models:
    """A repository of one model."""

    def __init__(self, served):
        self.served = served

    def lookup(self, name, version):
        if (name, version) not in {("m", ""), ("m", "3")}:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        return self.served


def engine_of(served, max_inflight_bytes=1 << 30):
    return Engine(Models(served), max_inflight_bytes)


def request(rows=1, name="m", data=None, outputs=(), deadline_ns=0, **parameters):
    data = bytes(range(rows * 2)) if data is None else data
    x = Tensor("x", DataType.UINT8, (rows, 2), data)
    return InferRequest(name, "", "r-1", (x,), tuple(map(RequestedOutput, outputs)), parameters, deadline_ns)


@pytest.fixture
async def loop_errors():
    """What the event loop was told of: exceptions in callbacks, and those that nobody looked at."""
    errors = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    return errors


async def settle():
    for _ in range(8):
        await asyncio.sleep(0)


async def test_a_request_is_answered_by_the_version_that_ran_it():
    served = Served()
    future = engine_of(served).infer(request(2, outputs=["y"]))
    await served.answer()
    response = await future
    assert (response.model, response.version, response.id) == ("m", "3", "r-1")
    assert response.outputs == (Tensor("y", DataType.UINT8, (2, 2), bytes(range(4))),)
    assert served.statistics.success == 1


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (request(name="other"), NotFound),
        (request(data=b"1"), InvalidRequest),
        (request(outputs=["z"]), InvalidRequest),
        (request(timeout=-1), InvalidRequest),
        (request(timeout=True), InvalidRequest),
        (request(timeout="soon"), InvalidRequest),
        (request(timeout=1.5), InvalidRequest),
    ],
)
async def test_what_cannot_be_accepted_is_refused_at_once_and_leaves_nothing(bad, kind):
    served = Served()
    with pytest.raises(kind):
        engine_of(served).infer(bad)
    assert len(served.queue) == 0


async def test_after_stop_nothing_more_is_accepted_and_what_was_is_answered():
    served = Served()
    engine = engine_of(served)
    future = engine.infer(request())
    engine.stop_accepting()
    with pytest.raises(NotReady, match="stopping"):
        engine.infer(request())
    await served.answer()
    assert (await future).outputs


async def test_a_request_without_parameters_has_the_default_priority():
    served = Served(max_size=9)
    engine = engine_of(served)
    engine.infer(request())
    engine.infer(request(priority=2))
    batches = [await served.answer(), await served.answer()]
    assert [[one.priority for one in batch] for batch in batches] == [[0], [2]]


async def test_a_full_queue_refuses_and_counts_it():
    served = Served(max_size=2)
    engine = engine_of(served)
    accepted = [engine.infer(request()) for _ in range(2)]
    with pytest.raises(Overloaded):
        engine.infer(request())
    assert served.statistics.failures == {"REJECTED": 1}
    await served.answer()
    await asyncio.gather(*accepted)
    engine.infer(request())


async def test_a_request_that_would_come_after_the_models_objective_is_refused_and_counted():
    served = Served(max_size=100, objective_ns=50 * MS, adaptive=True)
    served.queue.joined()
    for _ in range(20):
        served.queue.curves.observe(None, 4, 20 * MS)
    engine = engine_of(served)
    for _ in range(2):
        engine.infer(request(4))
    with pytest.raises(Overloaded, match=r"objective of 50 ms \(batching\.p99_objective_ms\)"):
        engine.infer(request(4))
    assert served.statistics.failures == {"REJECTED": 1}
    assert len(served.queue) == 2


async def test_a_refused_request_is_forgotten_whatever_time_it_had(loop_errors):
    """Else each one refused under overload is kept, with its tensors, until its time is up, and counted again."""
    served = Served(max_size=1)
    engine = engine_of(served)
    accepted = engine.infer(request())
    with pytest.raises(Overloaded):
        engine.infer(request(timeout=100_000))
    await asyncio.sleep(0.15)
    await served.answer()
    await accepted
    assert served.statistics.failures == {"REJECTED": 1}
    assert loop_errors == []


async def test_the_requests_own_timeout():
    served = Served()
    with pytest.raises(DeadlineExceeded, match="did not answer within the"):
        await engine_of(served).infer(request(timeout=50_000))
    assert served.statistics.failures == {"REJECTED": 1}


async def test_a_level_that_delays_keeps_a_request_whose_time_is_over():
    served = Served(max_batch_size=1)
    future = engine_of(served).infer(request(priority=3, timeout=1))
    await asyncio.sleep(0.01)
    assert not future.done()
    await served.answer()
    await future


async def test_a_timeout_can_shorten_a_levels_own_and_not_lengthen_it():
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(engine_of(Served()).infer(request(priority=4, timeout=60_000_000)), 30)


async def test_what_is_refused_or_given_up_is_counted_by_its_reason():
    served = Served(max_size=1)
    engine = engine_of(served)
    with pytest.raises(DeadlineExceeded):
        engine.infer(request(deadline_ns=1))
    waiting = engine.infer(request(timeout=100_000))
    with pytest.raises(Overloaded):
        engine.infer(request())
    with pytest.raises(DeadlineExceeded):
        await waiting
    assert served.statistics.refusals == {"queue_full": 1, "expired": 2}
    assert served.statistics.failures == {"REJECTED": 3}


async def test_the_models_default_timeout():
    with pytest.raises(DeadlineExceeded):
        await engine_of(Served(default_timeout_us=5000)).infer(request())


@pytest.mark.parametrize(("transport_ms", "timeout_us"), [(5, 60_000_000), (60_000, 5000)])
async def test_the_earlier_of_two_deadlines_counts(transport_ms, timeout_us):
    asked = request(deadline_ns=monotonic_ns() + transport_ms * MS, timeout=timeout_us)
    with pytest.raises(DeadlineExceeded):
        await asyncio.wait_for(engine_of(Served()).infer(asked), 30)


@pytest.mark.parametrize("timeout_us", [2**63, 10**20, 10**400], ids=["2^63", "10^20", "10^400"])
async def test_a_timeout_beyond_all_measure_is_the_clients_fault_or_none_at_all(timeout_us):
    served = Served()
    try:
        future = engine_of(served).infer(request(timeout=timeout_us))
    except InvalidRequest:
        return
    await served.answer()
    assert (await future).outputs


async def test_cancelling_takes_the_request_back():
    served = Served()
    engine = engine_of(served)
    gone, stays = engine.infer(request()), engine.infer(request())
    gone.cancel()
    assert len(await served.answer()) == 1
    assert (await stays).outputs
    assert served.statistics.failures == {"CANCELED": 1}


async def test_large_requests_are_bounded_by_their_bytes_and_small_ones_are_not():
    served = Served(max_size=100, inputs=(TensorSpec("x", DataType.UINT8, (-1, 2)),))
    engine = engine_of(served, max_inflight_bytes=3 * COUNTED_BYTES)
    rows = COUNTED_BYTES // 2
    served.max_batch_size = rows
    large = [engine.infer(request(rows, data=bytes(COUNTED_BYTES))) for _ in range(3)]
    assert engine.inflight_bytes == 3 * COUNTED_BYTES
    with pytest.raises(Overloaded, match="--max-inflight-bytes"):
        engine.infer(request(rows, data=bytes(COUNTED_BYTES)))
    assert served.statistics.failures == {"REJECTED": 1}
    engine.infer(request())
    large[0].cancel()
    await settle()
    assert engine.inflight_bytes == 2 * COUNTED_BYTES
    large.append(engine.infer(request(rows, data=bytes(COUNTED_BYTES))))
    while len(served.queue):
        await served.answer()
    await settle()
    assert engine.inflight_bytes == 0


async def test_a_request_larger_than_the_bound_still_runs_when_it_is_the_only_one():
    served = Served()
    served.max_batch_size = COUNTED_BYTES
    engine = engine_of(served, max_inflight_bytes=1024)
    future = engine.infer(request(COUNTED_BYTES, data=bytes(2 * COUNTED_BYTES)))
    await served.answer()
    await future
    await settle()
    assert engine.inflight_bytes == 0


@pytest.mark.parametrize(("caller", "room"), [("ensemble", True), ("model", False)])
async def test_what_an_ensemble_was_accepted_with_leaves_its_steps_their_room(caller, room):
    served = Served(max_batch_size=COUNTED_BYTES)
    engine = engine_of(served, max_inflight_bytes=3 * COUNTED_BYTES)
    engine.repository.find = lambda name, _: object.__new__(ServedEnsemble) if name == "ensemble" else served
    engine.inflight_bytes = 2 * COUNTED_BYTES  # the ensemble's own inputs
    step = msgspec.structs.replace(request(COUNTED_BYTES, data=bytes(2 * COUNTED_BYTES)), callers=(caller,))
    if not room:
        with pytest.raises(Overloaded):
            engine.infer(step)
        return
    answer = engine.infer(step)
    assert engine.inflight_bytes == 4 * COUNTED_BYTES
    with pytest.raises(Overloaded):
        engine.infer(request(COUNTED_BYTES, data=bytes(2 * COUNTED_BYTES)))
    await served.answer()
    assert (await answer).outputs


async def test_more_rows_than_a_batch_holds_run_in_parts_and_come_back_as_one():
    served = Served(max_batch_size=4)
    future = engine_of(served).infer(request(10))
    rows = [sum(one.rows for one in await served.answer()) for _ in range(3)]
    assert rows == [4, 4, 2]
    response = await future
    assert response.outputs == (Tensor("y", DataType.UINT8, (10, 2), bytes(range(20))),)
    assert (served.statistics.success, served.statistics.failures) == (1, {})


async def test_parts_may_end_in_any_order():
    served = Served(max_batch_size=4)
    future = engine_of(served).infer(request(10))
    batches = [await served.queue.take() for _ in range(3)]
    for batch in reversed(batches):
        x = batch[0].inputs.tensors[0]
        batch[0].resolve((Tensor("y", x.datatype, x.shape, bytes(x.data)),), monotonic_ns())
    assert (await future).outputs[0].data == bytes(range(20))


async def test_the_first_part_that_fails_fails_all_and_the_others_are_not_run():
    served = Served(max_batch_size=4)
    future = engine_of(served).infer(request(12))
    batch = await served.queue.take()
    batch[0].fail(InternalError("model 'm': broken"))
    served.queue.finished(batch)
    with pytest.raises(InternalError, match="broken"):
        await future
    await settle()
    assert served.queue.take_now() == []
    assert len(served.queue) == 0
    assert (served.statistics.success, served.statistics.failures) == (0, {"BACKEND": 1})


async def test_cancelling_takes_all_parts_back():
    served = Served(max_batch_size=4)
    future = engine_of(served).infer(request(12))
    future.cancel()
    await settle()
    assert served.queue.take_now() == []
    assert served.statistics.failures == {"CANCELED": 1}


async def test_time_that_is_up_is_up_for_all_parts():
    served = Served(max_batch_size=4)
    with pytest.raises(DeadlineExceeded):
        await engine_of(served).infer(request(12, timeout=5000))
    await settle()
    assert served.queue.take_now() == []
    assert served.statistics.failures == {"REJECTED": 1}


async def test_a_request_in_parts_needs_a_place_as_any_other():
    served = Served(max_batch_size=4, max_size=1)
    engine = engine_of(served)
    engine.infer(request(12))
    with pytest.raises(Overloaded):
        engine.infer(request(12, timeout=100_000))
    with pytest.raises(Overloaded):
        engine.infer(request())
    assert served.statistics.failures == {"REJECTED": 2}


@pytest.mark.parametrize("shape", [(), (3, 1)])
async def test_parts_that_cannot_be_joined_are_an_error_and_never_silence(loop_errors, shape):
    served = Served(max_batch_size=4)
    future = engine_of(served).infer(request(10))
    await served.answer()
    await served.answer(shape)
    await served.answer()
    with pytest.raises(InternalError):
        await asyncio.wait_for(future, 30)
    assert loop_errors == []
    assert served.statistics.success == 0


async def test_a_request_that_does_not_fit_counts_as_a_failure_of_its_model():
    served = Served()
    with pytest.raises(InvalidRequest):
        engine_of(served).infer(request(outputs=["nothing"]))
    assert served.statistics.failures == {"OTHER": 1}


@pytest.mark.parametrize("decoupled", [False, True])
async def test_what_comes_while_the_model_cannot_serve_counts_as_a_failure_too(decoupled):
    served = Served()
    served.decoupled = decoupled
    served.queue.refuse(Kind.NOT_READY, "its worker is gone")
    engine = engine_of(served)
    with pytest.raises(NotReady, match="its worker is gone"):
        (engine.stream if decoupled else engine.infer)(request())
    assert served.statistics.failures == {"OTHER": 1}


async def test_a_decoupled_model_is_given_no_more_rows_than_it_takes():
    served = Served(max_batch_size=4)
    served.decoupled = True
    engine = engine_of(served)
    with pytest.raises(InvalidRequest, match="has 5 rows, expected at most 4"):
        engine.stream(request(5))
    assert served.statistics.failures == {"OTHER": 1}
    engine.stream(request(4))
    assert [one.rows for one in served.queue.take_now()] == [4]


@pytest.mark.parametrize("leaves", [False, True])
async def test_an_ensemble_that_streams_holds_its_inputs_until_its_end(leaves):
    served = Served(max_batch_size=COUNTED_BYTES)
    served.decoupled = True
    step = Signature((X,), (TensorSpec("y", DataType.UINT8, None),), COUNTED_BYTES, decoupled=True)
    plan = plan_ensemble("e", [Step("m", "", {"x": "x"}, {"y": "y"})], (), (), {("m", ""): step})
    config = SimpleNamespace(response_cache=False)
    versions = {1: SimpleNamespace(print="")}
    folder = SimpleNamespace(name="e", versions=versions, config_print="", config=config, labels={})
    ensemble = ServedEnsemble(folder, 1, plan, lambda *_: True)
    engine = engine_of(served)
    engine.repository.lookup = lambda name, _: ensemble if name == "e" else served
    stream = engine.stream(request(COUNTED_BYTES // 2, name="e", data=bytes(COUNTED_BYTES)))
    await settle()
    assert engine.inflight_bytes == 2 * COUNTED_BYTES, "its own inputs and those of the step"
    (pending,) = served.queue.take_now()
    if leaves:
        stream.cancel()
    else:
        pending.ended()
    await settle()
    assert engine.inflight_bytes == 0
    assert ensemble.running == 0


async def test_one_request_may_not_take_a_thousand_batches(monkeypatch):
    monkeypatch.setattr("headrace.engine.MAX_PARTS", 3)
    served = Served()
    engine = engine_of(served)
    most = 3 * served.max_batch_size
    with pytest.raises(InvalidRequest, match=f"has {most + 1} rows, expected at most {most}"):
        engine.infer(request(most + 1))
    assert len(served.queue) == 0
    whole = engine.infer(request(most))
    for _ in range(3):
        await served.answer()
    assert (await whole).outputs[0].shape == (most, 2)


@pytest.mark.parametrize("rows", [COUNTED_BYTES, 3 * COUNTED_BYTES], ids=["whole", "in parts"])
@pytest.mark.parametrize("leaves", [True, False], ids=["left", "expired"])
async def test_a_large_request_that_nobody_waits_for_takes_no_memory_while_it_lies_in_the_queue(rows, leaves):
    served = Served(max_batch_size=COUNTED_BYTES, max_size=10)
    engine = engine_of(served)
    memory = np.zeros(rows * 2, np.uint8)
    freed = weakref.ref(memory)
    answer = engine.infer(request(rows, data=memory.data, deadline_ns=0 if leaves else monotonic_ns() + MS))
    assert engine.inflight_bytes == rows * 2
    del memory
    if leaves:
        answer.cancel()
    await asyncio.wait([answer], timeout=30)
    assert answer.cancelled() or isinstance(answer.exception(), DeadlineExceeded)
    await settle()
    gc.collect()
    assert len(served.queue) == -(-rows // COUNTED_BYTES), "no instance has looked for a batch since"
    assert engine.inflight_bytes == 0
    assert freed() is None
    assert served.queue.take_now() == []


async def test_what_a_worker_was_given_is_kept_for_it_whoever_leaves():
    served = Served(max_batch_size=COUNTED_BYTES)
    memory = np.zeros(COUNTED_BYTES * 2, np.uint8)
    answer = engine_of(served).infer(request(COUNTED_BYTES, data=memory.data))
    (taken,) = served.queue.take_now()
    answer.cancel()
    await settle()
    assert taken.inputs.tensors[0].data.obj is memory
    served.queue.finished([taken])


async def test_a_stream_that_cannot_be_given_its_form_is_one_failure_and_leaves_nothing():
    served = Served()
    served.decoupled = True
    wrong = (RequestedOutput("y", {"classification": "many"}),)
    asked = msgspec.structs.replace(request(deadline_ns=monotonic_ns() + MS), outputs=wrong)
    with pytest.raises(InvalidRequest, match="classification"):
        engine_of(served).stream(asked)
    await asyncio.sleep(0.005)  # a clock that went on would count it once more
    assert served.statistics.failures == {"OTHER": 1}
