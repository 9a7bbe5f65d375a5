"""Which process an instance goes to, and how long a dying one waits."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.workers.placement import Hosting, NewProcess, PlacementLimits, backoff_s, place

MIB = 1024 * 1024
LIMITS = PlacementLimits(own=2, shared=2)


def own(name, instances=1):
    return Hosting(name, shared=False, instances=instances)


def shared(name, instances):
    return Hosting(name, shared=True, instances=instances)


def test_while_they_are_few_each_has_a_process_to_itself():
    assert place(True, MIB, [], LIMITS) == NewProcess(shared=False)
    assert place(True, MIB, [own("worker-1")], LIMITS) == NewProcess(shared=False)


def test_past_the_cap_small_ones_share():
    full = [own("worker-1"), own("worker-2")]
    assert place(True, MIB, full, LIMITS) == NewProcess(shared=True)
    assert place(True, MIB, [*full, shared("shared-3", 9)], LIMITS) == NewProcess(shared=True)


def test_the_emptiest_shared_process_is_next():
    full = [own("worker-1"), own("worker-2")]
    assert place(True, MIB, [*full, shared("shared-3", 9), shared("shared-4", 8)], LIMITS) == "shared-4"
    assert place(True, MIB, [*full, shared("shared-4", 3), shared("shared-3", 3)], LIMITS) == "shared-3"


@pytest.mark.parametrize(("shareable", "file_bytes"), [(False, 1), (True, 64 * MIB + 1), (False, 10**12)])
def test_large_ones_and_those_that_cannot_share_always_have_their_own(shareable, file_bytes):
    many = [own("worker-1"), own("worker-2"), shared("shared-3", 0), shared("shared-4", 0)]
    assert place(shareable, file_bytes, many, LIMITS) == NewProcess(shared=False)


def test_a_model_of_exactly_the_bound_is_still_small():
    many = [own("worker-1"), own("worker-2"), shared("shared-3", 0), shared("shared-4", 0)]
    assert place(True, LIMITS.shareable_bytes, many, LIMITS) == "shared-3"


def test_a_cap_of_none_shares_from_the_first():
    assert place(True, 1, [], PlacementLimits(own=0, shared=1)) == NewProcess(shared=True)


@given(st.lists(st.booleans(), max_size=120), st.integers(0, 8), st.integers(1, 8))
def test_processes_stay_few_and_evenly_filled_however_many_models_come(shareable, own_cap, shared_cap):
    limits = PlacementLimits(own_cap, shared_cap)
    counts: Counter[str] = Counter()
    kinds: dict[str, bool] = {}
    for number, can_share in enumerate(shareable):
        where = place(can_share, 1, [Hosting(name, kinds[name], counts[name]) for name in kinds], limits)
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


def test_the_first_start_is_at_once_and_later_ones_wait_longer_up_to_a_bound():
    waits = [backoff_s(failures) for failures in range(12)]
    assert waits[:4] == [0.0, 0.1, 0.2, 0.4]
    assert waits == sorted(waits)
    assert waits[-1] == 5.0


def test_a_worker_that_has_died_all_week_is_still_started_again():
    assert backoff_s(20_000) == 5.0
