"""ONNX graphs in half precision: valid, with the same inputs and outputs, answers the same within its rounding."""

import builtins

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from headrace_backends.base import BackendUnavailable, LoadError
from headrace_backends.tensorrt.typed_onnx import convert

FLOAT, HALF, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
NODE, VALUE = helper.make_node, helper.make_tensor_value_info


def save(folder, nodes, inputs, outputs, weights=None, opset=21):
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def answers(model, feed):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def both(path, feed, half="fp16"):
    converted = convert(path, half)
    onnx.checker.check_model(converted, full_check=True)
    return answers(onnx.load(path), feed), answers(converted, feed), converted


def types_of(model, kind):
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    values = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    return {value.name for value in values if value.type.tensor_type.elem_type == kind}


@pytest.fixture
def weights():
    generator = np.random.default_rng(7)
    return {
        "w1": generator.standard_normal((16, 32), dtype=np.float32) / 4,
        "b1": generator.standard_normal(32, dtype=np.float32),
        "w2": generator.standard_normal((32, 4), dtype=np.float32) / 4,
    }


@pytest.fixture
def x():
    return np.random.default_rng(8).standard_normal((5, 16), dtype=np.float32)


def mlp(folder, weights):
    nodes = [
        NODE("MatMul", ["x", "w1"], ["h"]),
        NODE("Add", ["h", "b1"], ["a"]),
        NODE("Relu", ["a"], ["r"]),
        NODE("MatMul", ["r", "w2"], ["l"]),
        NODE("Softmax", ["l"], ["y"]),
    ]
    return save(folder, nodes, [VALUE("x", FLOAT, ["n", 16])], [VALUE("y", FLOAT, ["n", 4])], weights)


def test_an_mlp_runs_in_halves_and_answers_alike(tmp_path, weights, x):
    (before,), (after,), model = both(mlp(tmp_path, weights), {"x": x})
    assert after.dtype == np.float32
    np.testing.assert_allclose(after, before, atol=2e-3)
    assert types_of(model, FLOAT) == {"x", "y"}
    assert all(tensor.data_type == HALF for tensor in model.graph.initializer)
    assert sum(node.op_type == "Cast" for node in model.graph.node) == 2


def test_bfloat16(tmp_path, weights):
    model = convert(mlp(tmp_path, weights), "bf16")
    onnx.checker.check_model(model, full_check=True)  # ONNX Runtime's CPU has few such kernels, so none is run
    assert types_of(model, FLOAT) == {"x", "y"}
    (w2,) = [tensor for tensor in model.graph.initializer if tensor.name.startswith("w2")]
    np.testing.assert_array_equal(
        np.frombuffer(w2.raw_data, ml_dtypes.bfloat16).reshape(32, 4), weights["w2"].astype(ml_dtypes.bfloat16)
    )


def test_sums_and_powers_stay_as_they_were(tmp_path, x):
    """A layer norm by hand: in fp16 the squares of 300 leave its range."""
    nodes = [
        NODE("ReduceMean", ["x", "axes"], ["m"]),
        NODE("Sub", ["x", "m"], ["d"]),
        NODE("Pow", ["d", "two"], ["p"]),
        NODE("ReduceMean", ["p", "axes"], ["v"]),
        NODE("Sqrt", ["v"], ["s"]),
        NODE("Div", ["d", "s"], ["y"]),
    ]
    path = save(
        tmp_path,
        nodes,
        [VALUE("x", FLOAT, ["n", 16])],
        [VALUE("y", FLOAT, ["n", 16])],
        {"axes": np.array([1]), "two": np.float32(2)},
    )
    (before,), (after,), _ = both(path, {"x": x * 200})
    np.testing.assert_allclose(after, before, atol=5e-3)


def test_an_output_that_is_used_inside_too_has_both_types(tmp_path, weights, x):
    nodes = [
        NODE("MatMul", ["x", "w1"], ["h"]),
        NODE("Relu", ["h"], ["r"]),
        NODE("Exp", ["h"], ["e"]),
        NODE("Identity", ["e"], ["also"]),
    ]
    outputs = [VALUE(name, FLOAT, ["n", 32]) for name in ("h", "r", "e", "also")]
    path = save(tmp_path, nodes, [VALUE("x", FLOAT, ["n", 16])], outputs, {"w1": weights["w1"]})
    before, after, _ = both(path, {"x": x})
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-2, atol=2e-3)


def test_casts_and_constants_follow(tmp_path):
    nodes = [
        NODE("Cast", ["ids"], ["f"], to=FLOAT),
        NODE("Constant", [], ["c"], value_float=0.5),
        NODE("Constant", [], ["k"], value=numpy_helper.from_array(np.array([1.0, 2.0], np.float32))),
        NODE("Constant", [], ["s"], value_floats=[3.0, 4.0]),
        NODE("Mul", ["f", "c"], ["m"]),
        NODE("Add", ["m", "k"], ["a"]),
        NODE("Add", ["a", "s"], ["y"]),
    ]
    path = save(tmp_path, nodes, [VALUE("ids", TensorProto.INT64, ["n", 2])], [VALUE("y", FLOAT, ["n", 2])])
    (before,), (after,), model = both(path, {"ids": np.array([[1, 2], [3, 4]])})
    np.testing.assert_array_equal(after, before)
    assert types_of(model, FLOAT) == {"y"}


def test_masks_of_the_lowest_float_stay_finite(tmp_path):
    low = np.finfo(np.float32).min
    nodes = [NODE("Add", ["x", "mask"], ["a"]), NODE("Softmax", ["a"], ["y"])]
    mask = np.array([0, low, -np.inf, 0], np.float32)
    path = save(tmp_path, nodes, [VALUE("x", FLOAT, ["n", 4])], [VALUE("y", FLOAT, ["n", 4])], {"mask": mask})
    (before,), (after,), model = both(path, {"x": np.ones((1, 4), np.float32)})
    np.testing.assert_allclose(after, before)
    (half,) = model.graph.initializer
    assert numpy_helper.to_array(half).tolist() == [0, -65504, -np.inf, 0]


def test_sizes_of_a_resize_stay_floats(tmp_path):
    nodes = [
        NODE("Relu", ["x"], ["r"]),
        NODE("Resize", ["r", "", "scales"], ["z"], mode="linear"),
        NODE("Relu", ["z"], ["y"]),
    ]
    shapes = [VALUE("x", FLOAT, ["n", 1, 4, 4])], [VALUE("y", FLOAT, ["n", 1, 8, 8])]
    path = save(tmp_path, nodes, *shapes, {"scales": np.array([1, 1, 2, 2], np.float32)})
    feed = {"x": np.random.default_rng(3).standard_normal((1, 1, 4, 4), dtype=np.float32)}
    (before,), (after,), _ = both(path, feed)
    np.testing.assert_allclose(after, before, atol=2e-3)


@pytest.mark.parametrize("opset", [13, 21])
def test_what_is_quantised_stays_so(tmp_path, opset, x):
    """Up to opset 18 scales are floats, and so is what comes out; later it is of the scale's type."""
    weight = np.random.default_rng(9).integers(-100, 100, (16, 4)).astype(np.int8)
    nodes = [
        NODE("Relu", ["x"], ["r"]),
        NODE("QuantizeLinear", ["r", "sx", "zero"], ["q"]),
        NODE("DequantizeLinear", ["q", "sx", "zero"], ["d"]),
        NODE("DequantizeLinear", ["w", "sw", "zero"], ["dw"]),
        NODE("MatMul", ["d", "dw"], ["m"]),
        NODE("Relu", ["m"], ["y"]),
    ]
    constants = {"sx": np.float32(0.02), "sw": np.float32(0.01), "zero": np.int8(0), "w": weight}
    path = save(tmp_path, nodes, [VALUE("x", FLOAT, ["n", 16])], [VALUE("y", FLOAT, ["n", 4])], constants, opset)
    (before,), (after,), model = both(path, {"x": x})
    np.testing.assert_allclose(after, before, rtol=2e-2, atol=2e-2)
    (left,) = [tensor for tensor in model.graph.initializer if tensor.name == "w"]
    assert left.data_type == TensorProto.INT8


def test_an_input_and_a_constant_that_are_outputs(tmp_path):
    path = save(
        tmp_path,
        [NODE("Identity", ["x"], ["y"]), NODE("Add", ["y", "c"], ["z"])],
        [VALUE("x", FLOAT, ["n"])],
        [VALUE("y", FLOAT, ["n"]), VALUE("z", FLOAT, ["n"]), VALUE("c", FLOAT, [1])],
        {"c": np.array([0.1], np.float32)},
    )
    before, after, _ = both(path, {"x": np.array([1, 2], np.float32)})
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(other, one, atol=2e-3)
    assert after[2] == np.float32(0.1)


def test_graphs_inside_of_nodes_are_refused(tmp_path):
    then = helper.make_graph([NODE("Identity", ["x"], ["t"])], "then", [], [VALUE("t", FLOAT, ["n"])])
    other = helper.make_graph([NODE("Neg", ["x"], ["e"])], "else", [], [VALUE("e", FLOAT, ["n"])])
    path = save(
        tmp_path,
        [NODE("If", ["c"], ["y"], then_branch=then, else_branch=other)],
        [VALUE("c", TensorProto.BOOL, []), VALUE("x", FLOAT, ["n"])],
        [VALUE("y", FLOAT, ["n"])],
    )
    with pytest.raises(LoadError, match=r"the model has If, .*set parameters\.precision to fp32 or tf32"):
        convert(path, "fp16")


def test_broken_files_and_a_missing_package_are_told(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff")
    with pytest.raises(LoadError, match=r"cannot read 'model\.onnx'"):
        convert(tmp_path / "model.onnx", "fp16")
    real = builtins.__import__

    def without_onnx(name, *rest):
        if name == "onnx":
            raise ImportError("No module named 'onnx'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_onnx)
    with pytest.raises(BackendUnavailable, match=r"precision fp16 needs the package onnx.*pip install onnx"):
        convert(tmp_path / "model.onnx", "fp16")
