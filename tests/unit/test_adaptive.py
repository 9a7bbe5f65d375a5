"""The policy that chooses sizes and delays, the forecast, the budget and admission, with made-up clocks."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.adaptive import AdaptivePolicy
from headrace.batching.arrivals import ArrivalRate
from headrace.batching.budget import LEAST, MISSES, MOST, Budget
from headrace.batching.curve import LatencyCurves
from headrace.batching.forecast import Forecast, Place
from headrace.batching.objective import LEARNING, Objective, TooLate
from headrace.batching.policy import BatchLimits, Take, Wait

MS = 1_000_000
OBJECTIVE = 50 * MS


def learned(batch_ms=4.0, row_ms=0.7, sizes=(1, 2, 4, 8, 16, 32), times=50, key=None):
    curves = LatencyCurves()
    for _ in range(times):
        for rows in sizes:
            curves.observe(key, rows, int((batch_ms + row_ms * rows) * MS))
    return curves


class Model:
    """A policy with everything that it asks, and one instance unless told otherwise."""

    def __init__(self, curves=None, max_rows=64, instances=1, objective_ns=OBJECTIVE):
        self.curves = curves if curves is not None else learned()
        self.budget = Budget(objective_ns)
        self.forecast = Forecast(self.curves, instances)
        self.arrivals = ArrivalRate(objective_ns)
        self.policy = AdaptivePolicy(BatchLimits(max_rows), self.budget, self.curves, self.forecast, self.arrivals)

    def arriving(self, per_ms, until_ns):
        for number in range(400, 0, -1):
            self.arrivals.arrived(1, until_ns - int(number * MS / per_ms))
        return self


# Sizes


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_with_nothing_known_one_request_goes_at_once(rows):
    assert Model(LatencyCurves()).policy.decide(None, rows, 0, 0) == Take(1)


def test_with_one_size_known_twice_as_many_are_tried():
    curves = LatencyCurves()
    curves.observe(None, 1, 15 * MS)
    assert Model(curves).policy.decide(None, 40, 0, 0) == Take(2)
    assert Model(curves, max_rows=1).policy.decide(None, 40, 0, 0) == Take(1)


def test_a_batch_takes_about_half_of_the_objective():
    model = Model()
    decision = model.policy.decide(None, 500, 0, 30 * MS)
    assert 20 <= decision.rows <= 31
    assert model.policy.target == decision.rows


def test_a_longer_batch_is_worth_it_where_it_wins_much_throughput():
    flat = Model(learned(15.0, 0.2, (1, 2, 4, 8, 16, 32, 64)))
    assert flat.policy.decide(None, 500, 0, 0).rows >= 50, "two such take 54 ms"


def test_a_model_that_cannot_meet_the_objective_at_all_is_served_as_fast_as_it_can_be():
    assert Model(learned(80.0, 10.0)).policy.decide(None, 9, 0, 500 * MS) == Take(1)


def test_a_size_that_looked_bad_once_is_tried_again():
    curves = learned(1.0, 4.0, (1,))
    curves.observe(None, 2, 11 * MS)  # 9, if it had not been unlucky: more rows a second than one by one
    assert Model(curves).policy.decide(None, 9, 0, 0).rows >= 2


@given(
    batch_ms=st.floats(0.05, 60),
    row_ms=st.floats(0.001, 20),
    max_rows=st.integers(1, 64),
    rows=st.integers(1, 300),
    age_ms=st.integers(0, 200),
    per_ms=st.floats(0.01, 50),
    instances=st.integers(0, 3),
    busy=st.booleans(),
)
def test_every_decision_is_within_bounds_and_nobody_is_late_by_waiting(
    batch_ms, row_ms, max_rows, rows, age_ms, per_ms, instances, busy
):
    model = Model(learned(batch_ms, row_ms, times=3), max_rows, instances)
    now_ns = 10_000 * MS
    model.arriving(per_ms, now_ns)
    if busy:
        model.forecast.taken("a", None, 1, now_ns)
    oldest_ns = now_ns - age_ms * MS
    decision = model.policy.decide(None, rows, oldest_ns, now_ns)
    if isinstance(decision, Take):
        assert 1 <= decision.rows <= min(rows, max_rows)
        return
    curve = model.curves.of(None)
    assert rows < model.policy.target <= max_rows
    assert now_ns < decision.until_ns
    assert decision.until_ns + curve.high_ns(model.policy.target) <= oldest_ns + OBJECTIVE
    # While nobody comes it waits no longer than it said, and less where the stream of arrivals has dried up.
    again = model.policy.decide(None, rows, oldest_ns, decision.until_ns - 1)
    assert again in (decision, Take(rows))
    if again == decision:
        assert model.policy.decide(None, rows, oldest_ns, decision.until_ns) == Take(rows)
        assert model.policy.waited_ns == decision.until_ns - now_ns


def test_a_lone_request_does_not_wait_where_few_come():
    model = Model().arriving(0.05, 1000 * MS)
    assert model.policy.decide(None, 1, 1000 * MS, 1000 * MS) == Take(1)


def test_a_batch_that_is_nearly_full_waits_for_the_last_rows_while_many_come():
    model = Model().arriving(2.0, 1000 * MS)
    size = model.policy.decide(None, 500, 990 * MS, 1000 * MS).rows
    decision = model.policy.decide(None, size - 1, 990 * MS, 1000 * MS)
    assert isinstance(decision, Wait)
    assert 1000 * MS < decision.until_ns < 1003 * MS
    assert model.policy.decide(None, size, 990 * MS, 1000 * MS + 1) == Take(size)
    assert model.policy.waited_ns == 1


def test_nobody_waits_for_company_while_another_instance_is_idle_or_the_oldest_has_no_time():
    model = Model(instances=2).arriving(2.0, 1000 * MS)
    size = model.policy.decide(None, 500, 990 * MS, 1000 * MS).rows
    assert model.policy.decide(None, size - 1, 990 * MS, 1000 * MS) == Take(size - 1)
    model.forecast.taken("a", None, 20, 999 * MS)
    assert isinstance(model.policy.decide(None, size - 1, 990 * MS, 1000 * MS), Wait)
    assert model.policy.decide(None, size - 1, 979 * MS, 1000 * MS) == Take(size - 1)


# Forecast


def test_an_instance_is_free_when_what_it_has_taken_has_run():
    place = Place()
    assert place.free_ns(7) == 7
    place.taken("a", 10, 100)
    place.taken("b", 20, 105)
    assert (len(place), place.free_ns(106)) == (2, 130)
    place.ended("a", 108)
    assert place.free_ns(108) == 128
    place.ended("b", 128)
    assert place.free_ns(128) == 128


def test_a_batch_that_is_late_is_expected_to_stay_late():
    place = Place()
    place.taken("a", 10, 100)
    assert [place.free_ns(now) for now in (110, 120, 150)] == [110, 125, 170]


def test_rows_start_on_the_instance_that_is_free_soonest_round_by_round():
    forecast = Forecast(learned(10.0, 0.0), 2)
    curve = learned(10.0, 0.0).of(None)
    forecast.taken("a", None, 8, 0)
    assert forecast.free_ns(4 * MS) == [4 * MS, pytest.approx(10 * MS, rel=0.01)]
    starts = [forecast.start_ns(curve, 8, ahead, 0.0, 4 * MS) / MS for ahead in (0, 7, 8, 16, 24)]
    assert starts == pytest.approx([4, 4, 10, 14, 20], rel=0.01)
    assert forecast.finish_ns(16, 1, 4 * MS, 8) == pytest.approx(24 * MS, rel=0.01)
    assert forecast.finish_ns(0, 20, 4 * MS, 8) == pytest.approx(34 * MS, rel=0.01)
    forecast.ended("a", 5 * MS)
    assert forecast.free_ns(5 * MS) == [5 * MS, 5 * MS]


def test_nothing_is_foreseen_without_instances_or_batches():
    assert Forecast(learned(), 0).finish_ns(0, 1, 0, 8) is None
    assert Forecast(LatencyCurves(), 1).finish_ns(0, 1, 0, 8) is None


@given(st.lists(st.sampled_from(["up", "down", "take", "end"]), max_size=60), st.integers(0, 2**32))
def test_instances_come_and_go_and_no_batch_is_forgotten(events, seed):
    chance = random.Random(seed)
    forecast, running, number, now_ns, up = Forecast(learned(), 1), [], 0, 0, 1
    for event in events:
        now_ns += chance.randrange(20 * MS)
        if event == "up":
            forecast.up()
            up += 1
        elif event == "down" and up:
            forecast.down()
            up -= 1
        elif event == "take":
            number += 1
            forecast.taken(number, None, 4, now_ns)
            running.append(number)
        elif event == "end" and running:
            forecast.ended(running.pop(chance.randrange(len(running))), now_ns)
        assert forecast.instances == up
        free_ns = forecast.free_ns(now_ns)
        assert len(free_ns) == up
        assert free_ns == sorted(free_ns)
        assert all(each >= now_ns for each in free_ns)
    for batch in running:
        forecast.ended(batch, now_ns)
    assert forecast.free_ns(now_ns) == [now_ns] * up


# Budget


def test_the_budget_settles_where_few_answers_are_late():
    chance = random.Random(1)
    budget = Budget(OBJECTIVE)
    late = 0
    for batch in range(20_000):
        missed = sum(chance.gauss(budget.ns, 3 * MS) > OBJECTIVE for _ in range(10))
        budget.answered(10 - missed, missed)
        late += missed if batch >= 2000 else 0
    assert 0.002 < late / 180_000 < 0.01
    assert budget.timely + budget.late == 200_000


def test_the_budget_keeps_within_bounds_and_comes_back():
    budget = Budget(OBJECTIVE)
    for _ in range(100):
        budget.answered(0, 64)
    assert budget.ns == LEAST * OBJECTIVE
    for _ in range(3000):
        budget.answered(1, 0)
    assert budget.ns > 0.8 * OBJECTIVE
    for _ in range(3000):
        budget.answered(64, 0)
    assert budget.ns == MOST * OBJECTIVE
    before_ns = budget.ns
    budget.answered(5, 5, learn=False)
    assert (budget.ns, budget.late) == (before_ns, 6405)
    assert MISSES < 0.01


# Admission


def objective_of(curves=None, *, adaptive=True, limits=None, instances=1):
    objective = Objective(OBJECTIVE, curves if curves is not None else learned(), adaptive=adaptive)
    objective.set_limits(limits or BatchLimits(64))
    for _ in range(instances):
        objective.forecast.up()
    return objective


def test_what_can_be_in_time_is_accepted_and_what_cannot_is_refused_with_the_prediction():
    objective = objective_of()
    objective.forecast.taken("a", None, 28, 0)
    assert objective.admit([], None, 1, 10 * MS) is None
    assert objective.admit([(None, 20)], None, 1, 10 * MS) is None
    refusal = objective.admit([(None, 100)], None, 1, 10 * MS)
    assert refusal.rows_ahead == 100
    assert 80 * MS < refusal.predicted_ns < 140 * MS
    assert objective.refused == 1


def test_before_anything_is_known_everything_is_accepted():
    assert objective_of(LatencyCurves()).admit([(None, 1000)], None, 1, 0) is None


def test_one_that_finds_an_instance_idle_is_accepted_whatever_the_model_takes():
    objective = objective_of(learned(500.0))
    assert objective.admit([], None, 1, 0) is None
    objective.forecast.taken("a", None, 1, 0)
    assert objective.admit([], None, 1, 0) is not None


def test_nothing_is_promised_while_no_instance_is_up():
    objective = objective_of(instances=0)
    assert objective.admit([], None, 1, 0) == TooLate(None, 0)


def test_rows_of_other_shapes_are_ahead_too():
    curves = learned()
    wide = ((1000,),)
    for _ in range(10):
        curves.observe(wide, 4, 30 * MS)
    objective = objective_of(curves)
    objective.forecast.taken("a", None, 8, 0)
    assert objective.admit([(None, 4)], None, 1, 0) is None
    assert objective.admit([(None, 4), (wide, 4)], None, 1, 0) is not None


def test_with_sizes_of_the_owner_only_admission_is_the_objectives():
    objective = objective_of(adaptive=False, limits=BatchLimits(8, (), 2 * MS))
    assert objective.policy.decide(None, 20, 0, 0) == Take(8)
    assert objective.policy.decide(None, 3, 0, 0) == Wait(2 * MS)
    objective.forecast.taken("a", None, 8, 0)
    assert objective.admit([(None, 20)], None, 1, 0) is None
    assert objective.admit([(None, 60)], None, 1, 0) is not None


def test_late_answers_count_against_predictions_once_there_are_some():
    objective = objective_of(learned(times=1, sizes=(1,)))
    before_ns = objective.budget.ns
    objective.answered(None, 0, 5)
    assert objective.budget.ns == before_ns
    for _ in range(LEARNING):
        objective.forecast.taken("a", None, 1, 0)
        objective.forecast.ended("a", MS)
        objective._curves.observe(None, 1, 5 * MS)
    objective.answered(None, 0, 5)
    assert objective.budget.ns < before_ns
    assert objective.budget.late == 10


def test_those_who_wait_may_wait_until_they_have_to_run():
    objective = objective_of()
    spare_ns = objective.spare_ns(None, 8, 0, 10 * MS)
    curve = objective._curves.of(None)
    assert spare_ns == pytest.approx(objective.budget.ns - curve.high_ns(8) - 10 * MS, abs=2)
    assert objective.spare_ns(None, 8, 0, 60 * MS) == 0
    assert objective_of(LatencyCurves()).spare_ns(None, 8, 0, 0) == 0


def test_who_is_refused_for_an_objective_is_told_what_was_foreseen():
    told = TooLate(int(93.24 * MS), 32).explain(50 * MS)
    assert told.startswith("the request would be answered 93.2 ms after it came, too late for the objective of 50 ms")
    assert told.endswith("32 rows wait before it")
    assert TooLate(None, 3).explain(50 * MS).startswith("no instance is up now, so the objective of 50 ms")
