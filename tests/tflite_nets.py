"""Small TensorFlow Lite files, written with the format's own schema: no TensorFlow is needed for them."""

from pathlib import Path

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

TYPES = {
    np.dtype(np.float32): schema.TensorType.FLOAT32,
    np.dtype(np.int8): schema.TensorType.INT8,
    np.dtype(np.int32): schema.TensorType.INT32,
}


class Net:
    """One graph under construction; tensors are known by their names."""

    def __init__(self) -> None:
        self.model = schema.ModelT()
        self.model.version = 3
        self.model.buffers = [schema.BufferT()]
        self.model.operatorCodes = []
        self.model.signatureDefs = []
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.model.subgraphs = [self.graph]
        self.names: dict[str, int] = {}

    def tensor(self, name, dtype, shape, scale=None, zero=0, data=None):
        one = schema.TensorT()
        one.name, one.type = name.encode(), TYPES[np.dtype(dtype)]
        one.shape = [abs(size) for size in shape]
        if -1 in shape:
            one.shapeSignature = list(shape)
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data, dtype).tobytes(), np.uint8)
            one.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        if scale is not None:
            one.quantization = schema.QuantizationParametersT()
            one.quantization.scale, one.quantization.zeroPoint = [scale], [zero]
        self.names[name] = len(self.graph.tensors)
        self.graph.tensors.append(one)
        return self

    def op(self, code, inputs, outputs, options=None, options_type=0, version=1):
        kind = schema.OperatorCodeT()
        kind.builtinCode, kind.deprecatedBuiltinCode, kind.version = code, min(code, 127), version
        one = schema.OperatorT()
        one.opcodeIndex = len(self.model.operatorCodes)
        one.inputs = [self.names[name] for name in inputs]
        one.outputs = [self.names[name] for name in outputs]
        one.builtinOptions, one.builtinOptionsType = options, options_type
        self.model.operatorCodes.append(kind)
        self.graph.operators.append(one)
        return self

    def signature(self, key, inputs, outputs):
        """``inputs`` and ``outputs`` are tensors by the names that clients use."""
        one = schema.SignatureDefT()
        one.signatureKey, one.subgraphIndex = key.encode(), 0
        one.inputs, one.outputs = [
            [self._mapped(name, tensor) for name, tensor in side.items()] for side in (inputs, outputs)
        ]
        self.model.signatureDefs.append(one)
        return self

    def save(self, path: Path, inputs, outputs) -> Path:
        self.graph.inputs = [self.names[name] for name in inputs]
        self.graph.outputs = [self.names[name] for name in outputs]
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(builder.Output())
        return path

    def _mapped(self, name, tensor):
        one = schema.TensorMapT()
        one.name, one.tensorIndex = name.encode(), self.names[tensor]
        return one


def linear(path, weights, *, rows=-1, signatures=("serving_default",)):
    """y = x @ weights, of so many rows; the tensors are ``in:0`` and ``out:0``, by signature ``x`` and ``y``."""
    width, height = weights.shape
    net = Net().tensor("in:0", np.float32, [rows, width]).tensor("w", np.float32, [height, width], data=weights.T)
    net.tensor("out:0", np.float32, [rows, height])
    options = schema.FullyConnectedOptionsT()
    net.op(schema.BuiltinOperator.FULLY_CONNECTED, ["in:0", "w"], ["out:0"], options, 8)
    for key in signatures:
        net.signature(key, {"x": "in:0"}, {"y": "out:0"})
    return net.save(path, ["in:0"], ["out:0"])


def doubled_int8(path):
    """y = 2 x, both int8 with scales and zero points: x counts in halves from 3, y in ones from -1."""
    net = Net().tensor("x", np.int8, [-1, 4], scale=0.5, zero=3).tensor("y", np.int8, [-1, 4], scale=1.0, zero=-1)
    options = schema.AddOptionsT()
    return net.op(schema.BuiltinOperator.ADD, ["x", "x"], ["y"], options, 11, version=2).save(path, ["x"], ["y"])


def less_their_mean(path):
    """y = x - mean of x over the rows: whoever else is in the batch changes the answer."""
    net = Net().tensor("x", np.float32, [-1, 4]).tensor("axis", np.int32, [1], data=np.array([0]))
    net.tensor("m", np.float32, [1, 4]).tensor("y", np.float32, [-1, 4])
    keeps = schema.ReducerOptionsT()
    keeps.keepDims = True
    net.op(schema.BuiltinOperator.MEAN, ["x", "axis"], ["m"], keeps, 27)
    return net.op(schema.BuiltinOperator.SUB, ["x", "m"], ["y"], schema.SubOptionsT(), 28).save(path, ["x"], ["y"])
