"""The torch backend: exported programs and TorchScript, names, batching, and files that it must not open."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from typing import Optional

import ml_dtypes
import numpy as np
import pytest

from headrace.core.model import TensorSpec
from headrace.core.tensor import NUMPY_DTYPES, DataType
from headrace_backends import threads, torch_tensorrt_files
from headrace_backends.base import InputError, LoadError, ModelSource

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'headrace[torch]'")
from headrace_backends.torch import TorchBackend  # noqa: E402 only where torch is
from headrace_backends.torch_exported import read_exported  # noqa: E402 only where torch is

FP32 = DataType.FP32
ROWS = {0: torch.export.Dim("n", max=64)}


def module(function):
    class Module(torch.nn.Module):
        forward = function

    return Module()


def export(folder, function, *examples, dynamic=None):
    path = folder / "model.pt2"
    program = torch.export.export(
        module(function) if not isinstance(function, torch.nn.Module) else function, examples, dynamic_shapes=dynamic
    )
    torch.export.save(program, path)
    return path


def script(folder, function):
    path = folder / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(function), path)
    return path


class AddSub(torch.nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor):
        return a + b, a - b


class ToDict(torch.nn.Module):
    def forward(self, a: torch.Tensor):
        return {"twice": a * 2, "half": a / 2}


def load(path, **keywords):
    return TorchBackend.load(ModelSource("m", "1", path, **keywords))


def test_exported_linear(tmp_path):
    linear = torch.nn.Linear(3, 2)
    backend = load(export(tmp_path, linear, torch.ones(2, 3), dynamic=(ROWS,)))
    assert backend.signature.inputs == (TensorSpec("input", FP32, (-1, 3)),)
    assert backend.signature.outputs == (TensorSpec("output_0", FP32, (-1, 2)),)
    assert backend.signature.max_batch_size == 32
    assert backend.notes() == []
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    x.flags.writeable = False
    with torch.inference_mode():
        expected = linear(torch.tensor(x)).numpy()
    np.testing.assert_allclose(backend.execute({"input": x}, [])["output_0"], expected, rtol=1e-6, atol=1e-6)


def test_exported_names(tmp_path):
    def forward(self, Left, right):  # noqa: N803 capitals must survive
        return {"sum": Left + right, "left": Left * 1}

    path = export(tmp_path, forward, torch.ones(2, 3), torch.ones(2, 3), dynamic=(ROWS, ROWS))
    backend = load(path)
    assert [spec.name for spec in backend.signature.inputs] == ["Left", "right"]
    assert [spec.name for spec in backend.signature.outputs] == ["sum", "left"]
    one, two = np.ones((1, 3), np.float32), np.full((1, 3), 2, np.float32)
    assert backend.execute({"right": two, "Left": one}, [])["sum"][0, 0] == 3
    chosen = load(path, outputs=(TensorSpec("left", FP32, (-1, 3)),))
    assert [(name, array[0, 0]) for name, array in chosen.execute({"Left": one, "right": two}, []).items()] == [
        ("left", 1)
    ]
    with pytest.raises(LoadError, match=r"\['right_one'\] are configured, the module has \['sum', 'left'\]"):
        load(path, outputs=(TensorSpec("right_one", FP32, (-1, 3)),))


def test_configured_names_of_a_tuple(tmp_path):
    path = export(tmp_path, AddSub(), torch.ones(2, 3), torch.ones(2, 3), dynamic=(ROWS, ROWS))
    backend = load(path, outputs=(TensorSpec("plus", FP32, (-1, 3)), TensorSpec("minus", FP32, (-1, 3))))
    given = {"a": np.full((1, 3), 5, np.float32), "b": np.ones((1, 3), np.float32)}
    assert {name: float(array[0, 0]) for name, array in backend.execute(given, []).items()} == {"plus": 6, "minus": 4}


def test_nested_arguments_are_flattened(tmp_path):
    def forward(self, pair):
        return pair[0] - pair[1]

    backend = load(export(tmp_path, forward, (torch.ones(2), torch.ones(2))))
    names = [spec.name for spec in backend.signature.inputs]
    assert len(names) == 2
    given = dict(zip(names, (np.array([3, 4], np.float32), np.array([1, 1], np.float32)), strict=True))
    assert backend.execute(given, [])["output_0"].tolist() == [2, 3]


@pytest.mark.parametrize("datatype", [datatype for datatype in DataType if datatype is not DataType.BYTES])
def test_every_datatype(tmp_path, datatype):
    example = torch.zeros(2, dtype=torch.bool if datatype is DataType.BOOL else torch.float32)
    source = module(lambda self, x: x.clone())
    dtype = NUMPY_DTYPES[datatype]
    names = {"UINT": "uint", "INT": "int", "FP": "float", "BF": "bfloat"}
    letters = datatype.rstrip("0123456789")
    if letters != "BOOL":
        example = torch.zeros(2, dtype=getattr(torch, names[letters] + datatype[len(letters) :]))
    backend = load(export(tmp_path, source, example))
    assert backend.signature.inputs[0].datatype is datatype
    array = np.array([0, 1]).astype(dtype)
    made = backend.execute({"x": array}, [])["output_0"]
    assert made.dtype == dtype
    np.testing.assert_array_equal(made, array)


def test_bfloat16_scalar(tmp_path):
    backend = load(export(tmp_path, lambda self, x: x * 2, torch.ones((), dtype=torch.bfloat16)))
    made = backend.execute({"x": np.array(1.5, ml_dtypes.bfloat16)}, [])["output_0"]
    assert made.shape == ()
    assert made == 3


@pytest.mark.parametrize(
    ("function", "dynamic", "note"),
    [
        (lambda self, x: x + 1, None, "without a leading dimension of any size"),
        (lambda self, x: x.sum(0), (ROWS,), "without a leading dimension"),
        (lambda self, x: torch.cat([x, x]), (ROWS,), "leading dimensions are not one"),
        (lambda self, x: x @ x.T, (ROWS,), "part of another"),
        (lambda self, x: x - x.mean(0), (ROWS,), "different answers"),
        (lambda self, x: x / x.long().max().clamp(min=1), (ROWS,), "different answers"),
    ],
)
def test_rows_that_mix_are_not_merged(tmp_path, function, dynamic, note):
    backend = load(export(tmp_path, function, torch.ones(3, 3), dynamic=dynamic))
    assert backend.signature.max_batch_size == 0
    assert note in backend.notes()[0]


@pytest.mark.parametrize(
    ("function", "example", "indexes"),
    [
        (
            lambda self, x: (x.float() / 255 - 0.5).relu().sum(1, keepdim=True),
            torch.ones(2, 3, dtype=torch.int64),
            False,
        ),
        (lambda self, x: torch.zeros(4, 2)[x], torch.ones(2, 3, dtype=torch.int64), True),
        (torch.nn.Embedding(4, 2), torch.ones(2, 3, dtype=torch.int64), True),
        (
            lambda self, x: torch.cond(x.sum() > 0, lambda y: y.gather(1, y), lambda y: y + 1, (x,)),
            torch.ones(2, 3).long(),
            True,
        ),
    ],
)
def test_what_may_take_numbers_for_indices_is_known(tmp_path, function, example, indexes):
    path = export(tmp_path, function, example, dynamic=(ROWS,))
    assert read_exported(ModelSource("m", "1", path), torch.device("cpu")).indexes is indexes


def test_an_exported_bound_on_rows_is_kept(tmp_path):
    dynamic = ({0: torch.export.Dim("n", max=6)},)
    path = export(tmp_path, lambda self, x: x * 2, torch.ones(2, 3), dynamic=dynamic)
    assert load(path).signature.max_batch_size == 6
    assert load(path, max_batch_size=4).signature.max_batch_size == 4
    with pytest.raises(LoadError, match=r"max_batch_size is 8, and 'model\.pt2' was exported for at most 6 rows"):
        load(path, max_batch_size=8)


@pytest.mark.parametrize("max_batch_size", [None, 4])
def test_a_batch_below_an_exported_bound_is_filled_up(tmp_path, max_batch_size):
    dynamic = ({0: torch.export.Dim("n", min=3, max=6)},)
    path = export(tmp_path, lambda self, x: x * 2, torch.ones(4, 2), dynamic=dynamic)
    backend = load(path, max_batch_size=max_batch_size)
    assert backend.signature.max_batch_size == (max_batch_size or 6)
    assert backend.notes() == ["a batch of fewer than 3 rows is filled up to that: it was exported for no fewer"]
    for rows in (1, 2, 3, 4):
        x = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2)
        np.testing.assert_array_equal(backend.execute({"x": x}, [])["output_0"], x * 2)


def test_rows_that_mix_are_not_filled_up(tmp_path):
    dynamic = ({0: torch.export.Dim("n", min=3, max=6)},)
    backend = load(export(tmp_path, lambda self, x: x - x.mean(0), torch.ones(4, 2), dynamic=dynamic))
    assert backend.signature.max_batch_size == 0
    with pytest.raises(InputError, match="Guard failed"):
        backend.execute({"x": np.ones((2, 2), np.float32)}, [])


class Remembering(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(1, 3))
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor):
        answer = x * self.scale + self.last
        self.last.copy_(x[:1])
        return answer


@pytest.mark.parametrize("max_batch_size", [None, 0, 4])
def test_what_is_kept_between_requests_is_refused(tmp_path, max_batch_size):
    path = export(tmp_path, Remembering(), torch.ones(2, 3), dynamic=(ROWS,))
    with pytest.raises(LoadError, match=r"'model\.pt2' keeps 'last' from one request to the next"):
        load(path, max_batch_size=max_batch_size)
    tensors = {"inputs": (TensorSpec("x", FP32, (-1, 3)),), "outputs": (TensorSpec("y", FP32, (-1, 3)),)}
    with pytest.raises(LoadError, match=r"'model\.pt' keeps 'last' from one request to the next"):
        load(script(tmp_path, Remembering()), max_batch_size=max_batch_size, **tensors)


def test_a_batch_norm_in_training_mode_is_refused_and_one_in_evaluation_is_served(tmp_path):
    norm = torch.nn.BatchNorm1d(3)
    assert load(export(tmp_path, norm.eval(), torch.ones(2, 3), dynamic=(ROWS,))).signature.max_batch_size == 32
    with pytest.raises(LoadError, match=r"keeps 'running_mean', 'running_var' from .* save it after eval\(\)"):
        load(export(tmp_path, norm.train(), torch.ones(2, 3), dynamic=(ROWS,)), max_batch_size=4)


def test_configuration_that_does_not_fit(tmp_path):
    path = export(tmp_path, lambda self, x: x * 2, torch.ones(2, 3))
    with pytest.raises(
        LoadError, match=r"no input 'q'; it has \['x'\].*'output_0' is configured as FP16; the file has"
    ):
        load(path, inputs=(TensorSpec("q", FP32, (2, 3)),), outputs=(TensorSpec("output_0", DataType.FP16, (2, 3)),))
    with pytest.raises(LoadError, match=r"'x' is configured with shape \[2, 4\]; the file has \[2, 3\]"):
        load(path, inputs=(TensorSpec("x", FP32, (2, 4)),))
    with pytest.raises(LoadError, match=r"max_batch_size is 4, but the first dimension of 'x' \[2, 3\] is not"):
        load(path, max_batch_size=4)
    with pytest.raises(LoadError, match="no parameter 'a'; it has intra_op_threads"):
        load(path, parameters={"a": 1})


def test_refused_input(tmp_path):
    backend = load(export(tmp_path, lambda self, x: x * 2, torch.ones(2, 3), dynamic=(ROWS,)))
    with pytest.raises(InputError, match=r"^Guard failed"):
        backend.execute({"x": np.ones((2, 4), np.float32)}, [])


def test_out_of_memory_is_no_fault_of_the_input(tmp_path):
    backend = load(
        script(tmp_path, Expand()),
        inputs=(TensorSpec("x", DataType.INT64, ()),),
        outputs=(TensorSpec("y", FP32, (-1,)),),
    )
    with pytest.raises(MemoryError):
        backend.execute({"x": np.array(1 << 45)}, [])


class Expand(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(int(x.item()))


TENSORS = {
    "inputs": (TensorSpec("a", FP32, (-1,)), TensorSpec("b", FP32, (-1,))),
    "outputs": (TensorSpec("plus", FP32, (-1,)), TensorSpec("minus", FP32, (-1,))),
}
FIVE, TWO = np.array([5], np.float32), np.array([2], np.float32)


def test_torchscript_by_name(tmp_path):
    backend = load(
        script(tmp_path, AddSub()),
        inputs=tuple(reversed(TENSORS["inputs"])),
        outputs=TENSORS["outputs"],
        max_batch_size=4,
    )
    made = backend.execute({"a": FIVE, "b": TWO}, [])
    assert (made["plus"], made["minus"]) == (7, 3)
    assert backend.signature.max_batch_size == 4
    assert backend.notes() == []


def test_torchscript_by_tritons_positions(tmp_path):
    backend = load(
        script(tmp_path, AddSub()),
        inputs=(TensorSpec("INPUT__1", FP32, (-1,)), TensorSpec("INPUT__0", FP32, (-1,))),
        outputs=(TensorSpec("OUTPUT__1", FP32, (-1,)), TensorSpec("OUTPUT__0", FP32, (-1,))),
    )
    made = backend.execute({"INPUT__0": FIVE, "INPUT__1": TWO}, [])
    assert (made["OUTPUT__0"], made["OUTPUT__1"]) == (7, 3)
    assert "set max_batch_size" in backend.notes()[0]


def test_torchscript_dict(tmp_path):
    backend = load(script(tmp_path, ToDict()), inputs=TENSORS["inputs"][:1], outputs=(TensorSpec("half", FP32, (-1,)),))
    assert backend.execute({"a": FIVE}, [])["half"] == 2.5


class Masked(torch.nn.Module):
    def forward(self, x: torch.Tensor, mask: Optional[torch.Tensor] = None):  # noqa: UP045 - what TorchScript reads
        return x if mask is None else x * mask


@pytest.mark.parametrize("names", [("x", "mask"), ("INPUT__0", "INPUT__1")])
def test_torchscript_optional_inputs_may_be_left_out(tmp_path, names):
    inputs = (TensorSpec(names[0], FP32, (-1,)), TensorSpec(names[1], FP32, (-1,), optional=True))
    backend = load(script(tmp_path, Masked()), inputs=inputs, outputs=(TensorSpec("y", FP32, (-1,)),))
    assert backend.execute({names[0]: FIVE}, [])["y"] == 5
    assert backend.execute({names[0]: FIVE, names[1]: FIVE}, [])["y"] == 25
    both = tuple(TensorSpec(name, FP32, (-1,), optional=True) for name in names)
    with pytest.raises(LoadError, match=rf"\['{names[0]}'\] are configured as optional, and their arguments"):
        load(tmp_path / "model.pt", inputs=both, outputs=(TensorSpec("y", FP32, (-1,)),))


def test_torchscript_problems(tmp_path):
    path = script(tmp_path, AddSub())
    with pytest.raises(LoadError, match=r"write them in config\.yaml, as\ninputs:  \[\{name: x"):
        load(path)
    with pytest.raises(LoadError, match=r"\['a', 'c'\] are configured, forward takes \['a', 'b'\]"):
        load(path, inputs=(TENSORS["inputs"][0], TensorSpec("c", FP32, (-1,))), outputs=TENSORS["outputs"])
    with pytest.raises(LoadError, match="cannot be BYTES"):
        load(path, inputs=(TensorSpec("a", DataType.BYTES, (-1,)),), outputs=TENSORS["outputs"])
    with pytest.raises(LoadError, match=r"max_batch_size is 2, but the first dimension of 'a' \[3\]"):
        load(path, inputs=(TensorSpec("a", FP32, (3,)),), outputs=TENSORS["outputs"], max_batch_size=2)


def test_torchscript_outputs_are_checked(tmp_path):
    path = script(tmp_path, AddSub())
    with pytest.raises(RuntimeError, match=r"output 'plus' is torch\.float32, expected torch\.int64"):
        load(
            path,
            inputs=TENSORS["inputs"],
            outputs=tuple(TensorSpec(n, DataType.INT64, None) for n in ("plus", "minus")),
        ).execute({"a": FIVE, "b": TWO}, [])
    with pytest.raises(RuntimeError, match=r"gave 2 outputs, expected \['plus'\]"):
        load(path, inputs=TENSORS["inputs"], outputs=TENSORS["outputs"][:1]).execute({"a": FIVE, "b": TWO}, [])


def test_torchscript_refused_input(tmp_path):
    backend = load(script(tmp_path, AddSub()), **TENSORS)
    with pytest.raises(InputError, match=r"^The size of tensor a \(2\) must match"):
        backend.execute({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}, [])


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("declared", [{}, TENSORS], ids=["undeclared", "declared"])
def test_a_pickle_is_not_opened(tmp_path, declared):
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "model.pt")
    with pytest.raises(LoadError, match=r"made by torch\.save: it is a pickle.*torch\.export"):
        load(tmp_path / "model.pt", **declared)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_inside_an_exported_program_is_not_opened(tmp_path):
    path = export(tmp_path, lambda self, x: x * 2, torch.ones(2, 3))
    trap = tmp_path / "trap.pt"
    torch.save(Trap(tmp_path / "sprung"), trap)
    with zipfile.ZipFile(path) as archive:
        members = {info: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for info, content in members.items():
            archive.writestr(info, trap.read_bytes() if info.filename.endswith("sample_inputs/model.pt") else content)
    with pytest.raises(LoadError, match=r"cannot load 'model\.pt2'"):
        load(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kind", ["pt", "pt2"])
def test_engines_of_torch_tensorrt_are_told(tmp_path, kind):
    """As its own saving leaves them: an operator that nobody has registered."""

    def forward(self, x):
        return x + 1

    path = script(tmp_path, module(forward)) if kind == "pt" else export(tmp_path, forward, torch.ones(2, 3))
    with zipfile.ZipFile(path) as archive:
        members = {info: archive.read(info) for info in archive.infolist()}
    engines = {b"torch.add(x, 1)": b"ops.tensorrt.execute_engine([x], x)[0]",
               b"torch.ops.aten.add.Tensor": b"torch.ops.tensorrt.execute_engine.default"}  # fmt: skip
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for info, content in members.items():
            for was, becomes in engines.items():
                content = content.replace(was, becomes)  # noqa: PLW2901
            archive.writestr(info, content)
    with pytest.raises(
        LoadError, match=rf"'model\.{kind}' holds engines of Torch-TensorRT, which is not offered: .*2\.14"
    ):
        load(path, **TENSORS)


def test_broken_files(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"garbage")
    with pytest.raises(LoadError, match="it is not a zip file"):
        load(tmp_path / "model.pt2")
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"a": 1}))
    for tensors in (TENSORS, {}):  # a file that is none is told before what the configuration lacks
        with pytest.raises(LoadError, match=r"'model\.pt' is no TorchScript archive"):
            load(tmp_path / "model.pt", **tensors)
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("m/other", "x")
    with pytest.raises(LoadError, match="holds no exported program"):
        load(tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("m/data/aotinductor/model/a.so", "x")
    with pytest.raises(LoadError, match="AOTInductor"):
        load(tmp_path / "model.pt2")


@pytest.mark.parametrize("name", ["model.pt2", "model.pt"])
@pytest.mark.parametrize(
    ("was", "becomes", "why"),
    [(b"PK\x01\x02", b"PK\xff\xff", "Bad magic number"), (b"\xc3\xa9", b"\xff\xff", "'utf-8' codec can't decode")],
)
def test_damaged_archives(tmp_path, name, was, becomes, why):
    path = tmp_path / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/é/constants.pkl", "x")
    path.write_bytes(path.read_bytes().replace(was, becomes))
    with pytest.raises(LoadError, match=rf"'{name}' is damaged: {why}.*; copy it anew"):
        load(path, **TENSORS)
    assert torch_tensorrt_files.refusal(path) == ""


def test_devices(tmp_path):
    path = export(tmp_path, lambda self, x: x * 2, torch.ones(2, 3))
    if not torch.cuda.is_available():
        with pytest.raises(LoadError, match=r"'gpu:0' is not here: torch .* sees 0 GPUs"):
            load(path, device="gpu:0")
    with pytest.raises(LoadError, match="'cuda' is unknown, expected 'cpu', 'gpu:N' or"):
        load(path, device="cuda")


def test_threads(tmp_path):
    before = torch.get_num_threads()
    load(export(tmp_path, lambda self, x: x * 2, torch.ones(2, 3)), threads=1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


@pytest.fixture
def _threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads_restored")
def test_threads_by_weight(tmp_path, monkeypatch):
    path = export(tmp_path, torch.nn.Linear(3, 2), torch.ones(2, 3), dynamic=(ROWS,))
    for limit_ms, parameters, expected, note in (
        (1e9, {}, (1, 0), ["light: one row takes "]),
        (0, {}, (2, 2), ["2 threads: one row takes"]),
        (0, {"intra_op_threads": 1}, (1, 1), []),
        (1e9, {"intra_op_threads": "7"}, (2, 0), []),
    ):
        monkeypatch.setattr(threads, "LIGHT_MODEL_MS", limit_ms)
        backend = load(path, threads=2, parameters=parameters)
        assert (torch.get_num_threads(), backend.cpu_threads) == expected
        assert [one[: len(start)] for one, start in zip(backend.notes(), note, strict=True)] == note
        assert backend.warms_up


def test_an_exported_bound_below_three_rows_is_proved_within(tmp_path):
    dynamic = ({0: torch.export.Dim("n", max=2)},)
    backend = load(export(tmp_path, lambda self, x: x * 2, torch.ones(2, 3), dynamic=dynamic))
    assert (backend.signature.max_batch_size, backend.notes()) == (2, [])


class Images(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.convolution, self.last = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 2)

    def forward(self, image):
        return self.last(torch.relu(self.convolution(image)).mean((2, 3)))


def images(folder):
    return export(folder, Images().eval(), torch.ones(2, 3, 6, 6), dynamic=(ROWS,))


def answers(backend, rows=3):
    image = np.random.default_rng(rows).standard_normal((rows, 3, 6, 6)).astype(np.float32)
    return backend.execute({"image": image}, [])["output_0"]


@pytest.mark.parametrize(
    ("parameters", "tolerance"),
    [({"channels_last": True}, 1e-5), ({"autocast": "bf16"}, 2e-2), ({"autocast": "fp16"}, 2e-3)],
)
def test_other_ways_to_run(tmp_path, parameters, tolerance):
    path = images(tmp_path)
    plain, other = load(path), load(path, parameters=parameters)
    assert other.signature == plain.signature
    assert other.signature.max_batch_size == 32
    right, answer = answers(plain), answers(other)
    assert answer.dtype == np.float32
    np.testing.assert_allclose(answer, right, atol=tolerance)
    if "autocast" in parameters:
        assert np.abs(answer - right).max() > 0


def test_other_ways_to_run_torchscript(tmp_path):
    tensors = {
        "inputs": (TensorSpec("image", FP32, (-1, 3, 6, 6)),),
        "outputs": (TensorSpec("output_0", FP32, (-1, 2)),),
    }
    path = script(tmp_path, Images().eval())
    plain = load(path, **tensors, max_batch_size=4)
    other = load(path, **tensors, max_batch_size=4, parameters={"channels_last": "true", "autocast": "bf16"})
    np.testing.assert_allclose(answers(other), answers(plain), atol=2e-2)
    with pytest.raises(LoadError, match=r"compile is for exported programs \(\.pt2\)"):
        load(path, **tensors, parameters={"compile": True})


def test_a_module_that_does_not_run_with_channels_last(tmp_path):
    path = export(tmp_path, lambda self, image: image.view(-1, 12) * 2, torch.ones(2, 3, 2, 2), dynamic=(ROWS,))
    assert load(path).signature.max_batch_size == 32
    with pytest.raises(LoadError, match=r"^it does not run with these parameters: .*view"):
        load(path, parameters={"channels_last": True})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"autocast": "int8"}, r"parameters\.autocast is 'int8', expected bf16 or fp16"),
        ({"channels_last": 2}, r"parameters\.channels_last is 2, expected true or false"),
        ({"compile": "yes"}, r"parameters\.compile is 'yes', expected true or false"),
        (
            {"compile": True, "compile_cache": "here"},
            r"compile_cache is 'here', expected the absolute path of a folder",
        ),
        (
            {"compile": True, "compile_mode": "fast"},
            r"compile_mode is 'fast', expected one of default, reduce-overhead",
        ),
        ({"compile_mode": "default"}, r"compile_mode is set and parameters\.compile is not"),
        ({"compile_cache": "/tmp/x"}, r"compile_cache is set and parameters\.compile is not"),
        ({"compiled": True}, "no parameter 'compiled'; it has intra_op_threads, tf32, compile, compile_mode"),
    ],
)
def test_ways_to_run_that_there_are_not(tmp_path, parameters, message):
    with pytest.raises(LoadError, match=message):
        load(images(tmp_path), parameters=parameters)


COMPILED = """
import os, sys
from pathlib import Path
import numpy as np
from headrace_backends.base import LoadError, ModelSource
from headrace_backends.torch import TorchBackend

folder = Path(sys.argv[1])
parameters = {"compile": True, **({"compile_cache": sys.argv[2]} if len(sys.argv) > 2 else {})}
try:
    backend = TorchBackend.load(ModelSource("m", "1", folder / "model.pt2", threads=1, parameters=parameters))
except LoadError as error:
    sys.exit(f"LoadError: {error}")
for rows in (1, 3, 32):
    image = np.random.default_rng(rows).standard_normal((rows, 3, 6, 6)).astype(np.float32)
    np.save(folder / f"{rows}.npy", backend.execute({"image": image}, [])["output_0"])
print(backend.signature.max_batch_size, *backend.notes())
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


def compiled(folder, *arguments, **environment):
    """Load and run in a process of its own: the compiler keeps its settings for as long as a process lives."""
    return subprocess.run(
        [sys.executable, "-c", COMPILED, str(folder), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(("mode", "passed"), [(None, None), ("default", None), ("reduce-overhead", "reduce-overhead")])
def test_the_mode_is_what_the_compiler_is_told(tmp_path, monkeypatch, mode, passed):
    told = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: told.append(options["mode"]) or module)
    path = images(tmp_path)
    load(path, parameters={"compile": True, **({} if mode is None else {"compile_mode": mode})})
    assert told == [passed]


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile with")
def test_compiled(tmp_path):
    path = images(tmp_path)
    cache = tmp_path / "cache"
    ended = compiled(tmp_path, cache)
    assert ended.returncode == 0, ended.stderr
    assert re.match(r"32 compiled in \d+ s\n", ended.stdout)
    plain = load(path)
    for rows in (1, 3, 32):
        np.testing.assert_allclose(np.load(tmp_path / f"{rows}.npy"), answers(plain, rows), atol=1e-5)
    built = set(cache.rglob("*.so"))
    assert built
    assert compiled(tmp_path, cache).returncode == 0
    assert set(cache.rglob("*.so")) == built  # nothing was compiled anew


def test_compiling_without_a_compiler(tmp_path):
    images(tmp_path)
    ended = compiled(tmp_path, CXX="/nowhere/g++", TMPDIR=str(tmp_path))
    assert (
        "LoadError: parameters.compile needs a C++ compiler, and there is none: install g++, or set CXX" in ended.stderr
    )
    assert not list(tmp_path.glob("headrace-compiled-*"))


def test_made_up_inputs_that_the_module_itself_refuses_prove_nothing(tmp_path):
    def forward(self, x):
        torch._check(x.max().item() < -100)
        return x * 2

    path = export(tmp_path, forward, torch.full((2, 3), -200.0))
    assert load(path, parameters={"channels_last": True}).signature.max_batch_size == 0
