"""Who sleeps until there is work: one is woken at a time, and no wake-up is lost."""

import asyncio

import pytest

from headrace.batching.takers import Takers

NOW_NS = 10**12
HOUR_NS = 3600 * 10**9


async def settle():
    for _ in range(6):
        await asyncio.sleep(0)


class Sleeping:
    """Takers, and the tasks of them; those that are awake are told by their numbers."""

    def __init__(self):
        self.takers = Takers(lambda: NOW_NS)
        self.tasks = []

    async def add(self, count):
        loop = asyncio.get_running_loop()
        self.tasks += [loop.create_task(self.takers.sleep()) for _ in range(count)]
        await settle()

    async def awake(self):
        await settle()
        return [number for number, task in enumerate(self.tasks) if task.done() and not task.cancelled()]


@pytest.fixture
async def sleeping():
    made = Sleeping()
    yield made
    for task in made.tasks:
        task.cancel()
    await asyncio.gather(*made.tasks, return_exceptions=True)
    if made.takers._timer is not None:
        made.takers._timer.cancel()


async def test_a_wake_up_is_for_the_one_that_has_slept_longest(sleeping):
    await sleeping.add(3)
    assert len(sleeping.takers.sleeping) == 3
    sleeping.takers.wake()
    assert await sleeping.awake() == [0]
    sleeping.takers.wake()
    assert await sleeping.awake() == [0, 1]
    assert len(sleeping.takers.sleeping) == 1


async def test_where_nobody_sleeps_nobody_is_woken_later(sleeping):
    sleeping.takers.wake()
    await sleeping.add(1)
    assert await sleeping.awake() == []


async def test_one_that_leaves_with_a_wake_up_passes_it_on(sleeping):
    await sleeping.add(3)
    sleeping.takers.wake()
    sleeping.tasks[0].cancel()
    assert await sleeping.awake() == [1]
    assert sleeping.tasks[0].cancelled()


async def test_one_that_has_left_is_not_woken(sleeping):
    await sleeping.add(2)
    sleeping.tasks[0].cancel()
    await settle()
    assert len(sleeping.takers.sleeping) == 1
    sleeping.takers.wake()
    assert await sleeping.awake() == [1]


async def test_one_that_is_leaving_is_passed_over(sleeping):
    await sleeping.add(2)
    sleeping.tasks[0].cancel()  # its future is cancelled, and it has not run yet
    sleeping.takers.wake()
    assert await sleeping.awake() == [1]


async def test_the_last_time_that_was_asked_for_counts(sleeping):
    await sleeping.add(2)
    sleeping.takers.wake_at(NOW_NS + HOUR_NS)
    later = sleeping.takers._timer
    assert later is not None
    assert later.when() - asyncio.get_running_loop().time() == pytest.approx(3600, abs=60)
    sleeping.takers.wake_at(NOW_NS - 1)  # over already
    assert later.cancelled()
    for _ in range(1000):
        if await sleeping.awake():
            break
    assert await sleeping.awake() == [0]
