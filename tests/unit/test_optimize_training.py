"""The owner's training code: what it may be, and what is said of it where it is not that."""

import sys

import pytest

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.optimize.steps.base import StepFailed

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'headrace[torch]'")
from headrace_backends.optimize.training import OwnerTraining, argument_names, named_outputs  # noqa: E402 only with torch

GOOD = """
import torch

def model():
    return torch.nn.Linear(3, 2)

def batches(training):
    for _ in range(3 if training else 1):
        yield (torch.ones(4, 3),), torch.zeros(4, dtype=torch.long)
"""


def written(folder, text):
    path = folder / "training.py"
    path.write_text(text)
    return OwnerTraining.load(str(path))


def test_what_it_must_have_is_enough(tmp_path):
    owner = written(tmp_path, GOOD)
    module = owner.model()
    assert owner.model() is not module
    (inputs, labels), *others = owner.batches(training=True)
    assert len(others) == 2
    assert len(list(owner.batches(training=False))) == 1
    assert not owner.has_own_loss
    expected = torch.nn.functional.cross_entropy(module(*inputs), labels)
    assert owner.loss(module(*inputs), labels) == expected
    assert owner.score(module) is None
    with pytest.raises(
        StepFailed, match=r"^training\.py has no student\(\), expected student\(\) -> torch\.nn\.Module"
    ):
        owner.student()


def test_what_it_may_have(tmp_path):
    more = """
def loss(outputs, labels):
    return outputs.sum().reshape(1)

def student():
    return torch.nn.Linear(3, 2, bias=False)

def score(module):
    assert not module.training and not torch.is_grad_enabled()
    return torch.tensor(0.5)
"""
    owner = written(tmp_path, GOOD + more)
    assert owner.has_own_loss
    assert owner.loss(torch.ones(2, 3), None) == 6
    assert owner.student().bias is None
    assert owner.score(owner.model()) == 0.5


def test_it_may_import_what_lies_beside_it_and_leaves_no_trace(tmp_path):
    (tmp_path / "helper_of_training.py").write_text("SIZE = 7\n")
    before = list(sys.path)
    owner = written(tmp_path, f"import helper_of_training\n{GOOD.replace('3, 2', '3, helper_of_training.SIZE')}")
    assert owner.model().out_features == 7
    assert sys.path == before
    assert not (tmp_path / "__pycache__").exists()
    del sys.modules["helper_of_training"]


def test_labels_may_be_anything_and_one_input_needs_no_tuple(tmp_path):
    owner = written(tmp_path, GOOD.replace("(torch.ones(4, 3),), torch", "torch.ones(4, 3), {'a': 1} or torch"))
    ((inputs, labels),) = owner.batches(training=False)
    assert (len(inputs), labels) == (1, {"a": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", r"^training\.py: does not import: SyntaxError: .* \(line 1\)$"),
        (
            "import torch\nimport not_there_at_all",
            r"does not import: ModuleNotFoundError: .* \(line 2\)",
        ),
        ("import sys\nsys.exit(3)", r"does not import: SystemExit: 3 \(line 2\)"),
        ("def model(): pass", r"has no batches\(training: bool\) -> an iterable of \(tuple of input"),
        ("x = 1", r"has no model\(\) -> torch\.nn\.Module.*; has no batches"),
        (
            f"{GOOD}\nscore = 3",
            r"has 'score', which is no function, expected score\(module\)",
        ),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(StepFailed, match=message):
        written(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(StepFailed, match=r"optimize\.training names none"):
        OwnerTraining.load("")
    with pytest.raises(StepFailed, match=r"optimize\.training is '.*nowhere\.py', and there is no such file"):
        OwnerTraining.load(str(tmp_path / "nowhere.py"))
    (tmp_path / "training.txt").touch()
    with pytest.raises(StepFailed, match=r"expected a Python file"):
        OwnerTraining.load(str(tmp_path / "training.txt"))


@pytest.mark.parametrize(
    ("change", "use", "message"),
    [
        (("return torch.nn.Linear(3, 2)", "return 3"), "model", r"model\(\) gave int, expected model\(\) -> torch"),
        (("torch.nn.Linear(3, 2)", "1 / 0"), "model", r"model\(\) failed: ZeroDivisionError: .* \(line 5\)"),
        (("(torch.ones(4, 3),), torch", "torch.ones(4, 3), 1, torch"), "batches", r"gave a tuple of 3, expected"),
        (("(torch.ones(4, 3),)", "([1.0],)"), "batches", r"batches\(True\) gave inputs of type tuple"),
        (("3 if training else 1", "0"), "batches", r"batches\(True\) gave no batches, expected"),
        (("    for", "    raise OSError('no disk')\n    for"), "batches", r"failed: OSError: no disk \(line 8\)"),
        (("", "def loss(a, b):\n    return 1.0\n"), "loss", r"loss\(\) gave float, expected loss\(outputs, labels\)"),
        (("", "def loss(a, b):\n    return a\n"), "loss", r"loss\(\) gave a tensor of shape \[4, 2\]"),
        (("dtype=torch.long", "dtype=torch.bool"), "loss", r"the cross entropy failed"),
        (("", "def score(m):\n    return 'good'\n"), "score", r"score\(\) gave str, expected score"),
    ],
)  # fmt: skip
def test_functions_that_are_not_as_expected(tmp_path, change, use, message):
    old, new = change
    owner = written(tmp_path, GOOD.replace(old, new) if old else GOOD + new)
    uses = {
        "model": owner.model,
        "batches": lambda: list(owner.batches(training=True)),
        "loss": lambda: [
            owner.loss(owner.model()(*inputs), labels) for inputs, labels in owner.batches(training=False)
        ],
        "score": lambda: owner.score(owner.model()),
    }
    with pytest.raises(StepFailed, match=message):
        uses[use]()


def signature(inputs, outputs):
    specs = [[TensorSpec(name, DataType.FP32, (-1, 3)) for name in names] for names in (inputs, outputs)]
    return Signature(tuple(specs[0]), tuple(specs[1]), 8)


class Two(torch.nn.Module):
    def forward(self, left, right, scale=1.0):
        return left - right * scale


def test_inputs_are_in_the_order_of_forward():
    assert argument_names(Two(), signature(["right", "left"], ["y"])) == ["left", "right"]
    assert argument_names(Two(), signature(["b", "a"], ["y"])) == ["b", "a"]
    assert argument_names(Two(), signature(["right"], ["y"])) == ["right"]


def test_outputs_by_name():
    one, two = torch.ones(1), torch.zeros(1)
    assert named_outputs(one, signature(["x"], ["y"])) == {"y": one}
    assert named_outputs((one, two), signature(["x"], ["a", "b"])) == {"a": one, "b": two}
    assert named_outputs({"b": two, "a": one, "c": one}, signature(["x"], ["a", "b"])) == {"a": one, "b": two}
    with pytest.raises(StepFailed, match=r"gives 1 outputs, expected tensors for \['a', 'b'\]"):
        named_outputs(one, signature(["x"], ["a", "b"]))
    with pytest.raises(StepFailed, match="gives float, expected tensors"):
        named_outputs(1.0, signature(["x"], ["a"]))
