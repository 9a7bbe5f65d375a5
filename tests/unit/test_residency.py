"""Who makes room for whom: made-up sizes and times, and a pager over models that only say what they are told."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.repository.pager import Pager
from headrace.repository.residency import AwaitIdle, Evict, Resident, TooLarge, make_room
from headrace.workers.loads import LoadRefused


def resident(key, nbytes, used_at_ns, **more):
    return Resident(key, nbytes, used_at_ns, **more)


# -- the decision --------------------------------------------------------------------------------------------------


def test_while_there_is_room_nobody_goes():
    assert make_room(40, [resident("a", 60, 1)], 100) == Evict()
    assert make_room(0, [], 100) == Evict()


def test_those_used_longest_ago_go_first():
    everything = [resident("new", 30, 9), resident("old", 30, 1), resident("middle", 30, 5)]
    assert make_room(20, everything, 100) == Evict(("old",))
    assert make_room(50, everything, 100) == Evict(("old", "middle"))


def test_what_a_large_one_makes_needless_stays():
    everything = [resident("small", 5, 1), resident("large", 80, 2), resident("other", 10, 3)]
    assert make_room(20, everything, 100) == Evict(("large",))
    assert make_room(90, everything, 100) == Evict(("small", "large")), "and what is needed goes"


def test_who_is_busy_or_pinned_stays():
    everything = [resident("busy", 40, 1, busy=True), resident("pinned", 30, 2, pinned=True), resident("idle", 30, 3)]
    assert make_room(30, everything, 100) == Evict(("idle",))


def test_who_needs_more_than_is_idle_waits_and_nobody_goes_in_vain():
    everything = [resident("busy", 60, 1, busy=True), resident("idle", 30, 3)]
    assert make_room(50, everything, 100) == AwaitIdle()


def test_who_never_fits_is_told():
    everything = [resident("pinned", 30, 1, pinned=True), resident("busy", 60, 2, busy=True)]
    assert make_room(71, everything, 100) == TooLarge(30)
    assert make_room(70, everything, 100) == AwaitIdle()


ANY = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9), st.booleans(), st.booleans()), max_size=12)


@given(st.integers(0, 120), ANY, st.integers(0, 200))
def test_whatever_is_there(needed, made, limit):
    everything = [
        Resident(key, nbytes, used, busy=busy, pinned=pinned) for key, (nbytes, used, busy, pinned) in enumerate(made)
    ]
    decision = make_room(needed, everything, limit)
    if isinstance(decision, Evict):
        gone = [everything[key] for key in decision.keys]
        assert not any(one.busy or one.pinned for one in gone)
        free = limit - sum(one.nbytes for one in everything) + sum(one.nbytes for one in gone)
        assert free >= needed
        for one in gone:
            assert free - one.nbytes < needed, "nobody goes in vain"
    else:
        stay = sum(one.nbytes for one in everything if one.pinned or (one.busy and isinstance(decision, AwaitIdle)))
        assert stay + needed > limit


# -- the pager -----------------------------------------------------------------------------------------------------


class Model:
    """One that goes when it is told to."""

    def __init__(self, pager, label, nbytes, used_at_ns=0, *, pinned=False, takes=None):
        self.pager = pager
        self.label = label
        self.nbytes = nbytes
        self.takes = nbytes if takes is None else takes  # what it turns out to take
        self.used_at_ns = used_at_ns
        self.pinned = pinned
        self.busy = False
        self.loads = 0
        self.out = asyncio.Event()
        self.out.set()

    async def come(self):
        await self.pager.admit(self, self.nbytes)
        self.loads += 1
        await asyncio.sleep(0)
        self.pager.settle(self, self.takes)
        return self

    def page_out(self):
        assert not self.busy
        return asyncio.get_running_loop().create_task(self._leave())

    async def _leave(self):
        await self.out.wait()
        self.pager.release(self)

    @property
    def resident(self):
        return self.pager.bytes_of(self) > 0


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture
async def pager():
    made = Pager(100, room_timeout_s=30)
    yield made
    await made.close()


async def test_the_limit_holds(pager):
    models = [Model(pager, str(number), 30, number) for number in range(10)]
    for model in models:
        await model.come()
        assert pager.resident_bytes <= 100
    assert [model.resident for model in models] == [False] * 7 + [True] * 3
    assert (pager.resident_models, pager.counts.evictions) == (3, 7)


async def test_many_at_once_never_pass_it(pager):
    models = [Model(pager, str(number), 30) for number in range(10)]
    await asyncio.gather(*(model.come() for model in models))
    assert pager.resident_bytes == 90


async def test_one_that_waits_for_room_gets_it_when_another_is_idle(pager):
    busy = await Model(pager, "busy", 80).come()
    busy.busy = True
    coming = asyncio.get_running_loop().create_task(Model(pager, "large", 60).come())
    behind = asyncio.get_running_loop().create_task(Model(pager, "small", 10).come())
    await asyncio.sleep(0.05)
    assert not coming.done()
    assert not behind.done(), "who came first gets room first"
    busy.busy = False
    await asyncio.gather(coming, behind)
    assert not busy.resident


async def test_one_that_waits_in_vain_is_refused_and_the_next_is_not():
    pager = Pager(100, room_timeout_s=0.2)
    (await Model(pager, "busy", 80).come()).busy = True
    coming = asyncio.get_running_loop().create_task(Model(pager, "large", 60).come())
    behind = asyncio.get_running_loop().create_task(Model(pager, "small", 10).come())
    with pytest.raises(LoadRefused, match=r"needs about 60 bytes, and for 0.2 s .* busy; all may have 100"):
        await coming
    assert (await behind).resident


async def test_one_that_never_fits_is_refused_at_once_and_nobody_goes(pager):
    other = await Model(pager, "other", 50).come()
    with pytest.raises(LoadRefused, match=r"needs about 101 bytes, more than --resident-bytes 100 has room for$"):
        await Model(pager, "large", 101).come()
    await Model(pager, "pinned", 40, pinned=True).come()
    with pytest.raises(LoadRefused, match="room for beside the 40 bytes of pinned models"):
        await Model(pager, "large", 61).come()
    assert other.resident


async def test_one_that_turns_out_larger_has_others_go(pager):
    others = [await Model(pager, str(number), 30, number).come() for number in range(2)]
    large = await Model(pager, "large", 10, 9, takes=60).come()
    await until(lambda: [model.resident for model in (*others, large)] == [False, True, True])


async def test_one_that_turns_out_too_large_is_refused_and_not_counted(pager):
    await Model(pager, "pinned", 50, pinned=True).come()
    with pytest.raises(LoadRefused, match="needs about 60 bytes"):
        await Model(pager, "large", 10, takes=60).come()
    assert pager.resident_bytes == 50


async def test_over_the_limit_it_waits_for_somebody_to_be_idle(pager):
    busy = await Model(pager, "busy", 60).come()
    busy.busy = True
    large = await Model(pager, "large", 10, 9, takes=60).come()
    large.busy = True
    await asyncio.sleep(0.05)
    assert pager.resident_bytes == 120
    busy.busy = False
    await until(lambda: pager.resident_bytes == 60)


async def test_one_that_leaves_is_counted_until_it_is_gone(pager):
    slow = await Model(pager, "slow", 80).come()
    slow.out.clear()
    coming = asyncio.get_running_loop().create_task(Model(pager, "next", 50).come())
    await asyncio.sleep(0.05)
    assert not coming.done()
    assert pager.resident_bytes == 80
    slow.out.set()
    assert (await coming).resident
    assert pager.counts.evictions == 1


async def test_who_does_not_want_room_any_more_leaves_none_reserved(pager):
    slow = await Model(pager, "slow", 80).come()
    slow.out.clear()
    coming = asyncio.get_running_loop().create_task(Model(pager, "next", 50).come())
    await asyncio.sleep(0.05)
    coming.cancel()
    await asyncio.gather(coming, return_exceptions=True)
    slow.out.set()
    await until(lambda: pager.resident_bytes == 0)
    await Model(pager, "another", 100).come()
