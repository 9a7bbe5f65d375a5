"""The bounds of a search: time and its phases, memory, batches, and finals that are cut short."""

import threading
from multiprocessing import Pipe

import msgspec
import numpy as np
import pytest

from headrace.core.model import Signature
from headrace_backends.optimize import trial_process
from headrace_backends.optimize.accuracy import Budget, Errors
from headrace_backends.optimize.affordable import FEWEST_EXAMPLES, MOST_EXAMPLES, affordable
from headrace_backends.optimize.batches import batches, filling, glance_sizes, judging_sizes
from headrace_backends.optimize.clocking import Runner
from headrace_backends.optimize.deadline import Deadline, phases
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.finals import FINALISTS, Finals
from headrace_backends.optimize.findings import Fate, Row
from headrace_backends.optimize.form import Form, Step, Technique
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.halves import Half
from headrace_backends.optimize.listener import SilentListener
from headrace_backends.optimize.memory_room import RESERVE_BYTES, fits, groups
from headrace_backends.optimize.trial import TrialFailed

# -- time ----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def test_a_deadline_moves_on():
    clock = Clock()
    deadline = Deadline(clock)
    assert deadline.left_s == float("inf")
    assert not deadline.over
    deadline.move(107.0)
    assert deadline.left_s == 7.0
    clock.now_s = 107.0
    assert deadline.over
    clock.now_s = 109.0
    assert deadline.left_s == 0.0
    deadline.move(110.0)
    assert not deadline.over


@pytest.mark.parametrize("limit_s", [1.0, 60.0, 3600.0])
def test_each_phase_has_a_part_of_the_limit_and_all_end_with_it(limit_s):
    ends = phases(50.0, limit_s)
    assert 50.0 < ends.candidates_s < ends.finals_s < ends.report_s == 50.0 + limit_s
    assert ends.candidates_s >= 50.0 + limit_s / 2


# -- memory --------------------------------------------------------------------------------------------------------


def test_what_fits_is_loaded_together_and_else_group_by_group():
    room = RESERVE_BYTES + 100
    assert fits(100, room)
    assert not fits(101, room)
    assert groups([30, 30, 40], room) == [[0, 1, 2]]
    assert groups([60, 30, 40, 50], room) == [[0, 1], [2, 3]]
    assert groups([300, 10], room) == [[0], [1]]  # alone beside the reference, where not even that fits
    assert groups([10, 10, 10], 0) == [[0], [1], [2]]
    assert groups([], room) == []


# -- batches -------------------------------------------------------------------------------------------------------


def rows(*widths):
    return Examples(tuple({"x": np.zeros((1, width))} for width in widths), tuple({} for _ in widths), "test")


def lengths(examples, sizes):
    return [len(batch) for batch in batches(examples.inputs, sizes)]


@pytest.mark.parametrize("count", [1, 5, 31, 64, 200])
@pytest.mark.parametrize("most", [2, 8, 24, 32, 100, 256])
def test_forms_are_judged_alone_and_in_the_largest_batches_that_are_served(count, most):
    sizes = judging_sizes(most)
    filled = filling(rows(*[3] * count), sizes)
    made = lengths(filled, sizes)
    assert made[0] == most == max(made)
    assert made.count(1) >= 8
    assert len(filled) % count == 0  # each example as often as the others
    assert sum(made) == len(filled)


def test_what_is_not_merged_is_asked_one_by_one():
    assert judging_sizes(0) == glance_sizes(0) == (1,)
    examples = rows(3, 3, 3)
    assert filling(examples, (1,)) == examples
    assert lengths(examples, (1,)) == [1, 1, 1]
    several = Examples(({"x": np.zeros((2, 3))},) * 3, ({},) * 3, "test")
    assert lengths(several, (8,)) == [1, 1, 1]
    assert len(filling(several, judging_sizes(8))) == 3


def test_batches_have_rows_of_one_shape():
    examples = rows(3, 5, 3, 3, 5, 3)
    assert lengths(examples, (8,)) == [1, 1, 2, 1, 1]
    filled = filling(examples, (2,))
    assert len(filled) == 6  # the more of a shape, the more it counts, so none is repeated
    assert lengths(filled, (3, 2)) == [3, 1, 2]


def test_the_glance_is_at_small_batches():
    assert lengths(rows(*[3] * 20), glance_sizes(32)) == [8, 8, 4]
    assert glance_sizes(4) == (4,)


# -- finals --------------------------------------------------------------------------------------------------------

RIGHT = Errors(9, max_rel=0.0)
REFERENCE = Row(Form("torch"), Fate.KEPT, speedup=1.0, held_back=RIGHT)


def kept(name, speedup, *, proved=False, techniques=()):
    form = Form("onnxruntime", (Step(name),), techniques=techniques)
    return Row(form, Fate.KEPT, speedup=speedup, held_back=RIGHT if proved else None)


class Judge:
    """Each call takes 10 s of the clock; what is over by then is not done."""

    def __init__(self, clock, deadline, wrong=(), layouts=None):
        self.clock, self.deadline, self.wrong, self.layouts = clock, deadline, wrong, layouts or {}
        self.judged = []
        self.speeds = {}

    def decide(self, row):
        self.judged.append(row.form.steps[0].kind)
        self.clock.now_s += 10
        if self.deadline.over:
            return row
        fate = Fate.REFUSED if row.form.steps[0].kind in self.wrong else Fate.KEPT
        return msgspec.structs.replace(row, fate=fate, held_back=RIGHT)

    def final(self, rows):
        self.clock.now_s += 10
        if self.deadline.over:
            return []
        return [self.measured(row) for row in rows]

    def measured(self, row):
        base = self.speeds.get(row.form.name, 1.0)
        return msgspec.structs.replace(row, speedup=base * self.layouts.get(row.form.layout, 1.0))


def finals(*rows, left_s=1000.0, cpus=2, goal=None, **judge):
    clock = Clock()
    deadline = Deadline(clock)
    deadline.move(clock.now_s + left_s)
    judge = Judge(clock, deadline, **judge)
    judge.speeds = {row.form.name: row.speedup for row in rows}
    decision = Finals(judge, goal or Goal(), cpus, deadline, SilentListener()).run(REFERENCE, [REFERENCE, *rows])
    return decision, judge, clock.now_s - 100.0


def chosen(decision):
    assert [row for row in decision.rows if row.fate is Fate.CHOSEN] == [decision.chosen]
    steps = decision.chosen.form.steps
    return steps[0].kind if steps else "reference"


def test_the_fastest_that_is_proved_wins_in_its_best_layout():
    decision, judge, _ = finals(
        kept("a", 2.0), kept("wrong", 4.0), kept("b", 3.0), wrong=("wrong",), layouts={"1 x 1 thread": 1.5}
    )
    assert chosen(decision) == "b"
    assert decision.chosen.form.threads == 1
    assert judge.judged == ["wrong", "b", "a"]
    assert decision.complete
    assert "4.50 times as fast" in decision.why
    assert [row.fate for row in decision.rows if row.form.name == "onnxruntime + wrong"] == [Fate.REFUSED]


def test_no_more_than_a_few_are_judged():
    _, judge, _ = finals(*(kept(name, 2.0 + place) for place, name in enumerate("abcdefg")))
    assert len(judge.judged) == FINALISTS


def test_a_sweep_tries_every_form_in_every_layout():
    every = [kept(name, 1.5 + place / 10) for place, name in enumerate("abcdef")]
    decision, judge, _ = finals(*every, goal=Goal(exhaustive=True), cpus=4)
    assert sorted(judge.judged) == list("abcdef")
    assert len(decision.rows) == 7 * 3  # six and the reference, each on all, one and four threads


def test_of_equal_ones_that_is_taken_which_changes_least():
    int8 = kept("int8", 2.02, techniques=(Technique.INT8_STATIC,))
    decision, _, _ = finals(int8, kept("plain", 2.0), goal=Goal(Budget("cosine", min=0.9)))
    assert chosen(decision) == "plain"
    assert "nothing that is clearly faster changes less" in decision.why
    assert "cosine >= 0.9 holds" in decision.why


def test_without_time_the_best_that_is_proved_already_wins():
    unproved, proved = kept("unproved", 4.0), kept("proved", 3.0, proved=True)
    decision, judge, took_s = finals(unproved, proved, kept("slower", 2.0, proved=True), left_s=0.0)
    assert chosen(decision) == "proved"
    assert judge.judged == []
    assert took_s <= 10  # one race that finds at once that there is no time
    assert decision.chosen.form.layout == "1 x all threads"


def test_what_could_not_be_proved_in_time_is_not_chosen():
    decision, _, _ = finals(kept("a", 4.0), left_s=5.0)
    assert chosen(decision) == "reference"
    assert "nothing within the budget is clearly faster" in decision.why
    assert [row.fate for row in decision.rows if row.form.steps] == [Fate.KEPT]


def test_what_the_last_race_had_no_time_for_may_still_be_chosen():
    """Where memory is short forms are measured one at a time, and the reference may be all that there is time for."""

    class OneByOne(Judge):
        def final(self, rows):
            found = []
            for row in rows:
                self.clock.now_s += 10
                if not self.deadline.over:
                    found.append(self.measured(row))
            return found

    clock = Clock()
    deadline = Deadline(clock)
    deadline.move(clock.now_s + 35)
    judge = OneByOne(clock, deadline)
    judge.speeds = {"onnxruntime + a": 3.0}
    row = kept("a", 3.0, proved=True)
    decision = Finals(judge, Goal(), 1, deadline, SilentListener()).run(REFERENCE, [row])
    assert chosen(decision) == "a"


@pytest.mark.parametrize("left_s", [0.0, 5.0, 15.0, 25.0, 35.0, 45.0, 55.0, 65.0])
def test_whenever_they_are_cut_short_the_finals_are_over_soon_and_something_proved_wins(left_s):
    decision, _, took_s = finals(kept("a", 4.0), kept("b", 3.0), kept("c", 2.0, proved=True), left_s=left_s)
    assert decision.complete == (took_s < left_s)
    assert took_s <= left_s + 20  # the call under way, and one that finds that there is no time
    assert decision.chosen.held_back is not None
    assert chosen(decision) == ("c" if left_s < 15 else "a")


class Noisy(Judge):
    """The last races have these speeds in turn, by the kind of step; layouts are measured without noise."""

    races = ()

    def final(self, rows):
        found = super().final(rows)
        if len({row.form.name for row in rows}) == 1 or not found:
            return found
        self.raced = getattr(self, "raced", 0) + 1
        disturbed = self.races[self.raced - 1] if self.raced <= len(self.races) else {}
        return [msgspec.structs.replace(row, speedup=disturbed.get(kind_of(row), row.speedup)) for row in found]


def kind_of(row):
    return row.form.steps[0].kind if row.form.steps else "reference"


def noisy(*races, left_s=1000.0, rows=(("fast", 1.25), ("slow", 1.02))):
    clock = Clock()
    deadline = Deadline(clock)
    deadline.move(clock.now_s + left_s)
    judge = Noisy(clock, deadline)
    judge.races = races
    rows = [kept(name, speed, proved=True) for name, speed in rows]
    judge.speeds = {row.form.name: row.speedup for row in rows}
    return Finals(judge, Goal(), 1, deadline, SilentListener()).run(REFERENCE, rows), judge


def test_a_race_that_was_disturbed_does_not_decide():
    """What had measured 1.25 before and 0.9 in one race has lost to 1.02."""
    decision, judge = noisy({"fast": 0.9})
    assert chosen(decision) == "fast"
    assert decision.chosen.speedup == 1.25
    assert judge.raced == 3


def test_what_looked_fast_once_is_not_chosen_for_that():
    decision, judge = noisy({"slow": 1.6})
    assert chosen(decision) == "fast"
    assert judge.raced == 3


def test_what_two_races_agree_on_stands():
    decision, judge = noisy({"fast": 0.9}, {"fast": 0.92})
    assert chosen(decision) == "reference"  # and not "slow", which is no more than even with it
    assert judge.raced == 2
    assert decision.complete


def test_one_race_is_enough_where_it_bears_out_what_was_known():
    for race in ({}, {"fast": 1.2, "slow": 1.05}, {"slow": 0.7}):  # what is far behind may be anything
        decision, judge = noisy(race)
        assert chosen(decision) == "fast"
        assert judge.raced == 1


def test_there_are_no_further_races_without_time_for_them():
    # Three calls for layouts, one race, and less left than two races may take.
    decision, judge = noisy({"fast": 0.9}, left_s=55.0)
    assert judge.raced == 1
    assert decision.complete


def test_where_no_form_keeps_the_bound_that_is_said():
    row = kept("a", 0.0, proved=True)
    clock = Clock()
    deadline = Deadline(clock)
    judge = Judge(clock, deadline)
    judge.speeds = {row.form.name: 0.0, "torch": 0.0}
    goal = Goal(aim="throughput", p99_ms=20.0)
    decision = Finals(judge, goal, 1, deadline, SilentListener()).run(REFERENCE, [row])
    assert chosen(decision) == "reference"
    assert decision.why == (
        "no form was seen to reach throughput with p99 of at most 20 ms, nor was the model as it was dropped in"
    )


def test_a_function_is_one_instance():
    goals = Goal(aim="throughput"), Goal(aim="throughput", several=False)
    several, one = (finals(kept("a", 2.0), goal=goal)[0].rows for goal in goals)
    assert {row.form.instances for row in several} == {1, 2}
    assert {row.form.instances for row in one} == {1}


# -- examples --------------------------------------------------------------------------------------------------------


def test_a_model_is_judged_by_as_many_examples_as_there_is_time_and_memory_for():
    assert affordable(600.0, 0.001, 1000) == MOST_EXAMPLES
    assert affordable(600.0, 0.0, 0) == MOST_EXAMPLES
    assert FEWEST_EXAMPLES < affordable(600.0, 1.0, 1000) < MOST_EXAMPLES
    assert affordable(600.0, 1.0, 1000) <= 60
    assert FEWEST_EXAMPLES < affordable(600.0, 0.001, 8 << 20) < MOST_EXAMPLES
    assert affordable(1.0, 100.0, 1 << 30) == FEWEST_EXAMPLES


class Answering:
    """A form's process, whose answers have so many rows as ``rows_of`` says."""

    def __init__(self, rows_of):
        self.rows_of = rows_of
        self.asked = []

    def answer(self, requests, timeout_s):
        self.asked.append(len(requests))
        return [{"y": np.zeros(self.rows_of(len(one["x"])))} for one in requests]


def asked(rows_of):
    trial = Answering(rows_of)
    signature = Signature((), (), 8)
    half = Half(rows(*[3] * 20), (), lambda _: (8,), 20)
    return half.ask(Runner(Form("fake"), (trial,), signature)), trial


def test_examples_are_asked_batch_by_batch():
    answers, trial = asked(lambda count: (count, 2))
    assert len(answers) == 20
    assert {answer["y"].shape for answer in answers} == {(1, 2)}
    assert trial.asked == [1, 1, 1]  # else all answers would be in memory several times


@pytest.mark.parametrize("shape", [(), (1,), (9, 2)])
def test_answers_with_other_rows_than_were_asked_are_the_forms_fault(shape):
    with pytest.raises(TrialFailed, match=r"output 'y' has shape .* for a batch of 8 rows"):
        asked(lambda _: shape)


@pytest.mark.parametrize(("took_s", "seconds", "runs"), [(0.1, 0.0, 3), (0.1, 1.0, 10), (2.0, 0.0, 1), (2.0, 0.1, 1)])
def test_a_slow_model_is_run_once_in_each_round(monkeypatch, took_s, seconds, runs):
    now_ns = [0]
    bench = trial_process.Bench()
    monkeypatch.setattr(trial_process, "perf_counter_ns", lambda: now_ns[0])
    monkeypatch.setattr(bench, "_run", lambda _: now_ns.__setitem__(0, now_ns[0] + int(took_s * 1e9)))
    assert bench.clock({}, seconds, 100) == [int(took_s * 1e9)] * runs


def test_what_a_candidate_needs_and_is_not_installed_is_told_with_the_command_to_install_it():
    search, trial = Pipe()
    served = threading.Thread(target=trial_process.serve, args=(trial,))
    served.start()
    search.send(("call", ("no_such_module:thing", {})))
    assert search.recv() == (
        False,
        "not installed: No module named 'no_such_module'; pip install 'headrace[optimize]'",
    )
    search.close()
    served.join()
    trial.close()


@pytest.mark.parametrize(("in_the_last_race", "threads"), [(0.98, 0), (1.02, 0), (1.2, 1)])
def test_another_layout_has_to_be_faster_than_the_model_just_as_it_was_dropped_in(in_the_last_race, threads):

    class Once(Judge):
        calls = 0

        def final(self, rows):
            self.calls += 1
            self.layouts = {"1 x 1 thread": 1.3 if self.calls == 1 else in_the_last_race}
            return super().final(rows)

    clock = Clock()
    deadline = Deadline(clock)
    deadline.move(clock.now_s + 1000)
    decision = Finals(Once(clock, deadline), Goal(), 2, deadline, SilentListener()).run(REFERENCE, [])
    assert chosen(decision) == "reference"
    assert decision.chosen.form.threads == threads
