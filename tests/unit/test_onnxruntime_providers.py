"""ONNX Runtime on GPUs, as far as a machine without one shows: providers, their options, and bound memory."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from headrace_backends import onnxruntime as backend_module
from headrace_backends import onnxruntime_bound, onnxruntime_libraries
from headrace_backends.base import LoadError, ModelSource
from headrace_backends.onnxruntime import OnnxRuntimeBackend
from headrace_backends.onnxruntime_bound import BoundSession
from headrace_backends.onnxruntime_providers import CPU, CUDA, TENSORRT, choose_providers

ALL = (TENSORRT, CUDA, CPU)


def source(device="gpu:1", path="model.onnx", **parameters):
    return ModelSource("m", "1", Path(path), device=device, parameters=parameters)


def chosen(available=ALL, device="gpu:1", **parameters):
    return choose_providers(source(device, **parameters), available)


def test_a_gpu_means_cuda_and_exact_floats():
    choice = chosen()
    assert choice.wanted == CUDA
    assert choice.providers == ((CUDA, {"device_id": "1", "use_tf32": "0"}), CPU)
    assert not choice.fallback


def test_the_cpu_means_the_cpu():
    assert chosen(device="cpu").providers == (CPU,)
    assert chosen(device="cpu", provider="cpu").providers == (CPU,)


def test_options_of_cuda():
    choice = chosen(gpu_mem_limit=1 << 30, cuda_graphs="true", tf32=True)
    assert choice.providers[0][1] == {
        "device_id": "1",
        "use_tf32": "1",
        "gpu_mem_limit": str(1 << 30),
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1",
    }
    assert choice.cuda_graphs


def test_tensorrt_has_cuda_behind_it():
    choice = chosen(provider="tensorrt", precision="fp16", engine_cache="/cache")
    assert [one if isinstance(one, str) else one[0] for one in choice.providers] == [TENSORRT, CUDA, CPU]
    assert choice.providers[0][1] == {
        "device_id": "1",
        "trt_fp16_enable": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": "/cache",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": "/cache",
    }
    assert choice.note is None


def test_tensorrt_in_fp32_is_told_to_be_tf32_unless_that_is_meant():
    assert "may compute matrix products and convolutions in TF32" in chosen(provider="tensorrt").note
    assert chosen(provider="tensorrt", tf32=True).note is None


@pytest.mark.parametrize(
    ("device", "parameters", "message"),
    [
        ("gpu:0", {"provider": "rocm"}, "provider is 'rocm', expected one of cpu, cuda, tensorrt"),
        ("gpu:0", {"provider": "cpu"}, "provider is 'cpu', and the device is gpu:0"),
        (
            "cpu",
            {"provider": "cuda"},
            r"provider is 'cuda', and the device is cpu; set instances: \[\{device: gpu:0\}\]",
        ),
        ("cpu", {"gpu_mem_limit": 1, "cuda_graphs": True}, "gpu_mem_limit is for GPUs.*; .*cuda_graphs is for GPUs"),
        ("gpu:0", {"gpu_mem_limit": 0}, "gpu_mem_limit is 0, expected a number of bytes from 1"),
        ("gpu:0", {"gpu_mem_limit": True}, "gpu_mem_limit is True"),
        ("gpu:0", {"precision": "fp16"}, "precision is for 'provider: tensorrt', and here it is 'cuda'"),
        (
            "gpu:0",
            {"provider": "tensorrt", "precision": "int8"},
            "precision is 'int8', expected one of fp32, fp16, bf16",
        ),
        (
            "gpu:0",
            {"provider": "tensorrt", "cuda_graphs": True},
            "cuda_graphs is for 'provider: cuda': with TensorRT, ONNX Runtime keeps one graph for all shapes",
        ),
        ("gpu:0", {"allow_cpu_fallback": "perhaps"}, "allow_cpu_fallback is 'perhaps', expected true or false"),
    ],
)
def test_what_makes_no_sense_is_refused(device, parameters, message):
    with pytest.raises(LoadError, match=message):
        chosen(device=device, **parameters)


def test_a_build_without_the_provider_is_refused_unless_the_cpu_will_do():
    with pytest.raises(LoadError, match=r"'gpu:1' needs an onnxruntime with CUDA.*force-reinstall onnxruntime-gpu"):
        chosen((CPU,))
    with pytest.raises(LoadError, match="needs an onnxruntime with TensorRT"):
        chosen((CUDA, CPU), provider="tensorrt")
    choice = chosen((CPU,), allow_cpu_fallback=True)
    assert choice.providers == (CPU,)
    assert choice.note.startswith("runs on the CPU, as parameters.allow_cpu_fallback allows: device 'gpu:1' needs")


# -- the backend ------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    """y = x + x, z = -x, of any size."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Neg", ["x"], ["z"])],
        "graph",
        [value("x", TensorProto.FLOAT, ["n", "m"])],
        [value("y", TensorProto.FLOAT, ["n", "m"]), value("z", TensorProto.FLOAT, ["n", "m"])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    return tmp_path / "model.onnx"


def on_machine(monkeypatch, make_on_gpu):
    """ONNX Runtime with providers for GPUs, which really are the CPU's; ``make_on_gpu`` is called for each of them."""
    real = onnxruntime.InferenceSession

    class Session(real):
        def __init__(self, path, options, providers, enable_fallback=1):
            assert not enable_fallback  # it would swap providers by itself, with no word said
            self.asked = providers[0] if isinstance(providers[0], str) else providers[0][0]
            if self.asked != CPU:
                make_on_gpu()
            super().__init__(path, options, providers=[CPU], enable_fallback=enable_fallback)

    monkeypatch.setattr(backend_module.onnxruntime, "get_available_providers", lambda: list(ALL))
    monkeypatch.setattr(backend_module.onnxruntime, "InferenceSession", Session)
    return Session


def test_a_gpu_that_does_not_work_falls_back_only_if_that_is_allowed(model, monkeypatch):
    """ONNX Runtime offers CUDA and runs on the CPU: so it does where the driver is missing."""
    on_machine(monkeypatch, lambda: None)
    with pytest.raises(
        LoadError, match=r"'gpu:0' does not work here: onnxruntime offers CUDAExecutionProvider and then"
    ):
        OnnxRuntimeBackend.load(source("gpu:0", model))
    backend = OnnxRuntimeBackend.load(source("gpu:0", model, allow_cpu_fallback=True))
    assert (
        "runs on the CPU, as parameters.allow_cpu_fallback allows: device 'gpu:0' does not work" in backend.notes()[0]
    )
    np.testing.assert_array_equal(backend.execute({"x": np.ones((2, 3), np.float32)}, ())["y"], 2)


def test_a_gpu_that_fails_tells_why_and_falls_back_only_if_that_is_allowed(model, monkeypatch):
    def failing():
        raise RuntimeError("CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version")

    on_machine(monkeypatch, failing)
    with pytest.raises(LoadError, match=r"cannot load 'model.onnx': CUDA failure 35: CUDA driver version is insuff"):
        OnnxRuntimeBackend.load(source("gpu:0", model))
    backend = OnnxRuntimeBackend.load(source("gpu:0", model, allow_cpu_fallback=True))
    assert "allow_cpu_fallback allows: device 'gpu:0' does not work here: CUDA failure 35" in backend.notes()[0]
    np.testing.assert_array_equal(backend.execute({"x": np.ones((2, 3), np.float32)}, ())["y"], 2)


def test_libraries_are_loaded_before_it_is_asked_which_providers_there_are(model, monkeypatch, tmp_path):
    """The providers are linked with what pip puts where no loader looks; one that is a plugin registers after that."""
    on_machine(monkeypatch, lambda: None)
    log = []
    roots = [tmp_path / "site", tmp_path / "other"]
    for root, package in zip(roots, ("cu13", "cudnn"), strict=True):
        (root / package / "lib").mkdir(parents=True)

    def imported(name):
        if name != "nvidia":
            log.append(name)
        return SimpleNamespace(__path__=list(map(str, roots)))

    def preload(directory=None):
        log.append(Path(directory).parent.name if directory else "the rest")

    monkeypatch.setattr(backend_module.onnxruntime, "preload_dlls", preload)
    monkeypatch.setattr(onnxruntime_libraries, "import_module", imported)
    monkeypatch.setattr(backend_module.onnxruntime, "get_available_providers", lambda: log.append("asked") or [CPU])
    OnnxRuntimeBackend.load(source("cpu", model))
    assert log == ["asked"]
    for parameters, loaded in (({}, []), ({"provider": "tensorrt"}, ["tensorrt"])):
        log.clear()
        OnnxRuntimeBackend.load(source("gpu:0", model, allow_cpu_fallback=True, **parameters))
        assert log == ["cu13", "cudnn", "the rest", *loaded, "asked"]


def test_libraries_that_are_not_there_are_no_error(monkeypatch, capsys):
    def missing(_):
        raise ImportError("there is none")

    monkeypatch.setattr(onnxruntime_libraries, "import_module", missing)
    told = SimpleNamespace(preload_dlls=lambda: sys.stdout.write("Failed to load libcublas\n"))
    onnxruntime_libraries.load_libraries(told, tensorrt=True)
    onnxruntime_libraries.load_libraries(SimpleNamespace(), tensorrt=True)  # an older one
    assert capsys.readouterr().out == ""


def test_tensorrt_meets_the_smallest_and_the_largest_batch_when_it_is_loaded(model, monkeypatch):
    session = on_machine(monkeypatch, lambda: None)
    monkeypatch.setattr(session, "get_providers", lambda self: [self.asked])
    rows = []

    class Bound:
        def __init__(self, *_, **__):
            pass

        def run(self, inputs):
            rows.append(len(inputs["x"]))
            return [inputs["x"] * 2, -inputs["x"]]

    monkeypatch.setattr(backend_module, "BoundSession", Bound)
    for provider, expected in (("tensorrt", [1, 48]), ("cuda", [])):
        rows.clear()
        parameters = {"provider": provider, "tf32": True}
        asked = ModelSource("m", "1", model, device="gpu:0", max_batch_size=48, parameters=parameters)
        assert OnnxRuntimeBackend.load(asked).notes() == []
        assert rows == expected


# -- bound memory -----------------------------------------------------------------------------------------


def bound(model, **keywords):
    session = onnxruntime.InferenceSession(str(model), providers=[CPU])
    return BoundSession(session, ["x"], ["y", "z"], "cpu", 0, **keywords)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_shapes_that_come_and_go_keep_their_answers(model, cuda_graphs):
    """On the CPU's memory: what is bound is the same, and an id for a graph changes nothing there."""
    session = bound(model, cuda_graphs=cuda_graphs)
    generator = np.random.default_rng(4)
    kept = []
    for turn in range(40):
        x = generator.standard_normal((1 + turn % 3, 2 + turn % 2), dtype=np.float32)
        y, z = session.run({"x": x.copy()})
        kept.append((x, y, z))
    for x, y, z in kept:  # answers are not overwritten by later ones
        np.testing.assert_array_equal(y, x + x)
        np.testing.assert_array_equal(z, -x)
    assert session.graphs == (6 if cuda_graphs else 0)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_outputs_whose_shape_their_values_decide_may_change_it(tmp_path, cuda_graphs):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("NonZero", ["x"], ["places"])],
        "graph",
        [value("x", TensorProto.FLOAT, ["n"])],
        [value("places", TensorProto.INT64, [1, "k"])],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=[CPU])
    bound_session = BoundSession(session, ["x"], ["places"], "cpu", 0, cuda_graphs=cuda_graphs)
    for values in ([1, 0, 2], [1, 1, 1], [0, 0, 0], [0, 5, 0]):
        x = np.array(values, np.float32)
        np.testing.assert_array_equal(bound_session.run({"x": x})[0], [np.flatnonzero(x)])


def test_what_cannot_be_captured_runs_without_and_is_not_tried_again(model):
    real = onnxruntime.InferenceSession(str(model), providers=[CPU])
    asked = []

    class Session:
        io_binding = real.io_binding

        def run_with_iobinding(self, binding, options):
            asked.append(options.get_run_config_entry("gpu_graph_id"))
            if asked[-1] != "-1":
                raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
            real.run_with_iobinding(binding, options)

    session = BoundSession(Session(), ["x"], ["y", "z"], "cpu", 0, cuda_graphs=True)
    for start in range(5):
        x = np.full((2, 3), start, np.float32)
        np.testing.assert_array_equal(session.run({"x": x})[0], x * 2)
    assert asked == ["-1", "1", *["-1"] * 4]


def test_memory_is_kept_for_so_many_shapes_only(model, monkeypatch):
    monkeypatch.setattr(onnxruntime_bound, "MAX_SHAPES", 4)
    session = bound(model)
    for size in range(1, 30):
        session.run({"x": np.zeros((size, 1), np.float32)})
        assert len(session._places) <= 4


def test_graphs_are_bounded_and_what_comes_later_runs_without(model, monkeypatch):
    monkeypatch.setattr(onnxruntime_bound, "MAX_SHAPES", 4)
    session = bound(model, cuda_graphs=True)
    for size in [*range(1, 10), *range(1, 10)]:
        for _ in range(3):
            x = np.full((size, 1), size, np.float32)
            np.testing.assert_array_equal(session.run({"x": x})[0], x * 2)
    assert session.graphs == 4
    assert len(session._places) <= 5
