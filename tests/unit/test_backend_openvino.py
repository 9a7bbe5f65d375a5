"""The OpenVINO backend: exact results, signatures read from files, batching that is proved, clear refusals."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from headrace.core.model import TensorSpec
from headrace.core.tensor import NUMPY_DTYPES, DataType
from headrace_backends import threads
from headrace_backends.base import InputError, LoadError, ModelSource
from headrace_backends.openvino import OpenVinoBackend
from headrace_backends.openvino_model import DATATYPES, trimmed
from headrace_backends.openvino_quietly import ov
from headrace_backends.row_trial import MIXES

op = ov.opset13
TYPES = {datatype: kind for kind, datatype in DATATYPES.items()}
F32 = ov.Type.f32


def tensor(kind, shape, *names):
    node = op.parameter(shape, kind)
    node.output(0).set_names(set(names))
    return node


def result(node, *names):
    node = op.result(node)
    node.output(0).set_names(set(names))
    return node


def number(value, dtype=np.float32):
    return op.constant(np.asarray(value, dtype))


def save(folder, outputs, inputs):
    ov.save_model(ov.Model(outputs, inputs, "m"), folder / "model.xml", compress_to_fp16=False)
    return folder / "model.xml"


def load(path, **keywords):
    return OpenVinoBackend.load(ModelSource("m", "1", path, **keywords))


def identity(folder, datatype, shape, **keywords):
    x = tensor(TYPES[datatype], shape, "x")
    return load(save(folder, [result(ov.opset16.identity(x), "y")], [x]), **keywords)


def one_input(folder, make, shape=(-1, 3), **keywords):
    x = tensor(F32, list(shape), "x")
    return load(save(folder, [result(make(x), "y")], [x]), **keywords)


def linear(folder, shape=(-1, 3), **keywords):
    weights = number(np.arange(6).reshape(3, 2))
    return one_input(folder, lambda x: op.matmul(x, weights, False, False), shape, **keywords)


@pytest.mark.parametrize("datatype", [datatype for datatype in DataType if datatype is not DataType.BYTES])
@pytest.mark.parametrize("shape", [[], [2, 2], [0, 3]])
@pytest.mark.parametrize("writeable", [True, False])
def test_every_datatype_and_scalars_and_nothing(tmp_path, datatype, shape, writeable):
    backend = identity(tmp_path, datatype, shape)
    assert backend.signature.inputs == (TensorSpec("x", datatype, tuple(shape)),)
    assert backend.signature.outputs == (TensorSpec("y", datatype, tuple(shape)),)
    assert backend.signature.max_batch_size == 0
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(NUMPY_DTYPES[datatype])
    array.flags.writeable = writeable
    made = backend.execute({"x": array}, [])["y"]
    assert made.shape == tuple(shape)
    assert made.dtype == array.dtype
    np.testing.assert_array_equal(made, array)


def test_results(tmp_path):
    backend = linear(tmp_path)
    x = np.random.default_rng(1).standard_normal((10, 3)).astype(np.float32)
    expected = x @ np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_allclose(backend.execute({"x": x}, [])["y"], expected, rtol=1e-5)
    np.testing.assert_allclose(backend.execute({"x": x[::2]}, [])["y"], expected[::2], rtol=1e-5)
    np.testing.assert_allclose(backend.execute({"x": np.asfortranarray(x)}, [])["y"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        op.relu,
        lambda x: op.relu(op.reshape(x, number([-1], np.int64), special_zero=False)),
        lambda x: op.scatter_update(x, number([0], np.int64), number(np.ones((1, 64))), number(0, np.int64)),
        lambda x: op.split(op.sigmoid(x), number(1, np.int64), 2).output(0),
    ],
)
def test_inputs_are_only_read(tmp_path, make):
    backend = one_input(tmp_path, make, (-1, 64))
    assert backend.reads_only
    x = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    before = x.copy()
    backend.execute({"x": x}, [])
    np.testing.assert_array_equal(x, before)


def test_batching_is_read_from_the_file(tmp_path):
    backend = linear(tmp_path)
    assert backend.signature.max_batch_size == 32
    assert backend.signature.inputs[0].shape == (-1, 3)
    assert backend.signature.outputs[0].shape == (-1, 2)
    assert backend.notes() == []
    assert backend.warms_up


def test_no_more_rows_than_the_model_was_bounded_to(tmp_path):
    assert linear(tmp_path, (ov.Dimension(1, 5), 3)).signature.max_batch_size == 5
    assert linear(tmp_path, (ov.Dimension(1, 5), 3), max_batch_size=4).signature.max_batch_size == 4
    with pytest.raises(LoadError, match=r"max_batch_size is 8, and '.*' takes at most 5 rows"):
        linear(tmp_path, (ov.Dimension(1, 5), 3), max_batch_size=8)


def test_batching_is_not_assumed_where_configured(tmp_path):
    assert linear(tmp_path, max_batch_size=0).signature.max_batch_size == 0
    assert linear(tmp_path, max_batch_size=7).signature.max_batch_size == 7
    with pytest.raises(LoadError, match=r"max_batch_size is 8, but the first dimension of 'x' \[1, 3\] is not of any"):
        linear(tmp_path, (1, 3), max_batch_size=8)


@pytest.mark.parametrize(
    ("make", "shape", "note"),
    [
        (op.relu, (2, 3), "without a leading dimension of any size"),
        (lambda x: op.subtract(x, op.reduce_mean(x, number([0], np.int64), keep_dims=True)), (-1, 3), MIXES),
        (lambda x: op.concat([x, x], 0), (-1, 3), "has 2, 4 and 6 rows for 1, 2 and 3"),
    ],
)
def test_rows_that_mix_are_not_merged(tmp_path, make, shape, note):
    backend = one_input(tmp_path, make, shape)
    assert backend.signature.max_batch_size == 0
    assert note in backend.notes()[0]


def test_names_are_the_tensors(tmp_path):
    x, b = tensor(F32, [-1, 3], "x"), tensor(F32, [-1, 3], "b", "a")
    outputs = [result(op.add(x, b), "sum:0", "sum"), result(x, "x")]
    path = save(tmp_path, outputs, [x, b])
    signature = load(path).signature
    assert [spec.name for spec in signature.inputs] == ["x", "a"]
    assert [spec.name for spec in signature.outputs] == ["sum", "output_1"]
    wanted = load(path, inputs=(TensorSpec("b", DataType.FP32, (-1, 3)),))
    assert [spec.name for spec in wanted.signature.inputs] == ["x", "b"]
    made = wanted.execute({name: np.ones((1, 3), np.float32) for name in "xb"}, [])
    assert made["sum"].tolist() == [[2, 2, 2]]


def test_configured_shapes_replace_the_files(tmp_path):
    x = tensor(F32, ov.PartialShape.dynamic(), "x")
    path = save(tmp_path, [result(op.relu(x), "y")], [x])
    with pytest.raises(LoadError, match=r"input 'x' may have any number of dimensions.* give its shape"):
        load(path)
    fixed = load(path, inputs=(TensorSpec("x", DataType.FP32, (-1, 3)),))
    assert fixed.signature.inputs[0].shape == (-1, 3)
    assert fixed.signature.outputs[0].shape == (-1, 3)
    assert fixed.signature.max_batch_size == 32


def test_every_disagreement_with_the_configuration_is_told(tmp_path):
    with pytest.raises(LoadError) as caught:
        linear(
            tmp_path,
            inputs=(TensorSpec("x", DataType.FP16, (-1, 4)), TensorSpec("q", DataType.FP32, (1,))),
            outputs=(TensorSpec("y", DataType.FP32, (-1, 2, 1)),),
        )
    for part in (
        "no input 'q'; it has ['x']",
        "'x' is configured as FP16; the file has FP32",
        "'x' is configured with shape [-1, 4]; the file has [-1, 3]",
        "'y' is configured with shape [-1, 2, 1]; the file has [-1, 2]",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("x", "problem"),
    [
        (np.ones((2, 4), np.float32), r"^input 'x' does not suit the model: .*shape=\[\?,3\].*shape=\(2\.4\)"),
        (np.ones(3, np.float32), r"^input 'x' does not suit the model: .*shape=\(3\)"),
        (np.ones((2, 3), np.float64), r"^input 'x' does not suit the model: .* precision: f64.* is: f32$"),
    ],
)
def test_what_openvino_refuses_is_the_clients(tmp_path, x, problem, capfd):
    backend = linear(tmp_path)
    with pytest.raises(InputError, match=problem) as caught:
        backend.execute({"x": x}, [])
    assert ".cpp" not in str(caught.value)
    assert capfd.readouterr().err == ""
    assert backend.execute({"x": np.ones((1, 3), np.float32)}, [])["y"].tolist() == [[6, 9]]


@pytest.mark.parametrize("light", [True, False])
def test_an_operator_that_fails_is_told(tmp_path, monkeypatch, light):
    monkeypatch.setattr(threads, "LIGHT_MODEL_MS", 1e9 if light else 0)
    x, w = tensor(F32, [-1, -1], "x"), tensor(F32, [-1, -1], "w")
    path = save(tmp_path, [result(op.matmul(x, w, False, False), "y")], [x, w])
    backend = load(path, threads=2, max_batch_size=0)
    for _ in range(2):
        with pytest.raises(InputError, match=r"MatMul.* incompatible shape A: \(2\.2\) shape B: \(3\.3\)") as caught:
            backend.execute({"x": np.ones((2, 2), np.float32), "w": np.ones((3, 3), np.float32)}, [])
        assert ".cpp" not in str(caught.value)
        made = backend.execute({"x": np.ones((2, 3), np.float32), "w": np.ones((3, 3), np.float32)}, [])
        assert made["y"].tolist() == [[3] * 3] * 2


def test_out_of_memory_is_no_fault_of_the_input(tmp_path):
    x, s = tensor(F32, [1], "x"), tensor(ov.Type.i64, [2], "s")
    backend = load(save(tmp_path, [result(op.broadcast(x, s), "y")], [x, s]))
    with pytest.raises(MemoryError):
        backend.execute({"x": np.ones(1, np.float32), "s": np.array([1 << 18, 1 << 24])}, [])


def test_message_trimming_keeps_what_was_said():
    message = (
        "Exception from src/a/b.cpp:12:\nCheck 'x(1) == y' failed at src/c.cpp:3:\nBad (very) x\n\n\nBad (very) x\n"
    )
    assert trimmed(message) == "Bad (very) x"
    assert trimmed("no newline: c.cpp:12: stays") == "no newline: c.cpp:12: stays"


def broken(folder, kind):
    path = save(
        folder, [result(op.matmul(x := tensor(F32, [-1, 64], "x"), number(np.ones((64, 64))), False, False), "y")], [x]
    )
    text = path.read_text()
    match kind:
        case "garbage":
            path.write_text("garbage")
        case "empty":
            path.write_text("")
        case "another kind of XML":
            path.write_text("<?xml version='1.0'?><html><body/></html>")
        case "cut":
            path.write_text(text[: len(text) // 2])
        case "unknown operator":
            path.write_text(text.replace('type="MatMul"', 'type="Frobnicate"'))
        case "no text":
            path.write_bytes(text.encode().replace(b'type="MatMul"', b'type="Frob\xff"'))
        case "no weights":
            path.with_suffix(".bin").unlink()
        case "short weights":
            path.with_suffix(".bin").write_bytes(b"123")
        case "no outputs":
            path.write_text('<net name="m" version="11"></net>')
    return path


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("garbage", r"^cannot load 'model\.xml': it is not in the format OpenVINO IR$"),
        ("empty", r"^cannot load 'model\.xml': it is not in the format OpenVINO IR$"),
        ("another kind of XML", r"^cannot load 'model\.xml': it is not in the format OpenVINO IR$"),
        ("cut", r"^cannot load 'model\.xml': .* at offset"),
        ("unknown operator", r"^cannot load 'model\.xml': .*Frobnicate"),
        ("no text", r"^cannot load 'model\.xml': .* can't decode byte 0xff"),
        ("no weights", r"^'model\.xml' keeps its weights in 'model\.bin', and there is no such file beside it$"),
        ("short weights", r"^cannot load 'model\.xml': 'model\.bin' is shorter than the weights that it should have$"),
        ("no outputs", r"^'model\.xml' has no outputs"),
    ],
)
def test_broken_files(tmp_path, kind, problem, capfd):
    with pytest.raises(LoadError, match=problem):
        load(broken(tmp_path, kind))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "told"), [("model.onnx", "ONNX"), ("model.tflite", "TensorFlow Lite")])
def test_broken_files_of_others(tmp_path, name, told, capfd):
    (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(LoadError, match=f"^cannot load '{name}': it is not in the format {told}$"):
        load(tmp_path / name)
    assert capfd.readouterr() == ("", "")


def test_onnx_files(tmp_path):
    value, float32 = helper.make_tensor_value_info, TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [value("x", float32, ["n", 3])],
        [value("y", float32, ["n", 2])],
        [numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(3, 2), "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "model.onnx"
    )
    backend = load(tmp_path / "model.onnx")
    assert backend.signature.inputs == (TensorSpec("x", DataType.FP32, (-1, 3)),)
    assert backend.signature.max_batch_size == 32
    assert backend.execute({"x": np.ones((2, 3), np.float32)}, [])["y"].tolist() == [[6, 9]] * 2


def test_types_that_the_protocol_lacks(tmp_path):
    for kind, told in (
        (ov.Type.i4, "is i4, which the protocol has no datatype for"),
        (ov.Type.string, "holds strings"),
    ):
        x = tensor(kind, [-1, 2], "x")
        with pytest.raises(LoadError, match=f"^cannot serve 'model.xml': 'x' {told}"):
            load(save(tmp_path, [result(ov.opset16.identity(x), "y")], [x]))


def test_what_is_computed_with_fewer_bits_is_told(tmp_path):
    x = tensor(ov.Type.i64, [-1, 2], "x")
    backend = load(save(tmp_path, [result(op.add(x, number([1], np.int64)), "y")], [x]))
    assert backend.notes() == ["OpenVINO computes INT64 as INT32: larger or finer numbers are not kept"]
    assert backend.execute({"x": np.array([[2**20, -3]])}, [])["y"].tolist() == [[2**20 + 1, -2]]


def test_a_model_that_keeps_state_is_refused(tmp_path):
    x = tensor(F32, [1, 3], "x")
    variable = ov.op.util.Variable(ov.op.util.VariableInfo())
    info = ov.op.util.VariableInfo()
    info.data_shape, info.data_type, info.variable_id = ov.PartialShape([1, 3]), F32, "total"
    variable = ov.op.util.Variable(info)
    before = ov.opset6.read_value(number(np.zeros((1, 3))), variable)
    total = op.add(x, before)
    model = ov.Model([result(total, "y")], [ov.opset6.assign(total, variable)], [x], "m")
    ov.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    with pytest.raises(LoadError, match=r"'model\.xml' keeps 'total' from one request to the next"):
        load(tmp_path / "model.xml")


def compiled_with(backend, name):
    return backend._request.get_compiled_model().get_property(name)


def test_parameters(tmp_path):
    plain = linear(tmp_path)
    assert compiled_with(plain, "INFERENCE_PRECISION_HINT") == F32
    assert compiled_with(plain, "DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    assert compiled_with(plain, "ENABLE_CPU_PINNING") is False
    quantises = linear(tmp_path, parameters={"dynamic_quantization": "true"})
    assert compiled_with(quantises, "DYNAMIC_QUANTIZATION_GROUP_SIZE") > 0
    for given, problem in (
        ({"intra_op_thread": 1}, "no parameter 'intra_op_thread'; it has intra_op_threads, precision"),
        ({"intra_op_threads": 0}, "intra_op_threads is 0, expected a whole number"),
        ({"precision": "f64"}, "precision is 'f64', expected one of f32, bf16, f16"),
        ({"profiling": 3}, "profiling is 3, expected true or false"),
        ({"dynamic_quantization": 3}, "dynamic_quantization is 3, expected true or false"),
    ):
        with pytest.raises(LoadError, match=problem):
            linear(tmp_path, parameters=given)


@pytest.mark.parametrize(("precision", "ability"), [("bf16", "BF16"), ("f16", "FP16")])
def test_a_precision_that_the_cpu_lacks_is_refused_and_another_is_used(tmp_path, precision, ability):
    if ability in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        backend = linear(tmp_path, parameters={"precision": precision})
        assert compiled_with(backend, "INFERENCE_PRECISION_HINT") == getattr(ov.Type, precision)
        x = np.full((1, 3), 1.01, np.float32)
        np.testing.assert_allclose(backend.execute({"x": x}, [])["y"], [[6.06, 9.09]], rtol=1e-2)
    else:
        with pytest.raises(LoadError, match=f"precision is '{precision}', and OpenVINO offers f32"):
            linear(tmp_path, parameters={"precision": precision})


def test_devices(tmp_path):
    with pytest.raises(LoadError, match="'gpu:0' is not one for the backend openvino, expected cpu"):
        linear(tmp_path, device="gpu:0")
    with pytest.raises(LoadError, match="'tpu' is unknown, expected 'cpu', 'gpu:N' or"):
        linear(tmp_path, device="tpu")


def process_threads():
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_light_model_has_one_thread_and_takes_no_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "LIGHT_MODEL_MS", 1e9)
    x = tensor(F32, [-1, 256], "x")
    path = save(tmp_path, [result(op.matmul(x, number(np.ones((256, 256))), False, False), "y")], [x])
    gc.collect()
    for available, notes in ((1, []), (2, ["light: one row takes"])):
        before = process_threads()
        backend = load(path, threads=available)
        backend.execute({"x": np.ones((512, 256), np.float32)}, [])
        assert process_threads() <= before, "it runs on the calling thread"  # another's may have ended
        assert backend.cpu_threads == 0
        assert [note[:20] for note in backend.notes()] == notes


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="OpenVINO takes no more threads than there are CPUs")
def test_a_heavy_model_has_all_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "LIGHT_MODEL_MS", 0)
    backend = linear(tmp_path, threads=2)
    assert (compiled_with(backend, "INFERENCE_NUM_THREADS"), backend.cpu_threads) == (2, 2)
    assert [note[:24] for note in backend.notes()] == ["2 threads: one row takes"]
    assert backend.execute({"x": np.ones((2, 3), np.float32)}, [])["y"].tolist() == [[6, 9]] * 2
    asked = linear(tmp_path, threads=2, parameters={"intra_op_threads": "1"})
    assert (compiled_with(asked, "NUM_STREAMS"), asked.cpu_threads, asked.notes()) == (0, 1, [])


def test_operators_are_timed_where_that_was_asked_for(tmp_path):
    x = {"x": np.ones((2, 3), np.float32)}
    times = linear(tmp_path, parameters={"profiling": True}).operator_times(x)
    assert times
    assert all(isinstance(name, str) and isinstance(kind, str) and us >= 0 for name, kind, us in times)
    assert linear(tmp_path).operator_times(x) == []


def test_what_is_closed_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "LIGHT_MODEL_MS", 0)

    def cycle():
        backend = linear(tmp_path, threads=2)
        backend.execute({"x": np.ones((2, 3), np.float32)}, [])
        backend.close()

    cycle()
    gc.collect()
    before = process_threads()
    for _ in range(5):
        cycle()
    gc.collect()
    ends = time.monotonic() + 30
    while process_threads() > before:
        assert time.monotonic() < ends, "threads are left"
        time.sleep(0.01)


def test_importing_openvino_sends_nothing(tmp_path):
    code = (
        "import sys, headrace_backends.openvino; "
        "import openvino.tools.ovc.telemetry_utils as t; "
        "sys.exit(t.tm.__name__ != 'openvino.tools.ovc.telemetry_stub')"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    assert list(Path(tmp_path).iterdir()) == []
