"""Model files as OpenVINO models and back: what the steps that write OpenVINO IR have in common."""

import io
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import LoadError, ModelSource
from headrace_backends.openvino_model import DATATYPES, read_model, trimmed
from headrace_backends.openvino_quietly import ov
from headrace_backends.optimize.steps.base import StepFailed, StepTask

_TYPES = {datatype: kind for kind, datatype in DATATYPES.items()}
_UNUSED_BY_NNCF = ("torch", "onnx")  # with OpenVINO models; importing them takes it seconds

_NO_OPERATORS = ("Parameter", "Result", "Constant")
_Pair = tuple[TensorSpec, Any]
_SPLIT = "/WithoutBiases"  # what its ONNX reader adds to the name of a product whose bias it sets apart


def read(task: StepTask) -> Any:
    """The step's model as OpenVINO has it, with the signature's names, datatypes and shapes.

    Raises:
        StepFailed: OpenVINO cannot read it, or it comes out with other inputs and outputs.
    """
    texts = [spec.name for spec in (*task.signature.inputs, *task.signature.outputs) if spec.datatype is DataType.BYTES]
    if texts:
        raise StepFailed(f"OpenVINO does not run models with strings, as {', '.join(map(repr, texts))}")
    try:
        with quiet():
            model, inputs, outputs = _converted(task)
    except LoadError as error:
        raise StepFailed(str(error)) from error
    except StepFailed:
        raise
    except Exception as error:  # its converters promise no types
        raise StepFailed(f"OpenVINO cannot convert '{task.source.name}': {trimmed(str(error))[:500]}") from error
    for spec, port in (*inputs, *outputs):
        if port.element_type != _TYPES[spec.datatype]:
            told = port.element_type.get_type_name()
            raise StepFailed(f"'{spec.name}' is {told} to OpenVINO, expected {spec.datatype}")
    try:
        model.reshape({port: ov.PartialShape(list(spec.shape)) for spec, port in inputs if spec.shape is not None})
    except RuntimeError as error:
        raise StepFailed(f"the model does not take its own shapes: {trimmed(str(error))}") from error
    for spec, port in (*inputs, *outputs):
        port.get_tensor().set_names({spec.name})
        _check_rank(spec, port.partial_shape)
    return model


def save(task: StepTask, model: Any) -> Path:
    """Write ``model.xml`` and ``model.bin``, with all weights as they are."""
    path = task.folder / "model.xml"
    ov.save_model(model, path, compress_to_fp16=False)
    return path


def layers_to_keep(task: StepTask, model: Any, wanted: Sequence[str]) -> list[str]:
    """The operators that ``wanted`` means: kinds of operators, or names in OpenVINO's graph or in the task's ONNX file.

    Where OpenVINO has made a product and a bias of one, it is the product. What is not found is noted.

    Raises:
        StepFailed: none of them is found.
    """
    found, unknown = _named_layers(model, wanted)
    if unknown and task.source.suffix.lower() == ".onnx":
        import onnx

        graph = onnx.load(task.source, load_external_data=False).graph
        tensors = {node.name: node.output[0] for node in graph.node if node.name and node.output}
        more, _ = _named_layers(model, [tensors[name] for name in unknown if name in tensors])
        found = list(dict.fromkeys((*found, *more)))
        unknown = [name for name in unknown if name not in tensors]
    if unknown:
        task.note(f"not found in OpenVINO's graph, so not kept as they are: {', '.join(unknown)}")
    if wanted and not found:
        raise StepFailed("none of the layers to keep are in OpenVINO's graph")
    return found


def _named_layers(model: Any, wanted: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names of the model's operators that ``wanted`` means, and those of its elements that mean none."""
    found: dict[str, None] = {}
    unknown = []
    operators = [operator for operator in model.get_ordered_ops() if operator.get_type_name() not in _NO_OPERATORS]
    names: dict[str, list[str]] = {}
    for operator in operators:
        own = operator.get_friendly_name()
        tensors = (name for port in operator.outputs() for name in port.get_names())
        for name in {own, own.removesuffix(_SPLIT), operator.get_type_name(), *tensors}:
            names.setdefault(name, []).append(own)
    for element in wanted:
        if element in names:
            found.update(dict.fromkeys(names[element]))
        else:
            unknown.append(element)
    return list(found), unknown


@contextmanager
def nncf() -> Iterator[Any]:
    """The module nncf, quiet, and without importing what it does not need.

    Raises:
        StepFailed: it is not installed.
    """
    kind = logging.getLoggerClass()  # it makes its own the kind of all loggers to come
    hidden = [name for name in _UNUSED_BY_NNCF if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None: meanwhile they are not installed
    try:
        with quiet():
            try:
                import nncf as library
            except ImportError as error:
                raise StepFailed(f"nncf does not import here: {error}; install it with: pip install nncf") from error
            # Not by its set_log_level, which changes the handlers of the whole process.
            logging.getLogger("nncf").setLevel(logging.ERROR)
            yield library
    finally:
        logging.setLoggerClass(kind)
        for name in hidden:
            del sys.modules[name]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars, tables and warnings of libraries to themselves."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _converted(task: StepTask) -> tuple[Any, list[_Pair], list[_Pair]]:
    """The model, and each tensor of the signature with its port."""
    inputs, outputs = task.signature.inputs, task.signature.outputs
    source = ModelSource("", "", task.source, inputs=inputs, outputs=outputs)
    match task.source.suffix.lower():
        case ".pt2":
            from headrace_backends.torch_exported import load_exported, result_names

            program = load_exported(source)
            _, order = result_names(source, program.module_call_graph[0].signature.out_spec)
            model = ov.convert_model(program)
            return model, _paired("input", inputs, model.inputs), _paired("output", outputs, model.outputs, order)
        case ".pt":
            import torch

            from headrace_backends.torch_model import positions
            from headrace_backends.torchscript import argument_order, load_torchscript

            module = load_torchscript(source, torch.device("cpu"))
            places = argument_order(source, module)
            names = [argument.name for argument in module.forward.schema.arguments]
            arguments = [inputs[places[name]] for name in names if name in places]
            model = ov.convert_model(module, input=[_declared(spec) for spec in arguments])
            order = positions([spec.name for spec in outputs])
            return model, _paired("input", arguments, model.inputs), _paired("output", outputs, model.outputs, order)
        case _:
            core = ov.Core()
            core.set_property({"ENABLE_MMAP": False})  # the file may be written over while its weights are being read
            model = read_model(source, core)
            inner = _graph_names(task, model)
            return (
                model,
                _by_name("input", inputs, model.inputs, inner),
                _by_name("output", outputs, model.outputs, inner),
            )


def _graph_names(task: StepTask, model: Any) -> Mapping[str, str]:
    """What the graph calls the signature's tensors, where OpenVINO knows them by no other name."""
    wanted = {spec.name for spec in (*task.signature.inputs, *task.signature.outputs)}
    known = {name for port in (*model.inputs, *model.outputs) for name in port.get_names()}
    if task.source.suffix.lower() != ".tflite" or wanted <= known:
        return {}
    from headrace_backends.litert import tensor_names

    return tensor_names(task.source)


def _paired(
    kind: str, specs: Sequence[TensorSpec], ports: Sequence[Any], order: Sequence[int] | None = None
) -> list[_Pair]:
    places = range(len(specs)) if order is None else order
    if len(ports) <= max(places, default=-1) or (order is None and len(ports) != len(specs)):
        raise StepFailed(f"OpenVINO makes {len(ports)} {kind}s of it, expected {len(specs)}")
    return [(spec, ports[place]) for spec, place in zip(specs, places, strict=True)]


def _by_name(kind: str, specs: Sequence[TensorSpec], ports: Sequence[Any], names: Mapping[str, str]) -> list[_Pair]:
    found = {name: port for port in ports for name in port.get_names()}
    named = found | {name: found[inner] for name, inner in names.items() if inner in found}
    missing = [spec.name for spec in specs if spec.name not in named]
    if missing:
        raise StepFailed(f"OpenVINO finds no {kind} {', '.join(map(repr, missing))} in it; there are {sorted(found)}")
    return [(spec, named[spec.name]) for spec in specs]


def _declared(spec: TensorSpec) -> tuple[Any, Any]:
    shape = ov.PartialShape.dynamic() if spec.shape is None else ov.PartialShape(list(spec.shape))
    return shape, _TYPES[spec.datatype]


def _check_rank(spec: TensorSpec, shape: Any) -> None:
    if spec.shape is not None and shape.rank.is_static and len(shape) != len(spec.shape):
        raise StepFailed(f"'{spec.name}' has {len(shape)} dimensions in OpenVINO, expected {len(spec.shape)}")
