"""A worker's proof of a model in another form: on made-up backends."""

from pathlib import Path

import numpy as np
import pytest

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace.workers.replayed import UNPROVED, replay
from headrace_backends.base import Answer, Backend, LoadError
from headrace_backends.optimize.replay import write_replay

SIGNATURE = Signature(
    (TensorSpec("x", DataType.FP32, (-1, 2)),), (TensorSpec("y", DataType.FP32, (-1, 2)),), max_batch_size=8
)


class Form(Backend):
    """One that answers as the test says, always in the same memory, as some runtimes do."""

    def __init__(self, execute, *, wants_requests=False):
        self._execute = execute
        self._memory = np.zeros((1, 2), np.float32)
        self.wants_requests = wants_requests
        self.told = []

    @classmethod
    def load(cls, source):
        raise NotImplementedError

    @property
    def signature(self):
        return SIGNATURE

    def execute(self, inputs, requests):
        self.told.append([request.rows for request in requests])
        self._memory[:] = self._execute(inputs["x"])
        outputs = {"y": self._memory}
        return [Answer(outputs)] if self.wants_requests else outputs


@pytest.fixture
def recorded(tmp_path) -> Path:
    inputs = [{"x": np.array([[number, 1]], np.float32)} for number in range(3)]
    write_replay(tmp_path / "replay.npz", inputs, [{"y": one["x"] * 2} for one in inputs])
    return tmp_path / "replay.npz"


@pytest.mark.parametrize("wants_requests", [False, True])
def test_a_form_that_answers_as_recorded_is_let_in(recorded, wants_requests):
    form = Form(lambda x: x * 2, wants_requests=wants_requests)
    assert "its 3 recorded request(s)" in replay(form, recorded, 1e-2)
    assert form.told == [[1] if wants_requests else []] * 3


def test_a_form_that_answers_otherwise_is_not(recorded):
    with pytest.raises(LoadError, match=r"output 'y' is off by") as refused:
        replay(Form(lambda x: x * 2.1), recorded, 1e-2)
    assert str(refused.value).startswith(UNPROVED)
    replay(Form(lambda x: x * 2.1), recorded, 0.2)


def test_a_form_that_fails_is_not(recorded):
    def fail(_):
        raise RuntimeError("no such kernel")

    with pytest.raises(LoadError, match="example 0 is refused: RuntimeError: no such kernel"):
        replay(Form(fail), recorded, 1e-2)


def test_an_error_for_the_one_request_is_none_less(recorded):
    class Refusing(Form):
        def execute(self, inputs, requests):
            return [Answer(error=ValueError("not me"))]

    with pytest.raises(LoadError, match="example 0 is refused: ValueError: not me"):
        replay(Refusing(None, wants_requests=True), recorded, 1e-2)


def test_a_broken_recording_proves_nothing(recorded):
    recorded.write_bytes(recorded.read_bytes()[:-30])
    with pytest.raises(LoadError, match="cannot be read"):
        replay(Form(lambda x: x * 2), recorded, 1e-2)
