"""Turns on the CPUs: never more threads than there are, first come first served, nothing lost by cancelling."""

import asyncio

import pytest

from headrace.workers.turns import CpuTurns


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_is_free_is_had_at_once():
    turns = CpuTurns(4)
    await asyncio.wait_for(turns.take(3), 1)
    await asyncio.wait_for(turns.take(1), 1)
    waiting = asyncio.create_task(turns.take(1))
    await settle()
    assert not waiting.done()
    turns.give(1)
    await asyncio.wait_for(waiting, 1)


async def test_a_small_wish_does_not_overtake_a_large_one():
    turns = CpuTurns(2)
    await turns.take(1)
    order = []

    async def wish(name, threads):
        await turns.take(threads)
        order.append(name)

    large = asyncio.create_task(wish("large", 2))
    await settle()
    small = asyncio.create_task(wish("small", 1))
    await settle()
    assert order == [], "one thread is free, and it is kept for the one that came first"
    turns.give(1)
    await large
    await settle()
    assert order == ["large"]
    turns.give(2)
    await small
    assert order == ["large", "small"]


async def test_one_that_gives_up_lets_the_next_pass():
    turns = CpuTurns(2)
    await turns.take(1)
    large = asyncio.create_task(turns.take(2))
    await settle()
    small = asyncio.create_task(turns.take(1))
    await settle()
    large.cancel()
    await asyncio.wait_for(small, 1)
    with pytest.raises(asyncio.CancelledError):
        await large


async def test_a_turn_that_comes_together_with_the_cancellation_is_not_lost():
    turns = CpuTurns(2)
    await turns.take(2)
    waiting = asyncio.create_task(turns.take(2))
    await settle()
    turns.give(2)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(turns.take(2), 1)


async def test_threads_given_back_in_the_tick_of_a_cancellation_go_to_the_next():
    """A cancelled wait is still in the row until its task runs."""
    turns = CpuTurns(2)
    await turns.take(2)
    gone = asyncio.create_task(turns.take(2))
    await settle()
    next_one = asyncio.create_task(turns.take(2))
    await settle()
    gone.cancel()
    turns.give(2)
    await asyncio.wait_for(next_one, 1)
    with pytest.raises(asyncio.CancelledError):
        await gone
    turns.give(2)
    await asyncio.wait_for(turns.take(2), 1)
