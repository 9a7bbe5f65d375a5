"""ResNet-50 v1 as an ONNX graph: the true topology, batch norms folded into the convolutions, random weights."""

import onnx

from loadtests.graph import FLOAT, Graph

# Blocks, width and stride of each stage; a block ends in four times its width.
_STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))
_CLASSES = 1000


def build_resnet50() -> onnx.ModelProto:
    """``data`` FP32 [batch, 3, 224, 224] to ``logits`` FP32 [batch, 1000]."""
    graph = Graph("resnet50")
    value = graph.add("Relu", _convolution(graph, "data", 3, 64, kernel=7, stride=2))
    value = graph.add("MaxPool", value, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for blocks, width, stride in _STAGES:
        for block in range(blocks):
            value = _bottleneck(graph, value, channels, width, stride if block == 0 else 1)
            channels = width * 4
    value = graph.add("Flatten", graph.add("GlobalAveragePool", value))
    graph.linear(value, channels, _CLASSES, output="logits")
    return graph.model([("data", FLOAT, ("batch", 3, 224, 224))], [("logits", FLOAT, ("batch", _CLASSES))])


def _bottleneck(graph: Graph, value: str, channels: int, width: int, stride: int) -> str:
    """1x1, 3x3, 1x1 and the way around them. Version 1 has its stride in the first 1x1."""
    inner = graph.add("Relu", _convolution(graph, value, channels, width, stride=stride))
    inner = graph.add("Relu", _convolution(graph, inner, width, width, kernel=3))
    inner = _convolution(graph, inner, width, width * 4, gain=0.3)
    around = value if channels == width * 4 else _convolution(graph, value, channels, width * 4, stride=stride)
    return graph.add("Relu", graph.add("Add", inner, around))


def _convolution(
    graph: Graph, value: str, channels: int, filters: int, *, kernel: int = 1, stride: int = 1, gain: float = 1.0
) -> str:
    # He's scale keeps activations level; the gain below 1 keeps the sum over sixteen blocks from growing.
    weight = graph.weight(filters, channels, kernel, kernel, scale=gain * (2 / (channels * kernel * kernel)) ** 0.5)
    return graph.add(
        "Conv",
        value,
        weight,
        graph.weight(filters, scale=0.05),
        kernel_shape=[kernel, kernel],
        strides=[stride, stride],
        pads=[kernel // 2] * 4,
    )
