"""Counters of one model version, and the report that both protocols give of them."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import InvalidRequest, NotFound
from headrace.core.statistics import (
    FIRST_RESPONSE_BUCKETS_MS,
    LATENCY_BUCKETS_S,
    MAX_RESPONSE_INDEXES,
    ROWS_BUCKETS,
    Histogram,
    Statistics,
    Summaries,
)
from headrace.core.window import WINDOW_NS, Window
from headrace.frontends.grpc_statistics import StatisticsService
from headrace.frontends.http_statistics import add_statistics
from headrace.frontends.statistics_report import model_statistics, report
from headrace.metrics import WorkerSample
from headrace.wire import pb

MS = 1_000_000
S = 1_000_000_000


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


@pytest.mark.parametrize("bounds", [LATENCY_BUCKETS_S, ROWS_BUCKETS, FIRST_RESPONSE_BUCKETS_MS])
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


# -- response cache and decoupled models


def test_a_cache_hit_is_a_success_that_neither_waited_nor_ran():
    statistics = Statistics()
    statistics.executed(requests=2, rows=4, input_ns=1, infer_ns=10, output_ns=2)
    statistics.succeeded(50, 20)
    statistics.succeeded(60, 30)
    statistics.cache_hit(7)
    assert (statistics.success, statistics.success_ns, statistics.computed) == (3, 117, 2)
    assert (statistics.cache_hits, statistics.cache_hit_ns, statistics.queue_ns) == (1, 7, 50)
    assert (statistics.rows, statistics.executions) == (4, 1)
    assert statistics.queue_time_s.cumulative()[-1] == ("+Inf", 3)


def test_a_cache_miss_says_nothing_about_how_the_request_ends():
    statistics = Statistics()
    statistics.cache_miss(9)
    statistics.cache_miss(11)
    assert (statistics.cache_misses, statistics.cache_miss_ns) == (2, 20)
    assert (statistics.success, statistics.failures, statistics.executions) == (0, {}, 0)


def test_responses_are_counted_by_their_index_and_by_what_became_of_them():
    statistics = Statistics()
    statistics.responded(0, 100, 10, "success")
    statistics.responded(0, 200, 20, "success")
    statistics.responded(1, 300, 30, "fail")
    statistics.responded(1, 400, 0, "empty_response")
    statistics.responded(1, 50, 5, "cancel")
    first, second = (asdict(statistics.by_response[index]) for index in (0, 1))
    none = {"count": 0, "ns": 0}
    assert first == {
        "compute_infer": {"count": 2, "ns": 300},
        "compute_output": {"count": 2, "ns": 30},
        "success": {"count": 2, "ns": 330},
        "fail": none,
        "empty_response": none,
        "cancel": none,
    }
    assert second == {
        "compute_infer": {"count": 2, "ns": 700},
        "compute_output": {"count": 1, "ns": 30},
        "success": none,
        "fail": {"count": 1, "ns": 330},
        "empty_response": {"count": 1, "ns": 400},
        "cancel": {"count": 1, "ns": 55},
    }


def test_a_stream_without_end_takes_no_memory_without_end():
    statistics = Statistics()
    for index in range(MAX_RESPONSE_INDEXES + 500):
        statistics.responded(index, 1, 1, "success")
    assert len(statistics.by_response) == MAX_RESPONSE_INDEXES
    assert statistics.by_response[MAX_RESPONSE_INDEXES - 2].success.count == 1
    assert statistics.by_response[MAX_RESPONSE_INDEXES - 1].success.count == 501


def test_first_responses_are_counted_in_milliseconds():
    statistics = Statistics()
    for duration_ms in (99, 100, 101, 4999, 60_000):
        statistics.first_responded(duration_ms * MS)
    counts = [("100.0", 2), ("500.0", 3), ("2000.0", 3), ("5000.0", 4), ("+Inf", 5)]
    assert statistics.first_response_ms.cumulative() == counts


# -- quantiles of the last minute


@given(st.lists(st.integers(0, 10**13), min_size=1, max_size=200), st.floats(0.001, 1))
def test_a_quantile_is_that_of_the_values_but_for_a_percent(values, quantile):
    window = Window()
    for value in values:
        window.observe(value, 0)
    exact = sorted(values)[max(0, math.ceil(quantile * len(values)) - 1)]
    [found] = window.quantiles([quantile], 0)
    assert found == pytest.approx(exact, rel=0.01)


@given(
    st.lists(st.tuples(st.integers(0, 20 * S), st.integers(0, 1000)), max_size=60),
    st.integers(0, 90 * S),
)
def test_the_window_holds_the_last_minute_and_forgets_the_rest(steps, later_ns):
    window, now_ns, seen = Window(), 0, []
    for pause_ns, value in steps:
        now_ns += pause_ns
        window.observe(value, now_ns)
        seen.append((now_ns, value))
        low, high = window.quantiles([0.0001, 1], now_ns)
        held = [one for at_ns, one in seen if at_ns > now_ns - WINDOW_NS]
        certain = [one for at_ns, one in seen if at_ns > now_ns - WINDOW_NS * 5 // 6]
        assert min(held) * 0.99 <= low
        assert high <= max(held) * 1.01
        assert low <= min(certain) * 1.01
        assert high >= max(certain) * 0.99
    now_ns += later_ns
    empty = not [one for at_ns, one in seen if at_ns > now_ns - WINDOW_NS]
    certain = [one for at_ns, one in seen if at_ns > now_ns - WINDOW_NS * 5 // 6]
    [median] = window.quantiles([0.5], now_ns)
    assert math.isnan(median) or not empty
    assert not math.isnan(median) or not certain


def test_a_window_stays_small_whatever_it_is_fed():
    window = Window()
    for value in range(0, 3_000_000, 7):
        window.observe(value, 0)
    assert len(window._buckets) < 64 * 22 + 128


def test_observations_may_come_several_at_once():
    window = Window()
    window.observe(10, 0, times=98)
    window.observe(50, 0, times=2)
    assert window.quantiles([0.5, 0.98, 0.99], 0) == [10, 10, 50]


def test_summaries_are_fed_only_where_they_are_asked_for():
    assert Statistics().summaries is None
    statistics = Statistics(with_summaries=True)
    now_ns = 0
    statistics.summaries = summaries = Summaries(lambda: now_ns)
    statistics.executed(requests=3, rows=3, input_ns=1, infer_ns=10, output_ns=2)
    statistics.executed(requests=0, rows=3, input_ns=100, infer_ns=100, output_ns=100)  # nobody waited for it
    for queue_ns in (20, 21, 22):
        statistics.succeeded(100, queue_ns)
    statistics.cache_hit(5)
    statistics.cache_miss(6)
    medians = {
        name: summaries.quantiles(getattr(summaries, name), (0.5,))[0]
        for name in Summaries.__slots__
        if not name.startswith("_")
    }
    assert medians == {
        "request": 100,
        "queue": 20,  # the hit waited for nothing
        "compute_input": 1,
        "compute_infer": 10,
        "compute_output": 2,
        "cache_hit": 5,
        "cache_miss": 6,
    }
    now_ns = WINDOW_NS + 1
    assert math.isnan(summaries.quantiles(summaries.request, (0.5,))[0])


# -- the report


def busy() -> Statistics:
    statistics = Statistics()
    statistics.executed(requests=2, rows=5, input_ns=1, infer_ns=10, output_ns=2)
    statistics.executed(requests=1, rows=1, input_ns=3, infer_ns=30, output_ns=4)
    assert statistics.last_inference_ms > 0
    statistics.last_inference_ms = 1_700_000_000_000
    for duration_ns, queue_ns in ((100, 20), (110, 30), (120, 0)):
        statistics.succeeded(duration_ns, queue_ns)
    statistics.failed("OTHER", 5)
    statistics.failed("BACKEND", 6)
    statistics.cache_hit(8)
    statistics.cache_miss(9)
    return statistics


def duration(count, ns):
    return {"count": count, "ns": ns}


BUSY = {
    "name": "digits",
    "version": "3",
    "last_inference": 1_700_000_000_000,
    "inference_count": 6,
    "execution_count": 2,
    "inference_stats": {
        "success": duration(4, 338),
        "fail": duration(2, 11),
        "queue": duration(4, 50),
        "compute_input": duration(3, 5),
        "compute_infer": duration(3, 50),
        "compute_output": duration(3, 8),
        "cache_hit": duration(1, 8),
        "cache_miss": duration(1, 9),
    },
    "response_stats": {},
    "batch_stats": [
        {
            "batch_size": 1,
            "compute_input": duration(1, 3),
            "compute_infer": duration(1, 30),
            "compute_output": duration(1, 4),
        },
        {
            "batch_size": 5,
            "compute_input": duration(1, 1),
            "compute_infer": duration(1, 10),
            "compute_output": duration(1, 2),
        },
    ],
    "memory_usage": [{"type": "CPU", "id": 0, "byte_size": 4096}],
}


def test_the_report_of_a_model():
    assert asdict(model_statistics("digits", "3", busy(), [4096])) == BUSY


class OneModel:
    """A repository that serves versions 9 and 10 of one model, and another model."""

    def __init__(self):
        self._served = [
            SimpleNamespace(
                folder=SimpleNamespace(name=name),
                version=version,
                statistics=busy(),
                instances=[SimpleNamespace(load=SimpleNamespace(instance=number))],
            )
            for number, (name, version) in enumerate([("digits", "10"), ("digits", "9"), ("a", "1")])
        ]

    def served(self):
        return iter(self._served)

    def versions(self, name):
        return [one.version for one in reversed(self._served) if one.folder.name == name]

    def lookup(self, name, version):
        for one in self._served:
            if one.folder.name == name and one.version == version:
                return one
        raise NotFound(f"Request for unknown model: '{name}' is not found")


WORKERS = (
    WorkerSample("worker-1", 11, 1000, 0.1, 2, 0, frozenset({0, 1})),
    WorkerSample("worker-2", 12, 2000, 0.1, 1, 0, frozenset({0})),
    WorkerSample("worker-3", 13, 4000, 0.1, 1, 0, frozenset({7})),
)


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("", "", [("a", "1", []), ("digits", "9", [1000]), ("digits", "10", [1000, 2000])]),
        ("digits", "", [("digits", "9", [1000]), ("digits", "10", [1000, 2000])]),
        ("digits", "10", [("digits", "10", [1000, 2000])]),
    ],
)
def test_the_report_has_the_versions_that_were_asked_for_and_the_memory_of_their_workers(name, version, expected):
    found = report(OneModel(), lambda: WORKERS, name, version).model_stats
    assert [(one.name, one.version, [each.byte_size for each in one.memory_usage]) for one in found] == expected


@pytest.mark.parametrize(("name", "version"), [("nope", ""), ("nope", "1"), ("digits", "11"), ("", "1")])
def test_what_does_not_serve_has_no_report(name, version):
    with pytest.raises(InvalidRequest):
        report(OneModel(), lambda: WORKERS, name, version)


async def test_both_protocols_say_the_same():
    app = FastAPI()
    add_statistics(app, OneModel(), lambda: WORKERS)
    service = StatisticsService(OneModel(), lambda: WORKERS)
    paths = {
        ("", ""): "/v2/models/stats?name=ignored",
        ("digits", ""): "/v2/models/digits/stats",
        ("digits", "10"): "/v2/models/digits/versions/10/stats",
    }
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
        for (name, version), path in paths.items():
            document = (await client.get(path)).json()
            message = await service.ModelStatistics(pb.ModelStatisticsRequest(name=name, version=version), None)
            assert as_plain(message) == document
    assert "StatisticsReport" in json.dumps(app.openapi()["paths"]["/v2/models/stats"])


async def test_response_statistics_survive_both_protocols():
    repository = OneModel()
    repository._served[2].statistics.responded(0, 5, 6, "success")
    repository._served[2].statistics.responded(1, 7, 0, "empty_response")
    message = await StatisticsService(repository, lambda: ()).ModelStatistics(pb.ModelStatisticsRequest(name="a"), None)
    [found] = as_plain(message)["model_stats"]
    [expected] = report(repository, lambda: (), "a", "").model_stats
    assert found == asdict(expected)
    assert found["response_stats"]["1"]["empty_response"] == duration(1, 7)


def as_plain(message):
    """A protobuf message as plain data with every field, also those that are zero."""
    if not hasattr(message, "DESCRIPTOR"):
        return message
    plain = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            plain[field.name] = {key: as_plain(each) for key, each in value.items()}
        elif hasattr(value, "append") or hasattr(value, "add"):
            plain[field.name] = [as_plain(each) for each in value]
        else:
            plain[field.name] = as_plain(value)
    return plain
