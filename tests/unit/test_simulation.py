"""The policy under simulated load: what it promises is kept, and no fixed pair serves more within the objective."""

from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
from loadtests.schedule import burst_offsets_ns, poisson_offsets_ns, ramp_offsets_ns
from loadtests.simulate import DELAYS_MS, MODELS, SIZES, Job, jobs, run_job, summarize
from loadtests.simulation import MS, Setup, SimulatedModel, Simulation, simulate

RESNET, MINILM = (next(one for one in MODELS if one.name == name) for name in ("resnet50", "minilm"))
SEEDS = (1, 2, 3)


def result(model, setup, pattern="bursts", load=0.9, seconds=10.0, seed=1):
    return run_job(Job(model, pattern, setup, load, seconds, seed))


def adaptive(model, **more):
    return Setup(adaptive=True, max_rows=model.max_rows, **more)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_of_the_requests_accepted_in_bursts_99_in_100_are_in_time(model):
    results = [result(model, adaptive(model), seed=seed) for seed in SEEDS]
    assert mean(one.kept for one in results) >= 0.99
    assert min(one.kept for one in results) >= 0.98


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_no_fixed_pair_serves_nearly_as_much_in_time_in_bursts(model):
    ours = mean(result(model, adaptive(model), seconds=4.0, seed=seed).goodput for seed in SEEDS[:2])
    for size in (size for size in SIZES if size <= model.max_rows):
        for delay_ms in DELAYS_MS[::2]:
            setup = Setup(max_rows=size, delay_ms=delay_ms)
            fixed = mean(result(model, setup, seconds=4.0, seed=seed).goodput for seed in SEEDS[:2])
            assert fixed < 0.75 * ours, setup.name


@pytest.mark.parametrize("model", [RESNET, MINILM], ids=lambda model: model.name)
def test_the_best_pair_of_the_grid_with_the_same_admission_is_not_ahead_by_more_than_noise(model):
    def goodput(setup):
        return mean(result(model, setup, seconds=6.0, seed=seed).goodput for seed in SEEDS)

    ours = goodput(adaptive(model))
    sizes = [size for size in SIZES if size <= model.max_rows]
    fixed = {size: goodput(Setup(admission=True, max_rows=size)) for size in sizes}
    assert ours > 0.96 * max(fixed.values()), fixed
    assert ours > 1.02 * sorted(fixed.values())[len(fixed) // 2], "a pair that nobody has tuned"


def test_at_low_load_nobody_is_refused_or_kept_waiting():
    for model in MODELS:
        low = result(model, adaptive(model), "poisson", load=0.3)
        assert low.kept > 0.995
        assert low.goodput > 0.99
        none = result(model, Setup(max_rows=model.max_rows), "poisson", load=0.3)
        assert low.p50_ms < 1.3 * none.p50_ms


def test_three_instances_keep_it_too():
    three = [result(MINILM, adaptive(MINILM, instances=3), seconds=5.0, seed=seed) for seed in SEEDS]
    assert mean(one.kept for one in three) > 0.985
    assert mean(one.goodput for one in three) > 0.6


def test_a_slower_machine_is_followed():
    ours = [result(MINILM, adaptive(MINILM), "neighbour", seed=seed) for seed in SEEDS]
    assert mean(one.kept for one in ours) > 0.98
    assert result(replace(MINILM, neighbour=3.0), adaptive(MINILM)).kept > 0.9


def test_a_model_that_takes_longer_than_the_objective_still_answers():
    slow = SimulatedModel("slow", 80.0, 1.0, 8)
    simulation = Simulation(adaptive(slow), slow, seed=1)
    outcome = simulation.run(poisson_offsets_ns(20, 20, seed=1))
    assert outcome.batches > 150, "one after the other, as fast as it can"
    assert outcome.timely == 0


def test_the_same_seed_gives_the_same_outcome_and_every_request_has_one():
    arrivals = burst_offsets_ns(1000, 3, seed=5)
    outcomes = [simulate(adaptive(MINILM), MINILM, arrivals, seed) for seed in (5, 5, 6)]
    assert outcomes[0] == outcomes[1] != outcomes[2]
    for one in outcomes:
        assert one.offered == len(arrivals) == one.refused + one.timely + one.late
        assert len(one.latencies_ns) == one.timely + one.late == one.rows


def test_a_fixed_delay_is_waited_for():
    setup = Setup(max_rows=64, delay_ms=10.0)
    outcome = simulate(setup, replace(MINILM, noise=0.0, stragglers=0.0), [0], seed=1)
    assert outcome.latencies_ns == [10 * MS + int(4.7 * MS)]


# Schedules and the table


def test_bursts_have_the_rate_on_average_and_more_than_it_in_bursts():
    offsets = burst_offsets_ns(2000, 60, seed=1)
    assert offsets == sorted(offsets) == burst_offsets_ns(2000, 60, seed=1)
    assert len(offsets) == pytest.approx(120_000, rel=0.1)
    assert 0 <= offsets[0] <= offsets[-1] < 60e9
    counts = np.histogram(offsets, bins=6000, range=(0, 60e9))[0]  # of 10 ms, 20 on average
    assert 25 < np.percentile(counts, 75) < 45
    assert np.percentile(counts, 25) < 10
    for wrong in ({"burst_s": 0}, {"high": 0.9}, {"low": 1.0}):
        with pytest.raises(ValueError, match="expected"):
            burst_offsets_ns(10, 1, 1, **wrong)


def test_a_ramp_rises_and_falls():
    offsets = ramp_offsets_ns(2000, 8, seed=1, period_s=8)
    assert offsets == sorted(offsets)
    assert len(offsets) == pytest.approx(16_000, rel=0.05)
    counts = np.histogram(offsets, bins=8, range=(0, 8e9))[0] / 2000
    assert counts[0] == pytest.approx(0.4, abs=0.1) == counts[7]
    assert counts[3] == pytest.approx(1.6, abs=0.1) == counts[4]
    with pytest.raises(ValueError, match="expected all above 0"):
        ramp_offsets_ns(0, 8, 1)


def test_the_table_has_the_best_of_each_kind():
    todo = list(jobs([RESNET], ["bursts"], 1, 0.5, 0.9, 1))
    assert len(todo) == 1 + 2 * 6 * len(DELAYS_MS)
    (row,) = summarize([run_job(job) for job in todo])
    assert (row.model, row.pattern) == ("resnet50", "bursts")
    assert 0 <= row.without < row.with_admission <= 1
    assert row.kept_worst <= row.kept
