"""The torch backend on GPUs, as far as that goes without one: the CPU stands for it, or a device without memory."""

import re
import zipfile
from functools import partial

import numpy as np
import pytest

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import DeviceLost, InputError, LoadError, ModelSource
from headrace_backends.failures import device_lost
from headrace_backends.specs import FoundTensor

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'headrace[torch]'")
from headrace_backends import torch as backend_module  # noqa: E402 only where torch is
from headrace_backends import torch_package, torch_running  # noqa: E402 only where torch is
from headrace_backends.torch import TorchBackend, torch_device  # noqa: E402
from headrace_backends.torch_exported import load_exported, on_device, read_exported  # noqa: E402
from headrace_backends.torch_graphs import refuse_free_sizes  # noqa: E402
from headrace_backends.torch_model import TorchModel  # noqa: E402
from headrace_backends.torch_running import Running  # noqa: E402

FP32 = DataType.FP32
CPU, META = torch.device("cpu"), torch.device("meta")  # the latter has shapes and no memory
ASSERT = "CUDA error: device-side assert triggered"
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"
ROW = {"x": np.ones((1, 3), np.float32)}


def spec(name, *shape):
    return FoundTensor(TensorSpec(name, FP32, shape))


def backend_of(call, running=None, most=8, shape=(-1, 3)):
    """A backend that takes the CPU for a GPU."""
    model = TorchModel(torch.nn.Identity(), call, [spec("x", *shape)], [spec("y", *shape)])
    backend = TorchBackend(CPU, model, most, running or Running())
    backend._on_cpu = False
    return model, backend


def says(message):
    def fail(*_):
        raise RuntimeError(message)

    return fail


# ---- a GPU that is lost ----


def test_what_a_failed_kernel_leaves_is_told_by_the_copies(monkeypatch):
    model, backend = backend_of(lambda module, tensors: [tensors[0]])
    assert backend._takes(ROW)
    monkeypatch.setattr(backend_module, "array_of", says(ASSERT))
    monkeypatch.setattr(
        backend_module, "device_lost", partial(device_lost, is_well=lambda: False)
    )  # as its driver says
    with pytest.raises(DeviceLost, match=ASSERT):
        backend.execute(ROW, ())
    with pytest.raises(DeviceLost):  # made-up inputs that it refuses are one thing, a GPU that is lost is another
        backend._takes(ROW)
    with pytest.raises(DeviceLost):
        backend._refuse_memory(ModelSource("m", "1", "m.pt2"), model, says("not read again"))
    with pytest.raises(DeviceLost):
        torch_running.warmed(lambda: backend.execute(ROW, ()), "compiled")


def test_memory_that_is_full_is_no_loss(monkeypatch):
    _, backend = backend_of(lambda module, tensors: [tensors[0]])
    monkeypatch.setattr(backend_module, "array_of", says(FULL))
    with pytest.raises(RuntimeError, match=FULL):
        backend.execute(ROW, ())


def test_what_fails_in_a_package_on_a_gpu_is_not_its_input_s_fault():
    class Loader:
        run = staticmethod(says("run_func_(...) API call failed at model_container_runner.cpp, line 145"))

    for device, fault in (("cpu", InputError), ("cuda", RuntimeError)):
        call = torch_package._loader_call([0], 1, torch.device(device))
        _, backend = backend_of(lambda _, tensors, call=call: call(Loader(), tensors))
        with pytest.raises(fault, match="API call failed") as raised:
            backend.execute(ROW, ())
        assert type(raised.value) is fault


# ---- where it is ----


def test_the_gpu_is_the_thread_s_own_from_then_on(monkeypatch):
    chosen = []
    for name, stand_in in (("is_available", lambda: True), ("device_count", lambda: 3), ("set_device", chosen.append)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert torch_device(ModelSource("m", "1", "m.pt2", device="gpu:2")) == torch.device("cuda", 2)
    assert chosen == [torch.device("cuda", 2)]
    with pytest.raises(LoadError, match="'gpu:3' is not here"):
        torch_device(ModelSource("m", "1", "m.pt2", device="gpu:3"))
    assert torch_device(ModelSource("m", "1", "m.pt2")) == CPU
    assert len(chosen) == 1


class Shifted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x):
        return self.layer(x) + self.shift + torch.arange(2, device=x.device)


def exported(device=CPU):
    module, rows = Shifted().to(device), torch.zeros(2, 3, device=device)
    return torch.export.export(module, (rows,), dynamic_shapes=({0: torch.export.Dim("n", max=64)},))


def test_a_program_is_moved_from_where_it_was_exported(tmp_path):
    torch.export.save(exported(), tmp_path / "model.pt2")
    source = ModelSource("m", "1", tmp_path / "model.pt2")
    program = load_exported(source)
    assert on_device(program, CPU) is program
    model = read_exported(source, META)
    assert [one.spec.shape for one in (*model.inputs, *model.outputs)] == [(-1, 3), (-1, 2)]
    (answer,) = model.call(model.module, [torch.zeros(5, 3, device=META)])
    assert (answer.device, answer.shape) == (META, (5, 2))
    with pytest.raises(NotImplementedError, match="meta"):  # whose memory nobody can copy: it would be moved
        on_device(exported(META), CPU)


def test_what_keeps_autocast_out_keeps_out_that_of_the_device_it_is_moved_to():
    class Careful(torch.nn.Module):
        def forward(self, x):
            with torch.autocast(x.device.type, enabled=False):
                return x @ x.T

    def regions(program):
        nodes = program.graph.nodes
        return [node.args[0] for node in nodes if node.target is torch.ops.higher_order.wrap_with_autocast]

    program = torch.export.export(Careful(), (torch.ones(3, 3),))
    assert regions(program) == ["cpu"]
    assert regions(on_device(program, CPU)) == ["cpu"]
    assert regions(on_device(program, META)) == ["meta"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_program_on_a_gpu_that_is_not_here(tmp_path, monkeypatch, number):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    path = tmp_path / "model.pt2"
    torch.export.save(exported(), path)
    with zipfile.ZipFile(path) as archive:
        members = {info: archive.read(info) for info in archive.infolist()}
    on_gpu = re.compile(rb'"type": "cpu", "index": null')
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for info, content in members.items():
            archive.writestr(info, on_gpu.sub(b'"type": "cuda", "index": %d' % number, content))
    with pytest.raises(LoadError, match=rf"'model\.pt2': it was exported on cuda:{number}, and torch .* sees 0 GPUs"):
        load_exported(ModelSource("m", "1", path))


# ---- compiled ----


def test_sizes_of_which_there_could_be_any_number():
    rows, tokens = [spec("x", -1, 3)], [spec("x", -1, -1)]
    refuse_free_sizes("compile_mode", 8, rows)
    refuse_free_sizes("compile_mode", 0, [spec("x", 4, 3)])
    for most, inputs in ((0, rows), (8, tokens), (8, [FoundTensor(TensorSpec("x", FP32, None))])):
        with pytest.raises(
            LoadError, match="compile_mode needs sizes that are fixed but for the rows of batches: 'x' has"
        ):
            refuse_free_sizes("compile_mode", most, inputs)


@pytest.mark.parametrize(("mode", "runs"), [("default", 1), ("reduce-overhead", 3), ("max-autotune", 3)])
def test_graphs_of_compiled_code_are_recorded_before_requests_come(monkeypatch, mode, runs):
    taken = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: lambda rows: taken.append(len(rows)) or module(rows))
    model, backend = backend_of(
        lambda module, tensors: [module(tensors[0])], Running(compile=True, mode=mode), shape=(-1, 3)
    )
    backend._compile(model)
    assert taken == [1, 2, 8] * runs
    model, backend = backend_of(
        lambda module, tensors: [module(tensors[0])], Running(compile=True, mode=mode), shape=(-1, -1)
    )
    if runs == 1:
        backend._compile(model)
    else:
        with pytest.raises(LoadError, match=r"compile_mode needs sizes .*: 'x' has \[-1, -1\]"):
            backend._compile(model)


def test_a_compiler_for_c_is_missed_too():
    assert torch_running.lacks_compiler("Failed to find C compiler. Please specify via CC environment variable")
