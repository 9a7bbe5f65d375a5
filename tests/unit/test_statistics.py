"""Counters of one model version."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.statistics import LATENCY_BUCKETS_S, ROWS_BUCKETS, Histogram, Statistics

MS = 1_000_000


def test_an_observation_belongs_to_the_first_bucket_that_is_not_below_it():
    histogram = Histogram((1.0, 2.0, 4.0))
    for value in (0.5, 1.0, 1.5, 4.0, 4.5, 100.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2), ("2.0", 3), ("4.0", 4), ("+Inf", 6)]
    assert histogram.total == pytest.approx(111.5)


@given(st.lists(st.floats(0, 1000), max_size=50))
def test_buckets_are_cumulative_and_the_last_one_counts_everything(values):
    histogram = Histogram(LATENCY_BUCKETS_S)
    for value in values:
        histogram.observe(value)
    counts = [number for _, number in histogram.cumulative()]
    assert counts == sorted(counts)
    assert counts[-1] == len(values)
    for bound, number in zip(LATENCY_BUCKETS_S, counts, strict=False):
        assert number == sum(1 for value in values if value <= bound)


@pytest.mark.parametrize("bounds", [LATENCY_BUCKETS_S, ROWS_BUCKETS])
def test_bounds_rise(bounds):
    assert list(bounds) == sorted(set(bounds))


def test_an_answered_request():
    statistics = Statistics()
    statistics.succeeded(30 * MS, 10 * MS)
    statistics.succeeded(50 * MS, 0)
    assert (statistics.success, statistics.success_ns, statistics.queue_ns) == (2, 80 * MS, 10 * MS)
    assert statistics.request_latency_s.total == pytest.approx(0.080)
    assert statistics.queue_time_s.total == pytest.approx(0.010)
    assert statistics.failures == {}


def test_a_failed_request_is_counted_by_its_reason():
    statistics = Statistics()
    for reason in ("REJECTED", "CANCELED", "REJECTED"):
        statistics.failed(reason, 5 * MS)
    assert statistics.failures == {"REJECTED": 2, "CANCELED": 1}
    assert (statistics.failure_ns, statistics.success) == (15 * MS, 0)
    assert statistics.request_latency_s.cumulative()[-1] == ("+Inf", 0)


def test_a_batch_counts_once_as_execution_and_its_times_once_for_each_request():
    statistics = Statistics()
    statistics.executed(requests=3, rows=8, input_ns=1 * MS, infer_ns=10 * MS, output_ns=2 * MS)
    statistics.executed(requests=1, rows=8, input_ns=1 * MS, infer_ns=20 * MS, output_ns=2 * MS)
    statistics.executed(requests=1, rows=1, input_ns=1 * MS, infer_ns=5 * MS, output_ns=2 * MS)
    assert (statistics.executions, statistics.rows) == (3, 17)
    assert statistics.compute_input_ns == 5 * MS
    assert statistics.compute_infer_ns == 30 * MS + 20 * MS + 5 * MS
    assert statistics.compute_output_ns == 10 * MS
    eight = statistics.by_batch_size[8]
    assert (eight.executions, eight.compute_infer_ns) == (2, 30 * MS)
    assert (eight.compute_input_ns, eight.compute_output_ns) == (2 * MS, 4 * MS)
    assert sorted(statistics.by_batch_size) == [1, 8]
    assert statistics.compute_time_s.total == pytest.approx(0.044)
    assert statistics.batch_rows.total == 17


def test_two_versions_do_not_share_counters():
    one, other = Statistics(), Statistics()
    one.succeeded(1, 1)
    one.failed("BACKEND", 1)
    one.executed(1, 1, 1, 1, 1)
    assert (other.success, other.failures, other.by_batch_size, other.batch_rows.total) == (0, {}, {}, 0.0)
