"""TensorRT and TensorRT-RTX on a real GPU: answers, profiles, graphs, unknown shapes, refusals, memory."""

import importlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from headrace_backends.base import InputError, LoadError, ModelSource
from headrace_backends.tensorrt.backend import TensorRtBackend
from headrace_backends.tensorrt.cuda import CudaDriver
from headrace_backends.tensorrt.library import MODULES

FLOAT = TensorProto.FLOAT
NODE, VALUE = helper.make_node, helper.make_tensor_value_info
GENERATOR = np.random.default_rng(2)
W1 = GENERATOR.standard_normal((256, 512), dtype=np.float32) / 16
W2 = GENERATOR.standard_normal((512, 64), dtype=np.float32) / 22
BUDGETS = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 5e-3, "bf16": 3e-2}


@pytest.fixture(params=list(MODULES))
def library(request):
    try:
        importlib.import_module(MODULES[request.param])
    except (ImportError, OSError) as error:
        pytest.skip(f"{request.param} does not import here: {error}")
    return request.param


def save(folder, nodes, inputs, outputs, weights=None):
    initializers = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx"
    )
    return folder / "model.onnx"


def mlp(folder):
    nodes = [NODE("MatMul", ["x", "w1"], ["h"]), NODE("Relu", ["h"], ["r"]), NODE("MatMul", ["r", "w2"], ["y"])]
    shapes = [VALUE("x", FLOAT, ["n", 256])], [VALUE("y", FLOAT, ["n", 64])]
    return save(folder, nodes, *shapes, {"w1": W1, "w2": W2})


def wanted(x):
    return np.maximum(x.astype(np.float64) @ W1, 0) @ W2


def load(path, library, **parameters):
    return TensorRtBackend.load(
        ModelSource(
            "m",
            "1",
            path,
            device="gpu:0",
            parameters={"library": library, "engine_cache": str(path.parent / "cache"), **parameters},
        )
    )


def check(backend, rows, seed, budget):
    x = np.random.default_rng(seed).standard_normal((rows, 256), dtype=np.float32)
    got = np.array(backend.execute({"x": x}, ())["y"])
    assert np.linalg.norm(got - wanted(x)) <= budget * np.linalg.norm(wanted(x))


@pytest.mark.parametrize("precision", BUDGETS)
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_answers_of_every_size_and_precision(tmp_path, library, precision, cuda_graphs):
    backend = load(mlp(tmp_path), library, precision=precision, cuda_graphs=cuda_graphs)
    assert backend.signature.max_batch_size == 32
    for turn in range(4):
        for rows in (1, 7, 32, 3):
            check(backend, rows, 100 * turn + rows, BUDGETS[precision])
    if cuda_graphs and library == "tensorrt":
        assert backend._execution.graphs == 4
    backend.close()


def test_a_profile_for_each_size_of_batch(tmp_path, library):
    backend = load(mlp(tmp_path), library, batch_profiles="1, 8", cuda_graphs=True)
    for rows in (1, 8, 9, 32, 1, 8, 9, 32, 1, 8, 9, 32):
        check(backend, rows, rows, 1e-5)
    with pytest.raises(InputError, match="and the engine takes"):
        backend.execute({"x": np.zeros((33, 256), np.float32)}, ())
    backend.close()


def test_batches_of_one_row(tmp_path, library):
    parameters = {"library": library, "engine_cache": str(tmp_path / "cache")}
    source = ModelSource("m", "1", mlp(tmp_path), device="gpu:0", max_batch_size=1, parameters=parameters)
    backend = TensorRtBackend.load(source)
    assert backend.signature.max_batch_size == 1
    check(backend, 1, 1, 1e-5)
    backend.close()


def test_outputs_whose_values_decide_their_shape(tmp_path, library):
    path = save(
        tmp_path,
        [NODE("NonZero", ["x"], ["places"])],
        [VALUE("x", FLOAT, ["n", 16])],
        [VALUE("places", TensorProto.INT64, [2, "k"])],
    )
    try:
        backend = load(path, library)
    except LoadError as error:
        pytest.skip(str(error))  # TensorRT-RTX has no such layer
    for seed in range(5):
        x = (np.random.default_rng(seed).random((1 + seed * 3, 16)) < 0.3).astype(np.float32)
        np.testing.assert_array_equal(backend.execute({"x": x}, ())["places"], np.array(np.nonzero(x)))
    backend.close()


def test_the_second_load_takes_the_engine_from_the_cache(tmp_path, library):
    path = mlp(tmp_path)
    load(path, library).close()
    backend = load(path, library)
    assert any("from the cache" in note for note in backend.notes())
    check(backend, 4, 4, 1e-5)
    backend.close()


def test_a_cached_engine_is_an_engine_file(tmp_path, library):
    load(mlp(tmp_path), library).close()
    (engine,) = (tmp_path / "cache").glob("*.plan")
    data = bytearray(engine.read_bytes())
    (tmp_path / "plain").mkdir()
    path = tmp_path / "plain" / "model.plan"
    path.write_bytes(data)
    backend = TensorRtBackend.load(ModelSource("m", "1", path, device="gpu:0", parameters={"library": library}))
    check(backend, 5, 5, 1e-5)
    backend.close()
    data[24] += 1
    path.write_bytes(data)
    with pytest.raises(LoadError, match="does not fit: it was built by"):
        TensorRtBackend.load(ModelSource("m", "1", path, device="gpu:0", parameters={"library": library}))
    data[24] -= 1
    middle = len(data) // 2
    path.write_bytes(data[:middle])
    with pytest.raises(LoadError, match=r"cannot load|cannot run here|copy it anew"):
        TensorRtBackend.load(ModelSource("m", "1", path, device="gpu:0", parameters={"library": library}))


def test_memory_comes_back(tmp_path, library):
    path = mlp(tmp_path)
    device = CudaDriver().open(0)  # keeps the context, whose own memory is not what this is about
    load(path, library).close()
    before, _ = device.memory()
    for _ in range(3):
        backend = load(path, library, cuda_graphs=True)
        for rows in (32, 1, 1, 1):
            check(backend, rows, rows, 1e-5)
        backend.close()
    del backend
    assert before - device.memory()[0] < 32 << 20
    device.close()
