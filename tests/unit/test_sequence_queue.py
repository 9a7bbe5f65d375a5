"""The async shell round sequences: it wakes the instance that serves a sequence, and times what idles."""

import asyncio
import random
from time import monotonic_ns
from types import SimpleNamespace

import pytest

from headrace.batching.pending import Pending
from headrace.batching.policy import BatchLimits
from headrace.batching.queue import BatchQueue
from headrace.batching.sequence_queue import SequenceQueue
from headrace.core.errors import InternalError, InvalidRequest, Kind, NotReady, Overloaded
from headrace.core.request import InferRequest
from headrace.core.sequence import SequenceSpec
from headrace.core.statistics import Statistics
from headrace.core.validation import ModelInputs

MS = 1_000_000


def queue_of(strategy="oldest", *, rows=4, max_size=100, idle_ms=60_000, delay_ms=0, instances=1, spec=None, **more):
    queue = SequenceQueue("m", SequenceSpec(strategy, idle_ms * 1000, **(spec or {})), max_size, **more)
    for index in range(instances):
        queue.for_instance(index)
    queue.set_limits(BatchLimits(rows, (), delay_ms * MS))
    return queue


def request(identity, marks="", rows=1, key=None, statistics=None):
    parameters = {"sequence_id": identity, "sequence_start": "s" in marks, "sequence_end": "e" in marks}
    return Pending(
        InferRequest("m", "", "", (), (), parameters),
        ModelInputs((), rows, key),
        "1",
        statistics,
        asyncio.get_running_loop(),
    )


def put(queue, *requests):
    for one in requests:
        queue.put(one)
    return list(requests)


def answer(part, batch):
    for one in batch:
        one.resolve((), one.taken_at_ns)
    part.finished(batch)


async def settle():
    """Let everything run that can run now."""
    for _ in range(8):
        await asyncio.sleep(0)


@pytest.fixture
async def start():
    """A function that starts a task; what has not ended at the end of the test is stopped."""
    tasks = []

    def start(coroutine):
        tasks.append(asyncio.get_running_loop().create_task(coroutine))
        return tasks[-1]

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Time:
    """A clock that stands still between ``pass_ms`` calls, and the timers that a loop was given meanwhile."""

    def __init__(self):
        self.now_ns = monotonic_ns() + 60_000 * MS  # requests say themselves when they came
        self.timers = []

    def clock(self):
        return self.now_ns

    def call_later(self, delay_s, callback, *args):
        self.timers.append((self.now_ns + round(delay_s * 1e9), callback, args))
        return SimpleNamespace(cancel=self.timers.clear)

    def pass_ms(self, milliseconds):
        self.now_ns += milliseconds * MS
        due = [timer for timer in self.timers if timer[0] <= self.now_ns]
        self.timers = [timer for timer in self.timers if timer[0] > self.now_ns]
        for _, callback, args in due:
            callback(*args)


@pytest.fixture
async def time(monkeypatch):
    made = Time()
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", made.call_later)
    return made


async def test_an_instance_that_waits_gets_the_request_of_its_sequence(start):
    queue = queue_of()
    part = queue.for_instance(0)
    task = start(part.take())
    await settle()
    first, second = put(queue, request(5, "s"), request(5))
    await settle()
    assert task.result() == [first]
    assert (first.slot, len(queue), len(part), queue.executing, queue.active_sequences) == (0, 1, 0, 1, 1)
    task = start(part.take())
    await settle()
    assert not task.done(), "one request of a sequence at a time"
    answer(part, [first])
    await settle()
    assert task.result() == [second]


async def test_every_request_of_a_sequence_goes_to_its_instance(start):
    queue = queue_of(rows=2, instances=2)
    tasks = [start(queue.for_instance(index).take()) for index in range(2)]
    await settle()
    requests = put(queue, request("a", "s"), request("b", "s"))
    await settle()
    assert [task.result() for task in tasks] == [[one] for one in requests]
    for index, one in enumerate(requests):
        answer(queue.for_instance(index), [one])
    again = put(queue, request("b"), request("a"))
    assert [queue.for_instance(index).take_now() for index in range(2)] == [[again[1]], [again[0]]]


async def test_what_comes_before_an_instance_is_up_waits_for_it(start):
    queue = queue_of(rows=1, instances=2)
    waiting = put(queue, request(1, "s"), request(2, "s"))
    assert (len(queue), queue.active_sequences) == (2, 0)
    assert await queue.for_instance(1).take() == waiting[:1]
    ready = start(queue.for_instance(0).ready())
    await settle()
    assert ready.done()
    assert queue.for_instance(0).take_now() == waiting[1:]


async def test_a_sequence_in_line_begins_when_another_has_ended(start):
    queue = queue_of(rows=1)
    part = queue.for_instance(0)
    task = start(part.take())
    await settle()
    first, second = put(queue, request(1, "se"), request(2, "s"))
    await settle()
    answer(part, task.result())
    assert first.future.done()
    assert await part.take() == [second]


async def test_so_many_sequences_have_a_place_as_the_owner_allows():
    for spec, places in (({"max_candidates": 3}, 3), ({}, 4)):
        queue = queue_of(spec=spec)
        start = asyncio.get_running_loop().create_task(queue.for_instance(0).take())
        await settle()
        put(queue, *(request(identity, "s") for identity in range(1, 7)))
        assert queue.active_sequences == places
        await start


async def test_a_request_that_fits_no_sequence_is_answered_at_once():
    queue = queue_of()
    statistics = Statistics()
    (alone,) = put(queue, request(5, statistics=statistics))
    with pytest.raises(InvalidRequest, match="must specify the START flag on the first request"):
        await alone.future
    (nobody,) = put(queue, request(0, "s", statistics=statistics))
    with pytest.raises(InvalidRequest, match="must specify a non-zero or non-empty correlation ID"):
        await nobody.future
    assert (len(queue), statistics.success) == (0, 0)


async def test_one_too_many_is_refused_wherever_the_others_wait():
    queue = queue_of(rows=1, max_size=3)
    part = queue.for_instance(0)
    put(queue, request(1, "s"))
    await part.take()
    put(queue, request(1), request(2, "s"), request(2))
    with pytest.raises(Overloaded, match="model 'm' has 3 requests waiting"):
        queue.put(request(1))
    with pytest.raises(Overloaded):
        queue.make_room()


async def test_places_of_those_that_left_go_to_others():
    now_ns = 1000 * MS
    queue = queue_of(rows=1, max_size=4, clock=lambda: now_ns)
    part = queue.for_instance(0)
    first, *_ = put(queue, request(1, "s"))
    batch = await part.take()
    left, stays, in_line, behind = put(queue, request(1), request(1), request(2, "s"), request(2))
    left.future.cancel()
    in_line.future.cancel()
    put(queue, request(1))
    assert len(queue) == 2
    with pytest.raises(InvalidRequest, match="START flag"):
        await behind.future
    answer(part, batch)
    assert part.take_now() == [stays]
    assert first.future.done()


async def test_a_place_that_only_the_departed_hold_is_found_when_there_is_no_room():
    queue = queue_of(rows=1, max_size=2, clock=lambda: 1000 * MS)
    part = queue.for_instance(0)
    opened = asyncio.get_running_loop().create_task(part.take())
    await settle()
    put(queue, request(1, "s"))
    answer(part, await opened)
    gone, in_line = put(queue, request(1), request(2, "s"))
    gone.future.cancel()
    (new,) = put(queue, request(1, "e"))
    assert part.take_now() == [new]
    assert part.take_now() == []
    answer(part, [new])
    assert part.take_now() == [in_line]


async def test_one_that_idles_frees_its_place_in_time_and_one_timer_is_enough(time, start):
    queue = queue_of(rows=3, idle_ms=15, clock=time.clock)
    part = queue.for_instance(0)
    task = start(part.take())
    await settle()
    put(queue, *(request(identity, "s") for identity in (1, 2, 3)))
    await settle()
    answer(part, task.result())
    (waiting,) = put(queue, request(4, "s"))
    assert part.take_now() == []
    assert len(time.timers) == 1
    task = start(part.take())
    time.pass_ms(14)
    await settle()
    assert (task.done(), queue.active_sequences) == (False, 3)
    time.pass_ms(1)
    await settle()
    assert task.result() == [waiting]
    assert (queue.active_sequences, time.timers) == (1, [])
    (late,) = put(queue, request(2))
    with pytest.raises(InvalidRequest, match="sequence 2 of model 'm' has ended: no request of it came for 15000 us"):
        await late.future


async def test_one_whose_only_request_left_idles_from_then_on(time, start):
    queue = queue_of(idle_ms=10, clock=time.clock)
    part = queue.for_instance(0)
    task = start(part.take())
    await settle()
    put(queue, request(1, "s"))
    await settle()
    answer(part, task.result())
    (gone,) = put(queue, request(1))
    time.pass_ms(20)
    assert (queue.active_sequences, time.timers) == (1, []), "something of it waits"
    gone.future.cancel()
    assert part.take_now() == []
    time.pass_ms(9)
    assert queue.active_sequences == 1
    time.pass_ms(1)
    assert queue.active_sequences == 0


async def test_after_one_has_idled_too_long_the_next_is_seen_to_in_its_time(time, start):
    queue = queue_of(idle_ms=10, clock=time.clock)
    part = queue.for_instance(0)
    task = start(part.take())
    await settle()
    put(queue, request(1, "s"))
    await settle()
    answer(part, task.result())
    time.pass_ms(5)
    put(queue, request(2, "s"))
    answer(part, part.take_now())
    left = []
    for _ in range(3):
        left.append(queue.active_sequences)
        time.pass_ms(5)
    assert left == [2, 1, 0]


async def test_who_may_idle_for_years_is_looked_at_now_and_then(time, start):
    queue = queue_of(idle_ms=10**12, clock=time.clock)
    part = queue.for_instance(0)
    task = start(part.take())
    await settle()
    put(queue, request(1, "s"))
    await settle()
    answer(part, task.result())
    assert time.timers[0][0] <= time.now_ns + 3600 * 1000 * MS
    time.pass_ms(3600 * 1000)
    assert (queue.active_sequences, len(time.timers)) == (1, 1)


async def test_when_the_worker_dies_its_sequences_end_and_the_others_go_on(start):
    queue = queue_of(rows=1, instances=2)
    tasks = [start(queue.for_instance(index).take()) for index in range(2)]
    await settle()
    first, second = put(queue, request(1, "s"), request(2, "s"))
    behind, in_line = put(queue, request(1), request(3, "s"))
    await settle()
    part = queue.for_instance(0)
    part.lose("signal SIGKILL")
    part.put_back(tasks[0].result())  # as an instance does that does not know of sequences
    part.finished(tasks[0].result())
    for one in (first, behind):
        with pytest.raises(
            InternalError,
            match=r"sequence 1 of model 'm' has ended: its worker died \(signal SIGKILL\); begin it anew",
        ):
            await one.future
    assert (queue.executing, part.take_now()) == (1, [])
    answer(queue.for_instance(1), [second])
    (end,) = put(queue, request(2, "e"))
    answer(queue.for_instance(1), queue.for_instance(1).take_now())
    assert end.future.done()
    assert queue.for_instance(1).take_now() == [in_line]
    (told,) = put(queue, request(1))
    with pytest.raises(InvalidRequest, match="its worker died"):
        await told.future


async def test_a_death_seen_first_by_those_who_put_back_is_one_all_the_same(start):
    queue = queue_of()
    part = queue.for_instance(0)
    task = start(part.take())
    await settle()
    (lost,) = put(queue, request(1, "s"))
    await settle()
    part.put_back(task.result())
    part.finished(task.result())
    queue.lose(0, "exit status 1")
    with pytest.raises(InternalError, match=r"its worker died \(exit status 1\)"):
        await lost.future
    assert (len(queue), len(part), queue.executing, queue.active_sequences) == (0, 0, 0, 0)


async def test_members_of_a_failed_batch_run_again_each_alone():
    queue = queue_of()
    part = queue.for_instance(0)
    opened = asyncio.get_running_loop().create_task(part.take())
    await settle()
    members = put(queue, request(1, "s"), request(2, "s"))
    behind = put(queue, request(1))
    batch = [*await opened, *part.take_now()]
    for one in batch:
        one.alone = True
    part.put_back(batch)
    part.finished(batch)
    for one in members:
        assert part.take_now() == [one]
        answer(part, [one])
    assert part.take_now() == behind


async def test_with_a_delay_a_direct_batch_waits_for_its_share_of_the_slots(start):
    queue = queue_of("direct", delay_ms=60_000, spec={"minimum_slot_utilization": 0.5})
    task = start(queue.for_instance(0).take())
    await settle()
    waiting = put(queue, request(1, "s"))
    await settle()
    assert not task.done()
    waiting += put(queue, request(2, "s"))
    await settle()
    assert task.result() == waiting


async def test_in_order_the_next_batch_waits_for_the_one_before():
    queue = queue_of(rows=1, preserve_order=True, spec={"max_candidates": 2})
    part = queue.for_instance(0)
    opened = asyncio.get_running_loop().create_task(part.take())
    await settle()
    first, second = put(queue, request(1, "s"), request(2, "s"))
    assert await opened == [first]
    assert part.take_now() == []
    answer(part, [first])
    assert part.take_now() == [second]


async def test_refusing_answers_all_that_waits_and_all_that_comes_until_it_accepts_again(start):
    queue = queue_of(rows=1, spec={"max_candidates": 2})
    part = queue.for_instance(0)
    task = start(part.take())
    await settle()
    running, *waiting = put(queue, request(1, "s"), request(1), request(2, "s"), request(3, "s"))
    await settle()
    queue.refuse(Kind.NOT_READY, "model 'm' is broken")
    for one in waiting:
        with pytest.raises(NotReady, match="broken"):
            await one.future
    with pytest.raises(NotReady, match="broken"):
        queue.put(request(3, "s"))
    assert part.take_now() == []
    answer(part, task.result())
    assert running.future.result()
    queue.accept()
    (new,) = put(queue, request(1, "s"))
    assert part.take_now() == [new]


async def test_drained_means_that_nothing_waits_and_nothing_runs_and_sequences_without_an_end_do_not_hold_it_up(start):
    queue = queue_of(rows=1)
    part = queue.for_instance(0)
    task = start(part.take())
    await settle()
    put(queue, request(1, "s"))
    await settle()
    answer(part, task.result())
    put(queue, request(2, "s"))  # its place is held by the first, which idles
    drained = start(queue.drained())
    await settle()
    batch = part.take_now()
    assert len(batch) == 1
    assert not drained.done()
    answer(part, batch)
    await asyncio.wait_for(drained, 30)
    assert queue.active_sequences == 0


async def test_drained_when_nobody_waits_for_the_rest_any_more(start):
    queue = queue_of()
    (gone,) = put(queue, request(1, "s"))
    gone.future.cancel()
    drained = start(queue.drained())
    await settle()
    assert not drained.done()
    start(queue.for_instance(0).take())
    await asyncio.wait_for(drained, 30)


async def test_drained_when_the_worker_takes_the_rest_along(start):
    queue = queue_of()
    part = queue.for_instance(0)
    task = start(part.take())
    await settle()
    put(queue, request(1, "s"))[0].future.add_done_callback(lambda it: it.exception())
    put(queue, request(1))[0].future.add_done_callback(lambda it: it.exception())
    drained = start(queue.drained())
    await settle()
    part.lose("signal SIGKILL")
    assert not drained.done()
    part.finished(task.result())
    await asyncio.wait_for(drained, 30)


async def test_limits_can_be_set_while_there_are_no_sequences_and_not_later(start):
    queue = queue_of(rows=1)
    task = start(queue.for_instance(0).take())
    await settle()
    queue.set_limits(BatchLimits(2))
    waiting = put(queue, request(1, "s"))
    await settle()
    assert task.result() == waiting
    assert queue.active_sequences == 1
    put(queue, request(2, "s"), request(3, "s"))
    assert queue.active_sequences == 2
    with pytest.raises(AssertionError, match="before the first request"):
        queue.set_limits(BatchLimits(3))


async def test_a_queue_without_sequences_is_every_instances_own_and_loses_nothing():
    queue = BatchQueue("m", BatchLimits(2), 10)
    assert queue.for_instance(3) is queue
    waiting = put(queue, request(1))
    queue.lose("signal SIGKILL")
    assert await queue.take() == waiting


async def test_under_churn_every_request_is_answered_and_each_sequence_in_its_order():
    queue = queue_of(rows=3, max_size=10_000, instances=2)
    loop = asyncio.get_running_loop()
    chance = random.Random(7)
    ran: list[Pending] = []

    async def instance(index):
        part = queue.for_instance(index)
        while True:
            batch = await part.take()
            await asyncio.sleep(0)
            if chance.random() < 0.2:
                part.put_back(batch)
            else:
                ran.extend(batch)
                for one in batch:
                    one.resolve((), 0)
            part.finished(batch)

    instances = [loop.create_task(instance(index)) for index in range(2)]
    sent = []
    for step in range(20):
        for identity in range(1, 41):
            sent += put(queue, request(identity, "s" * (step == 0) + "e" * (step == 19), key=((identity % 2,),)))
        await asyncio.sleep(0)
    await asyncio.wait_for(queue.drained(), 30)
    for task in instances:
        task.cancel()
    await asyncio.gather(*instances, return_exceptions=True)
    assert len(ran) == len(sent)
    numbers = {id(one): number for number, one in enumerate(sent)}
    for identity in range(1, 41):
        order = [numbers[id(one)] for one in ran if one.request.parameters["sequence_id"] == identity]
        assert order == sorted(order)
        assert len(order) == 20
    assert queue.active_sequences == 0
