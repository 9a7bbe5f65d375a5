"""An ONNX graph in half precision: TensorRT takes every tensor in the type that the graph gives it, and chooses none.

Inputs and outputs keep their types. What loses too much in half precision stays as it was, with casts around it;
TensorRT merges those into the neighbouring kernels. Quantised layers stay quantised.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from headrace_backends.base import BackendUnavailable, LoadError

HALVES = ("fp16", "bf16")

_LARGEST_FP16 = 65504.0
# Sums over many elements, powers and logarithms leave the range or the precision of fp16; the others take no halves.
_KEPT = frozenset(
    {
        "CumSum", "Einsum", "Exp", "Log", "LogSoftmax", "LpNormalization", "NonMaxSuppression", "Pow", "RandomNormal",
        "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Range", "ReduceL1", "ReduceL2", "ReduceLogSum",
        "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Resize", "RoiAlign", "Softplus",
        "Upsample",
    }
)  # fmt: skip
_QUANTISED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_WITH_GRAPHS = frozenset({"If", "Loop", "Scan"})


def convert(path: Path, half: str) -> Any:
    """The model of an ONNX file (an ``onnx.ModelProto``), computing in ``half``: fp16 or bf16.

    Raises:
        BackendUnavailable: the package onnx is missing.
        LoadError: the model cannot be read, or has graphs inside of its nodes.
    """
    try:
        import onnx
    except ImportError as error:
        raise BackendUnavailable(
            f"precision {half} needs the package onnx, to put the types into the graph ({error}); "
            "install it with: pip install onnx"
        ) from error
    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    except Exception as error:
        raise LoadError(f"cannot read '{path.name}': {' '.join(str(error).split())}") from error
    return _Conversion(onnx, model, half).run()


class _Conversion:
    """Tensors of FLOAT keep their names and become halves; where one is needed as it was, it has another name."""

    def __init__(self, onnx: Any, model: Any, half: str) -> None:
        self._onnx = onnx
        self._model = model
        self._half = onnx.TensorProto.FLOAT16 if half == "fp16" else onnx.TensorProto.BFLOAT16
        self._float = onnx.TensorProto.FLOAT
        self._nodes: list[Any] = []
        self._names: set[str] = set()
        self._halved: dict[str, str] = {}  # FLOAT tensor -> its half
        self._floated: dict[str, str] = {}  # FLOAT tensor -> itself as FLOAT
        self._constants: dict[str, Any] = {}

    def run(self) -> Any:
        graph = self._model.graph
        held = sorted({node.op_type for node in graph.node} & _WITH_GRAPHS)
        if held:
            raise LoadError(
                f"the model has {', '.join(held)}, whose inner graphs cannot be put into half precision; set "
                "parameters.precision to fp32 or tf32, or export the model in half precision"
            )
        self._names = {name for node in graph.node for name in (*node.input, *node.output)}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        floats = {name for name, kind in self._types() if kind == self._float}
        outputs = {value.name for value in graph.output}
        for value in graph.input:
            if value.name in floats and value.name not in self._constants:
                self._floated[value.name] = value.name
        for node in graph.node:
            self._take(node, floats, outputs)
        for value in graph.output:  # an input or a constant that is an output as it is
            if value.name in floats and value.name in self._constants and value.name not in self._floated:
                self._floated[value.name] = value.name
        self._finish(graph)
        return self._model

    def _types(self) -> Iterator[tuple[str, int]]:
        graph = self._model.graph
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield value.name, value.type.tensor_type.elem_type
        for tensor in graph.initializer:
            yield tensor.name, tensor.data_type

    def _take(self, node: Any, floats: set[str], outputs: set[str]) -> None:
        keep = node.op_type in _KEPT or (node.op_type in _QUANTISED and not self._quantises_halves())
        for index, name in enumerate(node.input):
            if name in floats:
                node.input[index] = self._as_float(name) if keep else self._as_half(name)
        after = []
        for index, name in enumerate(node.output):
            if name not in floats:
                continue
            if keep:
                mine = name if name in outputs else self._fresh(f"{name}_fp32")
                node.output[index] = self._floated[name] = mine
            elif name in outputs:
                half = node.output[index] = self._halved[name] = self._fresh(f"{name}_half")
                self._floated[name] = name
                after.append(self._cast(half, name, self._float))
            else:
                self._halved[name] = name
        if not keep:
            self._retype(node)
        self._nodes += [node, *after]

    def _quantises_halves(self) -> bool:
        # Before opset 19 scales are FLOAT, and so is what comes out of a DequantizeLinear.
        return any(one.version >= 19 for one in self._model.opset_import if one.domain in ("", "ai.onnx"))

    def _as_half(self, name: str) -> str:
        if name not in self._halved:
            if name in self._constants and name not in self._floated:
                self._halved[name] = half = self._fresh(f"{name}_half")
                self._model.graph.initializer.append(self._half_tensor(self._constants[name], half))
            else:
                half = self._halved[name] = self._fresh(f"{name}_half")
                self._nodes.append(self._cast(self._floated[name], half, self._half))
        return self._halved[name]

    def _as_float(self, name: str) -> str:
        if name not in self._floated:
            if name in self._constants:
                self._floated[name] = name  # as it was
            else:
                floated = self._floated[name] = self._fresh(f"{name}_fp32")
                self._nodes.append(self._cast(self._halved[name], floated, self._float))
        return self._floated[name]

    def _retype(self, node: Any) -> None:
        """The attributes of a node that say FLOAT."""
        for attribute in node.attribute:
            if attribute.name in {"to", "dtype", "output_dtype"} and attribute.i == self._float:
                attribute.i = self._half
            elif attribute.name == "value" and attribute.t.data_type == self._float:
                attribute.t.CopyFrom(self._half_tensor(attribute.t, attribute.t.name))
        if node.op_type == "Constant" and any(one.name in {"value_float", "value_floats"} for one in node.attribute):
            (old,) = node.attribute
            values = np.float32(old.f) if old.name == "value_float" else np.array(old.floats, np.float32)
            tensor = self._half_tensor(self._onnx.numpy_helper.from_array(np.asarray(values)), "")
            node.attribute.remove(old)
            node.attribute.append(self._onnx.helper.make_attribute("value", tensor))

    def _half_tensor(self, tensor: Any, name: str) -> Any:
        array = self._onnx.numpy_helper.to_array(tensor)
        if self._half == self._onnx.TensorProto.FLOAT16:
            # Masks are often the lowest float: in half precision they would be infinite, and their differences NaN.
            finite = np.where(np.isfinite(array), np.clip(array, -_LARGEST_FP16, _LARGEST_FP16), array)
            return self._onnx.numpy_helper.from_array(finite.astype(np.float16), name)
        import ml_dtypes

        bits = array.astype(ml_dtypes.bfloat16)
        return self._onnx.helper.make_tensor(name, self._half, array.shape, bits.tobytes(), raw=True)

    def _cast(self, source: str, target: str, kind: int) -> Any:
        return self._onnx.helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=kind)

    def _fresh(self, name: str) -> str:
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name

    def _finish(self, graph: Any) -> None:
        del graph.node[:]
        graph.node.extend(self._nodes)
        used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        left = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(left)
        del graph.value_info[:]  # their types are not true any more, and TensorRT works out its own
