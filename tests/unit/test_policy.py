"""When a batch is closed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.policy import BatchLimits, Take, Wait, decide

MS = 1_000_000
sizes = st.integers(1, 64)
limits_of = st.builds(
    BatchLimits,
    max_rows=sizes,
    preferred_rows=st.lists(sizes, max_size=3).map(tuple),
    max_delay_ns=st.sampled_from([0, MS, 50 * MS]),
)


@pytest.mark.parametrize("rows", [1, 5, 31])
def test_without_a_delay_whatever_is_there_goes(rows):
    assert decide(BatchLimits(max_rows=32), rows, oldest_ns=100, now_ns=100) == Take(rows)


@pytest.mark.parametrize("rows", [8, 9, 500])
def test_a_full_batch_goes_at_once_and_holds_no_more_than_it_may(rows):
    assert decide(BatchLimits(8, (4,), 50 * MS), rows, oldest_ns=0, now_ns=0) == Take(8)


def test_with_a_delay_company_is_waited_for_until_the_oldest_has_had_enough():
    limits = BatchLimits(max_rows=8, max_delay_ns=2 * MS)
    due = 10 * MS + 2 * MS
    for now_ns in (10 * MS, 11 * MS, due - 1):
        assert decide(limits, 3, oldest_ns=10 * MS, now_ns=now_ns) == Wait(due)
    for now_ns in (due, due + 1, due + 90 * MS):
        assert decide(limits, 3, oldest_ns=10 * MS, now_ns=now_ns) == Take(3)


@pytest.mark.parametrize(("rows", "taken"), [(4, 4), (5, 4), (15, 4), (16, 16), (31, 16), (32, 32)])
def test_the_largest_preferred_size_that_is_there_goes_at_once(rows, taken):
    assert decide(BatchLimits(32, (16, 4), 5 * MS), rows, oldest_ns=0, now_ns=0) == Take(taken)


def test_fewer_rows_than_any_preferred_size_wait_and_then_go_as_they_are():
    limits = BatchLimits(32, (4, 16), 5 * MS)
    assert decide(limits, 3, oldest_ns=0, now_ns=MS) == Wait(5 * MS)
    assert decide(limits, 3, oldest_ns=0, now_ns=5 * MS) == Take(3)


def test_a_model_that_does_not_batch_takes_one_at_a_time():
    assert decide(BatchLimits(), 7, oldest_ns=0, now_ns=0) == Take(1)


@given(limits=limits_of, rows=st.integers(1, 200), oldest_ns=st.integers(0, 10 * MS), age_ns=st.integers(0, 200 * MS))
def test_every_decision_takes_something_within_bounds_or_names_a_time_ahead(limits, rows, oldest_ns, age_ns):
    now_ns = oldest_ns + age_ns
    decision = decide(limits, rows, oldest_ns, now_ns)
    if isinstance(decision, Take):
        assert 1 <= decision.rows <= rows
        assert decision.rows <= max(limits.max_rows, *limits.preferred_rows, 1)
        return
    assert now_ns < decision.until_ns == oldest_ns + limits.max_delay_ns
    # The time it names is the time at which it does not wait any more.
    assert isinstance(decide(limits, rows, oldest_ns, decision.until_ns), Take)
    assert isinstance(decide(limits, rows, oldest_ns, decision.until_ns - 1), Wait)
