"""What is read of model files before anything is tried, and the hush around talkative libraries."""

import logging
import subprocess
import sys
import warnings

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from unit.onnx_nets import convolutions, save, task_for, two_layers, value

from headrace_backends.optimize.quiet import hushed
from headrace_backends.optimize.steps import int8_static
from headrace_backends.optimize.traits import kind_of, layer_macs, operator_counts


def macs(path):
    return layer_macs(onnx.shape_inference.infer_shapes(onnx.load(path)))


def test_a_convolutional_net(tmp_path):
    path = convolutions(tmp_path)
    assert kind_of(path) == "convolutional"
    assert macs(path) == {"first": 36 * 16 * 27, "depthwise": 36 * 16 * 9, "last": 36 * 16 * 16, "gemm": 80}
    assert operator_counts(path)["Conv"] == 3


def test_the_layers_of_a_quantised_net_still_count(tmp_path):
    path = convolutions(tmp_path)
    quantized = int8_static.apply(task_for(path, tmp_path))
    assert kind_of(quantized) == "convolutional"
    before, after = macs(path), macs(quantized)
    assert [after[layer] for layer in ("first", "depthwise", "last")] == list(before.values())[:3]


def test_a_net_of_products(tmp_path):
    assert kind_of(two_layers(tmp_path)) == "dense"


@pytest.mark.parametrize(("size", "kind"), [(4, "dense"), ("h", "convolutional")])
def test_where_shapes_are_not_known_numbers_of_layers_decide(tmp_path, size, kind):
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Conv", ["c", "w"], ["d"]),
        node("GlobalAveragePool", ["d"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("MatMul", ["f", "v"], ["y"]),
    ]
    weights = {"w": np.ones((1, 1, 1, 1), np.float32), "v": np.ones((1, 500), np.float32)}
    inputs = [value("x", TensorProto.FLOAT, "n", 1, size, size)]
    assert kind_of(save(tmp_path, nodes, inputs, [value("y", TensorProto.FLOAT, "n", 500)], weights)) == kind


def test_attention_makes_a_transformer(tmp_path):
    node = helper.make_node
    nodes = [
        node("LayerNormalization", ["x", "one"], ["n"], axis=-1),
        node("Transpose", ["n"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["n", "t"], ["scores"], name="scores"),
        node("Softmax", ["scores"], ["share"]),
        node("MatMul", ["share", "n"], ["y"]),
    ]
    inputs, outputs = ([value(name, TensorProto.FLOAT, "n", "s", 8)] for name in "xy")
    path = save(tmp_path, nodes, inputs, outputs, {"one": np.ones(8, np.float32)})
    assert kind_of(path) == "transformer"
    assert macs(path)["scores"] is None  # as many as there are tokens


def test_operators_inside_of_control_flow_count(tmp_path):
    inner = [
        helper.make_graph([helper.make_node("Relu", ["x"], ["q"])], name, [], [value("q", TensorProto.FLOAT, 2, 2)])
        for name in ("yes", "no")
    ]
    nodes = [helper.make_node("If", ["b"], ["y"], then_branch=inner[0], else_branch=inner[1])]
    inputs = [value("x", TensorProto.FLOAT, 2, 2), value("b", TensorProto.BOOL)]
    path = save(tmp_path, nodes, inputs, [value("y", TensorProto.FLOAT, 2, 2)])
    assert operator_counts(path) == {"Relu": 2, "If": 1}
    assert kind_of(path) == "dense"


def test_weights_in_other_files_are_not_read(tmp_path):
    path = convolutions(tmp_path)
    onnx.save(onnx.load(path), tmp_path / "m.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()
    assert kind_of(tmp_path / "m.onnx") == "convolutional"
    assert operator_counts(tmp_path / "m.onnx") == operator_counts(path)


def test_other_files_tell_what_they_can(tmp_path):
    (tmp_path / "m.xml").write_text(
        '<net><layers><layer type="Parameter"/><layer type="MatMul"/>'
        '<layer type="Const"/><layer type="MatMul"/></layers></net>'
    )
    assert operator_counts(tmp_path / "m.xml") == {"MatMul": 2}
    (tmp_path / "m.param").write_text("7767517\n3 3\nInput x 0 1 x\nReLU r 1 1 x y\nReLU s 1 1 y z\n")
    assert operator_counts(tmp_path / "m.param") == {"ReLU": 2}
    assert operator_counts(tmp_path / "model.plan") == {}
    assert {kind_of(tmp_path / f"m.{ending}") for ending in ("xml", "param", "pt2", "plan")} == {"dense"}


def test_the_module_imports_no_framework():
    code = (
        "import sys, headrace_backends.optimize.traits, headrace_backends.optimize.sensitivity;"
        "sys.exit(any(name in sys.modules for name in ('onnx', 'onnxruntime', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_hushed_catches_what_is_printed_logged_and_warned_of(capsys):
    root = logging.getLogger()
    before = list(root.handlers)
    with hushed() as told:
        sys.stdout.write("progress\n")
        sys.stderr.write("trouble\n")
        logging.getLogger("library").warning("deep %s", "trouble")
        warnings.warn("old\n  thing", DeprecationWarning, stacklevel=1)
    assert told == ["deep trouble", "old thing"]
    assert capsys.readouterr() == ("", "")
    assert root.handlers == before
