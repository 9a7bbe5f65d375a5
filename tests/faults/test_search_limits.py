"""The bounds of a search where processes are real: candidates that outlast its time, and memory that is short."""

import time

import msgspec
import numpy as np
import pytest

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.optimize import contest as contest_module
from headrace_backends.optimize import halves
from headrace_backends.optimize import search as search_module
from headrace_backends.optimize.accuracy import Errors
from headrace_backends.optimize.batches import batches
from headrace_backends.optimize.candidates import Candidate
from headrace_backends.optimize.contest import Contest
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.findings import Fate, Hardware, Row
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.listener import SilentListener
from headrace_backends.optimize.memory_room import RESERVE_BYTES
from headrace_backends.optimize.search import Search
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.trial import Trial
from headrace_backends.optimize.workshop import Workshop

EXAMPLES = Examples(
    tuple({"x": np.full((1, 2), place, np.float32)} for place in range(4)), tuple({} for _ in range(4)), "test"
)
GIB = 1 << 30


def fake_subject(tmp_path):
    x, y = (TensorSpec(name, DataType.FP32, (-1, 2)) for name in "xy")
    return Subject("echo", "1", tmp_path, "fake", tmp_path, {"fake_delay_ms": 60}, (x,), (y,), 8)


class Counted(Trial):
    """Counts how many processes there are at once."""

    now = most = 0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        Counted.now += 1
        Counted.most = max(Counted.most, Counted.now)

    def __exit__(self, *arguments):
        super().__exit__(*arguments)
        Counted.now -= 1


@pytest.fixture
def free_bytes(monkeypatch):
    """What the contest is told; processes are counted."""
    monkeypatch.setattr(contest_module, "Trial", Counted)
    Counted.now = Counted.most = 0
    return {"now": 64 * GIB}


@pytest.fixture
def contest(tmp_path, free_bytes):
    subject = fake_subject(tmp_path)
    workshop = Workshop(tmp_path / "work", subject, 2)
    with Contest(subject, Goal(), workshop, 2, None, lambda: free_bytes["now"]) as contest:
        _, notes, seconds = contest.load_reference()
        contest.reference_row = contest.measure_reference(*EXAMPLES.halves(), notes, seconds)
        yield contest


def test_forms_are_measured_together_where_there_is_memory_and_one_by_one_where_not(contest, free_bytes):
    forms = [Form("fake", parameters={"fake_delay_ms": delay}) for delay in (0, 1, 60)]
    asked = [Row(form, Fate.KEPT, memory_bytes=GIB) for form in forms]
    assert len(contest.final(asked)) == 3
    assert Counted.most == 4
    free_bytes["now"], Counted.most = 0, 0
    found = contest.final(asked)
    assert [row.form for row in found] == [row.form for row in asked]
    assert all(row.speedup for row in found)
    assert Counted.most == 2  # one beside the reference


@pytest.mark.parametrize(
    ("delays", "exhaustive", "races"),
    [
        ((30, 31, 200), False, [[None, 30, 31, 200], [None, 30, 31]]),
        ((30, 31, 200), True, [[None, 30, 31, 200]]),
        ((1, 60), False, [[None, 1, 60]]),  # only one is left: there is nothing to tell apart
    ],
)
def test_what_is_clearly_slower_than_the_best_is_seen_at_a_glance_alone(
    contest, monkeypatch, delays, exhaustive, races
):
    seen, race = [], contest_module.race

    def watched(runners, *arguments, **options):
        seen.append([runner.form.parameters.get("fake_delay_ms") for runner in runners])
        return race(runners, *arguments, **options)

    monkeypatch.setattr(contest_module, "race", watched)
    contest.goal = Goal(exhaustive=exhaustive)
    forms = [Form("fake", parameters={"fake_delay_ms": delay}) for delay in delays]
    fast, *_, slow = contest.final([Row(form, Fate.KEPT) for form in forms])
    assert seen == races  # the reference, which has no parameters of its own, among them
    assert fast.speedup > slow.speedup > 0
    assert slow.curve


def test_instances_that_there_is_no_memory_for_are_left_out(contest, free_bytes):
    row = contest.reference_row
    asked = [row, msgspec.structs.replace(row, form=msgspec.structs.replace(row.form, instances=40))]
    free_bytes["now"] = RESERVE_BYTES + 2 * row.memory_bytes
    assert [row.form.instances for row in contest.final(asked)] == [1]


def test_the_best_so_far_is_let_go_of_where_memory_is_short(contest, free_bytes):
    fast = contest.try_form(Form("fake", parameters={"fake_delay_ms": 0}), 60.0)
    assert fast.fate is Fate.KEPT
    assert Counted.now == 2  # the reference and the best so far
    free_bytes["now"] = 0
    Counted.most = 0
    slower = contest.try_form(Form("fake", parameters={"fake_delay_ms": 30}), 60.0)
    assert Counted.most == 2
    assert slower.fate is Fate.SLOWER  # it is still known how fast the best was
    assert "the best so far" in slower.reason
    assert Counted.now == 1


def test_a_candidate_that_is_under_way_when_time_is_over_is_stopped_and_says_nothing(contest):
    contest.workshop.deadline.move(time.monotonic() + 0.5)
    row = contest.try_form(Form("fake", parameters={"fake_hang": True}), 600.0)
    assert row.fate is Fate.SKIPPED
    assert "no time was left" in row.reason
    assert Counted.now == 1
    contest.workshop.deadline.move(time.monotonic() + 600)
    assert contest.try_form(Form("fake", parameters={"fake_delay_ms": 0}), 600.0).fate is Fate.KEPT


def searched(tmp_path, monkeypatch, limit_s, *candidates):
    monkeypatch.setattr(search_module.forms, "candidates", lambda _: [Candidate(form, 2.0) for form in candidates])
    monkeypatch.setattr(Subject, "overruled", lambda *_: [])  # what is configured only makes the reference slow here
    subject = fake_subject(tmp_path)
    workshop = Workshop(tmp_path / "work", subject, 1)
    goal = Goal(time_limit_s=limit_s)
    return Search(subject, goal, lambda _: EXAMPLES, workshop, SilentListener(), 1, Hardware("cpu", 1, ()), {}).run()


def test_a_search_ends_when_a_candidate_hangs_and_goes_on_with_it_later(tmp_path, monkeypatch):
    hangs = Form("fake", parameters={"fake_hang": True})
    outcome = searched(tmp_path, monkeypatch, 1.0, hangs)
    assert not outcome.findings.complete
    assert [row.fate for row in outcome.findings.rows if row.form == hangs] == [Fate.SKIPPED]
    assert outcome.chosen.form.parameters == {}
    assert len(outcome.answers) == len(outcome.inputs) == 2  # what a plan is checked with is there all the same
    fast = Form("fake", parameters={"fake_delay_ms": 0})
    monkeypatch.setattr(halves, "ANSWER_TIMEOUT_S", 3.0)
    outcome = searched(tmp_path, monkeypatch, 600.0, hangs, fast)
    assert [row.fate for row in outcome.findings.rows if row.form == hangs] == [Fate.FAILED]  # so it was tried again
    assert outcome.findings.complete
    assert outcome.chosen.form.parameters == {"fake_delay_ms": 0}


def test_what_an_earlier_run_has_proved_is_proved_anew(tmp_path):
    subject = fake_subject(tmp_path)
    workshop = Workshop(tmp_path / "work", subject, 1)
    row = Row(Form("fake", parameters={"fake_delay_ms": 0}), Fate.KEPT, speedup=2.0, held_back=Errors(4, max_rel=0.0))
    (workshop.folder / "rows.jsonl").write_bytes(msgspec.json.encode(row))
    search = Search(*(subject, Goal(), lambda _: EXAMPLES, workshop, SilentListener()), 1, Hardware("cpu", 1, ()), {})
    assert search._earlier_rows == {row.form.name: msgspec.structs.replace(row, held_back=None)}


def test_a_form_of_larger_batches_is_measured_and_proved_as_large_as_they_get(tmp_path, monkeypatch):
    for effort in ("_GLANCE", "_LOOK"):
        monkeypatch.setattr(contest_module, effort, (2, 0.02))
    x, y = (TensorSpec(name, DataType.FP32, (-1, 2)) for name in "xy")
    subject = Subject("echo", "1", tmp_path, "fake", tmp_path, {"fake_delay_ms": 1}, (x,), (y,), device="gpu:0")
    with Contest(subject, Goal(aim="throughput"), Workshop(tmp_path / "work", subject, 1), 1, None) as contest:
        contest.load_reference()
        contest.measure_reference(*EXAMPLES.halves(), [], 0.0)
        row = contest.try_form(Form("fake", max_batch_size=128), 60.0)
    assert [point.rows for point in row.curve] == [1, 4, 8, 16, 32, 128]
    assert row.speedup > 1.5  # a batch takes as long as a row
    assert row.held_back is not None
    assert batches(contest.held_back.examples.inputs, contest.held_back.sizes(128))[0][127:]
