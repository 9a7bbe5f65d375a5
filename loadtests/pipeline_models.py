"""The pipeline under load, from a JPEG to its five best classes: models, pictures, and its steps without a server."""

import io
import runpy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from headrace.core.tensor import Array
from loadtests.graph import FLOAT, INT64, Graph
from loadtests.inputs import SEED
from loadtests.resnet import build_resnet50

MAX_BATCH_SIZE = 8
BEST = 5
STEPS = ("decode", "classify", "best")
PICTURE_SIZE = (500, 375)
_CLASSES = 1000

# Width and stride of each pair of a depthwise and a 1x1 convolution.
_MOBILE_LAYERS = ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (256, 2), *([(256, 1)] * 5), (512, 2), (512, 1))

_DECODE = """
import io

import numpy as np
from PIL import Image

from headrace_backends.python import InputError

MEAN = np.array([123.675, 116.28, 103.53], np.float32)
SCALE = np.float32(1) / np.array([58.395, 57.12, 57.375], np.float32)


class Model:
    inputs = [{"name": "file", "datatype": "BYTES", "shape": [-1, 1]}]
    outputs = [{"name": "pixels", "datatype": "FP32", "shape": [-1, 3, 224, 224]}]
    max_batch_size = %d

    def infer(self, inputs):
        files = inputs["file"].reshape(-1)
        pixels = np.empty((len(files), 3, 224, 224), np.float32)
        for index, file in enumerate(files):
            pixels[index] = self.normalized(file).transpose(2, 0, 1)
        return {"pixels": pixels}

    def normalized(self, file):
        try:
            with Image.open(io.BytesIO(file)) as picture:
                width, height = picture.size
                side = min(width, height) * 224 / 256
                left, top = (width - side) / 2, (height - side) / 2
                small = picture.convert("RGB").resize(
                    (224, 224), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
                )
        except OSError as error:
            raise InputError(f"'file' is no picture: {error}") from error
        return (np.asarray(small, np.float32) - MEAN) * SCALE
"""

_CALLING = """
class Model:
    inputs = [{"name": "file", "datatype": "BYTES", "shape": [-1, 1]}]
    outputs = [
        {"name": "scores", "datatype": "FP32", "shape": [-1, %d]},
        {"name": "classes", "datatype": "INT64", "shape": [-1, %d]},
    ]
    max_batch_size = %d

    def load(self, context):
        self.context = context

    def infer(self, inputs):
        pixels = self.context.infer("decode", inputs)["pixels"]
        logits = self.context.infer("%s", {"data": pixels})["logits"]
        return self.context.infer("best", {"logits": logits})
"""

_ENSEMBLE = """
ensemble:
- {model: decode, inputs: {file: file}, outputs: {pixels: pixels}}
- {model: %s, inputs: {data: pixels}, outputs: {logits: logits}}
- {model: best, inputs: {logits: logits}, outputs: {scores: scores, classes: classes}}
"""


# ---- the models ----


def build_mobilenet() -> onnx.ModelProto:
    """``data`` FP32 [batch, 3, 224, 224] to ``logits`` FP32 [batch, 1000]: MobileNet v1 at half its width."""
    graph = Graph("mobilenet")
    value = graph.add("Relu", _convolution(graph, "data", (16, 3, 3), stride=2))
    channels = 16
    for width, stride in _MOBILE_LAYERS:
        value = graph.add("Relu", _convolution(graph, value, (channels, 1, 3), stride=stride, group=channels))
        value = graph.add("Relu", _convolution(graph, value, (width, channels, 1)))
        channels = width
    value = graph.add("Flatten", graph.add("GlobalAveragePool", value))
    graph.linear(value, channels, _CLASSES, output="logits")
    return graph.model([("data", FLOAT, ("batch", 3, 224, 224))], [("logits", FLOAT, ("batch", _CLASSES))])


def _convolution(graph: Graph, value: str, sizes: tuple[int, int, int], *, stride: int = 1, group: int = 1) -> str:
    """``sizes`` are filters, channels that each of them sees, and kernel."""
    filters, channels, kernel = sizes
    # He's scale keeps activations level.
    weight = graph.weight(filters, channels, kernel, kernel, scale=(2 / (channels * kernel * kernel)) ** 0.5)
    bias = graph.weight(filters, scale=0.05)
    pads = [kernel // 2] * 4
    return graph.add(
        "Conv", value, weight, bias, kernel_shape=[kernel, kernel], strides=[stride, stride], pads=pads, group=group
    )


def build_best() -> onnx.ModelProto:
    """``logits`` FP32 [batch, 1000] to the five highest, ``scores``, and where they stand, ``classes``."""
    graph = Graph("best")
    probabilities = graph.add("Softmax", "logits", axis=1)
    count = graph.constant([BEST], np.int64)
    graph.add_outputs("TopK", (probabilities, count), ("scores", "classes"), axis=1)
    return graph.model(
        [("logits", FLOAT, ("batch", _CLASSES))],
        [("scores", FLOAT, ("batch", BEST)), ("classes", INT64, ("batch", BEST))],
    )


NETS: dict[str, Callable[[], onnx.ModelProto]] = {"resnet50": build_resnet50, "mobilenet": build_mobilenet}
