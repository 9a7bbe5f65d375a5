"""The scrape: both formats parse, names and labels are exact, and the numbers are the counters'."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_classic

from headrace import __version__
from headrace.core.statistics import REFUSALS, CacheUsage, Histogram, Statistics
from headrace.metrics import (
    CpuUtilization,
    LatencySample,
    Memory,
    Metrics,
    ModelSample,
    ObjectiveSample,
    PlanSample,
    ResidencySample,
    ServerSample,
    WorkerSample,
    prefers_openmetrics,
    read_memory,
)

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
# What Prometheus 3 sends unless told otherwise.
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)

TRITON_COUNTERS = {
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
}
TRITON_GAUGES = {
    "nv_inference_pending_request_count",
    "nv_model_load_duration_secs",
    "nv_cpu_utilization",
    "nv_cpu_memory_total_bytes",
    "nv_cpu_memory_used_bytes",
    "nv_pinned_memory_pool_total_bytes",
    "nv_pinned_memory_pool_used_bytes",
}
CACHE_COUNTERS = {
    "nv_cache_num_hits_per_model",
    "nv_cache_num_misses_per_model",
    "nv_cache_hit_duration_per_model",
    "nv_cache_miss_duration_per_model",
}
SUMMARIES = {
    "nv_inference_request_summary_us",
    "nv_inference_queue_summary_us",
    "nv_inference_compute_input_summary_us",
    "nv_inference_compute_infer_summary_us",
    "nv_inference_compute_output_summary_us",
}
CACHE_SUMMARIES = {"nv_cache_hit_summary_per_model", "nv_cache_miss_summary_per_model"}
COUNTERS = {
    "headrace_worker_deaths_total",
    "headrace_retried_requests_total",
    "headrace_refused_requests_total",
    "headrace_worker_cpu_seconds_total",
    "headrace_worker_restarts_total",
    "headrace_worker_recycles_total",
    "process_cpu_seconds_total",
}
GAUGES = {
    "headrace_batch_latency_high_seconds",
    "headrace_batch_latency_seconds",
    "headrace_queue_requests",
    "headrace_executing_batches",
    "headrace_streams_active",
    "headrace_sequences_active",
    "headrace_model_ready",
    "headrace_instances",
    "headrace_instances_up",
    "headrace_restart_pause_seconds",
    "headrace_worker_resident_bytes",
    "headrace_worker_memory_bytes",
    "headrace_worker_models",
    "headrace_inflight_requests",
    "headrace_inflight_bytes",
    "headrace_server_ready",
    "headrace_uptime_seconds",
    "process_virtual_memory_bytes",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_open_fds",
    "process_max_fds",
}
HISTOGRAMS = {
    "headrace_request_duration_seconds",
    "headrace_queue_duration_seconds",
    "headrace_compute_duration_seconds",
    "headrace_batch_rows",
}


def busy() -> Statistics:
    statistics = Statistics(worker_deaths=2, retries=5, load_seconds=1.25)
    for duration_ns, queue_ns in ((3_000_000, 1_000_500), (40_000_000, 2_000_000), (20_000_000_000, 100)):
        statistics.succeeded(duration_ns, queue_ns)
    statistics.executed(requests=2, rows=6, input_ns=10_000, infer_ns=1_000_000, output_ns=5_000)
    statistics.executed(requests=1, rows=1000, input_ns=20_000, infer_ns=7_000_000, output_ns=6_000)
    statistics.failed("REJECTED", 10)
    statistics.failed("REJECTED", 10)
    statistics.failed("BACKEND", 10)
    return statistics


def sample(name="digits", version="3", statistics=None, **changes):
    values = {"waiting": 4, "executing": 1, "ready": True, "instances": 2, "instances_up": 1} | changes
    values.setdefault("latencies", (LatencySample(0, 8, 0.01, 0.012),))
    return ModelSample(name, version, statistics or busy(), **values)


def metrics(models=None, workers=None, server=None):
    models = [sample()] if models is None else models
    workers = [WorkerSample("worker-0", 17, 1 << 28, 12.5, 3, 1, own_bytes=1 << 27)] if workers is None else workers
    server = server or ServerSample(
        inflight_requests=9, inflight_bytes=4096, uptime_seconds=61.5, ready=True, recycles={"growth": 2, "limit": 0}
    )
    return Metrics(lambda: models, lambda: workers, lambda: server)


def text(of, accept=""):
    return of.render(accept)[0].decode()


def types(body):
    return dict(line.split()[2:4] for line in body.splitlines() if line.startswith("# TYPE "))


def values(body, parse):
    """Every sample, by name and labels."""
    found = {}
    for family in parse(body):
        for one in family.samples:
            key = (one.name, tuple(sorted(one.labels.items())))
            assert key not in found
            found[key] = one.value
    return found


def number(body, name, **labels):
    """A sample's value as it stands in the text, whose names the parsers change for counters."""
    inside = ",".join(f'{key}="{value}"' for key, value in labels.items())
    wanted = f"{name}{{{inside}}} " if labels else f"{name} "
    [line] = [line for line in body.splitlines() if line.startswith(wanted)]
    return float(line.removeprefix(wanted))


def test_classic_format_has_exactly_these_families():
    body, content_type = metrics().render("")
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert types(body.decode()) == (
        dict.fromkeys(TRITON_COUNTERS | COUNTERS, "counter")
        | dict.fromkeys(TRITON_GAUGES | GAUGES | {"headrace_build_info"}, "gauge")
        | dict.fromkeys(HISTOGRAMS, "histogram")
    )


def test_openmetrics_has_the_same_families_under_its_own_rules():
    body, content_type = metrics().render(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert body.endswith(b"\n# EOF\n")
    assert types(body.decode()) == (
        dict.fromkeys(TRITON_COUNTERS, "unknown")
        | dict.fromkeys({name.removesuffix("_total") for name in COUNTERS}, "counter")
        | dict.fromkeys(TRITON_GAUGES | GAUGES, "gauge")
        | dict.fromkeys(HISTOGRAMS, "histogram")
        | {"headrace_build": "info"}
    )


def test_refusals_are_told_by_their_reasons_at_0_too():
    statistics = busy()
    statistics.refused("too_late")
    body = text(metrics([sample(statistics=statistics)]))
    of_model = {"model": "digits", "version": "3"}
    told = {one: number(body, "headrace_refused_requests_total", **of_model, reason=one) for one in REFUSALS}
    assert told == dict.fromkeys(REFUSALS, 0) | {"too_late": 1}
    assert number(body, "nv_inference_request_failure", **of_model, reason="REJECTED") == 3


@pytest.mark.parametrize(("accept", "parse"), [("", parse_classic), (OPENMETRICS, parse_openmetrics)])
def test_plans_are_told_where_there_are_any(accept, parse):
    planned = sample(plan=PlanSample('int8 "best"', 2.5, 1, 4, 2))
    dropped = sample(name="dropped", plan=PlanSample("", 0.0, 3, 0, 0))
    body = text(metrics([planned, dropped, sample(name="other")]), accept)
    values(body, parse)
    lines = [line for line in body.splitlines() if line.startswith("headrace_plan_")]
    assert lines == [
        'headrace_plan_speedup{model="digits",version="3"} 2.5',
        'headrace_plan_refusals_total{model="digits",version="3"} 1',
        'headrace_plan_refusals_total{model="dropped",version="3"} 3',
        r'headrace_plan_info{model="digits",version="3",form="int8 \"best\""} 1',
        'headrace_plan_replays_total{model="digits",version="3",result="right"} 4',
        'headrace_plan_replays_total{model="digits",version="3",result="wrong"} 2',
        'headrace_plan_replays_total{model="dropped",version="3",result="right"} 0',
        'headrace_plan_replays_total{model="dropped",version="3",result="wrong"} 0',
    ]
    assert "headrace_plan_" not in text(metrics([sample()]), accept)


@pytest.mark.parametrize(("accept", "parse"), [("", parse_classic), (OPENMETRICS, parse_openmetrics)])
def test_queues_by_priority_and_resources_are_told_where_there_are_any(accept, parse):
    server = ServerSample(0, 0, 1.0, ready=True, resources={("", "licence"): (1, 2), ("gpu:0", "R"): (0, 4)})
    found = values(text(metrics([sample(waiting_by_priority={1: 0, 2: 4})], server=server), accept), parse)
    by_priority = {
        dict(labels)["priority"]: value
        for (name, labels), value in found.items()
        if name == "headrace_queue_requests_by_priority"
    }
    assert by_priority == {"1": 0, "2": 4}
    for name, wanted in (("headrace_rate_limit_held", (1, 0)), ("headrace_rate_limit_count", (2, 4))):
        assert found[name, (("device", "global"), ("resource", "licence"))] == wanted[0]
        assert found[name, (("device", "gpu:0"), ("resource", "R"))] == wanted[1]


def test_every_series_has_the_same_name_in_both_formats():
    """Prometheus chooses the format, and a dashboard must not depend on what it chose."""

    def names(accept):
        lines = text(metrics(), accept).splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    assert names("") == names(OPENMETRICS)
    assert 'nv_inference_count{model="digits",version="3"}' in names(OPENMETRICS)
    assert 'headrace_worker_deaths_total{model="digits",version="3"}' in names("")


@pytest.mark.parametrize(("accept", "parse"), [("", parse_classic), (OPENMETRICS, parse_openmetrics)])
def test_both_formats_parse_and_hold_every_family(accept, parse):
    families = {family.name: family for family in parse(text(metrics(), accept))}
    assert {name.removesuffix("_total") for name in TRITON_COUNTERS | COUNTERS} <= families.keys()
    assert families.keys() >= TRITON_GAUGES | GAUGES | HISTOGRAMS
    assert all(family.documentation and family.samples for family in families.values())


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_numbers_of_a_model(accept):
    body = text(metrics(), accept)
    of_model = {"model": "digits", "version": "3"}
    expected = {
        "nv_inference_request_success": 3,
        "nv_inference_count": 1006,
        "nv_inference_exec_count": 2,
        "nv_inference_request_duration_us": 20_043_000,
        "nv_inference_queue_duration_us": 3_000,
        "nv_inference_compute_input_duration_us": 40,
        "nv_inference_compute_infer_duration_us": 9_000,
        "nv_inference_compute_output_duration_us": 16,
        "nv_inference_pending_request_count": 4,
        "nv_model_load_duration_secs": 1.25,
        "headrace_queue_requests": 4,
        "headrace_executing_batches": 1,
        "headrace_model_ready": 1,
        "headrace_instances": 2,
        "headrace_instances_up": 1,
        "headrace_worker_deaths_total": 2,
        "headrace_retried_requests_total": 5,
    }
    assert {name: number(body, name, **of_model) for name in expected} == expected


def test_every_failure_reason_is_there_even_at_zero():
    body = text(metrics([sample(), sample("idle", "1", Statistics())]))
    reasons = {
        (model, reason): number(body, "nv_inference_request_failure", model=model, version=version, reason=reason)
        for model, version in (("digits", "3"), ("idle", "1"))
        for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER")
    }
    assert {key: count for key, count in reasons.items() if count} == {
        ("digits", "REJECTED"): 2,
        ("digits", "BACKEND"): 1,
    }
    assert body.count("nv_inference_request_failure{") == len(reasons)


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_numbers_of_workers_and_server(accept):
    body = text(metrics(), accept)
    assert number(body, "headrace_worker_resident_bytes", worker="worker-0") == 1 << 28
    assert number(body, "headrace_worker_memory_bytes", worker="worker-0") == 1 << 27
    assert number(body, "headrace_worker_recycles_total", reason="growth") == 2
    assert number(body, "headrace_worker_recycles_total", reason="limit") == 0
    assert number(body, "headrace_worker_cpu_seconds_total", worker="worker-0") == 12.5
    assert number(body, "headrace_worker_models", worker="worker-0") == 3
    assert number(body, "headrace_worker_restarts_total", worker="worker-0") == 1
    assert number(body, "headrace_inflight_requests") == 9
    assert number(body, "headrace_inflight_bytes") == 4096
    assert number(body, "headrace_uptime_seconds") == 61.5
    assert number(body, "headrace_server_ready") == 1
    assert number(body, "headrace_build_info", version=__version__) == 1
    assert number(body, "process_resident_memory_bytes") > 1 << 20
    assert 0 <= number(body, "nv_cpu_utilization") <= 1
    assert 0 < number(body, "nv_cpu_memory_used_bytes") <= number(body, "nv_cpu_memory_total_bytes")


def test_readiness_is_told_as_it_is():
    body = text(metrics([sample(ready=False)], server=ServerSample(0, 0, 0.5, ready=False)))
    assert number(body, "headrace_model_ready", model="digits", version="3") == 0
    assert number(body, "headrace_server_ready") == 0


def test_a_scrape_shows_what_is_true_then():
    models = [sample()]
    scrape = metrics(models)
    before = text(scrape)
    models[0].statistics.succeeded(1_000, 0)
    models.append(sample("new", "1", Statistics()))
    after = text(scrape)
    assert number(after, "nv_inference_request_success", model="digits", version="3") == 4
    assert 'model="new"' in after
    assert 'model="new"' not in before


@pytest.mark.parametrize(("accept", "parse"), [("", parse_classic), (OPENMETRICS, parse_openmetrics)])
def test_a_server_without_models_or_workers_can_be_scraped(accept, parse):
    found = values(text(metrics([], []), accept), parse)
    assert ("headrace_server_ready", ()) in found
    assert not [name for name, labels in found if dict(labels).keys() & {"model", "worker"}]


def test_building_asks_for_nothing():
    def fail():
        raise AssertionError("asked before the first scrape")

    Metrics(fail, fail, fail)


@pytest.mark.parametrize(("accept", "parse"), [("", parse_classic), (OPENMETRICS, parse_openmetrics)])
@pytest.mark.parametrize("name", sorted(HISTOGRAMS))
def test_histograms_are_cumulative_and_end_at_their_count(name, accept, parse):
    found = values(text(metrics(), accept), parse)
    of_model = (("model", "digits"), ("version", "3"))
    buckets = {
        float(dict(labels)["le"]): value
        for (full_name, labels), value in found.items()
        if full_name == f"{name}_bucket"
    }
    count = found[f"{name}_count", of_model]
    counts = [buckets[bound] for bound in sorted(buckets)]
    assert len(buckets) > 5
    assert counts == sorted(counts)
    assert buckets[math.inf] == count > 0
    assert found[f"{name}_sum", of_model] > 0


def test_histogram_numbers():
    found = values(text(metrics()), parse_classic)
    of_model = (("model", "digits"), ("version", "3"))

    def bucket(name, bound):
        return found[f"{name}_bucket", (("le", bound), *of_model)]

    request = "headrace_request_duration_seconds"
    assert [bucket(request, bound) for bound in ("0.0025", "0.005", "0.05", "10.0", "+Inf")] == [0, 1, 2, 2, 3]
    assert found[f"{request}_sum", of_model] == pytest.approx(20.043)
    assert [bucket("headrace_batch_rows", bound) for bound in ("4.0", "8.0", "512.0", "+Inf")] == [0, 1, 1, 2]
    assert found["headrace_batch_rows_sum", of_model] == 1006
    assert found["headrace_queue_duration_seconds_sum", of_model] == pytest.approx(0.0030006)
    assert found["headrace_compute_duration_seconds_sum", of_model] == pytest.approx(0.008041)
    assert found["headrace_compute_duration_seconds_count", of_model] == 2


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_cache_metrics_are_of_models_that_have_the_cache(accept):
    cached = Statistics()
    cached.cache_hit(5_000)
    cached.cache_hit(6_000)
    cached.cache_miss(70_000)
    server = ServerSample(0, 0, 1.0, ready=True, cache=CacheUsage(bytes=12345, entries=6, evictions=7))
    body = text(metrics([sample(), sample("kept", "1", cached, cached=True)], server=server), accept)
    of_model = {"model": "kept", "version": "1"}
    assert number(body, "nv_cache_num_hits_per_model", **of_model) == 2
    assert number(body, "nv_cache_num_misses_per_model", **of_model) == 1
    assert number(body, "nv_cache_hit_duration_per_model", **of_model) == 11
    assert number(body, "nv_cache_miss_duration_per_model", **of_model) == 70
    assert not [line for line in body.splitlines() if line.startswith("nv_cache") and "digits" in line]
    assert number(body, "headrace_cache_bytes") == 12345
    assert number(body, "headrace_cache_entries") == 6
    assert number(body, "headrace_cache_evictions_total") == 7
    assert types(body).keys() >= CACHE_COUNTERS


def test_what_no_model_has_is_not_shown():
    body = text(metrics())
    assert not [name for name in types(body) if "cache" in name or "summary" in name or "first_response" in name]


@pytest.mark.parametrize(("accept", "parse"), [("", parse_classic), (OPENMETRICS, parse_openmetrics)])
def test_first_responses_of_decoupled_models(accept, parse):
    statistics = Statistics()
    for duration_ms in (3, 450, 9000):
        statistics.first_responded(duration_ms * 1_000_000)
    scrape = metrics([sample(), sample("streams", "1", statistics, decoupled=True, active_streams=4)])
    found = values(text(scrape, accept), parse)
    name, of_model = "nv_inference_first_response_histogram_ms", (("model", "streams"), ("version", "1"))
    buckets = {
        bound: found[f"{name}_bucket", (("le", bound), *of_model)]
        for bound in ("100.0", "500.0", "2000.0", "5000.0", "+Inf")
    }
    assert list(buckets.values()) == [1, 2, 2, 2, 3]
    assert found[f"{name}_sum", of_model] == pytest.approx(9453)
    assert not [key for key in found if key[0].startswith(name) and ("model", "digits") in key[1]]
    assert found["headrace_streams_active", of_model] == 4


def test_sequences_and_streams_that_are_active():
    body = text(metrics([sample(active_sequences=3, active_streams=2)]))
    assert number(body, "headrace_sequences_active", model="digits", version="3") == 3
    assert number(body, "headrace_streams_active", model="digits", version="3") == 2


@pytest.mark.parametrize(("accept", "parse"), [("", parse_classic), (OPENMETRICS, parse_openmetrics)])
def test_summaries_of_models_that_keep_them(accept, parse):
    statistics = Statistics(with_summaries=True)
    for duration_us in range(1, 1001):
        statistics.succeeded(duration_us * 1000, 2000)
    statistics.executed(1000, 1000, 3000, 4000, 5000)
    statistics.cache_hit(500_000)
    statistics.cache_miss(6000)
    scrape = metrics([sample(), sample("timed", "1", statistics, cached=True)])
    body = text(scrape, accept)
    assert {name for name, kind in types(body).items() if kind == "summary"} == SUMMARIES | CACHE_SUMMARIES
    found = values(body, parse)
    of_model = (("model", "timed"), ("version", "1"))

    def quantiles(name):
        levels = ("0.5", "0.9", "0.95", "0.99", "0.999")
        return [found[name, (*of_model[:1], ("quantile", level), *of_model[1:])] for level in levels]

    assert quantiles("nv_inference_request_summary_us") == pytest.approx([500, 900, 950, 990, 999], rel=0.01)
    assert quantiles("nv_inference_queue_summary_us") == pytest.approx([2] * 5, rel=0.01)
    for name, expected_us in {
        "nv_inference_compute_input_summary_us": 3,
        "nv_inference_compute_infer_summary_us": 4,
        "nv_inference_compute_output_summary_us": 5,
        "nv_cache_hit_summary_per_model": 500,
        "nv_cache_miss_summary_per_model": 6,
    }.items():
        assert quantiles(name) == pytest.approx([expected_us] * 5, rel=0.01)
    assert found["nv_inference_request_summary_us_count", of_model] == 1001
    assert found["nv_inference_request_summary_us_sum", of_model] == pytest.approx(500_500 + 500)
    assert found["nv_inference_compute_infer_summary_us_count", of_model] == 1000
    assert found["nv_inference_compute_infer_summary_us_sum", of_model] == pytest.approx(4000)
    assert found["nv_cache_hit_summary_per_model_count", of_model] == 1


@pytest.mark.parametrize(("accept", "parse"), [("", parse_classic), (OPENMETRICS, parse_openmetrics)])
def test_a_quantile_of_nothing_is_not_a_number(accept, parse):
    found = values(text(metrics([sample("idle", "1", Statistics(with_summaries=True))]), accept), parse)
    key = (("model", "idle"), ("quantile", "0.5"), ("version", "1"))
    assert math.isnan(found["nv_inference_request_summary_us", key])


NAMES = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r"), min_size=1, max_size=12)


@given(name=NAMES | st.sampled_from(['a"b', "a\\nb", "a\nb", "a\\", 'a\\"b', "a{b}", "a,b=c", "# EOF"]))
def test_any_model_name_comes_back_from_both_parsers(name):
    scrape = metrics([sample(name)])
    for accept, parse in (("", parse_classic), (OPENMETRICS, parse_openmetrics)):
        found = values_of_one(scrape.render(accept)[0].decode(), parse)
        assert found == {name}


def values_of_one(body, parse):
    return {
        one.labels["model"]
        for family in parse(body)
        if family.name.startswith("nv_inference_exec")
        for one in family.samples
    }


def test_a_name_that_is_not_utf_8_costs_no_other_model_its_metrics():
    body = text(metrics([sample("bad\udcff", "1"), sample("good", "1")]))
    assert number(body, "headrace_model_ready", model="bad?", version="1") == 1
    assert number(body, "headrace_model_ready", model="good", version="1") == 1


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("text/html", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text;Version=1.0.0", True),
        ("application/openmetrics-text;q=0.5,text/plain;q=0.4", True),
        ("application/openmetrics-text;q=0.3,text/plain;version=0.0.4;q=0.4", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=best", False),
        ("application/openmetrics-text;q=nan", False),
        (PROMETHEUS, True),
    ],
)
def test_format_follows_the_accept_header(accept, wanted):
    assert prefers_openmetrics(accept) is wanted
    body, content_type = metrics([]).render(accept)
    assert body.endswith(b"# EOF\n") is wanted
    assert content_type.startswith("application/openmetrics-text" if wanted else "text/plain; version=0.0.4")


def test_cpu_utilization_is_that_since_the_last_reading(tmp_path: Path):
    stat = tmp_path / "stat"

    def ticks(user, idle, iowait=0, guest=0):
        stat.write_text(f"cpu  {user} 0 0 {idle} {iowait} 0 0 0 {guest} 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n")

    ticks(user=1000, idle=1000)
    cpu = CpuUtilization(stat)
    assert cpu.read() == 0
    ticks(user=1030, idle=1060, iowait=10, guest=500)  # guest ticks are in user already
    assert cpu.read() == pytest.approx(0.3)
    assert cpu.read() == pytest.approx(0.3)  # no tick since
    ticks(user=1130, idle=1059, iowait=10)  # idle stepped back
    assert cpu.read() == 1
    ticks(user=1130, idle=1159, iowait=10)
    assert cpu.read() == 0


def kernel(tmp_path: Path, own: str, groups: dict[str, tuple[str, int]]) -> tuple[Path, Path]:
    """A /proc with 1,000 KiB of which 400 are available, and cgroups of (memory.max, memory.current)."""
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 400 kB\nHugePages_Total: 0\n")
    (proc / "self" / "cgroup").write_text(f"4:memory:/elsewhere\n0::{own}\n")
    root.mkdir()
    for name, (limit, current_bytes) in groups.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{current_bytes}\n")
        (folder / "memory.stat").write_text("anon 5000\ninactive_file 3000\nactive_file 10\n")
    return proc, root


MACHINE = Memory(1000 * 1024, 600 * 1024)


@pytest.mark.parametrize(
    ("own", "groups", "expected"),
    [
        pytest.param("/", {}, MACHINE, id="no cgroup v2"),
        pytest.param("/a", {"a": ("max", 9000)}, MACHINE, id="no limit"),
        pytest.param("/a", {"a": (str(1 << 40), 9000)}, MACHINE, id="limit above the machine"),
        pytest.param("/", {".": ("50000", 9000)}, Memory(50000, 6000), id="container"),
        pytest.param("/a/b", {"a": ("50000", 9000), "a/b": ("max", 8000)}, Memory(50000, 6000), id="parent's limit"),
        pytest.param("/a/b", {"a": ("50000", 9000), "a/b": ("60000", 8000)}, Memory(50000, 6000), id="tightest limit"),
        pytest.param("/from/outside", {".": ("50000", 9000)}, Memory(50000, 6000), id="path of another namespace"),
        pytest.param("/a", {"a": ("50000", 2000)}, Memory(50000, 0), id="less in use than its cache"),
    ],
)
def test_memory_is_that_of_the_cgroup_where_it_has_a_limit(tmp_path: Path, own, groups, expected):
    proc, root = kernel(tmp_path, own, groups)
    assert read_memory(proc, root) == expected


@pytest.mark.parametrize(
    ("own", "expected"),
    [("/pod/one", 40000), ("/pod", 50000), ("/from/outside", None), ("/pod/two", 50000)],
)
def test_memory_is_that_of_version_one_of_cgroups(tmp_path: Path, own, expected):
    proc, root = kernel(tmp_path, "/", {})
    (proc / "self" / "cgroup").write_text(f"7:cpu:/\n4:memory:{own}\n0::/\n")
    for name, limit in (("", 9223372036854771712), ("pod", 50000), ("pod/one", 40000), ("pod/two", 60000)):
        folder = root / "memory" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text("9000\n")
        (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 3000\n")
    assert read_memory(proc, root) == (MACHINE if expected is None else Memory(expected, 6000))


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_models_that_come_and_go(accept):
    seconds = Histogram((0.1, 1.0))
    for value in (0.05, 0.07, 0.5, 3.0):
        seconds.observe(value)
    server = ServerSample(0, 0, 1.0, True, residency=ResidencySample(1000, 700, 2, 4, 3, seconds))
    models = [
        sample("there", pages=True, memory_bytes=600),
        sample("away", pages=True, resident=False, memory_bytes=400),
        sample("ensemble"),
    ]
    body = text(metrics(models, server=server), accept)
    assert number(body, "headrace_model_resident", model="there", version="3") == 1
    assert number(body, "headrace_model_resident", model="away", version="3") == 0
    assert number(body, "headrace_model_memory_bytes", model="away", version="3") == 400
    assert 'headrace_model_resident{model="ensemble"' not in body
    assert number(body, "headrace_resident_limit_bytes") == 1000
    assert number(body, "headrace_resident_bytes") == 700
    assert number(body, "headrace_resident_models") == 2
    assert number(body, "headrace_page_ins_total") == 4
    assert number(body, "headrace_evictions_total") == 3
    assert number(body, "headrace_page_in_duration_seconds_bucket", le="0.1") == 2
    assert number(body, "headrace_page_in_duration_seconds_count") == 4
    assert number(body, "headrace_page_in_duration_seconds_sum") == pytest.approx(3.62)


def test_without_a_limit_nothing_is_said_of_coming_and_going():
    said = types(text(metrics()))
    assert {"headrace_resident_bytes", "headrace_model_resident", "headrace_page_ins_total"} & set(said) == set()


LATENCIES = (LatencySample(0, 1, 0.005, 0.006), LatencySample(0, 4, 0.008, 0.0095))
ADAPTIVE = ObjectiveSample(0.05, 0.047, 100, 2, 7, 812.5, target_rows=28, waited_s=0.25)


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_curves_and_decisions_are_shown_of_models_that_have_them(accept):
    fixed = ObjectiveSample(0.02, 0.018, 1, 0, 0, 0.0)
    models = [
        sample("a", latencies=LATENCIES, objective=ADAPTIVE),
        sample("b", objective=fixed, latencies=()),
        sample("c", latencies=()),
    ]
    parse = parse_openmetrics if accept else parse_classic
    series = {
        (
            one.name,
            *(one.labels[label] for label in ("model", "row_elements", "rows") if label in one.labels),
        ): one.value
        for family in parse(text(metrics(models), accept))
        for one in family.samples
        if one.name.startswith(("headrace_objective", "headrace_batch_latency", "headrace_batch_s", "headrace_batch_w"))
        or one.name == "headrace_arrival_rows_per_second"
    }
    assert series == {
        ("headrace_batch_latency_seconds", "a", "0", "1"): 0.005,
        ("headrace_batch_latency_seconds", "a", "0", "4"): 0.008,
        ("headrace_batch_latency_high_seconds", "a", "0", "1"): 0.006,
        ("headrace_batch_latency_high_seconds", "a", "0", "4"): 0.0095,
        ("headrace_objective_seconds", "a"): 0.05,
        ("headrace_objective_seconds", "b"): 0.02,
        ("headrace_objective_budget_seconds", "a"): 0.047,
        ("headrace_objective_budget_seconds", "b"): 0.018,
        ("headrace_objective_timely_total", "a"): 100,
        ("headrace_objective_timely_total", "b"): 1,
        ("headrace_objective_late_total", "a"): 2,
        ("headrace_objective_late_total", "b"): 0,
        ("headrace_objective_refusals_total", "a"): 7,
        ("headrace_objective_refusals_total", "b"): 0,
        ("headrace_arrival_rows_per_second", "a"): 812.5,
        ("headrace_arrival_rows_per_second", "b"): 0,
        ("headrace_batch_size_target", "a"): 28,
        ("headrace_batch_wait_seconds_total", "a"): 0.25,
    }


def test_models_without_an_objective_cost_the_page_nothing():
    page = text(metrics([sample(latencies=())]))
    assert "headrace_objective" not in page
    assert "headrace_batch_latency_seconds{" not in page
