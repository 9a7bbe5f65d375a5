"""What a TensorFlow Lite file says of its tensors: by a signature where it has one, else by the graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import Array, LoadError
from headrace_backends.saved_signatures import chosen_signature
from headrace_backends.specs import FoundTensor

_DATATYPES: dict[Any, DataType] = {
    np.bool_: DataType.BOOL,
    np.uint8: DataType.UINT8,
    np.uint16: DataType.UINT16,
    np.uint32: DataType.UINT32,
    np.uint64: DataType.UINT64,
    np.int8: DataType.INT8,
    np.int16: DataType.INT16,
    np.int32: DataType.INT32,
    np.int64: DataType.INT64,
    np.float16: DataType.FP16,
    np.float32: DataType.FP32,
    np.float64: DataType.FP64,
    np.bytes_: DataType.BYTES,
    np.object_: DataType.BYTES,
}


@dataclass(frozen=True, slots=True)
class FileSignature:
    """The tensors to serve. ``key`` is the signature's, None where the file has none."""

    key: str | None
    inputs: list[FoundTensor]
    outputs: list[FoundTensor]
    notes: list[str] = field(default_factory=list)
    tensor_names: dict[str, str] = field(default_factory=dict)  # in the graph, by those that clients use

    def runner(self, interpreter: Any) -> Any:
        """What takes arrays by input name as keywords and returns arrays by output name."""
        return interpreter.get_signature_runner(self.key) if self.key is not None else _GraphRunner(interpreter)


def chosen(interpreter: Any, wanted: object, file: str) -> FileSignature:
    """The tensors of the signature that the configuration wants, else of the one meant for serving.

    Raises:
        LoadError: there is no such signature, several could be meant, or the protocol has no datatype for a tensor.
    """
    offered = sorted(interpreter.get_signature_list())
    key = chosen_signature(offered, wanted, file)
    if key is None:
        inputs = {one["name"]: one for one in interpreter.get_input_details()}
        outputs = {one["name"]: one for one in interpreter.get_output_details()}
    else:
        runner = interpreter.get_signature_runner(key)
        inputs, outputs = runner.get_input_details(), runner.get_output_details()
    problems = [
        f"'{name}' is {np.dtype(one['dtype']).name}, which the protocol has no datatype for"
        for name, one in (*inputs.items(), *outputs.items())
        if one["dtype"] not in _DATATYPES
    ]
    if problems:
        raise LoadError(f"cannot serve '{file}': {'; '.join(problems)}")
    notes = [f"signature '{key}' of {', '.join(offered)}"] if len(offered) > 1 else []
    notes += [note for side in (inputs, outputs) for name, one in side.items() if (note := _scale(name, one))]
    names = {name: one["name"] for name, one in (*inputs.items(), *outputs.items())}
    return FileSignature(key, _found(inputs), _found(outputs), notes, names)


def _found(tensors: Mapping[str, Mapping[str, Any]]) -> list[FoundTensor]:
    return [
        FoundTensor(TensorSpec(name, _DATATYPES[one["dtype"]], tuple(int(size) for size in one["shape_signature"])))
        for name, one in tensors.items()
    ]


def _scale(name: str, tensor: Mapping[str, Any]) -> str | None:
    """What a quantised tensor's numbers mean."""
    scales = tensor["quantization_parameters"]["scales"]
    if len(scales) != 1:
        return None
    zero = int(tensor["quantization_parameters"]["zero_points"][0])
    return f"'{name}' is quantised: {float(scales[0]):.6g} x ({_DATATYPES[tensor['dtype']]} - {zero})"


class _GraphRunner:
    """A signature's runner for files without signatures."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        self._inputs = {one["name"]: one["index"] for one in interpreter.get_input_details()}
        self._outputs = {one["name"]: one["index"] for one in interpreter.get_output_details()}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def __call__(self, **given: Array) -> dict[str, Array]:
        shapes = {name: array.shape for name, array in given.items()}
        if shapes != self._shapes:
            self._shapes = {}
            for name, shape in shapes.items():
                self._interpreter.resize_tensor_input(self._inputs[name], shape)
            self._interpreter.allocate_tensors()
            self._shapes = shapes
        for name, array in given.items():
            self._interpreter.set_tensor(self._inputs[name], array)
        self._interpreter.invoke()
        return {name: self._interpreter.get_tensor(index) for name, index in self._outputs.items()}
