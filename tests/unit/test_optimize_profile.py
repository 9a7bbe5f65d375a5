import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import LoadError, ModelSource
from headrace_backends.optimize import profile as profiling
from headrace_backends.optimize.findings import OperatorTime, Profile
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.onnxruntime_profile import operator_times
from headrace_backends.optimize.profile import profile_form
from headrace_backends.optimize.traceevents import trace

onnx = pytest.importorskip("onnx", reason="it makes the model that is profiled")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(profiling, "_SECONDS", 0.05)


def branching_model(path):
    """Two products, the second one inside of an If."""
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
    shape = ["rows", 64]
    then, otherwise = (
        helper.make_graph(
            [helper.make_node(operator, ["m", *more], [name], name=name)],
            f"{name}_graph",
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        )
        for operator, more, name in (("MatMul", ["w"], "inner"), ("Identity", [], "other"))
    )
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], name="outer"),
            helper.make_node("ReduceSum", ["m"], ["s"], name="sum", keepdims=0),
            helper.make_node("Greater", ["s", "zero"], ["c"], name="compare"),
            helper.make_node("If", ["c"], ["y"], name="branch", then_branch=then, else_branch=otherwise),
        ],
        "branching",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weights, numpy_helper.from_array(np.float32(0), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def event(category, name, ts, dur, operator=""):
    return {"cat": category, "name": name, "ts": ts, "dur": dur, "args": {"op_name": operator} if operator else {}}


def test_kernel_times_are_means_over_runs_without_the_warm_up_and_without_what_is_nested():
    events = [
        event("Session", "model_loading_uri", 0, 5),
        *(
            made
            for at, factor in ((100, 50), (1000, 1), (2000, 3))
            for made in (
                event("Node", "a_kernel_time", at + 1, 10 * factor, "Conv"),
                event("Node", "a_fence_before", at + 1, 2),
                event("Node", "inner_kernel_time", at + 12 * factor, 4 * factor, "MatMul"),
                event("Session", "SequentialExecutor::Execute", at + 12 * factor, 5 * factor),
                event("Node", "branch_kernel_time", at + 11 * factor, 6 * factor, "If"),
                event("Node", "after_kernel_time", at + 17 * factor, 1, "Add"),
                event("Session", "model_run", at, 20 * factor),
            )
        ),
    ]
    assert operator_times(events, 1) == [
        OperatorTime("a", "Conv", 20.0, 1.0),
        OperatorTime("branch", "If", 4.0, 33.0),
        OperatorTime("inner", "MatMul", 8.0, 36.0),
        OperatorTime("after", "Add", 1.0, 51.0),
    ]
    assert operator_times(events, 3) == []


def test_a_kernel_that_runs_many_times_in_one_run_counts_whole():
    events = [
        event("Session", "model_run", 0, 100),
        event("Node", "body_kernel_time", 10, 5, "Add"),
        event("Node", "body_kernel_time", 20, 7, "Add"),
    ]
    assert operator_times(events, 0) == [OperatorTime("body", "Add", 12.0, 10.0)]


def test_a_real_onnx_model(tmp_path):
    path = branching_model(tmp_path / "model.onnx")
    source = ModelSource("branching", "1", path, threads=1)
    found = profile_form(Form("onnxruntime"), source, {"x": np.ones((256, 64), np.float32)}, tmp_path)
    assert pickle.loads(pickle.dumps(found)) == found  # it comes from another process
    assert found.form == "onnxruntime"
    by_name = {one.name: one for one in found.operators}
    assert {name: one.operator for name, one in by_name.items()} == {
        "outer": "MatMul",
        "sum": "ReduceSum",
        "compare": "Greater",
        "branch": "If",
        "inner": "MatMul",
    }
    assert found.operators[0].name == "outer"
    assert by_name["inner"].duration_us > 1.0
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]  # the profile's file is gone


def test_a_fused_operator_has_the_runtimes_name(tmp_path):
    from onnx import TensorProto, helper, numpy_helper

    kernel = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "k")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "k"], ["c"], name="conv"),
            helper.make_node("Relu", ["c"], ["y"], name="relu"),
        ],
        "fusing",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 14, 14])],
        [kernel],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "model.onnx"
    )
    inputs = {"x": np.ones((1, 3, 16, 16), np.float32)}

    def operators(level):
        source = ModelSource("m", "1", tmp_path / "model.onnx", parameters={"graph_optimization_level": level})
        return [one.operator for one in profile_form(Form("onnxruntime"), source, inputs, tmp_path).operators]

    assert operators("disabled") == ["Conv", "Relu"]
    assert "Relu" not in operators("all")
    assert "Conv" in " ".join(operators("all"))


def test_pytorch_operators_come_with_what_they_call_and_once_for_each_call(tmp_path):
    torch = pytest.importorskip("torch")
    layers = [torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)]
    path, inputs = tmp_path / "model.pt", {"x": np.ones((2, 8), np.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch calls all of TorchScript deprecated
        torch.jit.save(torch.jit.trace(torch.nn.Sequential(*layers).eval(), torch.ones(2, 8)), path)
    specs = (TensorSpec("x", DataType.FP32, (2, 8)),), (TensorSpec("y", DataType.FP32, (2, 4)),)
    source = ModelSource("m", "1", path, inputs=specs[0], outputs=specs[1])
    found = profile_form(Form("torch"), source, inputs, tmp_path).operators
    names = [one.name for one in found]
    assert [name for name in names if "linear" in name or "relu" in name] == [
        "aten::linear 1",
        "aten::relu 1",
        "aten::linear 2",
    ]
    assert not any(name.startswith("aten::addmm") for name in names)  # that is what linear calls
    assert all(one.duration_us >= 0 for one in found)
    assert [one.start_us for one in found] == sorted(one.start_us for one in found)


def test_a_runtime_that_tells_no_starts_has_operators_one_after_the_other(monkeypatch, tmp_path):
    loaded = []

    class Runtime:
        @classmethod
        def load(cls, source):
            loaded.append(source.parameters)
            return cls()

        def operator_times(self, inputs):
            assert set(inputs) == {"x"}
            return [("conv", "Convolution", 30.0), ("add", "Add", 10.0)]

    monkeypatch.setattr("headrace_backends.registry.resolve", lambda name: {"openvino": Runtime}[name])
    source = ModelSource("m", "1", Path("model.xml"), parameters={"intra_op_threads": 1})
    found = profile_form(Form("openvino"), source, {"x": np.ones(1)}, tmp_path)
    assert loaded == [{"intra_op_threads": 1, "profiling": True}]
    assert found.operators == (
        OperatorTime("conv", "Convolution", 30.0, 0.0),
        OperatorTime("add", "Add", 10.0, 30.0),
    )


def test_backends_without_a_profiler_have_no_operators(tmp_path):
    assert profile_form(Form("fake"), ModelSource("m", "1", tmp_path), {}, tmp_path) == Profile("fake", ())
    on_gpu = ModelSource("m", "1", tmp_path, device="gpu:0")
    assert profile_form(Form("onnxruntime"), on_gpu, {}, tmp_path).operators == ()


def test_a_broken_model_is_a_load_error(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(LoadError, match=r"cannot load 'model\.onnx'"):
        profile_form(Form("onnxruntime"), ModelSource("m", "1", tmp_path / "model.onnx"), {}, tmp_path)


def test_trace_events_have_a_process_for_each_form_and_never_overlap():
    before = Profile("a", (OperatorTime("x", "Conv", 10.0, 105.0), OperatorTime("y", "Add", 2.0, 109.0)))
    after = Profile("b", (OperatorTime("z", "Conv", 1.0), OperatorTime("nan", "Add", float("nan"), 1.0)))
    content = trace([before, after])
    slices = [one for one in content["traceEvents"] if one["ph"] == "X"]
    assert [(one["pid"], one["name"], one["ts"], one["dur"]) for one in slices] == [
        (1, "x", 0.0, 10.0),
        (1, "y", 10.0, 2.0),  # its start lies in the mean time of the one before
        (2, "z", 0.0, 1.0),
    ]
    names = {one["pid"]: one["args"]["name"] for one in content["traceEvents"] if one["name"] == "process_name"}
    assert names == {1: "a", 2: "b"}
    assert trace([])["traceEvents"] == []
