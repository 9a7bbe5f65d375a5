"""An ONNX model that computes in two bytes: float16 or bfloat16 inside, inputs and outputs as they were.

Options: ``to``, float16 or bfloat16; ``keep``, names of nodes or operators that stay in float32.
"""

import copy
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import msgspec
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from headrace_backends.optimize import onnx_model
from headrace_backends.optimize.quiet import hushed
from headrace_backends.optimize.steps import options
from headrace_backends.optimize.steps.base import StepFailed, StepTask


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the parts are computed in."""

    to: Literal["float16", "bfloat16"] = "float16"
    keep: tuple[str, ...] = ()


# What bfloat16 is worth having for, and what ONNX Runtime may have in it. The rest stays in float32 behind casts.
_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})


def apply(task: StepTask) -> Path:
    """Convert the model, and see that it loads."""
    chosen = options.read("half", Options, task.options)
    original = onnx_model.read(task.source)
    onnx_model.refuse_quantized(original)
    model = onnx_model.named(copy.deepcopy(original))
    if not any(one.data_type == TensorProto.FLOAT for one in model.graph.initializer):
        raise StepFailed("the model has no float32 weights")
    missing = [one for one in chosen.keep if all(one not in {node.name, node.op_type} for node in model.graph.node)]
    if missing:
        raise StepFailed(f"the model has no layers or operators {missing[:5]}")
    with hushed():
        made = _in_float16(model, chosen) if chosen.to == "float16" else _in_bfloat16(model, chosen)
        path = onnx_model.write(made, task, original)
    if not onnx_model.has_gpu():  # a GPU may have what the CPU has not
        onnx_model.session_of(path, task)
    return path


def _in_float16(model: Any, chosen: Options) -> Any:
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    large = [
        one.name
        for one in model.graph.initializer
        if one.data_type == TensorProto.FLOAT and np.abs(numpy_helper.to_array(one)).max(initial=0) > np.finfo("f2").max
    ]
    if large:
        raise StepFailed(f"weights are beyond what float16 can hold: {large[:3]}")
    names = [node.name for node in model.graph.node if node.name in chosen.keep]
    kinds = [kind for kind in onnx_model.counts(model) if kind in chosen.keep]
    try:
        return convert_float_to_float16(
            model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *kinds], node_block_list=names
        )
    except Exception as error:  # asserts, keys, values: whatever the tool stumbles over
        raise StepFailed(f"the model cannot be converted: {type(error).__name__}: {str(error)[:200]}") from error


def _in_bfloat16(model: Any, chosen: Options) -> Any:
    """Convolutions and products with their weights in bfloat16, and casts around each: the rest stays in float32.

    Casts that meet cancel each other out when ONNX Runtime loads the model.
    """
    weights = {one.name: one for one in model.graph.initializer if one.data_type == TensorProto.FLOAT}
    nodes, made = [], set()
    for node in model.graph.node:
        wanted = node.op_type in _PRODUCTS and node.name not in chosen.keep and node.op_type not in chosen.keep
        if not wanted or weights.keys().isdisjoint(node.input):
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if name:
                node.input[place] = half = f"{name}_bfloat16"
                if name not in weights and half not in made:
                    nodes.append(onnx.helper.make_node("Cast", [name], [half], to=TensorProto.BFLOAT16, name=half))
                made.add(half)
        whole = node.output[0]
        node.output[0] = f"{whole}_bfloat16_product"
        nodes.append(node)
        back = onnx.helper.make_node("Cast", [node.output[0]], [whole], to=TensorProto.FLOAT, name=f"{whole}_float")
        nodes.append(back)
    if not made:
        raise StepFailed("the model has no convolutions or products with constant weights")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in onnx_model.nodes_of(model.graph) for name in node.input}
    for name, tensor in weights.items():
        if f"{name}_bfloat16" in made:
            values = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
            model.graph.initializer.append(
                onnx.helper.make_tensor(
                    f"{name}_bfloat16", TensorProto.BFLOAT16, tensor.dims, values.tobytes(), raw=True
                )
            )
            if name not in used:
                model.graph.initializer.remove(tensor)
    return onnx_model.of_opset(model, 22 if "Conv" in onnx_model.counts(model) else onnx_model.LEAST_OPSET)
