"""The async shell round the backlog: it wakes the right one at the right time, and is empty when it says so."""

import asyncio
from time import monotonic_ns

import pytest

from headrace.batching.admission import Admission
from headrace.batching.pending import Pending
from headrace.batching.policy import BatchLimits
from headrace.batching.queue import BatchQueue
from headrace.batching.service_times import ServiceTimes
from headrace.core.errors import DeadlineExceeded, Kind, NotReady, Overloaded
from headrace.core.request import InferRequest
from headrace.core.statistics import Statistics
from headrace.core.validation import ModelInputs

MS = 1_000_000


def queue_of(max_rows=8, preferred=(), delay_ms=0, max_size=100, **more):
    return BatchQueue("m", BatchLimits(max_rows, preferred, delay_ms * MS), max_size, **more)


def request(rows=1, key=None, priority=0, age_ms=0, statistics=None):
    pending = Pending(
        InferRequest("m", "", "", ()),
        ModelInputs((), rows, key),
        "1",
        statistics,
        asyncio.get_running_loop(),
        priority=priority,
    )
    pending.queued_at_ns -= age_ms * MS
    return pending


def put(queue, *pending):
    for one in pending:
        queue.put(one)
    return list(pending)


async def settle():
    """Let everything run that can run now."""
    for _ in range(8):
        await asyncio.sleep(0)


@pytest.fixture
async def taker():
    """A function that starts to take a batch; what has not got one at the end of the test is stopped."""
    tasks = []

    def start(queue):
        tasks.append(asyncio.get_running_loop().create_task(queue.take()))
        return tasks[-1]

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_what_is_there_is_had_without_waiting():
    queue = queue_of()
    waiting = put(queue, request(), request())
    before_ns = monotonic_ns()
    assert await queue.take() == waiting
    assert (len(queue), queue.executing) == (0, 1)
    assert all(before_ns <= one.taken_at_ns <= monotonic_ns() for one in waiting)
    queue.finished([])
    assert queue.executing == 0


async def test_one_who_waits_gets_the_next_request(taker):
    queue = queue_of()
    task = taker(queue)
    await settle()
    assert not task.done()
    waiting = put(queue, request())
    await settle()
    assert task.result() == waiting


async def test_requests_go_to_as_many_as_wait_and_to_each_once(taker):
    queue = queue_of(max_rows=1)
    tasks = [taker(queue) for _ in range(3)]
    await settle()
    waiting = put(queue, request(), request())
    await settle()
    assert [task.result() for task in tasks[:2]] == [[one] for one in waiting]
    assert not tasks[2].done()
    assert queue.executing == 2


async def test_a_request_too_many_is_refused_and_says_of_what_there_are_too_many():
    queue = queue_of(max_size=2)
    waiting = put(queue, request(), request())
    with pytest.raises(Overloaded, match="model 'm' has 2 requests waiting"):
        queue.put(request())
    assert len(queue) == 2
    assert await queue.take() == waiting
    queue.put(request())


async def test_places_of_those_that_left_go_to_others():
    queue = queue_of(max_size=2)
    gone, stays = put(queue, request(), request())
    gone.future.cancel()
    new = request()
    queue.put(new)
    assert await queue.take() == [stays, new]


async def test_levels_are_bounded_one_by_one():
    queue = queue_of(max_size=2, level_sizes={1: 1})
    put(queue, request(priority=1), request(priority=2), request(priority=2))
    for priority, most in ((1, 1), (2, 2)):
        with pytest.raises(Overloaded, match=f"model 'm' has {most} requests of priority {priority} waiting") as caught:
            queue.make_room(priority)
        assert caught.value.reason == "queue_full"
    queue.make_room(3)
    assert queue.levels() == {1: 1, 2: 2}
    await queue.take()
    queue.make_room(1)


async def test_a_full_level_lets_go_of_what_nobody_waits_for():
    queue = queue_of(max_size=1, level_sizes={})
    (gone,) = put(queue, request(priority=2))
    gone.future.cancel()
    queue.make_room(2)
    assert queue.levels() == {}


async def test_what_comes_too_late_is_refused_at_once():
    queue = queue_of()
    with pytest.raises(DeadlineExceeded, match=r"Request timeout expired: .* model 'm' was over"):
        queue.make_room(0, monotonic_ns() - 1)


def learned(queue, batch_ms, rows=1):
    """Have the queue's admission see batches that took so long."""
    queue.make_room(0, monotonic_ns() + 60_000 * MS)
    for _ in range(60):
        queue.deadlines.observe(rows, batch_ms * MS)


async def test_what_cannot_be_answered_in_time_is_refused_at_arrival_and_told_why():
    queue = queue_of(max_rows=1, admission=Admission(ServiceTimes()))
    learned(queue, 200)
    put(queue, *(request() for _ in range(5)))
    with pytest.raises(
        Overloaded, match=r"Refused at arrival: model 'm' would answer in 2\d{4}\.\d ms .* 5 rows"
    ) as caught:
        queue.make_room(0, monotonic_ns() + 15_000 * MS, 100)
    assert caught.value.reason == "too_late"
    queue.make_room(0, monotonic_ns() + 15_000 * MS, 1)
    queue.make_room(0, 0, 1)
    queue.make_room(0, monotonic_ns() + 500 * MS)  # those without a deadline are overtaken


async def test_nothing_is_learned_before_somebody_comes_with_a_deadline():
    queue = queue_of(admission=Admission(ServiceTimes()))
    queue.make_room()
    assert queue.deadlines.observe is None
    queue.make_room(0, monotonic_ns() + 60_000 * MS)
    assert queue.deadlines.observe is not None


async def test_what_nobody_waits_for_does_not_make_others_late():
    queue = queue_of(max_rows=1, max_size=500, admission=Admission(ServiceTimes()))
    learned(queue, 20)
    waiting = put(queue, *(request() for _ in range(200)))
    deadline_ns = monotonic_ns() + 2000 * MS
    with pytest.raises(Overloaded, match="Refused at arrival"):
        queue.make_room(0, deadline_ns)
    for one in waiting:
        one.future.cancel()
    queue._sweep._swept_ns = 0  # it looks for those again
    queue.make_room(0, deadline_ns)
    assert len(queue) == 0


async def test_what_runs_is_counted_with_the_rest_of_its_time():
    queue = queue_of(max_rows=1, admission=Admission(ServiceTimes()))
    learned(queue, 2000)
    put(queue, request())
    batch = await queue.take()
    with pytest.raises(Overloaded, match="Refused at arrival"):
        queue.make_room(0, monotonic_ns() + 3000 * MS)
    queue.finished(batch)
    queue.make_room(0, monotonic_ns() + 3000 * MS)


async def test_parts_of_one_request_count_as_one_against_the_bound():
    queue = queue_of(max_size=2)
    put(queue, request())
    queue.make_room()
    for _ in range(3):
        queue.put_part(request())
    assert len(queue) == 4
    with pytest.raises(Overloaded):
        queue.make_room()


async def test_with_a_delay_the_batch_comes_when_the_oldest_has_waited_long_enough(taker):
    queue = queue_of(delay_ms=100)
    task = taker(queue)
    await settle()
    waiting = put(queue, request(), request())
    await settle()
    assert not task.done()
    assert await asyncio.wait_for(asyncio.shield(task), 30) == waiting
    assert monotonic_ns() - waiting[0].queued_at_ns >= 100 * MS


async def test_a_full_batch_does_not_wait_for_the_delay(taker):
    queue = queue_of(max_rows=3, delay_ms=60_000)
    task = taker(queue)
    await settle()
    waiting = put(queue, request(), request())
    await settle()
    assert not task.done()
    waiting += put(queue, request())
    await settle()
    assert task.result() == waiting


async def test_an_earlier_time_takes_the_place_of_a_later_one(taker):
    queue = queue_of(delay_ms=60_000)
    task = taker(queue)
    await settle()
    put(queue, request(key=((1,),)))
    await settle()
    impatient = put(queue, request(key=((2,),), age_ms=60_000 - 10))
    assert await asyncio.wait_for(asyncio.shield(task), 30) == impatient


async def test_the_clock_is_the_one_it_was_given(taker):
    now_ns = monotonic_ns()
    queue = queue_of(delay_ms=60_000, clock=lambda: now_ns)
    waiting = put(queue, request())
    waiting[0].queued_at_ns = now_ns
    task = taker(queue)
    await settle()
    assert not task.done()
    now_ns += 60_000 * MS
    waiting += put(queue, request())
    await settle()
    assert task.result() == waiting


async def test_one_who_stops_waiting_does_not_take_a_wake_up_along(taker):
    queue = queue_of(max_rows=1)
    first, second = taker(queue), taker(queue)
    await settle()
    waiting = put(queue, request())  # wakes the first, who leaves before it runs
    first.cancel()
    await settle()
    assert first.cancelled()
    assert second.result() == waiting
    assert queue.executing == 1


async def test_one_who_left_long_ago_is_passed_over(taker):
    queue = queue_of()
    first, second = taker(queue), taker(queue)
    await settle()
    first.cancel()
    await settle()
    waiting = put(queue, request())
    await settle()
    assert second.result() == waiting


async def test_what_is_put_back_wakes_another(taker):
    queue = queue_of()
    waiting = put(queue, request(), request())
    batch = await queue.take()
    task = taker(queue)
    await settle()
    queue.put_back(batch)
    queue.finished([])
    await settle()
    assert task.result() == waiting
    assert queue.executing == 1


async def test_what_is_put_back_goes_before_what_came_meanwhile():
    queue = queue_of(max_rows=2)
    first = put(queue, request(), request())
    batch = await queue.take()
    put(queue, request())
    queue.put_back(batch)
    queue.finished([])
    assert await queue.take() == first


async def test_suspects_wake_one_after_the_other(taker):
    queue = queue_of()
    put(queue, request(), request())
    batch = await queue.take()
    tasks = [taker(queue), taker(queue)]
    await settle()
    for one in batch:
        one.alone = True
    queue.put_back(batch)
    queue.finished([])
    await settle()
    assert [task.result() for task in tasks] == [[one] for one in batch]


async def test_in_order_the_next_batch_waits_for_the_one_before(taker):
    queue = queue_of(max_rows=1, preserve_order=True)
    first, second = put(queue, request(), request())
    assert await queue.take() == [first]
    task = taker(queue)
    await settle()
    assert not task.done()
    queue.finished([])
    await settle()
    assert task.result() == [second]


async def test_in_order_another_shape_is_not_overtaken():
    queue = queue_of(preserve_order=True)
    waiting = put(queue, request(), request(key=((2,),)), request())
    for one in waiting:
        assert await queue.take() == [one]
        queue.finished([one])


async def test_in_order_a_batch_that_was_put_back_is_the_next(taker):
    queue = queue_of(max_rows=1, preserve_order=True)
    first, _ = put(queue, request(), request())
    batch = await queue.take()
    tasks = [taker(queue), taker(queue)]
    await settle()
    queue.put_back(batch)
    queue.finished([])
    await settle()
    assert [task.result() for task in tasks if task.done()] == [[first]]


async def test_refusing_answers_all_that_waits_and_all_that_comes_until_it_accepts_again():
    queue = queue_of()
    gone, stays = put(queue, request(), request(priority=1))
    gone.future.cancel()
    queue.refuse(Kind.NOT_READY, "model 'm' is broken")
    assert len(queue) == 0
    assert gone.future.cancelled()
    with pytest.raises(NotReady, match="broken"):
        await stays.future
    with pytest.raises(NotReady, match="broken"):
        queue.put(request())
    assert len(queue) == 0
    queue.accept()
    waiting = put(queue, request())
    assert await queue.take() == waiting


async def test_what_comes_back_to_a_queue_that_refuses_is_refused_too():
    """Its instance took it before that; nobody may be there to take it again."""
    queue = queue_of()
    (one,) = put(queue, request())
    batch = await queue.take()
    queue.refuse(Kind.NOT_READY, "model 'm' is broken")
    queue.put_back(batch)
    queue.finished(batch)
    with pytest.raises(NotReady, match="model 'm' is broken"):
        await asyncio.wait_for(one.future, 30)
    await asyncio.wait_for(queue.drained(), 30)


async def test_refusing_for_long_keeps_nothing_of_what_was_refused():
    """An exception that is raised again and again grows by a traceback each time, with all that its frames hold."""
    queue = queue_of()
    queue.refuse(Kind.NOT_READY, "model 'm' is broken")
    for _ in range(50):
        with pytest.raises(NotReady) as caught:
            queue.put(request())
    assert len(caught.traceback) <= 5


async def test_while_it_refuses_there_is_no_room_for_a_request_in_parts_either():
    queue = queue_of()
    queue.refuse(Kind.NOT_READY, "model 'm' is broken")
    with pytest.raises(NotReady, match="broken"):
        queue.make_room()


async def test_drained_means_that_nothing_waits_and_nothing_runs(taker):
    queue = queue_of(max_rows=1)
    await asyncio.wait_for(queue.drained(), 30)
    put(queue, request(), request())
    drained = asyncio.get_running_loop().create_task(queue.drained())
    for _ in range(2):
        await queue.take()
        await settle()
        assert not drained.done()
    queue.finished([])
    await settle()
    assert not drained.done()
    queue.finished([])
    await asyncio.wait_for(drained, 30)


async def test_drained_after_everything_was_refused():
    queue = queue_of()
    put(queue, request())[0].future.add_done_callback(lambda it: it.exception())
    drained = [asyncio.get_running_loop().create_task(queue.drained()) for _ in range(2)]
    await settle()
    queue.refuse(Kind.INTERNAL, "gone")
    await asyncio.wait_for(asyncio.gather(*drained), 30)


async def test_drained_when_nobody_waits_for_the_rest_any_more(taker):
    queue = queue_of()
    put(queue, request())[0].future.cancel()
    drained = asyncio.get_running_loop().create_task(queue.drained())
    await settle()
    taker(queue)
    await asyncio.wait_for(drained, 30)


async def test_ready_says_when_there_is_a_batch_and_take_now_takes_it():
    queue = queue_of(max_rows=2, delay_ms=60_000)
    ready = asyncio.get_running_loop().create_task(queue.ready())
    await settle()
    waiting = put(queue, request())
    await settle()
    assert not ready.done()
    assert queue.take_now() == []
    waiting += put(queue, request())
    await asyncio.wait_for(ready, 30)
    assert queue.executing == 0
    assert queue.take_now() == waiting
    assert queue.take_now() == []
    assert queue.executing == 1


async def test_ready_comes_with_time_as_well():
    queue = queue_of(delay_ms=10)
    waiting = put(queue, request())
    await asyncio.wait_for(queue.ready(), 30)
    assert monotonic_ns() - waiting[0].queued_at_ns >= 10 * MS
    assert queue.take_now() == waiting


async def test_in_order_nothing_is_ready_while_a_batch_runs():
    queue = queue_of(max_rows=1, preserve_order=True)
    put(queue, request(), request())
    assert len(queue.take_now()) == 1
    ready = asyncio.get_running_loop().create_task(queue.ready())
    await settle()
    assert not ready.done()
    assert queue.take_now() == []
    queue.finished([])
    await asyncio.wait_for(ready, 30)


async def test_limits_can_be_set_while_it_is_empty_and_not_later():
    queue = queue_of(max_rows=1)
    queue.set_limits(BatchLimits(max_rows=2))
    waiting = put(queue, request(), request(), request())
    assert await queue.take() == waiting[:2]
    with pytest.raises(AssertionError, match="before the first request"):
        queue.set_limits(BatchLimits(max_rows=3))


async def test_refusing_when_full_costs_little_however_much_waits():
    """Under overload nearly every request is refused, so refusing must not look at all that wait each time."""
    queue = queue_of(max_size=2000)
    put(queue, *(request() for _ in range(2000)))
    looked_at = 0

    class Counting(Pending):
        __slots__ = ()

        @property
        def dead(self):
            nonlocal looked_at
            looked_at += 1
            return False

    for one in queue._backlog:
        one.__class__ = Counting
    for _ in range(50):
        with pytest.raises(Overloaded):
            queue.put(request())
    assert looked_at <= 3 * 2000


async def test_under_churn_every_request_is_run_once_and_none_is_forgotten():
    queue = queue_of(max_rows=3, max_size=1000)
    loop = asyncio.get_running_loop()
    ran: list[Pending] = []
    taken = 0

    async def instance():
        nonlocal taken
        while True:
            batch = await queue.take()
            taken += 1
            if taken % 5 == 0:
                queue.put_back(batch)  # as when its process has died
            else:
                ran.extend(batch)
            queue.finished([])
            await asyncio.sleep(0)

    instances = [loop.create_task(instance()) for _ in range(3)]
    sent = []
    for number in range(400):
        sent += put(queue, request(rows=1 + number % 3, key=((number % 2,),), priority=number % 3))
        if number % 3 == 0:
            await asyncio.sleep(0)
        if number % 20 == 10:
            instances[number % 3].cancel()  # often right after it was woken
            instances[number % 3] = loop.create_task(instance())
    await asyncio.wait_for(queue.drained(), 30)
    for task in instances:
        task.cancel()
    await asyncio.gather(*instances, return_exceptions=True)
    assert len(ran) == len(sent)
    assert set(map(id, ran)) == set(map(id, sent))
    assert queue.executing == 0


# With an objective


def objective_queue(now, **more):
    """A queue of one instance whose batches are known to take 10 ms, on a made-up clock."""
    queue = queue_of(max_rows=4, objective_ns=50 * MS, clock=lambda: now[0], **more)
    queue.joined()
    for _ in range(40):
        queue.curves.observe(None, 4, 10 * MS)
    return queue


async def test_what_would_come_too_late_is_refused_with_the_objective_and_the_prediction():
    now = [0]
    queue = objective_queue(now)
    for _ in range(12):
        queue.admit(None, 1, 0)
        queue.put(request())
    queue.put(request(20))
    with pytest.raises(
        Overloaded, match=r"model 'm'.* answered 9\d\.\d ms after it came.*objective of 50 ms .*32 rows"
    ):
        queue.admit(None, 1, 0)
    assert queue.objective.refused == 1


async def test_rows_of_less_urgent_requests_are_not_ahead():
    queue = objective_queue([0])
    queue.put(request(40, priority=2))
    queue.admit(None, 1, 1)
    with pytest.raises(Overloaded):
        queue.admit(None, 1, 2)


async def test_while_no_instance_is_up_nothing_is_promised():
    queue = objective_queue([0])
    queue.left()
    with pytest.raises(Overloaded, match="no instance is up now, so the objective of 50 ms"):
        queue.admit(None, 1, 0)
    queue.joined()
    queue.admit(None, 1, 0)


async def test_the_forecast_follows_what_is_taken_and_finished():
    queue = queue_of(max_rows=4)
    queue.joined()
    queue.curves.observe(None, 1, 10_000 * MS)
    forecast = queue.forecast()
    put(queue, request())
    batch = await queue.take()
    now_ns = monotonic_ns()
    assert forecast.free_ns(now_ns)[0] == pytest.approx(batch[0].taken_at_ns + 10_000 * MS)
    queue.finished(batch)
    assert forecast.free_ns(now_ns) == [now_ns]
    queue.left()
    assert forecast.instances == 0


async def test_it_foresees_when_rows_would_be_answered():
    queue = queue_of(max_rows=4, clock=lambda: 1000 * MS)
    assert queue.finish_ns(0, 1) is None, "no batch has run"
    queue.curves.observe(None, 4, 10 * MS)
    assert queue.finish_ns(0, 1) is None, "no instance is up"
    queue.joined()
    assert [queue.finish_ns(ahead, 1) / MS for ahead in (0, 3, 4, 11)] == [1010, 1010, 1020, 1030]
    assert objective_queue([0]).finish_ns(4, 1) == 20 * MS


async def test_where_the_order_is_kept_many_instances_are_as_good_as_one():
    queue = queue_of(preserve_order=True, objective_ns=50 * MS)
    forecast = queue.forecast()
    counts = []
    for change in (queue.joined, queue.joined, queue.joined, queue.left, queue.left, queue.left, queue.joined):
        change()
        counts.append(forecast.instances)
    assert counts == [1, 1, 1, 1, 1, 0, 1]
    late = queue_of(preserve_order=True)
    late.joined()
    late.joined()
    assert late.forecast().instances == 1


async def test_answers_are_counted_within_and_after_the_objective():
    queue = objective_queue([0])
    now_ns = monotonic_ns()
    batch = [request(), request(), request()]
    for one, age_ms in zip(batch, (10, 49, 60), strict=True):
        one.queued_at_ns = now_ns - age_ms * MS
    queue.ran(batch, 3, 10 * MS, now_ns)
    assert (queue.objective.budget.timely, queue.objective.budget.late) == (2, 1)


async def test_an_adaptive_queue_sizes_its_batches_by_the_objective_and_not_by_the_limit():
    queue = queue_of(max_rows=64, objective_ns=50 * MS, adaptive=True)
    queue.joined()
    for _ in range(40):
        for rows in (1, 2, 4):
            queue.curves.observe(None, rows, (1 + 4 * rows) * MS)
    queue.set_limits(BatchLimits(32))
    put(queue, *(request() for _ in range(30)))
    assert 3 <= len(await queue.take()) <= 6


async def test_without_an_objective_nobody_has_to_hurry():
    queue = queue_of()
    put(queue, request())
    assert queue.spare_ns(monotonic_ns()) > 10**15
    assert objective_queue([0]).spare_ns(monotonic_ns()) > 10**15, "nobody waits"


async def test_everybody_who_waits_for_the_queue_to_grow_is_told():
    queue = queue_of()
    patient = asyncio.get_running_loop().create_task(queue.grown(1, 3600))
    await asyncio.sleep(0)
    busy = queue.watchers.add(1)  # an instance with a batch at its worker ...
    busy.set_result(None)  # ... which has ended
    more = queue.watchers.add(2)
    put(queue, request())
    await asyncio.wait_for(patient, 30)
    assert not more.done()
    put(queue, request())
    assert more.done()
    assert not queue.watchers.size


async def test_who_no_longer_waits_for_the_queue_to_grow_is_forgotten():
    queue = queue_of()
    for _ in range(5):
        await queue.grown(3, 0.001)
        queue.watchers.add(3).cancel()
    last = queue.watchers.add(3)
    assert [one for _, one in queue.watchers._watching] == [last]


async def test_another_queue_inherits_what_waits_and_what_comes_back(taker):
    queue, heir = queue_of(), queue_of(max_size=1)
    first, second = put(queue, request(), request())
    taken = await queue.take()
    assert taken == [first, second]
    third, fourth = put(queue, request(), request())
    fourth.future.cancel()
    taking = taker(heir)
    await settle()
    queue.hand_over(heir, Statistics())
    draining = asyncio.get_running_loop().create_task(queue.drained())
    await settle()
    assert taking.result() == [third]  # over the bound: it was accepted before
    for one in taken:
        one.deaths, one.alone = 2, True
    queue.put_back(taken)
    queue.finished(taken)
    late = request()
    queue.put_part(late)
    await settle()
    assert draining.done()
    assert [await heir.take(), await heir.take(), await heir.take()] == [[first], [second], [late]]
    assert first.deaths == 0


async def test_what_is_put_back_or_inherited_makes_a_queue_grow_as_what_is_put():
    """Nobody else would bring a model in that has left the memory."""
    queue, predecessor = queue_of(), queue_of()
    growing = asyncio.get_running_loop().create_task(queue.grown(2, 3600))
    put(predecessor, request())
    taken = [*predecessor.take_now(), request()]
    predecessor.hand_over(queue, Statistics())
    queue.put_back(taken[:1])
    await asyncio.sleep(0)
    assert not growing.done()
    predecessor.put_back(taken[1:])
    await asyncio.wait_for(growing, 30)
