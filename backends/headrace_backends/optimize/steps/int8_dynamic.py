"""Dynamic int8 of an ONNX model: weights in int8, activations quantised as they come; nothing to calibrate.

Convolutions are left alone unless they are asked for: in this form they take five times as long as in float.
"""

import copy
from pathlib import Path
from typing import Any

import msgspec
import onnx

from headrace_backends.optimize import onnx_model
from headrace_backends.optimize.quiet import hushed
from headrace_backends.optimize.steps import options
from headrace_backends.optimize.steps.base import StepFailed, StepTask

_MADE = frozenset({"MatMulInteger", "DynamicQuantizeLSTM", "ConvInteger", "QAttention", "QEmbedLayerNormalization"})


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``operators`` to quantise; ``keep``, names of nodes or operators that stay in float."""

    per_channel: bool = True
    operators: tuple[str, ...] = ("MatMul", "Gemm", "Gather", "Attention", "LSTM", "EmbedLayerNormalization")
    keep: tuple[str, ...] = ()
    reduce_range: bool = False  # seven bits, for processors whose eight-bit products saturate
    keep_contracting: bool = False  # products of twice as many inputs as outputs, which suffer most, stay in float


def apply(task: StepTask) -> Path:
    """Quantise the weights."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.onnx_model import ONNXModel

    chosen = options.read("int8_dynamic", Options, task.options)
    original = onnx_model.read(task.source)
    onnx_model.refuse_quantized(original)
    model = onnx_model.of_opset(copy.deepcopy(original))
    ONNXModel(model).replace_gemm_with_matmul()
    model = onnx_model.named(model)
    missing = [one for one in chosen.keep if all(one not in {node.name, node.op_type} for node in model.graph.node)]
    if missing:
        raise StepFailed(f"the model has no layers or operators {missing[:5]}")
    kept = [node.name for node in model.graph.node if node.name in chosen.keep or node.op_type in chosen.keep]
    if chosen.keep_contracting:
        contracting = _contracting(model)
        if not contracting:
            raise StepFailed("the model has no products of twice as many inputs as outputs")
        kept += contracting
    whole, target = task.folder / "whole.onnx", task.folder / "dynamic.onnx"
    onnx.save(model, whole)
    try:
        with hushed():
            quantize_dynamic(
                whole,
                target,
                op_types_to_quantize=list(chosen.operators),
                per_channel=chosen.per_channel,
                reduce_range=chosen.reduce_range,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=kept,
                extra_options={
                    "MatMulConstBOnly": True,
                    "EnableSubgraph": True,
                    "DefaultTensorType": onnx.TensorProto.FLOAT,  # behind ONNX Runtime's own operators none is inferred
                },
            )
        made = onnx.load(target)
    except Exception as error:  # asserts, keys, values: whatever the tool stumbles over
        raise StepFailed(f"the model cannot be quantised: {type(error).__name__}: {str(error)[:300]}") from error
    finally:
        for file in (whole, target):
            file.unlink(missing_ok=True)
    counts = onnx_model.counts(made)
    done = {kind: count for kind, count in counts.items() if kind in _MADE}
    if not done:
        raise StepFailed("nothing of the model can be quantised: it has no products with constant weights")
    task.note("in int8: " + ", ".join(f"{count} {kind}" for kind, count in done.items()))
    task.note("its scales are those of a whole batch, so rows are not merged")
    return onnx_model.write(made, task, original)


def _contracting(model: Any) -> list[str]:
    """In transformers the second half of each feed-forward layer: what comes out of a GELU has values far off.

    Measured on MiniLM: the worst sentence's cosine is 0.988 with all products in int8, and 0.994 without these.
    """
    shapes = {one.name: tuple(one.dims) for one in model.graph.initializer}
    found = []
    for node in model.graph.node:
        shape = shapes.get(node.input[1], ()) if node.op_type == "MatMul" else ()
        if len(shape) == 2 and shape[0] >= 2 * shape[1]:
            found.append(node.name)
    return found
