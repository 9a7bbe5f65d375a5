"""What becomes of a worker's loads when it answers, refuses or dies, with made-up times."""

import asyncio
from types import SimpleNamespace

import pytest

from headrace.workers.loads import GIVE_UP_AFTER_S, LOAD_ATTEMPTS, LONGEST_PUT_OFF_S, PUT_OFF_S, LoadRefused, Loads


def instance(number=3, waiting=0):
    return SimpleNamespace(load=SimpleNamespace(instance=number), waiting=waiting)


def first_load(loads, of=None):
    """A load that somebody waits for."""
    return loads.add(of or instance(), asyncio.get_running_loop().create_future())


async def test_an_answer_ends_a_load_and_whoever_waits_is_told():
    loads = Loads()
    good, bad = first_load(loads, instance(1)), first_load(loads, instance(2))
    again = loads.add(instance(3))
    assert [one.instance.load.instance for one in loads] == [1, 2, 3]
    assert [loads.answered(number) for number in (1, 2, 3)] == [good, bad, again]
    good.succeed()
    bad.refuse("out of memory")
    again.succeed()
    again.refuse("nobody waits for this")
    assert await good.future is None
    with pytest.raises(LoadRefused, match="out of memory"):
        await bad.future
    assert len(loads) == 0


async def test_one_that_is_not_wanted_any_more_is_not_answered():
    loads, wanted = Loads(), instance()
    loading = first_load(loads, wanted)
    assert wanted in loads
    loading.future.cancel()
    loads.drop(wanted)
    loads.drop(wanted)
    assert wanted not in loads
    assert loads.answered(3) is None
    loading.succeed()
    loading.refuse("too late")
    assert loading.future.cancelled()


async def test_a_first_load_is_tried_again_when_the_process_dies_and_not_for_ever():
    loads = Loads()
    loading = first_load(loads)
    for attempt in range(LOAD_ATTEMPTS):
        assert not loading.future.done()
        assert len(loads) == 1
        assert loads.died(loading, "signal SIGSEGV", float(attempt), timed_out=False) == ""
    with pytest.raises(LoadRefused, match="the worker died while it loaded the model: signal SIGSEGV"):
        await loading.future
    assert len(loads) == 0
    assert loads.failures == LOAD_ATTEMPTS


async def test_one_that_took_too_long_is_not_tried_again():
    loads = Loads()
    loading = first_load(loads)
    assert loads.died(loading, "loading model 'm' took longer than 60 s", 0.0, timed_out=True) == ""
    with pytest.raises(LoadRefused, match="took longer"):
        await loading.future


@pytest.mark.parametrize(
    ("deaths_at", "told"),
    [
        ([0.0, 1.0, 2.0, 3.0], [False] * 4),
        ([0.0, GIVE_UP_AFTER_S + 1], [False] * 2),
        ([0.0, 1.0, GIVE_UP_AFTER_S], [False] * 3),
        ([0.0, 1.0, GIVE_UP_AFTER_S + 1, GIVE_UP_AFTER_S + 2], [False, False, True, True]),
    ],
    ids=["not long enough", "not often enough", "just so", "both"],
)
def test_what_was_up_before_is_tried_for_ever_and_whoever_waits_is_told_after_a_while(deaths_at, told):
    loads = Loads()
    loading = loads.add(instance())
    reasons = [loads.died(loading, "signal SIGKILL", 50.0 + now, timed_out=False) for now in deaths_at]
    assert [bool(reason) for reason in reasons] == told
    assert all("signal SIGKILL, " in one and one.endswith("it goes on trying") for one in reasons if one)
    assert len(loads) == 1


def test_getting_ready_once_makes_good_for_all_failures():
    loads = Loads()
    for now in (0.0, 10.0):
        loads.start_failed(now)
    assert loads.failures == 2
    loads.answered(99)
    assert loads.failures == 0
    loading = loads.add(instance())
    assert not any(loads.died(loading, "exit status 1", now, timed_out=False) for now in (20.0, 21.0, 22.0))


async def test_where_there_is_no_process_only_first_loads_are_refused():
    loads = Loads()
    loading, again = first_load(loads, instance(1)), loads.add(instance(2))
    loads.refuse_all("cannot start a worker process: no memory")
    loads.refuse_all("and again")
    with pytest.raises(LoadRefused, match="no memory"):
        await loading.future
    assert list(loads) == [loading, again], "each is dropped by whoever has asked for it"


async def test_what_is_waited_for_most_comes_back_first_and_keeps_who_waits_for_it():
    loads = Loads()
    hosted = [instance(1, waiting=0), instance(2, waiting=7), instance(3, waiting=2), instance(4, waiting=2)]
    loading = first_load(loads, hosted[2])
    loads.bring_back(hosted)
    assert [one.instance.load.instance for one in loads] == [2, 3, 4, 1]
    assert list(loads)[1] is loading


def die(loads, loading, times=1, timed_out=False):
    for _ in range(times):
        loads.died(loading, "signal SIGSEGV", 0.0, timed_out=timed_out)
    return loads.put_off(loading, timed_out=timed_out)


def test_what_the_process_died_of_comes_back_behind_all_others():
    loads = Loads()
    hosted = [instance(1, waiting=7), instance(2), instance(3, waiting=1)]
    loads.bring_back(hosted)
    assert die(loads, next(iter(loads))) == 0.0
    loads.bring_back(hosted)
    assert [one.instance.load.instance for one in loads] == [3, 2, 1]


def test_what_it_dies_of_again_and_again_is_put_off_for_longer_each_time():
    loads = Loads()
    hosted = [instance(1), instance(2)]
    loads.bring_back(hosted)
    assert die(loads, next(iter(loads)), LOAD_ATTEMPTS) == PUT_OFF_S
    loads.bring_back(hosted)
    assert [one.instance.load.instance for one in loads] == [2]
    pauses = [die(loads, loads.add(hosted[0])) for _ in range(6)]
    assert pauses[:2] == [2 * PUT_OFF_S, 4 * PUT_OFF_S]
    assert pauses[-1] == LONGEST_PUT_OFF_S
    loads.add(hosted[0])
    loads.answered(1)
    assert die(loads, loads.add(hosted[0])) == 0.0, "it has come up, and all is forgiven"


def test_what_took_too_long_to_come_back_is_put_off_at_once():
    loads = Loads()
    assert die(loads, loads.add(instance()), timed_out=True) == PUT_OFF_S


async def test_neither_a_first_load_nor_one_that_nobody_wants_any_more_is_put_off():
    loads = Loads()
    assert die(loads, first_load(loads, instance(1)), LOAD_ATTEMPTS - 1) == 0.0
    unloaded = loads.add(instance(2))
    loads.drop(unloaded.instance)
    assert die(loads, unloaded, LOAD_ATTEMPTS) == 0.0
