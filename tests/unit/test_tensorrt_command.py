"""``python -m headrace_backends.tensorrt``: engines as files, on a machine without a GPU."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from headrace_backends.tensorrt.__main__ import main
from headrace_backends.tensorrt.engine_file import read_engine

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'headrace[tensorrt-rtx]'")
RTX = ["-p", "library=tensorrt-rtx"]


@pytest.fixture
def model(tmp_path):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [value("x", TensorProto.FLOAT, ["n", "t", 8])],
        [value("y", TensorProto.FLOAT, ["n", "t", 4])],
        [numpy_helper.from_array(np.ones((8, 4), np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_an_engine_is_written_and_told(model, tmp_path, capsys):
    options = ["--max-batch-size", "4", "-p", "precision=fp16", "-p", "compute_capability=8.9", *RTX]
    assert main([str(model), str(tmp_path / "model.plan"), *options]) == 0
    header, data = read_engine(tmp_path / "model.plan")
    assert header.targets == ((8, 9),)
    lines = capsys.readouterr().out.splitlines()
    assert "dimension 1 (t) of input 'x' is taken to go from 1 to 512" in lines[0]
    assert lines[1] == "shapes: x [1, 1, 8] to [4, 512, 8]"
    assert f"{len(data)} bytes, fp16, built by TensorRT-RTX" in lines[2]
    assert lines[2].endswith("for compute capability 8.9")
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "precision"], "a parameter is 'precision', expected NAME=VALUE"),
        (["-p", "fp16=true"], "has no parameter 'fp16'"),
        (["-p", "max_shapes=z:1x1x8", *RTX], "parameters.max_shapes has 'z', and the inputs are ['x']"),
        (["-p", "compute_capability=9.0", *RTX], "cannot build for compute capability 9.0"),
    ],
)
def test_refusals_are_told(model, tmp_path, capsys, options, message):
    assert main([str(model), str(tmp_path / "model.plan"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model.plan").exists()
