"""An ONNX file as an ncnn model: ``model.param`` and ``model.bin``, by ncnn's converter pnnx, in full precision.

ncnn knows no batches, so the model is converted for one row. Examples are often of one row too, so only a model whose
rows are proved to be independent is converted, or one that takes a single row.
"""

import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx

from headrace.core.model import TensorSpec
from headrace.core.parent_death import die_with_parent
from headrace.core.tensor import DataType
from headrace_backends.base import Array, InputError
from headrace_backends.ncnn.graph import NcnnGraph, NotNcnn
from headrace_backends.ncnn.sizes import unserved
from headrace_backends.optimize import onnx_model
from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.row_trial import trial
from headrace_backends.specs import FoundTensor

_MOST_DIMENSIONS = 5  # with that of the rows
_WORDS = 300


def apply(task: StepTask) -> Path:
    """Convert the model. There are no options.

    Raises:
        StepFailed: pnnx is not installed or cannot convert it, or the model is not one of FP32 tensors of fixed shapes
            whose rows are independent.
    """
    if task.options:
        raise StepFailed(f"the step ncnn has no options, got {', '.join(task.options)}")
    shapes = {spec.name: _shape(spec) for spec in task.signature.inputs}
    unfit = [spec for spec in task.signature.outputs if spec.datatype is not DataType.FP32]
    if unfit:
        raise StepFailed(f"ncnn computes FP32 alone, and the output is {unfit[0].describe()}")
    _refuse_mixing(task)
    converter, model = _converter(), onnx_model.read(task.source)
    whole = task.folder / "whole.onnx"  # pnnx writes beside what it reads, and takes no weights from other files
    onnx.save(model, whole)
    names = _names(model)
    told = ",".join(f"[{','.join(map(str, (1, *shapes[name][1:])))}]f32" for name in names if name in shapes)
    done = subprocess.run(  # noqa: S603 - the converter that is installed beside us
        [converter, whole.name, f"inputshape={told}", "fp16=0"],
        cwd=task.folder,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        preexec_fn=die_with_parent,  # a step that takes too long is ended by SIGKILL
    )
    try:
        graph = NcnnGraph.parse((task.folder / "whole.ncnn.param").read_text())
        named = graph.with_names(_renaming(graph, names, [one.name for one in model.graph.output]))
        made = named.with_shapes(shapes).with_outputs([spec.name for spec in task.signature.outputs])
    except FileNotFoundError:
        words = " ".join((done.stderr or done.stdout).split())[-_WORDS:]
        raise StepFailed(f"pnnx cannot convert the model (exit code {done.returncode}): {words}") from None
    except NotNcnn as error:
        raise StepFailed(f"what pnnx made of the model is of no use: {error}") from error
    for problem in filter(None, map(unserved, made.layers)):
        raise StepFailed(f"of what pnnx made of the model, {problem}")
    path = task.folder / "model.param"
    path.write_text(str(made))
    (task.folder / "whole.ncnn.bin").rename(path.with_suffix(".bin"))
    for file in task.folder.glob("whole*"):
        file.unlink()
    task.note(f"converted to {len(made.layers)} layers of ncnn")
    return path


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape, where ncnn can have such an input."""
    shape = spec.shape or ()
    if spec.datatype is not DataType.FP32:
        raise StepFailed(f"ncnn computes FP32 alone, and the input is {spec.describe()}")
    if shape[:1] not in {(-1,), (1,)} or not 2 <= len(shape) <= _MOST_DIMENSIONS or -1 in shape[1:]:
        raise StepFailed(
            f"ncnn takes rows of one to four dimensions of fixed sizes, and the input is {spec.describe()}"
        )
    return shape


def _refuse_mixing(task: StepTask) -> None:
    """Rows that have to do with each other are not for ncnn, which answers each by itself.

    Where requests are merged that is proved already. They may not be because the owner does not want it.
    """
    signature = task.signature
    if signature.max_batch_size or all((spec.shape or ())[:1] == (1,) for spec in signature.inputs):
        return
    session = onnx_model.session_of(task.source, task)

    def run(rows: dict[str, Array]) -> dict[str, Array]:
        try:
            return onnx_model.run(session, rows)
        except StepFailed as error:
            raise InputError(str(error)) from error

    inputs, outputs = ([FoundTensor(spec) for spec in specs] for specs in (signature.inputs, signature.outputs))
    problem, doubt = trial(run, inputs, outputs)
    if problem or doubt:
        raise StepFailed(
            f"ncnn runs one row after the other, and rows may have to do with each other: {problem or doubt}"
        )


def _converter() -> str:
    """The program pnnx. Its module is not imported, which would import torch."""
    found = find_spec("pnnx")
    if found is None or found.origin is None:
        raise StepFailed("pnnx is not installed: pip install 'headrace[optimize]'")
    return str(Path(found.origin).parent / "pnnx")


def _names(model: Any) -> list[str]:
    weights = {one.name for one in model.graph.initializer}
    return [one.name for one in model.graph.input if one.name not in weights]


def _renaming(graph: NcnnGraph, inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, str]:
    """From pnnx's names, which are numbered in the order of the ONNX file, to the model's own."""
    names = {f"in{place}": name for place, name in enumerate(inputs)}
    names |= {f"out{place}": name for place, name in enumerate(outputs)}
    lacking = sorted(names.keys() - {*graph.inputs, *graph.outputs})
    if lacking:
        raise StepFailed(f"pnnx has lost '{names[lacking[0]]}' of the model")
    return names
