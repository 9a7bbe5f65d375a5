"""The step from ONNX to ncnn: names and shapes stay, answers stay near, nothing but the model is left behind."""

import signal
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("pnnx", reason="pnnx is not installed: pip install 'headrace[optimize]'")

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import ModelSource
from headrace_backends.ncnn.backend import NcnnBackend
from headrace_backends.onnxruntime import OnnxRuntimeBackend
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.steps import ncnn_model
from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.optimize.steps.registry import step

RANDOM = np.random.default_rng(7)
WEIGHTS = {
    "first": RANDOM.standard_normal((16, 3, 3, 3)).astype(np.float32) / 5,
    "second": RANDOM.standard_normal((16, 16, 3, 3)).astype(np.float32) / 12,
    "last": RANDOM.standard_normal((16, 4)).astype(np.float32) / 4,
}
IMAGES = RANDOM.standard_normal((3, 3, 17, 15)).astype(np.float32)  # no multiple of what vectors hold


def cnn(folder, image="image", scores="scores", **save):
    """Two convolutions and a classifier; the sum of a row of channels goes out too."""
    node, value = helper.make_node, helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            node("Conv", [image, "first"], ["a"], pads=[1] * 4),
            node("Relu", ["a"], ["b"]),
            node("Conv", ["b", "second"], ["c"], pads=[1] * 4),
            node("Relu", ["c"], ["d"]),
            node("GlobalAveragePool", ["d"], ["e"]),
            node("Flatten", ["e"], ["features"]),
            node("MatMul", ["features", "last"], [scores]),
        ],
        "cnn",
        [value(image, TensorProto.FLOAT, ["n", 3, 17, 15])],
        [value(scores, TensorProto.FLOAT, ["n", 4]), value("features", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(array, name) for name, array in WEIGHTS.items()],
    )
    path = folder / "source.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path, **save)
    return path


def taken(folder, source, signature=None, options=None):
    target = folder / "target"
    target.mkdir()
    notes = []
    signature = signature or OnnxRuntimeBackend.load(ModelSource("m", "1", source)).signature
    task = StepTask(source, target, signature, Examples((), (), "none"), options or {}, note=notes.append)
    return step("ncnn")(task), notes


@pytest.mark.parametrize(("image", "scores"), [("image", "scores"), ("in0", "1"), ("out1", "out0")])
def test_names_and_answers_stay(tmp_path, image, scores):
    source = cnn(tmp_path, image, scores)
    path, notes = taken(tmp_path, source)
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.bin", "model.param"]
    assert "layers of ncnn" in notes[0]
    made, reference = (
        kind.load(ModelSource("m", "1", file)) for kind, file in ((NcnnBackend, path), (OnnxRuntimeBackend, source))
    )
    assert made.signature.inputs == reference.signature.inputs
    assert made.signature.outputs == reference.signature.outputs
    right, answers = (one.execute({image: IMAGES}, []) for one in (reference, made))
    for name, array in right.items():
        np.testing.assert_allclose(answers[name], array, rtol=1e-4, atol=1e-5)


def test_weights_beside_the_file_come_along(tmp_path):
    outside = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    source = cnn(tmp_path, **outside)
    assert (tmp_path / "weights.bin").exists()
    path, _ = taken(tmp_path, source)
    right = OnnxRuntimeBackend.load(ModelSource("m", "1", source)).execute({"image": IMAGES}, [])["scores"]
    got = NcnnBackend.load(ModelSource("m", "1", path)).execute({"image": IMAGES}, [])["scores"]
    np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "outputs", "why"),
    [
        ((DataType.INT64, (-1, 8)), (DataType.FP32, (-1, 4)), "FP32 alone, and the input is x INT64"),
        ((DataType.FP32, (-1, 3, -1, 15)), (DataType.FP32, (-1, 4)), r"fixed sizes, and the input is x FP32\[-1, 3, -"),
        ((DataType.FP32, (2, 3)), (DataType.FP32, (2, 3)), r"fixed sizes, and the input is x FP32\[2, 3\]"),
        ((DataType.FP32, (-1, 3)), (DataType.INT64, (-1,)), "FP32 alone, and the output is y INT64"),
    ],
)
def test_tensors_that_ncnn_does_not_have(tmp_path, inputs, outputs, why):
    signature = Signature((TensorSpec("x", *inputs),), (TensorSpec("y", *outputs),), 8)
    with pytest.raises(StepFailed, match=why):
        taken(tmp_path, cnn(tmp_path), signature)


def test_rows_are_independent_where_the_owner_does_not_want_them_merged(tmp_path):
    """As max_batch_size 0 in the configuration says it, or an exporter that names dimensions as it likes."""
    source = cnn(tmp_path)
    merged = OnnxRuntimeBackend.load(ModelSource("m", "1", source)).signature
    path, _ = taken(tmp_path, source, Signature(merged.inputs, merged.outputs, 0))
    assert NcnnBackend.load(ModelSource("m", "1", path)).signature == Signature(merged.inputs, merged.outputs, 0)


def test_rows_that_have_to_do_with_each_other(tmp_path):
    """Examples of one row each would not show that ncnn answers each row by itself."""
    source = cnn(tmp_path)
    model = onnx.load(source)
    model.graph.node[-1].input[0] = "apart"
    model.graph.node.insert(6, helper.make_node("ReduceMean", ["features"], ["mean"], axes=[0], keepdims=1))
    model.graph.node.insert(7, helper.make_node("Sub", ["features", "mean"], ["apart"]))
    onnx.save(model, source)
    free, scores, features = (
        TensorSpec(name, DataType.FP32, (-1, *shape))
        for name, shape in (("image", (3, 17, 15)), ("scores", (4,)), ("features", (16,)))
    )
    with pytest.raises(StepFailed, match=r"rows may have to do with each other: output 'scores' differs between rows"):
        taken(tmp_path, source, Signature((free,), (scores, features), 0))


def test_a_model_that_takes_one_row_alone(tmp_path):
    signature = Signature(
        (TensorSpec("image", DataType.FP32, (1, 3, 17, 15)),),
        (TensorSpec("scores", DataType.FP32, (1, 4)), TensorSpec("features", DataType.FP32, (1, 16))),
        0,
    )
    source = cnn(tmp_path)
    path, _ = taken(tmp_path, source, signature)
    made = NcnnBackend.load(ModelSource("m", "1", path))
    assert made.signature == signature
    right = OnnxRuntimeBackend.load(ModelSource("m", "1", source)).execute({"image": IMAGES[:1]}, [])["scores"]
    np.testing.assert_allclose(made.execute({"image": IMAGES[:1]}, [])["scores"], right, rtol=1e-4, atol=1e-5)


def test_a_layer_that_pnnx_has_left_as_it_was(tmp_path):
    """ncnn has no slice with a step."""
    source = cnn(tmp_path)
    model = onnx.load(source)
    for name, array in (("start", [0]), ("end", [17]), ("axis", [2]), ("step", [2])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(array), name))
    model.graph.node[0].input[0] = "half"
    model.graph.node.insert(0, helper.make_node("Slice", ["image", "start", "end", "axis", "step"], ["half"]))
    onnx.save(model, source)
    with pytest.raises(
        StepFailed, match=r"of what pnnx made of the model, layer '.*' is a Tensor.slice, a kind that is n"
    ):
        taken(tmp_path, source)


def test_names_that_ncnn_cannot_have(tmp_path):
    with pytest.raises(StepFailed, match="'the image' cannot be the name of a tensor"):
        taken(tmp_path, cnn(tmp_path, image="the image"))


def test_a_converter_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(ncnn_model, "_converter", lambda: "/bin/false")
    with pytest.raises(StepFailed, match=r"pnnx cannot convert the model \(exit code 1\)"):
        taken(tmp_path, cnn(tmp_path))


def test_the_converter_does_not_outlive_the_step(tmp_path, monkeypatch):
    """A step that takes too long is killed, and a large model has its converter at work for minutes."""
    converter = tmp_path / "converter"
    converter.write_text(
        f"#!{sys.executable} -S\nimport ctypes\nnumber = ctypes.c_int()\n"
        "ctypes.CDLL(None).prctl(2, ctypes.byref(number))\nprint('with its parent comes signal', number.value)\n"
    )
    converter.chmod(0o700)
    monkeypatch.setattr(ncnn_model, "_converter", lambda: str(converter))
    with pytest.raises(StepFailed, match=rf"with its parent comes signal {int(signal.SIGKILL)}$"):
        taken(tmp_path, cnn(tmp_path))


def test_without_the_converter(tmp_path, monkeypatch):
    monkeypatch.setattr(ncnn_model, "find_spec", lambda _: None)
    with pytest.raises(StepFailed, match=r"pip install 'headrace\[optimize\]'"):
        taken(tmp_path, cnn(tmp_path))


def test_options(tmp_path):
    with pytest.raises(StepFailed, match="no options, got fp16"):
        taken(tmp_path, cnn(tmp_path), options={"fp16": True})
