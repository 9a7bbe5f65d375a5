"""Small ONNX nets with random weights, and tasks on them, for the tests of the optimiser's steps."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.steps.base import StepTask

KINDS = {TensorProto.FLOAT: DataType.FP32, TensorProto.INT64: DataType.INT64, TensorProto.STRING: DataType.BYTES}


def value(name, kind, *shape):
    return helper.make_tensor_value_info(name, kind, shape)


def save(folder, nodes, inputs, outputs, weights=None, opset=17):
    weights = {name: numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()}
    graph = helper.make_graph(nodes, "net", inputs, outputs, list(weights.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    path = folder / "source.onnx"
    onnx.save(model, path)
    return path


def convolutions(folder, opset=17):
    """Three convolutions, the middle one depthwise with six-fold clip, then a mean and a Gemm: 3 x 12 x 12 to 5."""
    random = np.random.default_rng(5)

    def weight(*shape):
        return (random.standard_normal(shape) * np.prod(shape[1:]) ** -0.5).astype(np.float32)

    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], name="first", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", ["c0"], ["r0"], name="relu"),
        node("Conv", ["r0", "w1", "b1"], ["c1"], name="depthwise", pads=[1, 1, 1, 1], group=16),
        node("Clip", ["c1", "low", "high"], ["r1"], name="clip"),
        node("Conv", ["r1", "w2", "b2"], ["c2"], name="last"),
        node("Add", ["c2", "r0"], ["sum"], name="add"),
        node("GlobalAveragePool", ["sum"], ["mean"], name="mean"),
        node("Flatten", ["mean"], ["flat"], name="flatten"),
        node("Gemm", ["flat", "w3", "b3"], ["y"], name="gemm", transB=1),
    ]
    weights = {
        "w0": weight(16, 3, 3, 3),
        "b0": weight(16),
        "w1": weight(16, 1, 3, 3) * 3,
        "b1": weight(16),
        "w2": weight(16, 16, 1, 1),
        "b2": weight(16),
        "w3": weight(5, 16),
        "b3": weight(5),
        "low": np.float32(0),
        "high": np.float32(6),
    }
    inputs, outputs = (
        [value("x", TensorProto.FLOAT, "n", 3, 12, 12)],
        [value("y", TensorProto.FLOAT, "n", 5)],
    )
    return save(folder, nodes, inputs, outputs, weights, opset)


def two_layers(folder, **options):
    """x [n, 32] times two matrices, with an integer input added in; two outputs."""
    random = np.random.default_rng(6)
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w0"], ["p0"]),
        node("Add", ["p0", "b0"], ["s0"]),
        node("Relu", ["s0"], ["r0"]),
        node("MatMul", ["r0", "w1"], ["scores"]),
        node("Add", ["k", "one"], ["next"]),
    ]
    weights = {
        "w0": random.standard_normal((32, 64)).astype(np.float32) / 6,
        "b0": random.standard_normal(64).astype(np.float32),
        "w1": random.standard_normal((64, 8)).astype(np.float32) / 8,
        "one": np.array([1], np.int64),
    }
    inputs = [value("x", TensorProto.FLOAT, "n", 32), value("k", TensorProto.INT64, "n", 1)]
    outputs = [value("scores", TensorProto.FLOAT, "n", 8), value("next", TensorProto.INT64, "n", 1)]
    return save(folder, nodes, inputs, outputs, weights, **options)


def attention(folder, width=16, heads=2):
    """x [n, s, width] looks at itself in two heads, at no place that the mask [n, s] hides with a 0."""
    random = np.random.default_rng(8)
    node = helper.make_node
    weights = {
        "gain": np.ones(width, np.float32),
        "shift": np.zeros(width, np.float32),
        "apart": np.array([0, 0, heads, width // heads]),
        "together": np.array([0, 0, width]),
        "root": np.float32((width // heads) ** 0.5),
        "one": np.float32(1),
        "low": np.float32(-10000),
        "first": np.array([1]),
        "second": np.array([2]),
    }
    nodes = [
        node("Add", ["x", "x"], ["doubled"]),
        node("LayerNormalization", ["doubled", "gain", "shift"], ["given"]),
        node("Unsqueeze", ["mask", "first"], ["mask_1"]),
        node("Unsqueeze", ["mask_1", "second"], ["mask_2"]),
        node("Cast", ["mask_2"], ["seen"], to=TensorProto.FLOAT),
        node("Sub", ["one", "seen"], ["unseen"]),
        node("Mul", ["unseen", "low"], ["hidden"]),
    ]
    for name in "qkvo":
        weights[f"{name}_weight"] = random.standard_normal((width, width)).astype(np.float32) / 2
        weights[f"{name}_bias"] = random.standard_normal(width).astype(np.float32)
    for name, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            node("MatMul", ["given", f"{name}_weight"], [f"{name}_product"]),
            node("Add", [f"{name}_bias", f"{name}_product"], [f"{name}_sum"]),
            node("Reshape", [f"{name}_sum", "apart"], [f"{name}_apart"]),
            node("Transpose", [f"{name}_apart"], [name], perm=order),
        ]
    nodes += [
        node("MatMul", ["q", "k"], ["scores"]),
        node("Div", ["scores", "root"], ["scaled"]),
        node("Add", ["scaled", "hidden"], ["masked"]),
        node("Softmax", ["masked"], ["shares"]),
        node("MatMul", ["shares", "v"], ["context"]),
        node("Transpose", ["context"], ["turned"], perm=[0, 2, 1, 3]),
        node("Reshape", ["turned", "together"], ["whole"]),
        node("MatMul", ["whole", "o_weight"], ["o_product"]),
        node("Add", ["o_bias", "o_product"], ["o_sum"]),
        node("Add", ["o_sum", "given"], ["sum"]),
        node("LayerNormalization", ["sum", "gain", "shift"], ["y"]),
    ]
    inputs = [value("x", TensorProto.FLOAT, "n", "s", width), value("mask", TensorProto.INT64, "n", "s")]
    return save(folder, nodes, inputs, [value("y", TensorProto.FLOAT, "n", "s", width)], weights)


def examples_of(path, count=24, real=True):
    random = np.random.default_rng(7)

    def one(tensor):
        dims = [size.dim_value or 1 for size in tensor.type.tensor_type.shape.dim]
        kind = tensor.type.tensor_type.elem_type
        if kind == TensorProto.STRING:
            return np.full(dims, b"word", np.object_)
        if kind == TensorProto.INT64:
            return random.integers(0, 9, dims)
        return random.standard_normal(dims).astype(np.float32)

    inputs = onnx.load(path).graph.input
    found = tuple({tensor.name: one(tensor) for tensor in inputs} for _ in range(count))
    return Examples(found, tuple({} for _ in found), "tests", real=real)


def signature_of(path, max_batch_size=16):
    graph = onnx.load(path).graph

    def specs(tensors):
        return tuple(
            TensorSpec(
                one.name,
                KINDS[one.type.tensor_type.elem_type],
                tuple(size.dim_value or -1 for size in one.type.tensor_type.shape.dim),
            )
            for one in tensors
        )

    return Signature(specs(graph.input), specs(graph.output), max_batch_size)


def task_for(path, folder, notes=None, examples=None, **options):
    target = folder / "made"
    target.mkdir(exist_ok=True)
    return StepTask(
        path,
        target,
        signature_of(path),
        examples_of(path) if examples is None else examples,
        options,
        note=(lambda _: None) if notes is None else notes.append,
    )


def answers(path, examples, level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return [dict(zip(names, session.run(names, dict(one)), strict=True)) for one in examples.inputs]


def declared(path):
    """Names, element types and dimensions of inputs and outputs."""
    graph = onnx.load(path).graph
    return [[_declared(one) for one in tensors] for tensors in (graph.input, graph.output)]


def _declared(tensor):
    kind = tensor.type.tensor_type
    return tensor.name, kind.elem_type, [size.dim_param or size.dim_value for size in kind.shape.dim]
