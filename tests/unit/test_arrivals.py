"""The rate of arrivals, at made-up times."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.arrivals import ArrivalRate

MS = 1_000_000


def rate_of(gap_ms, count, rows=1, horizon_ms=50):
    rate = ArrivalRate(horizon_ms * MS)
    for number in range(count):
        rate.arrived(rows, int(number * gap_ms * MS))
    return rate, int((count - 1) * gap_ms * MS)


@pytest.mark.parametrize(("gap_ms", "rows"), [(1, 1), (5, 1), (0.25, 3)])
def test_a_steady_stream_has_its_rate(gap_ms, rows):
    rate, now_ns = rate_of(gap_ms, 2000, rows)
    assert rate.per_ns(now_ns) * MS == pytest.approx(rows / gap_ms, rel=0.06)


def test_nothing_has_no_rate_and_silence_fades():
    assert ArrivalRate(MS).per_ns(10**12) == 0
    rate, now_ns = rate_of(1, 1000)
    assert rate.per_ns(now_ns + 50 * MS) == pytest.approx(rate.per_ns(now_ns) / 2.718, rel=0.01)
    assert rate.per_ns(now_ns + 10_000 * MS) * MS < 1e-9


def test_a_burst_is_seen_within_the_horizon():
    rate, now_ns = rate_of(10, 500)
    for number in range(1, 101):
        rate.arrived(1, now_ns + number * MS)
    assert rate.per_ns(now_ns + 100 * MS) * MS == pytest.approx(1.0, rel=0.2)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 10**9)), max_size=50))
def test_it_is_never_negative_and_a_clock_that_stands_still_is_no_trouble(arrivals):
    rate = ArrivalRate(20 * MS)
    now_ns = 0
    for rows, gap_ns in arrivals:
        now_ns += gap_ns
        rate.arrived(rows, now_ns)
        rate.arrived(rows, now_ns)
        assert 0 < rate.per_ns(now_ns) <= sum(2 * each for each, _ in arrivals) / (20 * MS) * (1 + 1e-9)
