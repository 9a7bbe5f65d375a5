"""The TensorRT backend with engines that TensorRT-RTX builds here, without a GPU; what runs them is made of numpy."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from unit.tensorrt_fakes import FakeDevice, FakeEngine, FakeTensor

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import BackendUnavailable, InputError, LoadError, ModelSource
from headrace_backends.registry import resolve
from headrace_backends.tensorrt import backend as module
from headrace_backends.tensorrt import cuda
from headrace_backends.tensorrt.builder import PRECISIONS, BuildOptions, build, parse_onnx, read_options
from headrace_backends.tensorrt.engine_cache import EngineCache, default_folder, engine_key, model_hash
from headrace_backends.tensorrt.engine_file import read_header
from headrace_backends.tensorrt.library import Library, find_library
from headrace_backends.tensorrt.profiles import Range, derive

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'headrace[tensorrt-rtx]'")

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
NODE, VALUE = helper.make_node, helper.make_tensor_value_info
WEIGHTS = np.random.default_rng(5).standard_normal((6, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def rtx():
    return find_library("tensorrt-rtx")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "headrace" / "engines"


def save(folder, nodes, inputs, outputs, weights=None, opset=21):
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def linear(folder, weights=WEIGHTS, rows="n"):
    return save(
        folder,
        [NODE("MatMul", ["x", "w"], ["y"])],
        [VALUE("x", FLOAT, [rows, 6])],
        [VALUE("y", FLOAT, [rows, 3])],
        {"w": weights},
    )


def built(library, path, precision="fp32", *, capability=None, max_batch_size=None):
    parsed = parse_onnx(library, path, precision)
    options = read_options(
        {"precision": precision, **({"compute_capability": capability} if capability else {})}, library
    )
    return build(library, parsed, options, derive(parsed.inputs, max_batch_size, {}).profiles)[0]


# -- real builds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_engines_are_built_in_every_precision(rtx, tmp_path, precision):
    engine = built(rtx, linear(tmp_path), precision)
    header = read_header(engine)
    assert (header.library, header.version_text, header.nbytes) == ("tensorrt-rtx", rtx.version, len(engine))
    assert (8, 9) in header.targets
    assert header.others


@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "12.0", "8.6, 8.9"])
def test_engines_are_built_for_gpus_that_are_not_here(rtx, tmp_path, capability):
    header = read_header(built(rtx, linear(tmp_path), "fp16", capability=capability))
    assert ", ".join(f"{major}.{minor}" for major, minor in header.targets) == capability
    assert not header.others


def test_a_capability_that_the_library_has_not_is_told_with_those_that_it_has(rtx):
    with pytest.raises(LoadError, match=r"cannot build for compute capability 9\.0; it can for 7\.5, 8\.0, 8\.6"):
        read_options({"compute_capability": "9.0"}, rtx)


def test_quantised_models_are_built(rtx, tmp_path):
    nodes = [
        NODE("QuantizeLinear", ["x", "s", "z"], ["q"]),
        NODE("DequantizeLinear", ["q", "s", "z"], ["d"]),
        NODE("DequantizeLinear", ["w", "s", "z"], ["dw"]),
        NODE("MatMul", ["d", "dw"], ["y"]),
    ]
    weights = {"s": np.float32(0.02), "z": np.int8(0), "w": np.ones((64, 64), np.int8)}
    path = save(tmp_path, nodes, [VALUE("x", FLOAT, ["n", 64])], [VALUE("y", FLOAT, ["n", 64])], weights)
    assert read_header(built(rtx, path, "fp32"))


def test_the_parser_says_what_is_wrong_and_where(rtx, tmp_path):
    shapes = [VALUE("x", FLOAT, ["n"])], [VALUE("y", FLOAT, ["n"])]
    path = save(tmp_path, [NODE("Nonesuch", ["x"], ["y"], name="third")], *shapes)
    with pytest.raises(LoadError, match=r"TensorRT-RTX .* cannot read 'model\.onnx': node third 'Nonesuch'"):
        parse_onnx(rtx, path, "fp32")
    path.write_bytes(b"\xff\xff\xff")
    with pytest.raises(LoadError, match="Failed to parse the ONNX model"):
        parse_onnx(rtx, path, "fp32")
    path.write_bytes(b"")
    with pytest.raises(LoadError, match=r"cannot read 'model\.onnx': it has no graph with outputs"):
        parse_onnx(rtx, path, "fp32")


def test_types_that_cannot_be_served_and_values_that_make_shapes_are_refused(rtx, tmp_path):
    path = save(
        tmp_path,
        [NODE("Reshape", ["x", "to"], ["y"])],
        [VALUE("x", FLOAT, ["n", 6]), VALUE("to", INT64, [2])],
        [VALUE("y", FLOAT, None)],
    )
    with pytest.raises(LoadError, match=r"the values of \['to'\] decide about shapes"):
        parse_onnx(rtx, path, "fp32")


def test_a_network_that_the_shapes_do_not_suit_is_refused_in_the_librarys_words(rtx, tmp_path):
    path = save(
        tmp_path,
        [NODE("Conv", ["x", "w"], ["y"])],
        [VALUE("x", FLOAT, ["n", 1, "h", "v"])],
        [VALUE("y", FLOAT, None)],
        {"w": np.ones((1, 1, 5, 5), np.float32)},
    )
    parsed = parse_onnx(rtx, path, "fp32")
    wrong = {"x": Range((1, 2, 8, 8), (1, 2, 8, 8), (1, 2, 8, 8))}  # two channels
    with pytest.raises(LoadError, match=r"x \[1, 2, 8, 8\] to \[1, 2, 8, 8\]\)?: .*\w"):
        build(rtx, parsed, BuildOptions(), [wrong])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"precision": "int8"}, "precision is 'int8', expected one of fp32, tf32, fp16, bf16; int8 and fp8 come from"),
        ({"builder_level": 6}, "builder_level is 6, expected 0 to 5"),
        ({"builder_level": "fast"}, "builder_level is 'fast', expected 0 to 5"),
        ({"workspace_bytes": -1}, "workspace_bytes is -1, expected a number of bytes"),
        ({"precision": "x", "builder_level": True}, "precision.*; .*builder_level"),
    ],
)
def test_options_are_checked(rtx, parameters, message):
    with pytest.raises(LoadError, match=message):
        read_options(parameters, rtx)


def test_the_target_is_the_full_librarys_own_gpu():
    full = Library("tensorrt", SimpleNamespace(), "10.13.3.9")
    with pytest.raises(LoadError, match="compute_capability is for TensorRT-RTX"):
        read_options({"compute_capability": "8.9"}, full)


# -- the cache --------------------------------------------------------------------------------------------


def test_the_key_changes_with_everything_that_the_engine_depends_on(rtx, tmp_path):
    path = linear(tmp_path)
    profiles = [{"x": Range((1, 6), (8, 6), (32, 6))}]
    other_profiles = [{"x": Range((1, 6), (8, 6), (64, 6))}]
    other_version = Library(rtx.name, rtx.module, "1.8.0.1")
    full = Library("tensorrt", rtx.module, rtx.version)
    model = model_hash(path)
    keys = [
        engine_key(model, rtx, "A 8.9", BuildOptions(), profiles),
        engine_key(model, other_version, "A 8.9", BuildOptions(), profiles),
        engine_key(model, full, "A 8.9", BuildOptions(), profiles),
        engine_key(model, rtx, "A 8.6", BuildOptions(), profiles),
        engine_key(model, rtx, "A 8.9", BuildOptions("fp16"), profiles),
        engine_key(model, rtx, "A 8.9", BuildOptions(level=5), profiles),
        engine_key(model, rtx, "A 8.9", BuildOptions(workspace_bytes=1), profiles),
        engine_key(model, rtx, "A 8.9", BuildOptions(capabilities=((8, 9),)), profiles),
        engine_key(model, rtx, "A 8.9", BuildOptions(), other_profiles),
    ]
    linear(tmp_path, WEIGHTS + 1)
    keys.append(engine_key(model_hash(path), rtx, "A 8.9", BuildOptions(), profiles))
    (tmp_path / "weights.bin").write_bytes(b"weights in a file of their own")
    keys.append(engine_key(model_hash(path), rtx, "A 8.9", BuildOptions(), profiles))
    (tmp_path / "model.plan").write_bytes(b"another model beside it")
    assert keys[-1] == engine_key(model_hash(path), rtx, "A 8.9", BuildOptions(), profiles)
    assert len(set(keys)) == len(keys)
    assert keys[0] == engine_key(model, rtx, "A 8.9", BuildOptions(), profiles)


def test_engines_come_back_and_damaged_ones_do_not(tmp_path):
    cache = EngineCache(tmp_path / "engines")
    with cache.building("k"):
        assert cache.get("k") == (None, None)
        cache.put("k", b"engine", {"precision": "fp16"})
    assert cache.get("k") == (b"engine", None)
    assert json.loads((tmp_path / "engines" / "k.json").read_text())["precision"] == "fp16"
    (tmp_path / "engines" / "k.plan").write_bytes(b"enginE")
    assert cache.get("k") == (None, "the cached engine k.plan is damaged")
    (tmp_path / "engines" / "k.json").write_text("{")
    data, wrong = cache.get("k")
    assert data is None
    assert "cannot be read" in wrong
    (tmp_path / "engines" / "k.json").unlink()
    assert cache.get("k") == (None, None)


def test_the_engines_used_longest_ago_make_room(tmp_path):
    import os

    cache = EngineCache(tmp_path, limit_bytes=25)
    for age, key in ((300, "a"), (200, "b")):
        cache.put(key, bytes(10), {})
        os.utime(tmp_path / f"{key}.plan", (1_000_000 - age,) * 2)
    cache.get("a")  # used now
    cache.put("c", bytes(10), {})
    assert {one.stem for one in tmp_path.glob("*.plan")} == {"a", "c"}
    assert {one.stem for one in tmp_path.glob("*.json")} == {"a", "c"}


# -- the backend ------------------------------------------------------------------------------------------


class FakeRuntime:
    """In place of the library's, which wants a GPU to load engines: takes real ones, and multiplies by WEIGHTS."""

    invalid: tuple = ()
    device: FakeDevice
    tensors: tuple
    refuses = False

    def __init__(self, log):
        self.log = log
        self.engine_host_code_allowed = False

    def get_engine_validity(self, data):
        import tensorrt_rtx as trt

        bits = 0
        for name in self.invalid:
            bits |= int(getattr(trt.EngineInvalidityDiagnostics, name))
        return (trt.EngineValidity.INVALID if self.invalid else trt.EngineValidity.VALID), bits

    def deserialize_cuda_engine(self, data):
        assert read_header(data)
        if self.refuses:
            self.log.errors.append("Error Code 1: Serialization")
            return None
        library = Library("tensorrt-rtx", self.module, "1")
        return FakeEngine(
            self.device, library, self.tensors, lambda at: {"y": at["x"] @ WEIGHTS}, lambda to: {"y": (to["x"][0], 3)}
        )


@pytest.fixture
def device():
    return FakeDevice()


@pytest.fixture
def on_fake_gpu(rtx, device, monkeypatch):
    """A loader with the real library, but for its runtime."""
    runtime = type("Runtime", (FakeRuntime,), {"device": device, "module": rtx.module})
    runtime.tensors = (
        FakeTensor("x", "INPUT", (-1, 6), ((1, 6), (32, 6), (32, 6))),
        FakeTensor("y", "OUTPUT", (-1, 3)),
    )
    library = Library(rtx.name, SimpleNamespace(**{**vars(rtx.module), "Runtime": runtime}), rtx.version)

    class Driver:
        def open(self, index):
            assert index == 0
            return device

    monkeypatch.setattr(module, "find_library", lambda wanted: library)
    monkeypatch.setattr(module, "CudaDriver", Driver)

    def load(path, **keywords):
        return resolve("tensorrt").load(ModelSource("m", "1", Path(path), **keywords))

    load.runtime = runtime
    return load


def test_an_onnx_file_is_built_served_and_found_in_the_cache_next_time(on_fake_gpu, device, tmp_path, cache_folder):
    (tmp_path / "m").mkdir()
    path = linear(tmp_path / "m")
    backend = on_fake_gpu(path, parameters={"precision": "fp16"}, device="gpu:0")
    assert backend.signature.inputs == (TensorSpec("x", DataType.FP32, (-1, 6)),)
    assert backend.signature.max_batch_size == 32
    x = np.random.default_rng(1).standard_normal((4, 6), dtype=np.float32)
    np.testing.assert_allclose(backend.execute({"x": x}, ())["y"], x @ WEIGHTS, rtol=1e-6)
    (note,) = backend.notes()
    assert "built by TensorRT-RTX" in note
    backend.close()
    assert device.empty
    assert device.closed
    assert len(list(cache_folder.glob("*.plan"))) == 1
    again = on_fake_gpu(path, parameters={"precision": "fp16"}, device="gpu:0")
    assert "from the cache" in again.notes()[0]
    other = on_fake_gpu(path, parameters={"precision": "bf16"}, device="gpu:0")
    assert "built by" in other.notes()[0]


def test_a_damaged_engine_in_the_cache_is_built_anew(on_fake_gpu, tmp_path, cache_folder):
    (tmp_path / "m").mkdir()
    path = linear(tmp_path / "m")
    on_fake_gpu(path)
    (cached,) = cache_folder.glob("*.plan")
    good = cached.read_bytes()
    cached.write_bytes(good[:-1])
    notes = on_fake_gpu(path).notes()
    assert any("is damaged: built anew" in note for note in notes)
    assert any("on gpu:0" in note for note in notes)  # nobody had said which
    assert len(cached.read_bytes()) == len(good)


def test_a_folder_that_cannot_be_written_costs_only_the_cache(on_fake_gpu, tmp_path):
    path = linear(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    backend = on_fake_gpu(path, parameters={"engine_cache": str(tmp_path / "file" / "below")}, device="gpu:0")
    assert "engines cannot be cached" in backend.notes()[0]
    assert on_fake_gpu(path, parameters={"engine_cache": "off"}, device="gpu:0").notes() == []
    assert not default_folder().exists()


def test_an_engine_that_cannot_be_kept_is_not_built_twice(on_fake_gpu, tmp_path, monkeypatch):
    def full(self, key, data, facts):
        raise OSError(28, "No space left on device")

    builds = []
    build_engine = module.build_engine
    monkeypatch.setattr(EngineCache, "put", full)
    monkeypatch.setattr(module, "build_engine", lambda *given: builds.append(given) or build_engine(*given))
    notes = on_fake_gpu(linear(tmp_path), device="gpu:0").notes()
    assert len(builds) == 1
    assert "built by TensorRT-RTX" in notes[0]
    assert "engines cannot be cached ([Errno 28] No space left on device)" in notes[1]


def test_an_engine_that_takes_no_single_row_is_not_merged_unproved(on_fake_gpu, tmp_path):
    on_fake_gpu.runtime.tensors = (
        FakeTensor("x", "INPUT", (-1, 6), ((4, 6), (8, 6), (8, 6))),
        FakeTensor("y", "OUTPUT", (-1, 3)),
    )
    backend = on_fake_gpu(linear(tmp_path), device="gpu:0")
    assert backend.signature.max_batch_size == 0
    assert backend.notes()[-1] == "requests are not merged into batches: the engine takes no fewer than 4 rows"


def test_an_engine_file_is_taken_as_it_is(on_fake_gpu, rtx, tmp_path):
    path = tmp_path / "model.plan"
    path.write_bytes(built(rtx, linear(tmp_path), capability="8.9"))
    backend = on_fake_gpu(path, device="gpu:0", max_batch_size=16)
    assert backend.signature.max_batch_size == 16
    with pytest.raises(LoadError, match=r"parameters precision are for building, and 'model\.plan' is built already"):
        on_fake_gpu(path, parameters={"precision": "fp16"})
    with pytest.raises(LoadError, match="max_batch_size is 64, and the engine was built for at most 32 rows"):
        on_fake_gpu(path, max_batch_size=64)


def test_a_stale_engine_says_how_to_come_by_another_or_is_built_from_the_onnx_beside_it(on_fake_gpu, rtx, tmp_path):
    engine = bytearray(built(rtx, linear(tmp_path)))
    engine[25] += 1  # the minor version
    path = tmp_path / "model.plan"
    path.write_bytes(engine)
    assert "is stale: it was built by TensorRT-RTX 1." in on_fake_gpu(path, device="gpu:0").notes()[0]
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(
        LoadError, match=r"'model\.plan' does not fit: it was built by .*; build it anew with TensorRT-RTX"
    ):
        on_fake_gpu(path)


def test_an_engine_for_other_gpus_is_refused_before_it_is_loaded(on_fake_gpu, rtx, device, tmp_path):
    path = tmp_path / "model.plan"
    path.write_bytes(built(rtx, linear(tmp_path), capability="12.0"))
    (tmp_path / "model.onnx").unlink()
    on_fake_gpu.runtime.refuses = True
    with pytest.raises(LoadError, match=r"built for compute capability 12\.0, and this GPU has 8\.9"):
        on_fake_gpu(path)
    assert device.closed


def test_what_the_library_finds_wrong_is_told(on_fake_gpu, device, tmp_path, cache_folder):
    path = linear(tmp_path)
    on_fake_gpu.runtime.invalid = ("UNSUPPORTED_CC", "OLD_CUDA_DRIVER")
    with pytest.raises(
        LoadError,
        match=r"'model\.onnx' cannot run here: unsupported cc, old cuda driver; the engine was built here, on Fake "
        r"GPU \(compute capability 8\.9\): another library may do",
    ):
        on_fake_gpu(path)
    engine = tmp_path / "model.plan"
    engine.write_bytes(next(cache_folder.glob("*.plan")).read_bytes())
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(LoadError, match=r"'model\.plan' cannot run here: .*; build it anew with TensorRT-RTX"):
        on_fake_gpu(engine)
    (tmp_path / "elsewhere").rename(path)
    on_fake_gpu.runtime.invalid = ()
    on_fake_gpu.runtime.refuses = True
    with pytest.raises(LoadError, match=r"cannot load 'model\.onnx' \(it was built by version .*\): Error Code 1: Ser"):
        on_fake_gpu(path)
    assert device.empty


def test_a_library_that_makes_no_runtime_says_why(on_fake_gpu, device, monkeypatch, tmp_path):
    def null(self, log):
        log.errors.append("CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(on_fake_gpu.runtime, "__init__", null)
    with pytest.raises(LoadError, match=r"TensorRT-RTX .* cannot run here: CUDA initialization failure with error: 35"):
        on_fake_gpu(linear(tmp_path), max_batch_size=8)
    assert device.closed


def test_a_gpu_that_engines_are_not_built_for_by_themselves_has_one_of_its_own(on_fake_gpu, device, tmp_path):
    path = linear(tmp_path)
    headers = []
    runtime = on_fake_gpu.runtime
    real = runtime.deserialize_cuda_engine
    runtime.deserialize_cuda_engine = lambda self, data: headers.append(read_header(data)) or real(self, data)
    for capability in ((7, 5), (9, 0)):
        device.gpu = replace(device.gpu, capability=capability)
        on_fake_gpu(path, max_batch_size=8, parameters={"precision": "fp16"}).close()
    assert headers[0].targets == ((7, 5),)
    assert headers[1].others


def test_an_engine_that_cannot_run_on_this_gpu_is_not_served(on_fake_gpu, device, monkeypatch, tmp_path):
    """TensorRT-RTX compiles kernels for its GPU in a context: an engine that loads may yet be one for others."""
    monkeypatch.setattr(FakeEngine, "create_execution_context", lambda *_: None)
    with pytest.raises(LoadError, match=r"TensorRT-RTX .* cannot make an execution context: it does not say why"):
        on_fake_gpu(linear(tmp_path), max_batch_size=8)
    assert device.empty
    assert device.closed


def test_requests_are_merged_only_where_rows_are_their_own(on_fake_gpu, tmp_path):
    path = linear(tmp_path)
    on_fake_gpu.runtime.deserialize_cuda_engine = lambda self, data: FakeEngine(
        self.device,
        Library("tensorrt-rtx", self.module, "1"),
        self.tensors,
        lambda at: {"y": (at["x"] - at["x"].mean()) @ WEIGHTS},
        lambda to: {"y": (to["x"][0], 3)},
    )
    backend = on_fake_gpu(path, device="gpu:0")
    assert backend.signature.max_batch_size == 0
    assert "requests are not merged into batches" in backend.notes()[-1]


def test_kernels_that_are_replaced_meanwhile_do_not_keep_rows_apart(on_fake_gpu, tmp_path, rtx):
    """TensorRT-RTX compiles others in the background, which round otherwise."""
    none = rtx.module.DynamicShapesKernelSpecializationStrategy.NONE
    made = []

    class Engine(FakeEngine):
        def computed(self, at):
            made.append(self)
            replaced = self.configs[-1].dynamic_shapes_kernel_specialization_strategy != none
            return {"y": at["x"] @ WEIGHTS + (1e-2 * len(made) if replaced else 0)}

    on_fake_gpu.runtime.deserialize_cuda_engine = lambda self, data: Engine(
        self.device, Library("tensorrt-rtx", self.module, "1"), self.tensors, None, lambda to: {"y": (to["x"][0], 3)}
    )
    Engine.compute = property(Engine.computed.__get__, lambda *_: None)
    backend = on_fake_gpu(linear(tmp_path), device="gpu:0")
    assert backend.signature.max_batch_size == 32
    assert [config.dynamic_shapes_kernel_specialization_strategy == none for config in made[0].configs] == [False, True]
    backend.close()
    assert on_fake_gpu.runtime.device.empty


def test_an_engine_for_one_number_of_rows_is_served_with_that(on_fake_gpu, tmp_path):
    """TensorRT tells a dimension whose range is one size as that size."""
    on_fake_gpu.runtime.tensors = (
        FakeTensor("x", "INPUT", (1, 6), ((1, 6), (1, 6), (1, 6))),
        FakeTensor("y", "OUTPUT", (1, 3)),
    )
    backend = on_fake_gpu(linear(tmp_path), device="gpu:0", max_batch_size=1)
    assert backend.signature.max_batch_size == 1
    assert [spec.shape for spec in (*backend.signature.inputs, *backend.signature.outputs)] == [(-1, 6), (-1, 3)]
    np.testing.assert_allclose(
        backend.execute({"x": np.ones((1, 6), np.float32)}, ())["y"][0], WEIGHTS.sum(0), rtol=1e-5
    )


def test_configured_tensors_are_held_against_the_engine(on_fake_gpu, tmp_path):
    path = linear(tmp_path)
    with pytest.raises(LoadError, match="input 'x' is configured as FP16; the file has FP32"):
        on_fake_gpu(path, inputs=(TensorSpec("x", DataType.FP16, (-1, 6)),))
    backend = on_fake_gpu(path, device="gpu:0")
    with pytest.raises(InputError, match=r"input 'x' has shape \[33, 6\], and the engine takes"):
        backend.execute({"x": np.zeros((33, 6), np.float32)}, ())


def test_unknown_parameters_and_no_driver(rtx, tmp_path, monkeypatch):
    load = resolve("tensorrt").load
    path = linear(tmp_path)
    with pytest.raises(LoadError, match="the backend tensorrt has no parameter 'fp16'; it has library, cuda_graphs"):
        load(ModelSource("m", "1", path, parameters={"fp16": True}))
    monkeypatch.setattr(cuda.CudaDriver.__init__, "__defaults__", ("libcuda-that-is-not-here.so.1",))
    with pytest.raises(BackendUnavailable, match="there is no NVIDIA driver here"):
        load(ModelSource("m", "1", path))


# -- as the full library does it --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # RTX says that it makes no use of them
def test_what_one_build_measured_is_given_to_the_next(on_fake_gpu, rtx, tmp_path, cache_folder, monkeypatch):
    """TensorRT-RTX's module under the full library's name: it takes and gives timing caches as that does."""
    as_full = SimpleNamespace(**{**vars(rtx.module), "Runtime": on_fake_gpu.runtime})
    monkeypatch.setattr(module, "find_library", lambda wanted: Library("tensorrt", as_full, rtx.version))
    given = []
    real = module.build
    monkeypatch.setattr(module, "build", lambda *arguments: given.append(arguments[-1]) or real(*arguments))
    (tmp_path / "m").mkdir()
    path = linear(tmp_path / "m")
    on_fake_gpu(path, device="gpu:0")
    (timing,) = cache_folder.glob("*.timing")
    assert timing.stat().st_size > 0
    on_fake_gpu(path, device="gpu:0", parameters={"precision": "tf32"})
    assert given[0] is None
    assert given[1]
    timing.write_bytes(b"damaged")
    on_fake_gpu(path, device="gpu:0", parameters={"precision": "bf16"})
    assert given[2] == b"damaged"
    assert timing.read_bytes() != b"damaged"
