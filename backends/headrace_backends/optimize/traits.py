"""What a model file is like, as far as it decides which forms are worth trying. Never imports a framework by itself.

``traits_of`` and ``operator_counts`` read ONNX files with the onnx package, in the process that asks.
"""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from headrace_backends.ncnn_graph import NcnnGraph

_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose", "FusedConv", "ConvInteger", "QLinearConv"})
_PRODUCTS = frozenset({"MatMul", "Gemm", "FusedGemm", "FusedMatMul", "MatMulInteger", "QLinearMatMul", "QGemm"})
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "PackedAttention"})
_NORMS = frozenset({"LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization", "RMSNormalization"})
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulNBits", "QGemm"})
_QUANTIZED_PREFIXES = ("QLinear", "ConvInteger", "MatMulInteger", "DynamicQuantize")


class Traits(msgspec.Struct, frozen=True, omit_defaults=True):
    """None is what cannot be told of a file of this kind. MACs are multiplications for one row."""

    operators: dict[str, int] = {}  # how many of each, also inside of control flow; empty where the file does not tell
    parameter_bytes: int | None = None
    parameter_types: tuple[str, ...] = ()  # of weights with more than one element, as "FLOAT" and "INT8"
    convolutions: int | None = None
    products: int | None = None  # matrix products with constant weights
    free_products: int | None = None  # matrix products of two computed values
    recurrent: int | None = None
    convolution_macs: float | None = None  # None also where shapes are not known
    product_macs: float | None = None
    quantized: bool | None = None
    transformer: bool | None = None
    dynamic_batch: bool | None = None  # every input and output has a leading dimension of any size
    control_flow: bool | None = None
    opset: int | None = None
    depthwise: int | None = None  # convolutions of one channel each, which lose most in int8

    @property
    def mostly_convolutions(self) -> bool | None:
        """Whether most of the arithmetic is in convolutions."""
        if self.convolutions is None or self.products is None:
            return None
        if self.convolution_macs is None or self.product_macs is None:
            return self.convolutions > self.products
        return self.convolution_macs > self.product_macs


def traits_of(path: Path) -> Traits:
    """The traits of a file: all of them for .onnx, a few for .pt2, .pt and .xml.

    Raises:
        ImportError: an ONNX file, and onnx is not installed.
        OSError, ValueError: the file cannot be read.
    """
    if path.suffix == ".onnx":
        return _onnx_traits(path)
    if path.suffix in {".pt2", ".pt"} and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            held = [one for one in archive.infolist() if "/data/" in one.filename or "/constants/" in one.filename]
        return Traits(parameter_bytes=sum(one.file_size for one in held))
    if path.suffix in {".xml", ".param"}:
        weights = path.with_suffix(".bin")
        return Traits(
            operators=operator_counts(path), parameter_bytes=weights.stat().st_size if weights.exists() else None
        )
    return Traits()


def operator_counts(path: Path) -> dict[str, int]:
    """How many nodes of each operator a graph has, the most frequent first; empty where the file does not tell.

    Raises:
        ImportError: an ONNX file, and onnx is not installed.
    """
    counts: dict[str, int] = {}
    if path.suffix == ".onnx":
        for node in _nodes(_graph_only(path)):
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    elif path.suffix == ".xml":
        from xml.etree.ElementTree import parse

        for layer in parse(path).getroot().iter("layer"):  # noqa: S314 - the owner's file, which a runtime reads too
            kind = layer.get("type", "")
            if kind not in {"Parameter", "Result", "Const"}:
                counts[kind] = counts.get(kind, 0) + 1
    elif path.suffix == ".param":
        for one in NcnnGraph.parse(path.read_text()).layers:
            if one.kind != "Input":
                counts[one.kind] = counts.get(one.kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda one: (-one[1], one[0])))


def layer_macs(model: Any) -> dict[str, float | None]:
    """The multiplications that each convolution and matrix product does for one row, by its node's name."""
    shapes = _shapes(model)
    return {
        node.name: _macs(node, shapes)
        for node in model.graph.node
        if node.op_type in _CONVOLUTIONS or node.op_type in _PRODUCTS
    }


def _onnx_traits(path: Path) -> Traits:
    import onnx

    model = _graph_only(path)
    counts = operator_counts(path)
    constants = {one.name: one for one in model.graph.initializer}
    shapes = _shapes(_inferred(model))
    nodes = list(_nodes(model))
    convolutions = [node for node in nodes if node.op_type in _CONVOLUTIONS]
    products = [node for node in nodes if node.op_type in _PRODUCTS]
    constant = {*constants, *_derived(nodes, constants)}
    weighted = [node for node in products if any(name in constant for name in node.input[:2])]
    weights = [one for one in constants.values() if math.prod(one.dims) > 1]
    return Traits(
        operators=counts,
        parameter_bytes=sum(_tensor_bytes(one) for one in constants.values()),
        parameter_types=tuple(sorted({onnx.TensorProto.DataType.Name(one.data_type) for one in weights})),
        convolutions=len(convolutions),
        products=len(weighted),
        free_products=len(products) - len(weighted),
        recurrent=sum(counts.get(kind, 0) for kind in _RECURRENT),
        convolution_macs=_total(convolutions, shapes),
        product_macs=_total(products, shapes),
        quantized=any(one in _QUANTIZED or one.startswith(_QUANTIZED_PREFIXES) for one in counts),
        transformer=_is_transformer(counts, len(products) - len(weighted)),
        dynamic_batch=_has_dynamic_batch(model, constants),
        control_flow=bool(_CONTROL_FLOW & counts.keys()),
        opset=max((one.version for one in model.opset_import if one.domain in {"", "ai.onnx"}), default=None),
        depthwise=sum(_is_depthwise(node, shapes) for node in convolutions),
    )


def _graph_only(path: Path) -> Any:
    import onnx

    return onnx.load(path, load_external_data=False)


def _inferred(model: Any) -> Any:
    import onnx

    try:
        return onnx.shape_inference.infer_shapes(model)
    except Exception:  # noqa: BLE001 - of any kind; then shapes are not known
        return model


def _nodes(model: Any) -> list[Any]:
    found: list[Any] = []
    waiting = [list(model.graph.node), *(list(function.node) for function in model.functions)]
    while waiting:
        for node in waiting.pop():
            found.append(node)
            for attribute in node.attribute:
                waiting += [list(graph.node) for graph in (attribute.g, *attribute.graphs)]
    return found


def _derived(nodes: list[Any], constants: Mapping[str, Any]) -> set[str]:
    """What is computed of constants alone in one step: weights that are stored in int8, or turned round."""
    plain = {"DequantizeLinear", "Transpose", "Cast", "Identity"}
    made = {node.output[0] for node in nodes if node.op_type == "Constant"}
    return made | {node.output[0] for node in nodes if node.op_type in plain and node.input[0] in constants}


def _shapes(model: Any) -> dict[str, tuple[int | None, ...]]:
    shapes: dict[str, tuple[int | None, ...]] = {one.name: tuple(one.dims) for one in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        tensor = value.type.tensor_type
        if value.name not in shapes and tensor.HasField("shape"):
            shapes[value.name] = tuple(one.dim_value if one.HasField("dim_value") else None for one in tensor.shape.dim)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in shapes:
            shapes.setdefault(node.output[0], shapes[node.input[0]])
    return shapes


def _macs(node: Any, shapes: Mapping[str, tuple[int | None, ...]]) -> float | None:
    """Of one node, its rows (the first dimension of its output) counted as one."""
    output, weight = (shapes.get(name) for name in (node.output[0], node.input[1]))
    if output is None or weight is None or not output:
        return None
    if node.op_type in _CONVOLUTIONS:
        transposed = node.op_type == "ConvTranspose"
        spread = shapes.get(node.input[0]) if transposed else output
        places = None if spread is None else spread[2:]
        return _product((*(places or (None,)), *weight))
    inner = weight[-1] if _flag(node, "transB") else (weight[-2] if len(weight) > 1 else weight[0])
    return _product((*output[1:], inner))


def _product(sizes: tuple[int | None, ...]) -> float | None:
    total = 1.0
    for size in sizes:
        if size is None:
            return None
        total *= size
    return total


def _total(nodes: list[Any], shapes: Mapping[str, tuple[int | None, ...]]) -> float | None:
    found = [_macs(node, shapes) for node in nodes]
    known = [one for one in found if one is not None]
    return sum(known) if len(known) == len(found) else None


def _flag(node: Any, name: str) -> int:
    return next((int(one.i) for one in node.attribute if one.name == name), 0)


def _is_depthwise(node: Any, shapes: Mapping[str, tuple[int | None, ...]]) -> bool:
    weight = shapes.get(node.input[1])
    return _flag(node, "group") > 1 and weight is not None and weight[1] == 1


def _is_transformer(counts: Mapping[str, int], free_products: int) -> bool:
    """Softmax between products of computed values is attention, in whatever other words a file puts it."""
    if _ATTENTION & counts.keys():
        return True
    norms = any(kind in counts for kind in _NORMS) or counts.get("ReduceMean", 0) >= 2 * counts.get("Softmax", 0) > 0
    return counts.get("Softmax", 0) > 0 and free_products >= 2 and norms


def _has_dynamic_batch(model: Any, constants: Mapping[str, Any]) -> bool:
    values = [*(one for one in model.graph.input if one.name not in constants), *model.graph.output]
    return bool(values) and all(
        one.type.tensor_type.HasField("shape")
        and len(one.type.tensor_type.shape.dim) > 0
        and not one.type.tensor_type.shape.dim[0].HasField("dim_value")
        for one in values
    )


def _tensor_bytes(tensor: Any) -> int:
    import onnx

    outside = sum(int(one.value) for one in tensor.external_data if one.key == "length")
    if outside:
        return outside
    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(len(one) for one in tensor.string_data)
    return int(math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
