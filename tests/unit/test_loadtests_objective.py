"""The load test of an objective: what it configures and how it counts."""

from pathlib import Path

from loadtests.objective import SLEEPER, Bench, Measured, Setting, Tally, settings, table

from headrace.repository.model_config import parse_config

MS = 1_000_000


def test_every_setting_is_a_configuration_and_says_what_its_name_says():
    every = list(settings([4, 16], [0.0, 2.0]))
    assert [one.name for one in every[:3]] == ["adaptive", "4 rows, 0 ms", "4 rows, 0 ms, admission"]
    assert len({one.name for one in every}) == len(every) == 9
    for one in every:
        config = parse_config(one.config(50))
        assert config.batching.adaptive is (one.size is None)
        assert (config.batching.p99_objective_ms == 50) is (one.admission or one.size is None)
        assert config.max_batch_size == one.size
        assert config.batching.max_queue_delay_us == one.delay_ms * 1000


def test_a_repository_is_made_for_each(tmp_path):
    bench = Bench(SLEEPER, 50.0, 1.0, 1.0, tmp_path)
    bench.prepare()
    config = parse_config((bench.repository(Setting(8, 2.0)) / SLEEPER / "config.yaml").read_text())
    assert (config.backend, config.max_batch_size, config.parameters["fake_delay_ms"]) == ("fake", 8, 4)
    assert not parse_config((bench.repository(None) / SLEEPER / "config.yaml").read_text()).batching.adaptive


def test_refusals_are_no_errors_and_late_is_not_timely(tmp_path):
    tally = Tally(0, 1000 * MS, by_start=True)
    for took_ms, problem in ((10, None), (60, None), (1, "status 503: too late"), (1, "status 500: bad"), (50, None)):
        tally.add(100 * MS, (100 + took_ms) * MS, problem)
    bench = Bench(SLEEPER, 50.0, 1.0, 1.0, Path(tmp_path))
    before, after = (f'headrace_objective_late_total{{model="sleeper",version="1"}} {late}\n' for late in (3, 4))
    timely = 'headrace_objective_timely_total{model="sleeper",version="1"} 7\n'
    measured = bench._measured(Setting(None), tally, before, after + timely)
    assert (measured.offered, measured.refused, measured.timely, measured.late) == (5, 1, 2, 1)
    assert measured.errors == {"status 500: bad": 1}
    assert (measured.goodput, measured.kept, measured.late_share) == (0.4, 2 / 3, 1 / 8)
    assert table("sleeper", [measured], "x").row_count == 1


def test_nothing_measured_is_no_division_by_zero():
    assert Measured("adaptive", 0, 0, 0, 0, {}, 0.0, 0.0, None, None).goodput == 0
