"""The shell round the resources: it wakes who may run, and nothing is lost by cancelling."""

import asyncio

import pytest

from headrace.workers.rate_limit import RateLimiter
from headrace.workers.resources import Claim, Resources

R = ("cpu", "R")


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
def claims():
    return [Claim(name, {R: 1}) for name in "abc"]


@pytest.fixture
def limiter(claims):
    resources = Resources({})
    for claim in claims:
        resources.add(claim)
    return RateLimiter(resources)


async def test_one_after_the_other(limiter, claims):
    await asyncio.wait_for(limiter.take(claims[0]), 30)
    waiting = asyncio.create_task(limiter.take(claims[1]))
    await settle()
    assert not waiting.done()
    limiter.give(claims[0], ran=True)
    await asyncio.wait_for(waiting, 30)
    assert claims[1].holds


async def test_one_that_gives_up_lets_the_next_pass(limiter, claims):
    await limiter.take(claims[0])
    gone = asyncio.create_task(limiter.take(claims[1]))
    await settle()
    waiting = asyncio.create_task(limiter.take(claims[2]))
    await settle()
    gone.cancel()
    limiter.give(claims[0], ran=True)
    await asyncio.wait_for(waiting, 30)
    with pytest.raises(asyncio.CancelledError):
        await gone


async def test_what_comes_together_with_the_cancellation_is_not_lost(limiter, claims):
    await limiter.take(claims[0])
    waiting = asyncio.create_task(limiter.take(claims[1]))
    await settle()
    limiter.give(claims[0], ran=True)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not claims[1].holds
    await asyncio.wait_for(limiter.take(claims[2]), 30)


async def test_one_that_is_gone_makes_room_for_others():
    large, small = Claim("large", {R: 2}), Claim("small", {R: 1})
    resources = Resources({})
    resources.add(large)
    resources.add(small)
    limiter = RateLimiter(resources)
    await limiter.take(small)
    limiter.remove(large)
    assert resources.usage() == {R: (1, 1)}
    limiter.give(small, ran=False)
    await asyncio.wait_for(limiter.take(small), 30)


async def test_what_is_asked_for_again_is_had_once(limiter, claims):
    """Whether it was granted at once or had to be waited for."""
    await limiter.take(claims[0])
    limiter.give(claims[0], again=True)
    assert claims[0].holds, "nobody else wants it"
    await asyncio.wait_for(limiter.take(claims[0]), 30)
    assert limiter.resources.usage() == {R: (1, 1)}
    waiting = asyncio.create_task(limiter.take(claims[1]))
    await settle()
    limiter.give(claims[0], again=True)
    await asyncio.wait_for(waiting, 30)
    again = asyncio.create_task(limiter.take(claims[0]))
    await settle()
    assert not again.done()
    limiter.give(claims[1])
    await asyncio.wait_for(again, 30)
    limiter.give(claims[0])
    assert limiter.resources.usage() == {R: (0, 1)}


async def test_what_was_asked_for_again_can_be_dropped(limiter, claims):
    await limiter.take(claims[0])
    limiter.give(claims[0], again=True)
    limiter.drop(claims[0])
    await asyncio.wait_for(limiter.take(claims[1]), 30)
    limiter.drop(claims[0])  # nothing is asked for, and nothing held
    assert limiter.resources.usage() == {R: (1, 1)}
