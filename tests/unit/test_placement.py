"""Which process an instance goes to, and how long a dying one waits."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.workers.placement import Hosting, Needs, NewProcess, PlacementLimits, place

MIB = 1024 * 1024
LIMITS = PlacementLimits(own=2, shared=2)


def own(name, instances=1):
    return Hosting(name, shared=False, instances=instances)


def shared(name, instances):
    return Hosting(name, shared=True, instances=instances)


def test_while_they_are_few_each_has_a_process_to_itself():
    assert place(Needs(MIB, True), [], LIMITS) == NewProcess(shared=False)
    assert place(Needs(MIB, True), [own("worker-1")], LIMITS) == NewProcess(shared=False)


def test_past_the_cap_small_ones_share():
    full = [own("worker-1"), own("worker-2")]
    assert place(Needs(MIB, True), full, LIMITS) == NewProcess(shared=True)
    assert place(Needs(MIB, True), [*full, shared("shared-3", 9)], LIMITS) == NewProcess(shared=True)


def test_the_emptiest_shared_process_is_next():
    full = [own("worker-1"), own("worker-2")]
    assert place(Needs(MIB, True), [*full, shared("shared-3", 9), shared("shared-4", 8)], LIMITS) == "shared-4"
    assert place(Needs(MIB, True), [*full, shared("shared-4", 3), shared("shared-3", 3)], LIMITS) == "shared-3"


@pytest.mark.parametrize(("shareable", "file_bytes"), [(False, 1), (True, 64 * MIB + 1), (False, 10**12)])
def test_large_ones_and_those_that_cannot_share_always_have_their_own(shareable, file_bytes):
    many = [own("worker-1"), own("worker-2"), shared("shared-3", 0), shared("shared-4", 0)]
    assert place(Needs(file_bytes, shareable), many, LIMITS) == NewProcess(shared=False)


def test_a_model_of_exactly_the_bound_is_still_small():
    many = [own("worker-1"), own("worker-2"), shared("shared-3", 0), shared("shared-4", 0)]
    assert place(Needs(LIMITS.shareable_bytes, True), many, LIMITS) == "shared-3"


def test_a_cap_of_none_shares_from_the_first():
    assert place(Needs(1, True), [], PlacementLimits(own=0, shared=1)) == NewProcess(shared=True)


PAGES = Needs(MIB, shareable=True, pages=True)
COMES_IN = Needs(MIB, shareable=True, pages=True, again=True)


def test_small_ones_that_come_and_go_share_from_the_first_and_spread():
    assert place(PAGES, [], LIMITS) == NewProcess(shared=True)
    assert place(PAGES, [shared("shared-1", 1)], LIMITS) == NewProcess(shared=True)
    assert place(PAGES, [shared("shared-1", 3), shared("shared-2", 2)], LIMITS) == "shared-2"


def test_what_comes_in_goes_where_nobody_is_at_work():
    """And not to the emptiest, whose one model would wait for the load."""
    hot = Hosting("shared-1", shared=True, instances=1, active=True, used_at_ns=9)
    quiet = [Hosting(f"shared-{number}", shared=True, instances=number, used_at_ns=number) for number in (5, 4)]
    limits = PlacementLimits(own=2, shared=4)
    assert place(COMES_IN, [hot, *quiet], limits) == "shared-4"
    assert place(COMES_IN, [hot], limits) == NewProcess(shared=True)
    assert place(COMES_IN, [], limits) == NewProcess(shared=True)


def test_where_all_are_at_work_it_goes_to_the_one_used_longest_ago():
    hot = [
        Hosting(f"shared-{number}", shared=True, instances=1, active=True, used_at_ns=9 - number) for number in (1, 2)
    ]
    assert place(COMES_IN, hot, LIMITS) == "shared-2"


def test_what_comes_in_and_cannot_share_has_its_own():
    needs = Needs(MIB, shareable=False, pages=True, again=True)
    assert place(needs, [shared("shared-1", 0)], LIMITS) == NewProcess(shared=False)


@given(st.lists(st.booleans(), max_size=120), st.integers(0, 8), st.integers(1, 8))
def test_processes_stay_few_and_evenly_filled_however_many_models_come(shareable, own_cap, shared_cap):
    limits = PlacementLimits(own_cap, shared_cap)
    counts: Counter[str] = Counter()
    kinds: dict[str, bool] = {}
    for number, can_share in enumerate(shareable):
        where = place(Needs(1, can_share), [Hosting(name, kinds[name], counts[name]) for name in kinds], limits)
        if isinstance(where, NewProcess):
            name = f"process-{number}"
            kinds[name] = where.shared
        else:
            assert can_share
            assert kinds[where]
            name = where
        counts[name] += 1
        filled = [counts[name] for name, is_shared in kinds.items() if is_shared]
        assert len(filled) <= shared_cap
        assert not filled or max(filled) - min(filled) <= 1 or len(filled) < shared_cap
        assert all(counts[name] == 1 for name, is_shared in kinds.items() if not is_shared)
    assert sum(1 for is_shared in kinds.values() if not is_shared) <= own_cap + shareable.count(False)


def test_models_of_one_device_share_and_others_do_not():
    limits = PlacementLimits(own=0, shared=1)
    hosting = [Hosting("shared-1", shared=True, instances=1), Hosting("shared-2", True, 2, device="gpu:0")]
    assert place(Needs(1, True), hosting, limits) == "shared-1"
    assert place(Needs(1, True, "gpu:0"), hosting, limits) == "shared-2"
    assert place(Needs(1, True, "gpu:1"), hosting, limits) == NewProcess(shared=True)
    assert place(Needs(1, True, "gpu:0", again=True), hosting, limits) == "shared-2"
