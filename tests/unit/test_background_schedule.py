"""What is optimised next beside a server, and when not: with made-up clocks."""

import copy
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from headrace.background.schedule import (
    FIRST_WAIT_S,
    MIB,
    MOST_FAILURES,
    PAUSE_S,
    RESERVE_BYTES,
    TRUSTED_AFTER_S,
    Result,
    Room,
    Schedule,
    Start,
    Stop,
    Subject,
)

PLENTY = Room(1 << 40, 1 << 40)
A = Subject("a", "1", "print-a", model_bytes=100 * MIB)
B = Subject("b", "1", "print-b")
PLANNED_A = replace(A, planned=True)


def begin(schedule, subjects, now=0.0):
    decision = schedule.observe(subjects, PLENTY, now)
    assert isinstance(decision, Start)
    schedule.started(decision.subject)
    return decision.subject


def test_one_after_the_other_and_each_once():
    schedule = Schedule()
    assert begin(schedule, [A, B]) == A
    assert schedule.observe([A, B], PLENTY, 1) is None
    assert schedule.ended(Result.PLANNED, 2) is None
    assert begin(schedule, [PLANNED_A, B], 3) == B
    schedule.ended(Result.NOTHING_BETTER, 4)
    assert schedule.observe([PLANNED_A, replace(B, planned=True)], PLENTY, 1e9) is None


def test_what_has_a_plan_needs_none():
    assert Schedule().observe([PLANNED_A], PLENTY, 0) is None
    assert Schedule().observe([], PLENTY, 0) is None


def test_a_failure_is_tried_again_later_and_later_and_then_no_more():
    schedule, now, waits = Schedule(), 0.0, []
    while True:
        begin(schedule, [A], now)
        wait = schedule.ended(Result.FAILED, now)
        if wait is None:
            break
        waits.append(wait)
        assert schedule.observe([A], PLENTY, now + wait - 0.1) is None
        now += wait
    assert waits == [60, 300, 1500]
    assert len(waits) == MOST_FAILURES - 1
    assert schedule.observe([A], PLENTY, 1e12) is None
    # Until it is another model.
    assert schedule.observe([replace(A, basis="changed")], PLENTY, now) == Start(replace(A, basis="changed"))


def test_others_do_not_wait_for_one_that_fails():
    schedule = Schedule()
    begin(schedule, [A, B])
    schedule.ended(Result.TIMED_OUT, 10)
    assert begin(schedule, [A, B], 11) == B
    schedule.ended(Result.FAILED, 12)
    late = 10 + FIRST_WAIT_S
    assert begin(schedule, [A, B], late) == A


def test_a_run_is_stopped_when_its_model_goes_changes_or_has_a_plan():
    for there, reason in (
        ([B], "not served"),
        ([replace(A, basis="other")], "changed"),
        ([PLANNED_A], "there is a plan"),
    ):
        schedule = Schedule()
        begin(schedule, [A])
        decision = schedule.observe(there, PLENTY, 1)
        assert isinstance(decision, Stop)
        assert reason in decision.reason
        schedule.ended(Result.STOPPED, 2)
        assert schedule.running is None


def test_a_changed_model_is_begun_anew_at_once():
    schedule = Schedule()
    begin(schedule, [A])
    changed = replace(A, basis="other")
    schedule.observe([changed], PLENTY, 1)
    assert schedule.ended(Result.STOPPED, 1) is None
    assert schedule.observe([changed], PLENTY, 1) == Start(changed)


def test_a_run_makes_room_and_goes_on_later():
    schedule = Schedule()
    begin(schedule, [A])
    decision = schedule.observe([A], Room(RESERVE_BYTES - 1, 1 << 40), 1)
    assert isinstance(decision, Stop)
    assert "memory" in decision.reason
    assert schedule.ended(Result.STOPPED, 1) == PAUSE_S
    assert schedule.observe([A], PLENTY, 1 + PAUSE_S - 1) is None
    assert schedule.observe([A], PLENTY, 1 + PAUSE_S) == Start(A)


def test_nothing_is_begun_without_room_and_the_obstacle_is_told():
    schedule = Schedule()
    assert schedule.observe([A, B], Room(1000 * MIB, 1 << 40), 0) == Start(B)  # the small one has room
    assert "1000 MiB are free" in schedule.obstacles["a", "1"]
    assert schedule.observe([A], Room(1 << 40, 10 * MIB), 0) is None
    assert "disk space" in schedule.obstacles["a", "1"]
    assert schedule.observe([A], PLENTY, 0) == Start(A)
    assert schedule.obstacles == {}


def test_a_refused_plan_is_made_again_at_once_and_then_later_and_later():
    schedule = Schedule()
    assert schedule.refused("a", "1", 0) == 0  # before anything was seen
    schedule.observe([PLANNED_A], PLENTY, 0)
    assert schedule.refused("a", "1", 5) == 0
    begin(schedule, [A], 5)
    schedule.ended(Result.PLANNED, 10)
    schedule.observe([PLANNED_A], PLENTY, 10)
    assert schedule.refused("a", "1", 20) == 5 * FIRST_WAIT_S
    assert schedule.observe([A], PLENTY, 20) is None
    schedule.refused("a", "1", 30)
    assert schedule.refused("a", "1", 40) is None
    assert schedule.observe([A], PLENTY, 1e9) is None


def test_a_plan_that_was_in_use_for_long_makes_failures_forgotten():
    schedule = Schedule()
    for now in range(3):
        schedule.observe([PLANNED_A], PLENTY, now)
        schedule.refused("a", "1", now)
    schedule.observe([PLANNED_A], PLENTY, 100)
    schedule.observe([PLANNED_A], PLENTY, 100 + TRUSTED_AFTER_S)
    assert schedule.refused("a", "1", 200 + TRUSTED_AFTER_S) == 0


def test_a_plan_that_disappears_counts_as_a_failure_so_that_nothing_goes_round_and_round():
    schedule = Schedule()
    begin(schedule, [A])
    schedule.ended(Result.PLANNED, 1)
    assert schedule.observe([A], PLENTY, 2) is None
    assert schedule.observe([A], PLENTY, 2 + FIRST_WAIT_S) == Start(A)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["planned", "nothing_better", "failed", "timed_out", "stopped", "refused", "gone", "look"]),
            st.integers(0, 4000),
        ),
        max_size=60,
    )
)
def test_whatever_happens_one_runs_at_a_time_and_failures_are_bounded(events):
    schedule, now, there = Schedule(), 0.0, {A: A, B: B}
    bad = {A.model: 0, B.model: 0}
    for event, seconds in events:
        now += seconds
        decision = schedule.observe(list(there.values()), PLENTY, now)
        if isinstance(decision, Start):
            assert schedule.running is None
            assert not decision.subject.planned
            schedule.started(decision.subject)
        running = schedule.running
        if event == "refused":
            if running is None:
                schedule.refused("a", "1", now)
                bad["a"] += 1
        elif event == "gone" and running is not None:
            schedule.ended(Result.STOPPED, now)
        elif event in set(Result) and running is not None:
            schedule.ended(Result(event), now)
            bad[running.model] += event in ("failed", "timed_out")
        assert all(one.failures <= sum(bad.values()) + len(events) for one in schedule._attempts.values())
        for key, one in schedule._attempts.items():
            if one.failures >= MOST_FAILURES and schedule.running is None:
                alone = copy.deepcopy(schedule)  # it forgets whoever it is not told of
                assert alone.observe([Subject(*key, one.basis)], PLENTY, now + 1e9) is None
