"""Candidates that crash, hang, refuse or answer wrongly are rows of the report, and the search goes on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.optimize import halves
from headrace_backends.optimize.accuracy import Budget
from headrace_backends.optimize.contest import Contest
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.findings import Fate
from headrace_backends.optimize.form import Form, Step, Technique
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.trial import Trial, TrialFailed
from headrace_backends.optimize.workshop import Workshop

EXAMPLES = Examples(
    tuple({"x": np.full((1, 2), place, np.float32)} for place in range(4)), tuple({} for _ in range(4)), "test"
)


def echo(tmp_path):
    x, y = (TensorSpec(name, DataType.FP32, (-1, 2)) for name in "xy")
    return Subject("echo", "1", tmp_path, "fake", tmp_path, {"fake_delay_ms": 2}, (x,), (y,), 8)


def measured(contest):
    contest.measure_reference(*EXAMPLES.halves(), [], 0.0)
    return contest


@pytest.fixture
def contest(tmp_path):
    subject = echo(tmp_path)
    with Contest(subject, Goal(), Workshop(tmp_path / "work", subject, 1), 1, None) as contest:
        contest.load_reference()
        yield measured(contest)


def tried(contest, *steps, **parameters):
    return contest.try_form(Form("fake", tuple(steps), parameters), 60.0)


def test_one_that_segfaults_is_a_row_with_that_reason(contest):
    row = tried(contest, fake_crash="segfault")
    assert row.fate is Fate.FAILED
    assert "SIGSEGV" in row.reason
    assert tried(contest, fake_delay_ms=0).errors.faithful  # the next one has its turn


def test_one_that_crashes_at_load_is_a_row(contest):
    row = tried(contest, fake_load_crash="kill")
    assert row.fate is Fate.FAILED
    assert "SIGKILL" in row.reason


def test_one_that_exits_tells_the_status(contest):
    assert "exit code 70" in tried(contest, fake_crash="exit").reason


def test_one_that_hangs_is_killed(contest, monkeypatch):
    monkeypatch.setattr(halves, "ANSWER_TIMEOUT_S", 2.0)
    row = tried(contest, fake_hang=True)
    assert row.fate is Fate.FAILED
    assert "hung: killed after 2 s" in row.reason


def test_one_that_fails_tells_its_own_words(contest):
    assert "out of cheese" in tried(contest, fake_fail="out of cheese").reason
    assert "no such file" in tried(contest, fake_load_fail="no such file").reason


def test_one_that_is_clearly_slower_is_cut(contest):
    row = tried(contest, fake_delay_ms=60)
    assert row.fate is Fate.SLOWER
    assert row.errors.faithful


def test_a_step_that_is_not_there_is_a_row(contest):
    row = tried(contest, Step("no_such_step"))
    assert row.fate is Fate.FAILED
    assert "no_such_step" in row.reason


def test_what_changes_answers_needs_real_examples(contest):
    made_up = Examples(EXAMPLES.inputs[:2], EXAMPLES.labels[:2], "made up", real=False)
    contest.first = replace(contest.first, examples=made_up)
    row = contest.try_form(Form("fake", parameters={"fake_delay_ms": 0}, techniques=(Technique.BF16,)), 60.0)
    assert row.fate is Fate.REFUSED
    assert "no real examples" in row.reason


def test_a_process_that_was_killed_says_so_to_the_next_call(tmp_path):
    import os
    import signal

    with Trial(tmp_path / "log", 1) as trial:
        assert trial.memory_bytes() > 0
        os.kill(trial.pid, signal.SIGKILL)
        with pytest.raises(TrialFailed, match="SIGKILL"):
            trial.memory_bytes()
        with pytest.raises(TrialFailed):
            trial.memory_bytes()


def test_a_process_that_cannot_be_started_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "no such program"))
    with pytest.raises(TrialFailed, match="its process cannot be started"):
        Trial(tmp_path / "log", 1)


def test_where_memory_runs_out_a_candidate_goes_first(tmp_path):
    with Trial(tmp_path / "log", 1) as trial:
        trial.memory_bytes()
        assert Path(f"/proc/{trial.pid}/oom_score_adj").read_text().strip() == "1000"


def test_the_reference_is_waited_for_longer_than_any_candidate(tmp_path, monkeypatch):
    monkeypatch.setattr(halves, "ANSWER_TIMEOUT_S", 0.1)
    subject = replace(echo(tmp_path), parameters={"fake_delay_ms": 300})
    with Contest(subject, Goal(), Workshop(tmp_path / "work", subject, 1), 1, None) as contest:
        contest.load_reference()
        seconds, nbytes = contest.pace(EXAMPLES.inputs[0])
        assert seconds >= 0.3
        assert nbytes == 2 * 2 * 4


def test_a_budget_that_no_answer_could_meet_is_told_at_once(tmp_path):
    subject = echo(tmp_path)
    goal = Goal(Budget("topk_agreement", min=0.9))
    with Contest(subject, goal, Workshop(tmp_path / "work", subject, 1), 1, None) as contest:
        contest.load_reference()
        with pytest.raises(TrialFailed, match="cannot be met by any form: topk_agreement cannot be told"):
            measured(contest)


def test_a_model_that_is_beyond_its_own_budget_says_so(tmp_path):
    subject = echo(tmp_path)
    goal = Goal(Budget("judge.py:accuracy", min=0.9))
    with Contest(subject, goal, Workshop(tmp_path / "work", subject, 1), 1, lambda *_: 0.5) as contest:
        contest.load_reference()
        row = contest.measure_reference(*EXAMPLES.halves(), [], 0.0)
        assert "which is beyond the budget itself: judge.py:accuracy is 0.5" in row.reason
        # What answers as it does is allowed all the same, and nothing else is.
        same = Form("fake", parameters={"fake_delay_ms": 0})
        assert contest.try_form(same, 60.0).fate in (Fate.KEPT, Fate.SLOWER)  # which depends on the machine
        lossy = Form("fake", parameters=same.parameters, techniques=(Technique.BF16,))
        assert contest.try_form(lossy, 60.0).fate is Fate.REFUSED
