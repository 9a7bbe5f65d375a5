"""What the command ``optimize`` does with the outcome of a search, and with what goes wrong."""

import errno
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from headrace import optimizing
from headrace.optimizing import CannotOptimize, Job, OptimizeArguments, job_of, run
from headrace.optimizing_flags import optimize
from headrace_backends.optimize.accuracy import Errors
from headrace_backends.optimize.findings import Fate, Findings, Hardware, Row
from headrace_backends.optimize.form import Form, Step, Technique
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.listener import SilentListener
from headrace_backends.optimize.plan import Basis, Plan, write_plan
from headrace_backends.optimize.search import Outcome, SearchFailed
from headrace_backends.optimize.subject import Subject

REFERENCE = Row(Form("onnxruntime"), Fate.CHOSEN, speedup=1.0, held_back=Errors(4, max_rel=0.0))


class Command:
    """The command with a search that is told what comes of it."""

    def __init__(self, tmp_path, monkeypatch):
        self.output, self.said, self.complaints = tmp_path / "out", [], []
        subject = Subject("m", "1", tmp_path / "m.onnx", "onnxruntime", tmp_path)
        subject.path.write_bytes(b"model")
        work = self.output / "work" / "key"
        self.job = Job(subject, Goal(), None, "digest", None, self.output, work)
        monkeypatch.setattr(optimizing, "job_of", lambda _: self.job)
        monkeypatch.setattr(optimizing, "_search", self.search)
        self.arguments = {"target": "m", "repository": tmp_path, "plan_cache": tmp_path / "plans"}
        self.outcome = None

    def search(self, job, work, *_):
        work.mkdir(parents=True, exist_ok=True)
        (work / "rows.jsonl").write_text("some")
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def run(self, **arguments):
        given = OptimizeArguments(**self.arguments, **arguments)
        return run(given, SilentListener(), self.said.append, self.complaints.append)


@pytest.fixture
def command(tmp_path, monkeypatch):
    return Command(tmp_path, monkeypatch)


def outcome(row, artifact, *, complete=True):
    findings = Findings(
        *("m", "m.onnx", "now", 1.0, "latency", None, (), "4 (test)", Hardware("cpu", 2, ()), {}),
        *(REFERENCE, (row,), row.form, "because"),
        complete=complete,
    )
    return Outcome(findings, row, None, artifact, [{}], [{}])


@pytest.mark.parametrize(
    "error", [SearchFailed("the moon is full"), OSError(errno.ENOSPC, "No space left on device", "rows.jsonl")]
)
def test_what_goes_wrong_is_complained_of_and_goes_on_later(command, error):
    command.outcome = error
    assert command.run() == 1
    assert command.complaints == [f"headrace: {error}"]
    assert command.said == []
    assert (command.job.work / "rows.jsonl").exists()


def test_what_was_found_of_files_that_have_changed_meanwhile_is_thrown_away(command):
    command.outcome = outcome(REFERENCE, command.job.subject.path)
    command.job = replace(command.job, changed=lambda: True)
    assert command.run() == 1
    assert "the files of 'm' have changed during the search" in command.complaints[0]
    assert not command.job.work.exists()
    assert not (command.output / "plan.json").exists()


def test_changes_of_weights_beside_a_model_and_of_a_version_are_noticed(tmp_path):
    version = tmp_path / "models" / "m" / "1"
    version.mkdir(parents=True)
    (version / "model.xml").write_text("<net/>")
    (version / "model.bin").write_bytes(b"weights")
    arguments = OptimizeArguments("m", tmp_path / "models", tmp_path / "plans")
    file_arguments = replace(arguments, target=str(version / "model.xml"), output=tmp_path / "out")
    jobs = [job_of(one) for one in (arguments, file_arguments)]
    assert not any(job.changed() for job in jobs)
    (version / "model.bin").write_bytes(b"others")
    assert all(job.changed() for job in jobs)


@pytest.mark.parametrize("version", ["2", "newest", "²"])
def test_a_version_that_is_not_there_is_not_taken_for_the_newest(tmp_path, version):
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.onnx").write_bytes(b"model")
    with pytest.raises(CannotOptimize, match=rf"model 'm' has no version {version}: it has \[1\]"):
        job_of(OptimizeArguments("m", tmp_path, tmp_path / "plans", version=version))
    assert job_of(OptimizeArguments("m", tmp_path, tmp_path / "plans")).subject.version == "1"


def test_training_code_that_is_not_there_is_told(command, tmp_path):
    command.job = replace(command.job, goal=Goal(allow=frozenset({Technique.QAT, Technique.PRUNE, Technique.BF16})))
    command.outcome = outcome(REFERENCE, command.job.subject.path)
    command.run()
    assert command.said[0] == "there is no training code (--training FILE.py), so nothing is tried of prune, qat"
    with pytest.raises(CannotOptimize, match=r"there is no training code '.*nobody\.py'"):
        job_of(OptimizeArguments("m", tmp_path, tmp_path / "plans", training=tmp_path / "nobody.py"))


def test_beside_a_server_a_search_without_time_leaves_no_plan_that_says_nothing_is_better(command):
    command.outcome = outcome(REFERENCE, command.job.subject.path, complete=False)
    assert command.run(beside_server=True) == 1
    assert "the next run goes on from here" in command.complaints[0]
    assert not (command.output / "plan.json").exists()
    assert (command.job.work / "rows.jsonl").exists()
    assert command.run() == optimizing.NOTHING_BETTER  # whoever asks for it by hand is told, and has the plan
    assert (command.output / "plan.json").exists()


def test_a_plan_takes_the_place_of_an_earlier_one_whole(command, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    (made / "model.xml").write_text("<net/>")
    (made / "model.bin").write_bytes(b"weights")
    fast = Row(Form("openvino", (Step("openvino"),)), Fate.CHOSEN, speedup=2.0, held_back=Errors(4, max_rel=0.0))
    command.outcome = outcome(fast, made / "model.xml")
    assert command.run() == 0
    assert (command.output / "model.bin").exists()
    assert not (command.output / "work").exists()
    mine = command.output / "notes.txt"
    mine.write_text("my own")
    command.outcome = outcome(REFERENCE, command.job.subject.path)
    assert command.run() == optimizing.NOTHING_BETTER
    assert not (command.output / "model.xml").exists()
    assert not (command.output / "model.bin").exists()
    assert mine.exists()


def test_an_earlier_plan_cannot_name_files_elsewhere(command, tmp_path):
    command.output.mkdir()
    outside = tmp_path / "outside"
    outside.write_text("mine")
    basis = Basis("digest", Hardware("cpu", 2, ()), {})
    files = {"../outside": "hash"}
    write_plan(
        command.output,
        Plan("m", "1", basis, Form("x"), "", files, None, (), "latency", "4", Errors(4), 1.0, (), (), "now"),
    )
    command.outcome = outcome(REFERENCE, command.job.subject.path)
    assert command.run() == optimizing.NOTHING_BETTER
    assert outside.exists()


def test_a_file_cannot_be_applied_which_is_said_before_the_search(tmp_path):
    app = typer.Typer()
    app.command()(optimize)
    (tmp_path / "m.onnx").write_bytes(b"model")
    ended = CliRunner().invoke(app, [str(tmp_path / "m.onnx"), "--apply"])
    assert ended.exit_code == 1
    assert "m.onnx' is a file" in ended.output


def test_what_goes_wrong_is_told_where_a_server_beside_it_reads_reasons(tmp_path):
    app = typer.Typer()
    app.command()(optimize)
    flags = ["--repository", str(tmp_path), "--plan-cache", str(tmp_path), "--background"]
    ended = CliRunner().invoke(app, ["nobody", *flags])
    assert ended.exit_code == 1
    assert ended.stderr.startswith("headrace: there is no model 'nobody'")
    assert "nobody" not in ended.stdout
