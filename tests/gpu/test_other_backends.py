"""ONNX Runtime and PyTorch on a real GPU give what they give on the CPU."""

import shutil
from copy import deepcopy

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from headrace.core.model import Signature
from headrace_backends.base import LoadError, ModelSource
from headrace_backends.onnxruntime import OnnxRuntimeBackend
from headrace_backends.optimize import cuda_headers
from headrace_backends.optimize.cuda_headers import NoCudaHeaders
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.steps.base import StepTask

VALUE, NODE = helper.make_tensor_value_info, helper.make_node
WEIGHTS = np.random.default_rng(6).standard_normal((64, 32), dtype=np.float32)


@pytest.fixture
def model(tmp_path):
    graph = helper.make_graph(
        [NODE("MatMul", ["x", "w"], ["h"]), NODE("Relu", ["h"], ["y"])],
        "graph",
        [VALUE("x", TensorProto.FLOAT, ["n", 64])],
        [VALUE("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    return tmp_path / "model.onnx"


@pytest.mark.parametrize(
    "parameters", [{}, {"cuda_graphs": True}, {"gpu_mem_limit": 1 << 28}, {"provider": "tensorrt"}], ids=str
)
def test_onnxruntime(model, parameters):
    wanted = "TensorrtExecutionProvider" if "provider" in parameters else "CUDAExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has no {wanted}")
    try:
        backend = OnnxRuntimeBackend.load(
            ModelSource("m", "1", model, device="gpu:0", threads=2, parameters=parameters)
        )
    except LoadError as error:
        if "install TensorRT" not in str(error):  # which ONNX Runtime offers whether it is there or not
            raise
        pytest.skip(str(error))
    assert backend._session.get_providers()[0] == wanted
    assert backend.signature.max_batch_size == 32
    for turn in range(4):
        for rows in (1, 32, 5):
            x = np.random.default_rng(turn * 100 + rows).standard_normal((rows, 64), dtype=np.float32)
            near = 2e-2 if "provider" in parameters else 1e-4  # TensorRT takes TF32 there
            np.testing.assert_allclose(
                backend.execute({"x": x}, ())["y"], np.maximum(x @ WEIGHTS, 0), rtol=near, atol=near
            )
    backend.close()


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_onnxruntime_with_outputs_whose_values_decide_their_shape(tmp_path, cuda_graphs):
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDAExecutionProvider")
    nodes = [NODE("NonZero", ["x"], ["places"]), NODE("Add", ["x", "x"], ["y"])]
    outputs = [VALUE("places", TensorProto.INT64, [2, "k"]), VALUE("y", TensorProto.FLOAT, ["n", 16])]
    graph = helper.make_graph(nodes, "graph", [VALUE("x", TensorProto.FLOAT, ["n", 16])], outputs)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    parameters = {"cuda_graphs": cuda_graphs}
    source = ModelSource("m", "1", tmp_path / "model.onnx", device="gpu:0", threads=2, parameters=parameters)
    backend = OnnxRuntimeBackend.load(source)
    for seed in range(12):
        x = (np.random.default_rng(seed).random((1 + seed % 2, 16)) < 0.3).astype(np.float32)
        answer = backend.execute({"x": x}, ())
        np.testing.assert_array_equal(answer["places"], np.array(np.nonzero(x)))
        np.testing.assert_array_equal(answer["y"], x * 2)
    backend.close()


def linear(device):
    """A layer on the CPU, and the same on the device as a program for batches of up to 64 rows."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")
    torch.manual_seed(3)
    layer = torch.nn.Linear(64, 32).eval()
    rows = {"input": {0: torch.export.Dim("n", max=64)}}
    program = torch.export.export(deepcopy(layer).to(device), (torch.zeros(2, 64, device=device),), dynamic_shapes=rows)
    return torch, layer, program


def compare(torch, layer, path, tolerance=1e-4, device="gpu:0", **parameters):
    from headrace_backends.torch import TorchBackend

    backend = TorchBackend.load(ModelSource("m", "1", path, device=device, threads=2, parameters=parameters))
    (name,) = [spec.name for spec in backend.signature.inputs]
    for rows in (1, 32, 5, 1, 8):
        x = np.random.default_rng(rows).standard_normal((rows, 64), dtype=np.float32)
        (got,) = backend.execute({name: x}, ()).values()
        np.testing.assert_allclose(got, layer(torch.from_numpy(x)).detach().numpy(), rtol=tolerance, atol=tolerance)
    backend.close()
    return backend.notes()


def find_headers(torch):
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        pytest.skip(f"torch {torch.__version__} loads no package that is unpacked already: 2.13 is the first that does")
    try:
        cuda_headers.find_for(torch.version.cuda)
    except NoCudaHeaders as error:
        pytest.skip(str(error))


def test_torch(tmp_path):
    torch, layer, program = linear("cpu")
    torch.export.save(program, tmp_path / "model.pt2")
    compare(torch, layer, tmp_path / "model.pt2")


def test_torch_graphs(tmp_path):
    torch, layer, program = linear("cpu")
    torch.export.save(program, tmp_path / "model.pt2")
    notes = compare(torch, layer, tmp_path / "model.pt2", cuda_graphs=True, graph_batch_sizes="1, 8")
    assert "CUDA graphs for batches of 1, 8, 32 rows" in notes
    compare(torch, layer, tmp_path / "model.pt2", tolerance=2e-2, cuda_graphs=True, autocast="fp16")


def test_torch_compiled_graphs(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile with")
    torch, layer, program = linear("cpu")
    torch.export.save(program, tmp_path / "model.pt2")
    compare(torch, layer, tmp_path / "model.pt2", compile=True, compile_mode="reduce-overhead")


def test_torch_program_of_a_gpu(tmp_path):
    torch, layer, program = linear("cuda")
    torch.export.save(program, tmp_path / "model.pt2")
    compare(torch, layer, tmp_path / "model.pt2")
    compare(torch, layer, tmp_path / "model.pt2", device="cpu")


def test_torch_module_that_waits_for_the_gpu_is_not_captured(tmp_path):
    torch, _, _ = linear("cpu")
    from headrace_backends.torch import TorchBackend

    class Waiting(torch.nn.Module):
        def forward(self, x):
            return x * x.max().item()

    rows = {"x": {0: torch.export.Dim("n", max=64)}}
    torch.export.save(torch.export.export(Waiting(), (torch.ones(2, 3),), dynamic_shapes=rows), tmp_path / "model.pt2")
    source = ModelSource("m", "1", tmp_path / "model.pt2", "gpu:0", max_batch_size=8, parameters={"cuda_graphs": True})
    with pytest.raises(
        LoadError, match=r"it cannot be captured as a CUDA graph: .*not permitted when stream is capturing"
    ):
        TorchBackend.load(source)


def test_torch_package(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile a package with")
    torch, layer, program = linear("cuda")
    find_headers(torch)
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs={"compile_threads": 1})
    compare(torch, layer, tmp_path / "model.pt2", allow_native_code=True)
    compare(torch, layer, tmp_path / "model.pt2", allow_native_code=True, cuda_graphs=True)


def test_torch_package_of_the_optimiser(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile with")
    torch, layer, program = linear("cpu")
    find_headers(torch)
    torch.export.save(program, tmp_path / "program.pt2")
    from headrace_backends.optimize.steps import aot_inductor

    (tmp_path / "made").mkdir()
    nothing = Signature((), ()), Examples((), (), "")
    path = aot_inductor.apply(StepTask(tmp_path / "program.pt2", tmp_path / "made", *nothing, device="gpu:0"))
    compare(torch, layer, path, allow_native_code=True)
    compare(torch, layer, path, allow_native_code=True, cuda_graphs=True)
