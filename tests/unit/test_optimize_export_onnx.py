"""PyTorch files as ONNX: names as they are served, free dimensions kept, the same answers, and no pickles opened."""

import warnings

import numpy as np
import onnx
import pytest
import torch
from unit.onnx_nets import answers, declared

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.steps import export_onnx
from headrace_backends.optimize.steps.base import StepFailed, StepTask

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


class Two(torch.nn.Module):
    """Two inputs, one of integers, and two outputs."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, shift: torch.Tensor):
        return self.layer(x).relu(), shift + 1


class Branching(torch.nn.Module):
    """Control flow that only TorchScript keeps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 0):
            return x * 2
        return x - 1


def task(path, folder, inputs, outputs, examples):
    folder = folder / "made"
    folder.mkdir()
    return StepTask(path, folder, Signature(inputs, outputs, 8), Examples(examples, ({},) * len(examples), "tests"))


INPUTS = (TensorSpec("x", DataType.FP32, (-1, 6)), TensorSpec("shift", DataType.INT64, (-1, 2)))
EXAMPLE = {"x": np.linspace(-1, 1, 6, dtype=np.float32)[None], "shift": np.array([[3, 4]])}


def exported(folder):
    torch.manual_seed(1)
    module, rows = Two().eval(), torch.export.Dim("rows", max=64)
    arguments = (torch.zeros(2, 6), torch.zeros(2, 2, dtype=torch.int64))
    program = torch.export.export(module, arguments, dynamic_shapes=({0: rows}, {0: rows}))
    torch.export.save(program, folder / "model.pt2")
    return module, folder / "model.pt2"


@pytest.mark.parametrize("names", [("output_0", "output_1"), ("x_out", "moved"), ("shift_1", "linear")])
def test_an_exported_program(tmp_path, names, capfd):
    module, path = exported(tmp_path)
    outputs = (TensorSpec(names[0], DataType.FP32, (-1, 4)), TensorSpec(names[1], DataType.INT64, (-1, 2)))
    made = export_onnx.apply(task(path, tmp_path, INPUTS, outputs, (EXAMPLE,)))
    (x, shift), (first, second) = declared(made)
    rows = x[2][0]
    assert isinstance(rows, str)
    assert rows
    assert (x, shift) == (("x", FLOAT, [rows, 6]), ("shift", INT64, [rows, 2]))
    assert (first, second) == ((names[0], FLOAT, [rows, 4]), (names[1], INT64, [rows, 2]))
    batch = {name: np.repeat(array, 3, 0) for name, array in EXAMPLE.items()}
    (got,) = answers(made, Examples((batch,), ({},), "tests"))
    wanted = module(*(torch.from_numpy(batch[spec.name]) for spec in INPUTS))
    np.testing.assert_allclose(got[names[0]], wanted[0].detach().numpy(), atol=1e-5)
    np.testing.assert_array_equal(got[names[1]], wanted[1].numpy())
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in made.parent.iterdir()] == ["model.onnx"]


def test_torchscript_with_its_control_flow(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Branching()).save(tmp_path / "model.pt")
    inputs, outputs = ((TensorSpec(name, DataType.FP32, (-1, 3)),) for name in ("x", "y"))
    examples = ({"x": np.ones((1, 3), np.float32)}, {"x": -np.ones((1, 3), np.float32)})
    made = export_onnx.apply(task(tmp_path / "model.pt", tmp_path, inputs, outputs, examples))
    assert declared(made) == [[("x", FLOAT, ["batch", 3])], [("y", FLOAT, ["batch", 3])]]
    found = answers(made, Examples(examples, ({}, {}), "tests"))
    assert [one["y"].tolist() for one in found] == [[[2.0] * 3], [[-2.0] * 3]]


def test_what_cannot_be_exported_says_why(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save(Evil(), tmp_path / "model.pt")
    spec = (TensorSpec("x", DataType.FP32, (-1, 3)),)
    example = ({"x": np.ones((1, 3), np.float32)},)
    with pytest.raises(StepFailed, match=r"torch\.save"):
        export_onnx.apply(task(tmp_path / "model.pt", tmp_path, spec, spec, example))
    assert not (tmp_path / "written").exists()
    for number, (name, reason) in enumerate(
        (("model.onnx", "no PyTorch file"), ("model.pt2", "no torch.export archive"))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(b"nothing")
        with pytest.raises(StepFailed, match=reason):
            export_onnx.apply(task(folder / name, folder, spec, spec, example))


def test_a_batch_that_was_exported_as_fixed_is_refused(tmp_path):
    program = torch.export.export(torch.nn.Linear(3, 3), (torch.zeros(2, 3),))
    torch.export.save(program, tmp_path / "model.pt2")
    inputs, outputs = ((TensorSpec(name, DataType.FP32, (-1, 3)),) for name in ("input", "output_0"))
    example = ({"input": np.ones((1, 3), np.float32)},)
    with pytest.raises(StepFailed, match=r"fixed the size|not of any size"):
        export_onnx.apply(task(tmp_path / "model.pt2", tmp_path, inputs, outputs, example))
