"""The proof of a conversion: right ones pass, wrong ones are refused with what differs."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from headrace_backends.base import BackendUnavailable, LoadError
from headrace_backends.importers.formats import SKLEARN, TENSORFLOW, XGBOOST, Format
from headrace_backends.importers.graph_names import rename_outputs
from headrace_backends.importers.proof import prove
from headrace_backends.registry import ENDINGS, MODEL_FILES

WEIGHTS = np.arange(6, dtype=np.float32).reshape(3, 2) - 2


@pytest.fixture
def path(tmp_path):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("ArgMax", ["y"], ["k"], axis=1, keepdims=0)],
        "graph",
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, ["n", 2]), value("k", TensorProto.INT64, ["n"])],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def asked(change=lambda y: y):
    def ask(inputs):
        y = change(inputs["x"] @ WEIGHTS)
        return {"y": y, "k": y.argmax(axis=1)}

    return ask


def test_the_same_answers_are_told_with_how_near_they_are(path):
    told = prove(path, asked(), "Caffe")
    assert told.startswith("as ONNX it answers 32 made-up rows as Caffe does, within ")


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (asked(lambda y: 1 / (1 + np.exp(-y))), r"does not answer as Caffe does: output 'y' differs by 0\.\d|by \d"),
        (asked(lambda y: np.where(y > 0, np.nan, y)), "differs in which of them are numbers"),
        (asked(lambda y: y[:, :1]), r"output 'y' the shape \[32, 2\], and Caffe gives it \[32, 1\]"),
        (lambda inputs: {"z": inputs["x"]}, r"has no output 'z', which Caffe has; it has \['k', 'y'\]"),
        (lambda inputs: {"k": 1 - asked()(inputs)["k"]}, "output 'k' is another for 32 of 32 made-up rows"),
    ],
)
def test_other_answers_are_refused(path, ask, told):
    with pytest.raises(LoadError, match=told):
        prove(path, ask, "Caffe")


def test_a_class_may_be_another_where_two_are_as_likely(path):
    def ask(inputs):
        return {"k": np.concatenate([1 - asked()(inputs)["k"][:2], asked()(inputs)["k"][2:]])}

    prove(path, ask, "Caffe")


def test_where_the_original_refuses_what_is_made_up_that_is_told(path):
    def ask(_):
        raise ValueError("seven\nfeatures")

    assert prove(path, ask, "Caffe") == (
        "that its answers are Caffe's could not be checked: Caffe refuses made-up inputs (ValueError: seven features)"
    )


def test_shown_inputs_come_first(path):
    shown = {"x": np.ones((5, 3), np.float32)}
    assert "answers 5 made-up rows" in prove(path, asked(), "Caffe", [shown])


def test_outputs_get_other_names(path):
    model = onnx.load(path)
    rename_outputs(model, {"y": "scores", "k": "y", "absent": "z"})
    onnx.checker.check_model(model)
    assert [one.name for one in model.graph.output] == ["scores", "k"]  # y was taken when it was its turn


@pytest.mark.parametrize("made_of", [TENSORFLOW, SKLEARN, XGBOOST])
def test_formats_and_the_registry_agree(made_of):
    endings = {ending for ending, backend in ENDINGS.items() if backend == made_of.backend}
    assert endings == set(made_of.endings) - {".pb"}
    assert made_of.backend in MODEL_FILES


def test_what_is_missing_is_told_with_the_extra_to_install():
    made_of = Format("x", "Caffe", "caffe", {".a": "m:f", ".b": "m:f"}, {"json": "json", "no_such": "no-such"})
    with pytest.raises(BackendUnavailable) as caught:
        made_of.versions(".a")
    assert str(caught.value) == (
        "Caffe models are converted to ONNX with json and no-such, and no-such is not installed; install with: pip "
        "install 'headrace[caffe]'"
    )
    own = Format("x", "Caffe", "caffe", {}, {"numpy": "numpy"}, (), {".b": {"nor_this": "nor-this"}})
    assert own.versions(".a") == {"numpy": np.__version__}
    with pytest.raises(BackendUnavailable, match="numpy and nor-this, and nor-this is not"):
        own.versions(".b")
