"""Reading files that OpenVINO takes, and what they say of their inputs and outputs."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import LoadError, ModelSource
from headrace_backends.openvino_quietly import ov
from headrace_backends.specs import FoundTensor

DATATYPES = {
    ov.Type.boolean: DataType.BOOL,
    ov.Type.u8: DataType.UINT8,
    ov.Type.u16: DataType.UINT16,
    ov.Type.u32: DataType.UINT32,
    ov.Type.u64: DataType.UINT64,
    ov.Type.i8: DataType.INT8,
    ov.Type.i16: DataType.INT16,
    ov.Type.i32: DataType.INT32,
    ov.Type.i64: DataType.INT64,
    ov.Type.f16: DataType.FP16,
    ov.Type.bf16: DataType.BF16,
    ov.Type.f32: DataType.FP32,
    ov.Type.f64: DataType.FP64,
}
_FORMATS = {".xml": ("ir", "OpenVINO IR"), ".onnx": ("onnx", "ONNX"), ".tflite": ("tflite", "TensorFlow Lite")}
_NO_WEIGHTS = "Empty weights data in bin file"
_WRONG_WEIGHTS = "Incorrect weights in bin file"
# "Exception from src/a/b.cpp:12:" and "Check 'x != y' failed at src/a/b.cpp:12:" are for OpenVINO's developers.
_CPP_LOCATION = re.compile(r"(?:Exception from|Check '.*?' failed at) \S+\.(?:h|hpp|cpp):\d+:[ \t]*")
_FRONT_END = "FrontEnd API failed with "


def read_model(source: ModelSource, core: Any) -> Any:
    """The file's model, with the configured shapes of its inputs.

    Raises:
        LoadError: it is broken or empty, or keeps something between requests.
    """
    path = source.path
    _check_kind(path)
    try:
        model = core.read_model(str(path))
        model.reshape(_configured_shapes(source, model))
    except (RuntimeError, UnicodeDecodeError) as error:  # its own message may quote a damaged name
        raise LoadError(_why_unread(path, str(error))) from error
    if not model.outputs:
        raise LoadError(f"'{path.name}' has no outputs, so there is nothing to serve")
    kept = [variable.info.variable_id for variable in model.get_variables()]
    if kept:
        raise LoadError(
            f"'{path.name}' keeps {', '.join(map(repr, kept))} from one request to the next, which would be other "
            "clients' requests; expected a model without states, or with states as inputs and outputs"
        )
    return model


def found_tensors(source: ModelSource, model: Any) -> tuple[list[FoundTensor], list[FoundTensor]]:
    """The model's inputs and outputs, in its own order.

    Raises:
        LoadError: the protocol has no datatype for one of them, or OpenVINO cannot run or hand it over.
    """
    problems = [
        f"input '{_label(port)}' may have any number of dimensions, and OpenVINO has to know how many; give its shape "
        "in the configuration's inputs"
        for port in model.inputs
        if port.partial_shape.rank.is_dynamic
    ]
    for port in (*model.inputs, *model.outputs):
        if port.element_type == ov.Type.string:
            problems.append(f"'{_label(port)}' holds strings, which OpenVINO's Python interface cuts at trailing zeros")
        elif port.element_type not in DATATYPES:
            told = port.element_type.get_type_name()
            problems.append(f"'{_label(port)}' is {told}, which the protocol has no datatype for")
    if problems:
        raise LoadError(f"cannot serve '{source.path.name}': {'; '.join(problems)}")
    taken: set[str] = set()  # an input that is an output too is one tensor, with the names of both
    inputs = _named(model.inputs, [spec.name for spec in source.inputs], "input", taken)
    outputs = _named(model.outputs, [spec.name for spec in source.outputs], "output", taken)
    return [_found(*one) for one in inputs], [_found(*one) for one in outputs]


def most_rows(model: Any) -> int | None:
    """How many rows a batch may have by the model's bounds on leading dimensions; None for any number."""
    shapes = [port.partial_shape for port in (*model.inputs, *model.outputs)]
    bounds = [shape[0].max_length for shape in shapes if shape.rank.is_static and len(shape) and shape[0].is_dynamic]
    return min((int(bound) for bound in bounds if bound > 0), default=None)


def trimmed(message: str) -> str:
    """OpenVINO's message on one line, without its places in C++ and without what comes twice."""
    lines = [line.strip() for line in _CPP_LOCATION.sub("", message).splitlines()]
    kept = dict.fromkeys(line for line in lines if line and not line.startswith(_FRONT_END))
    return " ".join(kept)


def _check_kind(path: Path) -> None:
    """Refuse what its ending does not fit: else OpenVINO tries every reader that it has, and some of them print."""
    if path.suffix.lower() not in _FORMATS:
        return
    reader, told = _FORMATS[path.suffix.lower()]
    try:
        suits = ov.frontend.FrontEndManager().load_by_framework(reader).supported(str(path))
    except RuntimeError as error:
        raise LoadError(_why_unread(path, str(error))) from error
    if not suits:
        raise LoadError(f"cannot load '{path.name}': it is not in the format {told}")


def _why_unread(path: Path, message: str) -> str:
    weights = path.with_suffix(".bin")
    if _NO_WEIGHTS in message and not weights.is_file():
        return f"'{path.name}' keeps its weights in '{weights.name}', and there is no such file beside it"
    if _NO_WEIGHTS in message or _WRONG_WEIGHTS in message:
        return f"cannot load '{path.name}': '{weights.name}' is shorter than the weights that it should have"
    return f"cannot load '{path.name}': {trimmed(message)}"


def _configured_shapes(source: ModelSource, model: Any) -> dict[Any, Any]:
    """The inputs whose shapes the configuration fixes further than the file does."""
    wanted = {spec.name: ov.PartialShape(list(spec.shape)) for spec in source.inputs if spec.shape is not None}
    return {
        port: wanted[name]
        for port in model.inputs
        for name in port.get_names()
        if name in wanted and port.partial_shape.compatible(wanted[name]) and port.partial_shape.relaxes(wanted[name])
    }


def _label(port: Any) -> str:
    name: str = port.get_any_name() if port.get_names() else port.get_node().get_friendly_name()
    return name


def _named(ports: Sequence[Any], configured: Sequence[str], kind: str, taken: set[str]) -> list[tuple[Any, str]]:
    """What clients call these: a configured name of the tensor's, else its first; or what the node is called."""
    named = []
    for index, port in enumerate(ports):
        names = sorted(port.get_names() - taken, key=lambda name: (name not in configured, name))
        if not names and kind == "input":
            names = [port.get_node().get_friendly_name()]
        named.append((port, names[0] if names else f"{kind}_{index}"))
        taken.add(named[-1][1])
    return named


def _found(port: Any, name: str) -> FoundTensor:
    shape = port.partial_shape
    sizes = tuple(size.get_length() if size.is_static else -1 for size in shape) if shape.rank.is_static else None
    return FoundTensor(TensorSpec(name, DATATYPES[port.element_type], sizes))
