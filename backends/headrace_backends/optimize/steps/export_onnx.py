"""A PyTorch file (.pt2, TorchScript .pt) as ONNX, its tensors named as they are served, dimensions of any size kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch

from headrace_backends.base import LoadError, ModelSource
from headrace_backends.optimize import onnx_model
from headrace_backends.optimize.examples import merged
from headrace_backends.optimize.quiet import hushed
from headrace_backends.optimize.steps import options
from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.torch_exported import load_exported, read_exported, result_names
from headrace_backends.torch_model import TorchModel, array_of, gist, positions, tensor_of
from headrace_backends.torchscript import argument_order, load_torchscript, read_torchscript

_OLD_OPSET = 18  # the last that the exporter of TorchScript knows well


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The version of ONNX's operators to use."""

    opset: int = onnx_model.OPSET


def apply(task: StepTask) -> Path:
    """Export the program, and see that it gives the same answers.

    Raises:
        StepFailed: it cannot be exported, or not with its free dimensions, or it answers otherwise.
    """
    chosen = options.read("export_onnx", Options, task.options)
    signature = task.signature
    kinds = {".pt2": (_of_program, read_exported), ".pt": (_of_torchscript, read_torchscript)}
    if task.source.suffix not in kinds:
        raise StepFailed(f"'{task.source.name}' is no PyTorch file")
    source = ModelSource(
        "model",
        "1",
        task.source,
        inputs=signature.inputs,
        outputs=signature.outputs,
        max_batch_size=signature.max_batch_size,
    )
    export, read = kinds[task.source.suffix]
    torch.set_num_threads(task.threads)
    try:
        with hushed():
            model = export(task, source, chosen.opset)
            _check_shapes(model, task)
            path = onnx_model.write(model, task, model)
            _check_answers(path, task, read(source, torch.device("cpu")))
    except LoadError as error:
        raise StepFailed(str(error)) from error
    task.note(f"exported {sum(onnx_model.counts(model).values())} operators of version {onnx_model.opset(model)}")
    return path


def _of_program(task: StepTask, source: ModelSource, opset: int) -> Any:
    program = load_exported(source)
    _, order = result_names(source, program.module_call_graph[0].signature.out_spec)
    try:
        made = torch.onnx.export(program, dynamo=True, opset_version=opset, external_data=False, verbose=False)
        assert made is not None
        model = made.model_proto
    except Exception as error:  # the exporter promises no types
        raise StepFailed(f"torch cannot export the program: {gist(str(error))[:300]}") from error
    return _with_names(
        model,
        dict(zip((one.name for one in model.graph.input), (one.name for one in task.signature.inputs), strict=True)),
        [model.graph.output[place].name for place in order],
        [one.name for one in task.signature.outputs],
    )


def _of_torchscript(task: StepTask, source: ModelSource, opset: int) -> Any:
    """Through torch's older exporter, the one that takes TorchScript."""
    module = load_torchscript(source, torch.device("cpu"))
    order = argument_order(source, module)
    arguments = [one.name for one in module.forward.schema.arguments if one.name in order]
    specs = [task.signature.inputs[order[name]] for name in arguments]
    wanted = [one.name for one in task.signature.outputs]
    example = _example(task)
    free = {
        one.name: {
            place: f"{one.name}_{place}" if place else "batch" for place, size in enumerate(one.shape) if size < 0
        }
        for one in (*task.signature.inputs, *task.signature.outputs)
        if one.shape is not None
    }
    names = [wanted[place] for place in positions(wanted)]
    written = task.folder / "torchscript.onnx"
    try:
        torch.onnx.export(
            module,
            tuple(example[one.name] for one in specs),
            written,
            dynamo=False,
            opset_version=min(opset, _OLD_OPSET),
            input_names=[one.name for one in specs],
            output_names=names,
            dynamic_axes=free,
        )
    except Exception as error:  # the exporter promises no types
        raise StepFailed(f"torch cannot export TorchScript of this kind: {gist(str(error))[:300]}") from error
    model = onnx.load(written)
    written.unlink()
    return _with_names(model, {}, names, wanted)


def _with_names(model: Any, inputs: Mapping[str, str], found: Sequence[str], wanted: Sequence[str]) -> Any:
    """The model with its inputs renamed, and of its outputs ``found`` as ``wanted``."""
    onnx_model.rename(model, inputs)
    found = [inputs.get(name, name) for name in found]
    values = {one.name: one for one in model.graph.output}
    missing = [name for name in found if name not in values]
    if missing:
        raise StepFailed(f"the exporter left out the outputs {missing}")
    kept = [onnx.ValueInfoProto() for _ in found]
    for value, name in zip(kept, found, strict=True):
        value.CopyFrom(values[name])
    del model.graph.output[:]
    if list(found) != list(wanted):
        spare = {name: f"{name}_before_output" for name in {*found, *wanted}}
        onnx_model.rename(model, spare)
        onnx_model.rename(model, {spare[name]: name for name in inputs.values() if name in spare})
        for value, name, before in zip(kept, wanted, found, strict=True):
            value.name = name
            inner = before if before in inputs.values() else spare[before]
            model.graph.node.append(onnx.helper.make_node("Identity", [inner], [name], name=f"output_{name}"))
    model.graph.output.extend(kept)
    return model


def _check_shapes(model: Any, task: StepTask) -> None:
    """Dimensions of any size must have stayed so."""
    declared = {one.name: one for one in (*model.graph.input, *model.graph.output)}
    for spec in (*task.signature.inputs, *task.signature.outputs):
        value = declared.get(spec.name)
        if value is None:
            raise StepFailed(f"the exported graph has no '{spec.name}'")
        sizes = value.type.tensor_type.shape.dim
        fixed = [
            place for place, size in enumerate(spec.shape or ()) if size < 0 and sizes[place].HasField("dim_value")
        ]
        if spec.shape is not None and (len(sizes) != len(spec.shape) or fixed):
            raise StepFailed(f"the exporter fixed the size of dimensions {fixed} of '{spec.name}'")


def _check_answers(path: Path, task: StepTask, model: TorchModel) -> None:
    example = _example(task)
    with torch.inference_mode():
        right = model.call(model.module, [example[spec.name] for spec in task.signature.inputs])
    feed = {name: tensor.numpy() for name, tensor in example.items()}
    answers = onnx_model.run(onnx_model.session_of(path, task), feed)
    for spec, wanted in zip(task.signature.outputs, right, strict=True):
        expected, got = array_of(wanted), answers[spec.name]
        scale = float(np.abs(expected).max(initial=0)) if expected.dtype.kind == "f" else 0.0
        close = got.shape == expected.shape and np.allclose(got, expected, rtol=0, atol=1e-3 * scale, equal_nan=True)
        if not close:
            raise StepFailed(f"the exported graph answers otherwise than the program: see output '{spec.name}'")


def _example(task: StepTask) -> dict[str, torch.Tensor]:
    """Two rows where rows can be merged: of one row, exporters may take the 1 for fixed."""
    if not task.examples.inputs:
        raise StepFailed("there is no example to export with")
    first = task.examples.inputs[0]
    chosen = merged([first, first]) if task.signature.max_batch_size > 1 else first
    return {name: tensor_of(np.array(array)) for name, array in chosen.items()}
