"""Turns on the CPUs: never more threads than there are, nothing lost by cancelling."""

import asyncio

import pytest

from headrace.workers.turns import CpuTurns


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_is_free_is_had_at_once():
    turns = CpuTurns(4)
    await asyncio.wait_for(turns.take(3), 30)
    one = await asyncio.wait_for(turns.take(1), 30)
    waiting = asyncio.create_task(turns.take(1))
    await settle()
    assert not waiting.done()
    turns.give(one)
    await asyncio.wait_for(waiting, 30)


async def test_the_model_that_has_used_less_goes_first():
    now_ns = 0
    turns = CpuTurns(2, clock=lambda: now_ns)
    first = await turns.take(2, "hot")
    order = []

    async def wish(model):
        turn = await turns.take(2, model)
        order.append(model)
        turns.give(turn)

    tasks = [asyncio.create_task(wish(model)) for model in ("hot", "hot", "quiet")]
    await settle()
    now_ns = 1000
    turns.give(first)
    await asyncio.gather(*tasks)
    assert order == ["quiet", "hot", "hot"]


async def test_one_that_gives_up_lets_the_next_pass():
    turns = CpuTurns(2)
    await turns.take(1)
    large = asyncio.create_task(turns.take(2))
    await settle()
    small = asyncio.create_task(turns.take(1))
    await settle()
    large.cancel()
    await asyncio.wait_for(small, 30)
    with pytest.raises(asyncio.CancelledError):
        await large


async def test_a_turn_that_comes_together_with_the_cancellation_is_not_lost():
    turns = CpuTurns(2)
    turn = await turns.take(2)
    waiting = asyncio.create_task(turns.take(2))
    await settle()
    turns.give(turn)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(turns.take(2), 30)


async def test_threads_given_back_in_the_tick_of_a_cancellation_go_to_the_next():
    """A cancelled wait is still in the row until its task runs."""
    turns = CpuTurns(2)
    turn = await turns.take(2)
    gone = asyncio.create_task(turns.take(2))
    await settle()
    next_one = asyncio.create_task(turns.take(2))
    await settle()
    gone.cancel()
    turns.give(turn)
    turn = await asyncio.wait_for(next_one, 30)
    with pytest.raises(asyncio.CancelledError):
        await gone
    turns.give(turn)
    await asyncio.wait_for(turns.take(2), 30)


async def test_who_stands_in_line_again_is_not_passed_by_who_has_had_more():
    now_ns = 0
    turns = CpuTurns(1, clock=lambda: now_ns)
    long = await turns.take(1, "long")
    short = turns.ask(1, "short")
    now_ns = 100
    long = turns.give(long, again=True)
    assert (await turns.wait(short)).granted_ns == 100
    for now_ns in range(101, 200):  # noqa: B007 - the clock reads it
        short = turns.give(short, again=True)
        assert short.granted_ns >= 0
        assert long.granted_ns < 0
    now_ns = 202
    short = turns.give(short, again=True)
    assert long.granted_ns == 202
    turns.drop(short)
    assert turns.give(long) is None
    await asyncio.wait_for(turns.take(1), 30)


async def test_who_waits_goes_on_when_there_are_more_cpus():
    turns = CpuTurns(1)
    first = await turns.take(1, "a")
    waiting = asyncio.get_running_loop().create_task(turns.take(1, "b"))
    await asyncio.sleep(0)
    assert not waiting.done()
    turns.resize(2)
    assert (await waiting).granted == 1
    turns.give(first)
