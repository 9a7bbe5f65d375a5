"""The ONNX Runtime backend: exactly the session's results, signatures read from files, batching that is proved."""

import gc
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from headrace.core.model import TensorSpec
from headrace.core.tensor import NUMPY_DTYPES, DataType
from headrace_backends import threads
from headrace_backends.base import InputError, LoadError, ModelSource
from headrace_backends.onnxruntime import OnnxRuntimeBackend, _trimmed

VALUE = helper.make_tensor_value_info
NODE = helper.make_node
FLOAT, INT64, STRING, BFLOAT16 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.BFLOAT16
ONNX_TYPES = {
    DataType.BOOL: TensorProto.BOOL,
    DataType.UINT8: TensorProto.UINT8,
    DataType.UINT16: TensorProto.UINT16,
    DataType.UINT32: TensorProto.UINT32,
    DataType.UINT64: TensorProto.UINT64,
    DataType.INT8: TensorProto.INT8,
    DataType.INT16: TensorProto.INT16,
    DataType.INT32: TensorProto.INT32,
    DataType.INT64: TensorProto.INT64,
    DataType.FP16: TensorProto.FLOAT16,
    DataType.BF16: TensorProto.BFLOAT16,
    DataType.FP32: TensorProto.FLOAT,
    DataType.FP64: TensorProto.DOUBLE,
    DataType.BYTES: TensorProto.STRING,
}


def save(folder, nodes, inputs, outputs, weights=None):
    initializers = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def load(folder, nodes, inputs, outputs, weights=None, /, **keywords):
    return OnnxRuntimeBackend.load(ModelSource("m", "1", save(folder, nodes, inputs, outputs, weights), **keywords))


def identity(folder, datatype, shape, **keywords):
    kind = ONNX_TYPES[datatype]
    return load(
        folder, [NODE("Identity", ["x"], ["y"])], [VALUE("x", kind, shape)], [VALUE("y", kind, shape)], **keywords
    )


def linear(folder, shape=("n", 3), **keywords):
    return load(
        folder,
        [NODE("MatMul", ["x", "w"], ["y"])],
        [VALUE("x", FLOAT, shape)],
        [VALUE("y", FLOAT, (shape[0], 2))],
        {"w": np.arange(6, dtype=np.float32).reshape(3, 2)},
        **keywords,
    )


def reshape(folder):
    return load(
        folder,
        [NODE("Reshape", ["x", "s"], ["y"])],
        [VALUE("x", FLOAT, ["n", 2]), VALUE("s", INT64, ["k"])],
        [VALUE("y", FLOAT, None)],
    )


@pytest.mark.parametrize("datatype", list(DataType))
@pytest.mark.parametrize("shape", [(), (2, 2), (0, 3)])
def test_every_datatype_and_scalars_and_nothing(tmp_path, datatype, shape):
    backend = identity(tmp_path, datatype, shape)
    assert backend.signature.inputs == (TensorSpec("x", datatype, shape),)
    assert backend.signature.outputs == (TensorSpec("y", datatype, shape),)
    assert backend.signature.max_batch_size == 0
    if datatype is DataType.BYTES:
        array = np.empty(shape, object)
        array[...] = "dür\0e".encode()
    else:
        array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(NUMPY_DTYPES[datatype])
        array.flags.writeable = False
    made = backend.execute({"x": array}, [])["y"]
    assert made.shape == shape
    assert made.dtype == array.dtype
    if datatype is DataType.BYTES:
        made = np.array([text.encode() for text in made.reshape(-1)], object).reshape(shape)
    np.testing.assert_array_equal(made, array)


def test_results_are_the_sessions_own(tmp_path):
    backend = linear(tmp_path)
    x = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    expected = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"x": x})[0]
    np.testing.assert_array_equal(backend.execute({"x": x}, [])["y"], expected)
    np.testing.assert_array_equal(backend.execute({"x": x[::2]}, [])["y"], expected[::2])


def test_bfloat16_among_others(tmp_path):
    backend = load(
        tmp_path,
        [NODE("Cast", ["b"], ["y"], to=FLOAT), NODE("Cast", ["f"], ["z"], to=BFLOAT16), NODE("Shape", ["b"], ["s"])],
        [VALUE("b", BFLOAT16, ["k", "m"]), VALUE("f", FLOAT, [2])],
        [VALUE("y", FLOAT, ["k", "m"]), VALUE("z", BFLOAT16, [2]), VALUE("s", INT64, [2])],
    )
    b = np.array([[1.5, -2], [3, 4]], ml_dtypes.bfloat16)
    made = backend.execute({"b": b.T, "f": np.array([0.5, 7], np.float32)}, [])
    np.testing.assert_array_equal(made["y"], b.T.astype(np.float32))
    np.testing.assert_array_equal(made["z"], np.array([0.5, 7], ml_dtypes.bfloat16))
    assert made["z"].dtype == ml_dtypes.bfloat16
    assert made["s"].tolist() == [2, 2]


def test_bfloat16_and_strings_in(tmp_path):
    backend = load(
        tmp_path,
        [NODE("Cast", ["b"], ["y"], to=FLOAT), NODE("Identity", ["s"], ["t"])],
        [VALUE("b", BFLOAT16, ["k"]), VALUE("s", STRING, ["j"])],
        [VALUE("y", FLOAT, ["k"]), VALUE("t", STRING, ["j"])],
    )
    made = backend.execute({"b": np.ones(2, ml_dtypes.bfloat16), "s": np.array([b"p"], object)}, [])
    assert made["y"].tolist() == [1, 1]
    assert made["t"].tolist() == ["p"]


def test_strings_must_be_text(tmp_path):
    backend = identity(tmp_path, DataType.BYTES, ["n"])
    with pytest.raises(InputError, match=r"^input 'x' has an element \(number 1\) that is not UTF-8"):
        backend.execute({"x": np.array([b"a", b"\xff"], object)}, [])


def test_a_scalar_is_not_a_shape_nobody_declared(tmp_path):
    scalar = load(
        tmp_path,
        [NODE("ReduceSum", ["x"], ["y"], keepdims=0)],
        [VALUE("x", FLOAT, None)],
        [VALUE("y", FLOAT, [])],
    )
    assert scalar.signature.inputs[0].shape is None
    assert scalar.signature.outputs[0].shape == ()
    assert float(scalar.execute({"x": np.ones((2, 2), np.float32)}, [])["y"]) == 4
    assert reshape(tmp_path).signature.outputs[0].shape is None


@pytest.mark.parametrize("shape", [("n", 3), (None, 3), (-1, 3)])
def test_batching_is_read_from_the_file(tmp_path, shape):
    backend = linear(tmp_path, shape)
    assert backend.signature.max_batch_size == 32
    assert backend.signature.inputs[0].shape == (-1, 3)
    assert backend.notes() == []


def test_names_that_tf2onnx_made_up_are_no_names(tmp_path):
    backend = load(
        tmp_path,
        [NODE("Identity", ["x"], ["y"])],
        [VALUE("x", FLOAT, ["unk__214", 3])],
        [VALUE("y", FLOAT, ["unk__215", 3])],
    )
    assert backend.signature.max_batch_size == 32
    assert backend.notes() == []


def test_batching_is_not_assumed_where_configured(tmp_path):
    assert linear(tmp_path, max_batch_size=0).signature.max_batch_size == 0
    assert linear(tmp_path, max_batch_size=7).signature.max_batch_size == 7


@pytest.mark.parametrize(
    ("nodes", "x", "y", "note"),
    [
        ([NODE("Identity", ["x"], ["y"])], ["n", 3], ["m", 3], "different names"),
        ([NODE("Identity", ["x"], ["y"])], [2, 3], [2, 3], "without a leading dimension of any size"),
        ([NODE("ReduceSum", ["x"], ["y"], keepdims=0)], ["n", 3], [], r"'y' has shape \[\]"),
        ([NODE("Transpose", ["x"], ["y"])], ["n", "n"], ["n", "n"], "another dimension"),
        (  # the shapes of a model that batches, and a mean over the batch
            [NODE("ReduceMean", ["x", "zero"], ["mean"]), NODE("Sub", ["x", "mean"], ["y"])],
            ["n", 3],
            ["n", 3],
            "differs between rows that ran together",
        ),
        ([NODE("Concat", ["x", "x"], ["y"], axis=0)], [None, 3], [None, 3], "has 2, 4 and 6 rows for 1, 2 and 3"),
        ([NODE("CumSum", ["x", "axis"], ["y"])], ["n", 3], ["n", 3], "differs between"),
        ([NODE("Softmax", ["x"], ["y"], axis=0)], ["n", 3], ["n", 3], "differs between"),
        (
            [
                NODE("Shape", ["x"], ["s"], end=1),
                NODE("Cast", ["s"], ["rows"], to=FLOAT),
                NODE("Div", ["x", "rows"], ["y"]),
            ],
            ["n", 3],
            ["n", 3],
            "depends on how many there are",
        ),
        (
            [NODE("Cast", ["float"], ["one"], to=INT64), NODE("Reshape", ["x", "one"], ["y"])],
            ["n", 3],
            ["n", 3],
            "several fail",
        ),
    ],
)
def test_rows_that_mix_are_not_merged(tmp_path, nodes, x, y, note):
    weights = {"zero": np.array([0]), "float": np.array([1, 3], np.float32), "axis": np.array(0)}
    used = {name: array for name, array in weights.items() if any(name in node.input for node in nodes)}
    unfolded = {"graph_optimization_level": "disabled"}  # else the last one's output shape is found out at load
    backend = load(tmp_path, nodes, [VALUE("x", FLOAT, x)], [VALUE("y", FLOAT, y)], used, parameters=unfolded)
    assert backend.signature.max_batch_size == 0
    assert len(backend.notes()) == 1
    with pytest.raises(AssertionError, match=note):
        raise AssertionError(backend.notes()[0])


def quantised_dynamically(folder, **keywords):
    return load(
        folder,
        [
            NODE("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
            NODE("MatMulInteger", ["q", "w", "zero"], ["product"]),
            NODE("Cast", ["product"], ["float"], to=FLOAT),
            NODE("Mul", ["float", "scale"], ["y"]),
        ],
        [VALUE("x", FLOAT, ["n", 3])],
        [VALUE("y", FLOAT, ["n", 2])],
        {"w": np.array([[1, 2], [3, 4], [5, 6]], np.int8)},
        **keywords,
    )


@pytest.mark.parametrize("level", ["disabled", "all"])
def test_one_scale_for_the_whole_batch_is_mixing_and_is_explained(tmp_path, level):
    backend = quantised_dynamically(tmp_path, parameters={"graph_optimization_level": level})
    assert backend.signature.max_batch_size == 0
    assert "differs between rows that ran together" in backend.notes()[0]
    assert "quantised dynamically (DynamicQuantizeLinear), with one scale for the whole batch" in backend.notes()[0]
    assert quantised_dynamically(tmp_path, max_batch_size=4).signature.max_batch_size == 4


def test_a_model_whose_kernels_differ_by_batch_size_is_batched():
    folder = Path(find_spec("magika").origin).parent / "models"
    for file in folder.glob("*/model.onnx"):
        backend = OnnxRuntimeBackend.load(ModelSource("magika", "1", file))
        assert backend.signature.max_batch_size == 32
        assert backend.notes() == []
        assert backend.cpu_threads == 1


def test_texts_that_are_cut_into_as_many_words_as_the_longest_has_are_not_merged(tmp_path):
    text = onnx.TensorProto.STRING
    backend = load(
        tmp_path,
        [NODE("StringSplit", ["x"], ["y", "z"], delimiter=" ")],
        [VALUE("x", text, ["n"])],
        [VALUE("y", text, ["n", "words"]), VALUE("z", onnx.TensorProto.INT64, ["n"])],
    )
    assert backend.signature.max_batch_size == 0
    assert "has a shape that depends on what the rows of the input hold" in backend.notes()[0]


def test_batching_that_cannot_be_proved_is_kept_and_told(tmp_path):
    backend = load(  # only rows of 5 columns fit, and the file does not say so
        tmp_path,
        [NODE("MatMul", ["x", "w"], ["y"])],
        [VALUE("x", FLOAT, ["n", "m"])],
        [VALUE("y", FLOAT, ["n", 2])],
        {"w": np.ones((5, 2), np.float32)},
    )
    assert backend.signature.max_batch_size == 32
    assert "could not be proved" in backend.notes()[0]


@pytest.mark.parametrize("datatype", [DataType.BYTES, DataType.INT64, DataType.BF16, DataType.FP16, DataType.BOOL])
def test_batching_of_other_datatypes(tmp_path, datatype):
    assert identity(tmp_path, datatype, ["n", "m"]).signature.max_batch_size == 32


def test_nan_equals_itself_in_the_proof(tmp_path):
    backend = load(tmp_path, [NODE("Log", ["x"], ["y"])], [VALUE("x", FLOAT, ["n"])], [VALUE("y", FLOAT, ["n"])])
    assert backend.signature.max_batch_size == 32


def test_configured_tensors_replace_the_files_shapes(tmp_path):
    backend = linear(tmp_path, ("n", "m"), inputs=(TensorSpec("x", DataType.FP32, (-1, 3)),))
    assert backend.signature.inputs[0].shape == (-1, 3)
    assert backend.notes() == []


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


def test_max_batch_size_needs_a_free_leading_dimension(tmp_path):
    with pytest.raises(
        LoadError, match=r"max_batch_size is 8, but the first dimension of 'x' \[1, 3\] is not of any size"
    ):
        linear(tmp_path, (1, 3), max_batch_size=8)


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        ({"x": np.ones((2, 4), np.float32)}, "invalid dimensions for input: x .* Got: 4 Expected: 3"),
        ({"x": np.ones((2, 3), np.float64)}, r"Actual: \(tensor\(double\)\) , expected: \(tensor\(float\)\)"),
    ],
)
def test_what_onnxruntime_refuses_is_the_clients(tmp_path, inputs, problem, capfd):
    backend = linear(tmp_path)
    with pytest.raises(InputError, match=problem):
        backend.execute(inputs, [])
    assert capfd.readouterr().err == ""


def test_a_failing_node_is_told_without_cpp(tmp_path, capfd):
    with pytest.raises(InputError) as caught:
        reshape(tmp_path).execute({"x": np.ones((2, 2), np.float32), "s": np.array([3])}, [])
    message = str(caught.value)
    assert message.startswith("Non-zero status code returned while running Reshape node.")
    assert "requested shape:{3}" in message
    assert ".h:" not in message
    assert "::" not in message
    assert capfd.readouterr().err == ""


def test_out_of_memory_is_no_fault_of_the_input(tmp_path):
    backend = load(
        tmp_path,
        [NODE("Expand", ["x", "s"], ["y"])],
        [VALUE("x", FLOAT, [1]), VALUE("s", INT64, [2])],
        [VALUE("y", FLOAT, None)],
    )
    with pytest.raises(MemoryError, match="Failed to allocate memory"):
        backend.execute({"x": np.ones(1, np.float32), "s": np.array([1 << 20, 1 << 28])}, [])


def test_message_trimming_keeps_what_was_said():
    location = "a/b.cc:12 void* onnxruntime::A<int>::B(size_t, bool (*)(int)) const "
    assert _trimmed(f"[ONNXRuntimeError] : 1 : FAIL : {location}Bad (very) x\n") == "Bad (very) x"
    assert (
        _trimmed("tensorprotoutils.cc:619 Check External data (x::y) is gone") == "Check External data (x::y) is gone"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"garbage", "it is not a whole ONNX file: .*Protobuf parsing failed"),
        (b"", "it is not a whole ONNX file: .*No graph"),
        (None, "Load model from .* doesn't exist"),
    ],
)
def test_broken_files(tmp_path, content, problem):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoadError, match=f"^cannot load 'model.onnx': {problem}"):
        OnnxRuntimeBackend.load(ModelSource("m", "1", path))


@pytest.mark.parametrize("name", [b"image", b"rows"])
def test_names_that_are_no_text(tmp_path, name):
    path = save(
        tmp_path, [NODE("Relu", ["image"], ["y"])], [VALUE("image", FLOAT, ["rows", 3])], [VALUE("y", FLOAT, None)]
    )
    path.write_bytes(path.read_bytes().replace(name, b"\xff" + name[1:]))
    with pytest.raises(LoadError, match=r"^cannot load 'model\.onnx': a name in it is no text \('utf-8' codec can't"):
        OnnxRuntimeBackend.load(ModelSource("m", "1", path))


def test_missing_weights_file(tmp_path):
    path = save(
        tmp_path,
        [NODE("MatMul", ["x", "w"], ["y"])],
        [VALUE("x", FLOAT, ["n", 3])],
        [VALUE("y", FLOAT, ["n", 3])],
        {"w": np.ones((3, 3), np.float32)},
    )
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert OnnxRuntimeBackend.load(ModelSource("m", "1", path)).signature.max_batch_size == 32
    (tmp_path / "w.bin").unlink()
    with pytest.raises(LoadError, match=r"'model\.onnx' keeps weights in a file of its own, 'w\.bin', and there is no"):
        OnnxRuntimeBackend.load(ModelSource("m", "1", path))


def test_types_that_the_protocol_lacks(tmp_path):
    sequence = helper.make_tensor_sequence_value_info("y", FLOAT, None)
    with pytest.raises(LoadError, match=r"'y' is a seq\(tensor\(float\)\), which the protocol has no datatype for"):
        load(tmp_path, [NODE("SplitToSequence", ["x"], ["y"])], [VALUE("x", FLOAT, ["n"])], [sequence])
    float8 = TensorProto.FLOAT8E4M3FN
    with pytest.raises(LoadError, match=r"'x' is a tensor\(float8e4m3fn\)"):
        load(tmp_path, [NODE("Cast", ["x"], ["y"], to=FLOAT)], [VALUE("x", float8, ["n"])], [VALUE("y", FLOAT, ["n"])])


def test_parameters(tmp_path):
    options = linear(
        tmp_path, threads=2, parameters={"intra_op_threads": "9", "graph_optimization_level": "basic"}
    )._session.get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert linear(tmp_path, parameters={"intra_op_threads": 3})._session.get_session_options().intra_op_num_threads == 1
    for parameters, problem in (
        ({"intra_op_thread": 1}, "no parameter 'intra_op_thread'; it has intra_op_threads"),
        ({"intra_op_threads": 0}, "intra_op_threads is 0, expected a whole number"),
        ({"intra_op_threads": True}, "intra_op_threads is True"),
        ({"allow_spinning": 1}, "allow_spinning is 1, expected true or false"),
        ({"graph_optimization_level": "most"}, "'most', expected one of disabled, basic"),
    ):
        with pytest.raises(LoadError, match=problem):
            linear(tmp_path, parameters=parameters)


@pytest.mark.parametrize(
    ("parameters", "within_a_run", "stops_after_it"),
    [({}, "1", "1"), ({"allow_spinning": True}, "1", "0"), ({"allow_spinning": "false"}, "0", "1")],
)
def test_threads_spin_within_a_run_unless_more_or_less_is_asked_for(tmp_path, parameters, within_a_run, stops_after_it):
    options = linear(tmp_path, parameters=parameters)._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == within_a_run
    assert options.get_session_config_entry("session.force_spinning_stop") == stops_after_it


def test_devices(tmp_path):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(LoadError, match=r"'gpu:0' needs an onnxruntime with CUDA.*--force-reinstall onnxruntime-gpu"):
        linear(tmp_path, device="gpu:0")
    with pytest.raises(LoadError, match="'tpu' is unknown, expected 'cpu', 'gpu:N' or"):
        linear(tmp_path, device="tpu")


def session_threads(backend):
    return backend._session.get_session_options().intra_op_num_threads


def test_a_light_model_has_one_thread_and_takes_no_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "LIGHT_MODEL_MS", 1e9)
    for available, notes in ((1, []), (3, ["light: one row takes"])):
        backend = linear(tmp_path, threads=available)
        assert (session_threads(backend), backend.cpu_threads) == (1, 0)
        assert [note[:20] for note in backend.notes()] == notes


def test_a_heavy_model_has_all_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "LIGHT_MODEL_MS", 0)
    for available, notes in ((1, []), (3, ["3 threads: one row takes"])):
        backend = linear(tmp_path, threads=available)
        assert (session_threads(backend), backend.cpu_threads) == (available, available)
        assert [note[:24] for note in backend.notes()] == notes
        x = np.ones((2, 3), np.float32)
        assert backend.execute({"x": x}, [])["y"].tolist() == [[6, 9]] * 2
    asked = linear(tmp_path, threads=3, parameters={"intra_op_threads": 2})
    assert (session_threads(asked), asked.cpu_threads, asked.notes()) == (2, 2, [])


def test_a_model_that_cannot_be_timed_has_all_threads(tmp_path):
    backend = reshape(tmp_path)
    assert (session_threads(backend), backend.cpu_threads) == (1, 1)
    assert backend.warms_up


def process_threads():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))


def test_one_thread_means_no_more_threads(tmp_path):
    gc.collect()  # others' models, and the threads that they have
    before = process_threads()
    backend = linear(tmp_path, threads=1)
    backend.execute({"x": np.ones((64, 3), np.float32)}, [])
    assert process_threads() <= before
    before = process_threads()
    pool = linear(tmp_path, threads=3, parameters={"intra_op_threads": 3})
    assert process_threads() == before + 2
    pool.close()
