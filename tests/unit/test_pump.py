"""When an instance takes its next batch, over a real queue; the test is what the batches are handed to."""

import asyncio
from time import monotonic_ns

import pytest

from headrace.batching.pending import Pending
from headrace.batching.policy import BatchLimits
from headrace.batching.queue import BatchQueue
from headrace.core.errors import InternalError
from headrace.core.model import Signature, TensorSpec
from headrace.core.request import InferRequest
from headrace.core.tensor import DataType
from headrace.core.validation import ModelInputs
from headrace.workers.frames import Loaded
from headrace.workers.open_streams import OpenStreams
from headrace.workers.permit import Permit
from headrace.workers.pump import Pump
from headrace.workers.rate_limit import RateLimiter
from headrace.workers.resources import Claim, Resources
from headrace.workers.turns import CpuTurns

X = TensorSpec("x", DataType.UINT8, (-1, 2))
SIGNATURE = Signature((X,), (X,), max_batch_size=4)


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


class Pumped:
    """A pump, what it has sent and not got back, and its queue."""

    def __init__(self, queue=None):
        self.queue = BatchQueue("m", BatchLimits(4), 100) if queue is None else queue
        self.permit = Permit("m", CpuTurns(2), 1.0)
        self.sent = []
        self.full = False
        self.pump = Pump("m", self.queue, self.permit, OpenStreams("m"), self._send, of_sequences=False)

    def _send(self, slot, pending):
        if self.full:
            raise OSError("no room")
        self.pump.in_flight += len(pending)
        self.sent.append((slot, pending))

    def start(self, cpu_threads=0):
        return self.pump.start(Loaded(0, SIGNATURE, False, cpu_threads, (), 0.1))

    async def put(self, count):
        loop = asyncio.get_running_loop()
        made = []
        for _ in range(count):
            made.append(Pending(InferRequest("m", "", "", ()), ModelInputs((), 1, None), "1", None, loop))
            self.queue.put(made[-1])
        await settle()
        return made

    async def end(self):
        """The worker has run the oldest batch."""
        slot, pending = self.sent.pop(0)
        self.pump.in_flight -= len(pending)
        for one in pending:
            one.resolve((), monotonic_ns())
        self.pump.slots.give(slot)
        self.pump.batch_ended(pending)
        await settle()

    @property
    def sizes(self):
        """Requests of the batches that are at the worker."""
        return [len(pending) for _, pending in self.sent]


@pytest.fixture
async def pumped():
    made = Pumped()
    yield made
    made.pump.stop()
    await settle()


async def test_it_takes_what_waits_and_counts_as_one_that_does_so(pumped):
    forecast = pumped.queue.forecast()
    requests = await pumped.put(2)
    assert not pumped.pump.running
    assert forecast.instances == 0
    pumped.start()
    await settle()
    assert (pumped.pump.running, forecast.instances) == (True, 1)
    assert [pending for _, pending in pumped.sent] == [requests]
    await pumped.end()
    assert pumped.pump.slots.idle
    assert pumped.queue.executing == 0


async def test_a_light_models_next_batch_is_staged_when_half_of_all_clients_are_there(pumped):
    pumped.start()
    await pumped.put(4)
    await pumped.put(2)
    assert pumped.sizes == [4]
    await pumped.put(2)
    assert pumped.sizes == [4, 4]
    await pumped.put(4)
    assert pumped.sizes == [4, 4], "one runs and one is staged"
    await pumped.end()
    assert pumped.sizes == [4, 4]
    assert len(pumped.queue) == 0


async def test_or_when_the_one_before_it_has_ended(pumped):
    pumped.start()
    await pumped.put(4)
    await pumped.put(1)
    await pumped.end()
    assert pumped.sizes == [1]


async def test_a_heavy_models_batch_has_its_turn_until_it_ends(pumped):
    pumped.start(cpu_threads=2)
    await pumped.put(1)
    assert pumped.permit.held
    await pumped.put(4)
    assert pumped.sizes == [1], "nothing is staged"
    await pumped.end()
    assert (pumped.sizes, pumped.permit.held) == ([4], True)
    await pumped.end()
    assert not pumped.permit.held


async def test_what_cannot_be_handed_over_is_answered_and_the_next_one_is_taken(pumped, caplog):
    pumped.start()
    pumped.full = True
    (request,) = await pumped.put(1)
    with pytest.raises(InternalError, match="model 'm': could not hand the request over: no room"):
        await request.future
    assert "could not hand a batch of model m to its worker" in caplog.text
    assert (pumped.pump.slots.idle, pumped.queue.executing) == (True, 0)
    pumped.full = False
    await pumped.put(1)
    assert pumped.sizes == [1]


async def test_once_stopped_it_takes_no_more_and_is_counted_off_once(pumped):
    task = pumped.start()
    forecast = pumped.queue.forecast()
    await settle()
    pumped.pump.stop()
    pumped.pump.stop()
    await pumped.put(1)
    assert (task.cancelled(), pumped.pump.running, forecast.instances) == (True, False, 0)
    assert (pumped.sent, len(pumped.queue)) == ([], 1)


async def test_what_a_dead_worker_had_is_not_in_flight_any_more_and_its_turn_is_over(pumped):
    pumped.start(cpu_threads=2)
    await pumped.put(3)
    assert (pumped.pump.in_flight, pumped.permit.held) == (3, True)
    pumped.pump.stop()
    pumped.pump.lose()
    pumped.pump.let_go()
    assert (pumped.pump.in_flight, pumped.permit.held, pumped.pump.slots.idle) == (0, False, True)


# ---- where resources are limited ----


class Limited:
    """A model with an instance for each of these claims, beside one of another model for every resource."""

    def __init__(self, *needs):
        self.limiter = RateLimiter(Resources({}))
        self.pumps = []
        for need in needs:
            made = Pumped(self.pumps[0].queue if self.pumps else None)
            claim = Claim("m", dict.fromkeys((("cpu", name) for name in need), 1))
            self.limiter.resources.add(claim)
            made.permit.limit(self.limiter, claim)
            made.start()
            self.pumps.append(made)
        self.others = {name: Claim("other", {("cpu", name): 1}) for name in "".join(needs)}
        for claim in self.others.values():
            self.limiter.resources.add(claim)

    async def put(self, count):
        return await self.pumps[0].put(count)

    @property
    def sizes(self):
        return [made.sizes for made in self.pumps]

    @property
    def asking(self):
        """Instances that stand in line."""
        return sum(made.permit._claim.asked for made in self.pumps)

    async def close(self):
        for made in self.pumps:
            made.pump.stop()
        await settle()


async def test_a_lone_request_does_not_wait_for_an_instance_that_cannot_run_while_another_could():
    model = Limited("A", "B")
    await settle()
    await model.limiter.take(model.others["A"])
    await model.put(1)
    assert model.sizes == [[], [1]]
    model.limiter.give(model.others["A"])
    await settle()
    assert (model.sizes, model.asking) == ([[], [1]], 0), "there is nothing left for the one that had to wait"
    assert model.limiter.resources.usage() == {("cpu", "A"): (0, 1), ("cpu", "B"): (1, 1)}
    await model.put(1)
    assert model.sizes == [[1], [1]]
    await model.close()


async def test_whoever_of_them_can_run_first_takes_it():
    model = Limited("A", "B", "C")
    await settle()
    for name in "AB":
        await model.limiter.take(model.others[name])
    await model.put(1)
    assert model.sizes == [[], [], [1]]
    await model.pumps[2].end()
    for name in "AB":
        model.limiter.give(model.others[name])
    await settle()
    assert (model.sizes, model.asking) == ([[], [], []], 0)
    assert all(held == 0 for held, _ in model.limiter.resources.usage().values())
    await model.close()


async def test_instances_that_need_the_same_are_not_woken_for_each_other():
    model = Limited("A", "A", "A")
    await settle()
    await model.limiter.take(model.others["A"])
    await model.put(1)
    assert (model.sizes, model.asking) == ([[], [], []], 1)
    model.limiter.give(model.others["A"])
    await settle()
    assert sorted(model.sizes) == [[], [], [1]]
    await model.close()
