"""What the hour-long run concludes from its samples, and that its driver's memory stays bounded."""

import random

import pytest
from loadtests.metrics import total
from loadtests.soak_processes import Reading
from loadtests.soak_report import FLAT_MIB_PER_HOUR, Growth, Sample, Use, growths, robust_slope
from loadtests.soak_traffic import Histogram

EVERY_S = 10.0


def use(name, rss_mib, descriptors=10, pid=1, started_ticks=1):
    return Use(Reading(pid, started_ticks, name, rss_mib, rss_mib, rss_mib / 2, 0, descriptors, 3), 0.5)


def samples(*windows):
    """One sample for each list of the server's processes."""
    return [
        Sample(at * EVERY_S, EVERY_S, 100.0, 1.0, 2.0, 3.0, 0.1, {}, 1.0, use("driver", 50.0), window)
        for at, window in enumerate(windows, 1)
    ]


def growth_of(rows: list[Growth], name: str) -> Growth:
    (found,) = [row for row in rows if row.name == name]
    return found


def test_slope_is_not_moved_by_peaks():
    times = [float(at) for at in range(100)]
    values = [5.0 + 2.0 * at for at in times]
    values[10], values[98] = 1e6, -1e6
    assert robust_slope(times, values) == pytest.approx(2.0)


def test_slope_needs_two_points():
    with pytest.raises(ValueError, match="of 1 points was asked for; expected at least two"):
        robust_slope([1.0], [1.0])


def test_growth_at_the_start_is_not_judged():
    hour = samples(*([use("front", 80.0 + min(at, 60))] for at in range(360)))
    row = growth_of(growths(hour), "front")
    assert row.flat
    assert row.mib_per_hour == pytest.approx(0.0)


@pytest.mark.parametrize(("mib_per_hour", "flat"), [(0.5 * FLAT_MIB_PER_HOUR, True), (2 * FLAT_MIB_PER_HOUR, False)])
def test_slow_growth_shows_in_noise(mib_per_hour, flat):
    noise = random.Random(1)
    hour = samples(*([use("front", 80.0 + mib_per_hour * at / 360 + noise.uniform(-1, 1))] for at in range(360)))
    row = growth_of(growths(hour), "front")
    assert row.mib_per_hour == pytest.approx(mib_per_hour, abs=0.5)
    assert row.flat is flat


def test_a_worker_that_was_started_again_is_another_one():
    hour = samples(*([use("worker-1", 70.0 + 100.0 * (at >= 40), started_ticks=1 + (at >= 40))] for at in range(80)))
    mine = [row for row in growths(hour) if row.name == "worker-1"]
    assert [(row.samples, row.first_mib, row.flat) for row in mine] == [(20, 70.0, True), (40, 170.0, True)]


def test_descriptors_that_are_left_open_are_growth():
    row = growth_of(growths(samples(*([use("front", 80.0, descriptors=100 + at)] for at in range(360)))), "front")
    assert row.mib_per_hour == pytest.approx(0.0)
    assert not row.flat


def test_the_tree_is_judged_by_what_is_its_own():
    hour = samples(*([use("front", 80.0), use("worker-1", 40.0, pid=2)] for _ in range(40)))
    assert growth_of(growths(hour), "all, no files").first_mib == 60.0


def test_histogram_tells_percentiles_within_its_step_from_few_numbers():
    histogram, latencies_ns = Histogram(), [int(1e5 * 1.0001**at) for at in range(100_000)]
    for latency_ns in random.Random(2).sample(latencies_ns, len(latencies_ns)):
        histogram.add(latency_ns)
    assert histogram.count == 100_000
    assert len(histogram.counts) < 600
    for fraction in (0.01, 0.5, 0.99):
        right_ms = latencies_ns[int(fraction * 100_000) - 1] * 1e-6
        assert right_ms <= histogram.percentile_ms(fraction) <= right_ms * 1.0203


def test_histogram_of_nothing():
    assert Histogram().percentile_ms(0.99) == 0.0


def test_total_of_a_counter_is_over_all_its_series_and_no_other():
    page = '# TYPE deaths_total counter\ndeaths_total{model="a}",version="1"} 2\ndeaths_total{model="b"} 1.5\nrest 4\n'
    page += 'deaths_total_more{model="a"} 7\n'
    assert total(page, "deaths_total") == 3.5
    assert total(page, "rest") == 4.0
    assert total(page, "absent") == 0.0
