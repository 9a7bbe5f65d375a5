"""Where files of candidates are made: once, and only whole ones are taken from an earlier run."""

from typing import ClassVar

import pytest

from headrace_backends.optimize import workshop as workshop_module
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.form import Step
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.workshop import Workshop

EXAMPLES = Examples((), (), "none")
STEPS = (Step("one"), Step("two"))


class FakeTrial:
    """Takes steps in this process."""

    taken: ClassVar[list[str]] = []

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def call(self, target, timeout_s, kind, task):
        FakeTrial.taken.append(kind)
        assert task["device"] == "gpu:2"  # its subject's
        path = task["folder"] / "model.onnx"
        path.write_text(f"{task['source'].read_text()} {kind}")
        return path, [f"took {kind}"]


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    monkeypatch.setattr(workshop_module, "Trial", FakeTrial)
    FakeTrial.taken = []
    (tmp_path / "m.onnx").write_text("model")
    return Workshop(
        tmp_path / "work", Subject("m", "1", tmp_path / "m.onnx", "onnxruntime", tmp_path, device="gpu:2"), 1
    )


def made(workshop):
    return workshop.make(STEPS, None, EXAMPLES, 60.0)


def test_each_chain_of_steps_is_taken_once(workshop):
    for _ in range(2):
        artifact = made(workshop)
        assert artifact.path.read_text() == "model one two"
        assert artifact.notes == ("took one", "took two")
    assert FakeTrial.taken == ["one", "two"]


@pytest.mark.parametrize("left", [b"", b'{"path": "mod', b"[]"])
def test_a_file_that_a_full_disk_has_cut_off_is_made_again(workshop, left):
    note = made(workshop).path.parent / "done.json"
    note.write_bytes(left)
    assert made(workshop).path.read_text() == "model one two"
    assert FakeTrial.taken == ["one", "two", "two"]
