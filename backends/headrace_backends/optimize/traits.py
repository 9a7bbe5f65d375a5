"""What a model file is made of, as far as it decides which forms are worth trying. Imports no framework by itself.

ONNX files are read with the onnx package, in the process that asks.
"""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from headrace_backends.ncnn.graph import NcnnGraph
from headrace_backends.optimize.facts import Kind

_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose", "FusedConv", "ConvInteger", "QLinearConv"})
_PRODUCTS = frozenset({"MatMul", "Gemm", "FusedGemm", "FusedMatMul", "MatMulInteger", "QLinearMatMul", "QGemm"})
_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "PackedAttention"})
_NORMS = frozenset({"LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization", "RMSNormalization"})


def kind_of(path: Path) -> Kind:
    """What most of the arithmetic is in; a file that does not tell counts as dense.

    Raises:
        ImportError: an ONNX file, and onnx is not installed.
        OSError, ValueError: the file cannot be read.
    """
    if path.suffix != ".onnx":
        return "dense"
    model = _graph_only(path)
    nodes = list(_nodes(model))
    convolutions = [node for node in nodes if node.op_type in _CONVOLUTIONS]
    products = [node for node in nodes if node.op_type in _PRODUCTS]
    stored = {one.name for one in model.graph.initializer}
    constant = stored | _derived(nodes, stored)
    weighted = [node for node in products if any(name in constant for name in node.input[:2])]
    if _is_transformer(operator_counts(path), len(products) - len(weighted)):
        return "transformer"
    shapes = _shapes(_inferred(model))
    in_convolutions, in_products = _total(convolutions, shapes), _total(products, shapes)
    if in_convolutions is None or in_products is None:  # shapes are not known, numbers of layers are
        in_convolutions, in_products = len(convolutions), len(weighted)
    return "convolutional" if in_convolutions > in_products else "dense"


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


def _derived(nodes: list[Any], constants: Container[str]) -> set[str]:
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


def _is_transformer(counts: Mapping[str, int], free_products: int) -> bool:
    """Softmax between products of computed values is attention, in whatever other words a file puts it."""
    if _ATTENTION & counts.keys():
        return True
    norms = any(kind in counts for kind in _NORMS) or counts.get("ReduceMean", 0) >= 2 * counts.get("Softmax", 0) > 0
    return counts.get("Softmax", 0) > 0 and free_products >= 2 and norms
