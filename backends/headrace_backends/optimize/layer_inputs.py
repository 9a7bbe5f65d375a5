"""What a layer of an ONNX model is given: the mean and the covariance of its inputs, from examples."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace_backends.base import Array

Floats = npt.NDArray[np.float32]

MOST_INPUTS = 2304  # of one output, 256 channels of 3 x 3: a covariance of more takes seconds to invert
_FEWEST_PLACES, _MOST_PLACES = 64, 256  # of an example that are looked at, of the thousands that a convolution has


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or matrix product with constant weights, as groups of [outputs, inputs] matrices."""

    name: str
    operator: str
    given: str  # the tensor that it works on
    weight: str
    bias: str  # empty where there is none
    groups: int
    kernel: tuple[int, ...] = ()  # of a convolution; empty for products
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    outputs_first: bool = True  # how the weight is stored

    def matrices(self, weight: Array) -> Floats:
        """The weight as [groups, outputs, inputs]."""
        rows = weight if self.outputs_first else weight.T
        return rows.reshape(self.groups, rows.shape[0] // self.groups, -1).astype(np.float32)

    def stored(self, matrices: Array, shape: Sequence[int]) -> Array:
        """The way back from ``matrices``."""
        if self.outputs_first:
            return matrices.reshape(shape)
        return np.ascontiguousarray(matrices.reshape(shape[1], shape[0]).T)


@dataclass(frozen=True, slots=True)
class Moments:
    """``mean`` is [groups, inputs]; ``covariance`` [groups, inputs, inputs] around it, None of too many inputs."""

    mean: Floats
    covariance: Floats | None

    @property
    def about_zero(self) -> Floats | None:
        """The covariance where nothing can make up for the mean, as in a layer without bias."""
        if self.covariance is None:
            return None
        around: Floats = self.covariance + self.mean[:, :, None] * self.mean[:, None, :]
        return around


def layers_of(model: Any) -> Iterator[Layer]:
    """Those that can be told, in the order of the graph; not those inside of If, Loop and Scan."""
    shapes = {one.name: tuple(one.dims) for one in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in {"Conv", "Gemm", "MatMul"} or node.domain not in {"", "ai.onnx"}:
            continue
        shape = shapes.get(node.input[1])
        if shape is None or not node.name:
            continue
        attributes = {one.name: one for one in node.attribute}
        bias = node.input[2] if len(node.input) > 2 and node.input[2] in shapes else ""
        if node.op_type == "Conv":
            layer = _convolution(node, shape, attributes, bias)
            if layer is not None:
                yield layer
        elif len(shape) == 2 and not ("transA" in attributes and attributes["transA"].i):
            plain = all(attributes[one].f == 1.0 for one in ("alpha", "beta") if one in attributes)
            if plain:
                first = "transB" in attributes and bool(attributes["transB"].i)
                yield Layer(node.name, node.op_type, node.input[0], node.input[1], bias, 1, outputs_first=first)


def moments_of(
    layers: Iterable[Layer], values: Iterable[Mapping[str, Array]], seed: int = 20240229
) -> dict[str, Moments]:
    """By layer, from what the tensors that layers are given were in some runs."""
    layers = list(layers)
    random = np.random.default_rng(seed)
    sums: dict[str, list[Any]] = {}
    for tensors in values:
        for layer in layers:
            columns = _columns(layer, tensors[layer.given], random)
            if columns is None:
                continue
            kept = sums.setdefault(layer.name, [0, 0.0, None])
            kept[0] += columns.shape[-1]
            kept[1] = kept[1] + columns.sum(-1)
            if columns.shape[1] <= MOST_INPUTS:
                products = columns @ columns.transpose(0, 2, 1)
                kept[2] = products if kept[2] is None else kept[2] + products
    found = {}
    for name, (count, total, products) in sums.items():
        mean = total / count
        if not np.isfinite(mean).all() or (products is not None and not np.isfinite(products).all()):
            continue
        covariance = None if products is None else products / count - mean[:, :, None] * mean[:, None, :]
        found[name] = Moments(mean, covariance)
    return found


def _convolution(node: Any, shape: tuple[int, ...], attributes: Mapping[str, Any], bias: str) -> Layer | None:
    kernel = shape[2:]
    ones = (1,) * len(kernel)

    def numbers(name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(attributes[name].ints) if name in attributes else default

    if "auto_pad" in attributes and attributes["auto_pad"].s not in {b"NOTSET", b"VALID", b""}:
        return None  # where it pads depends on the input's size
    return Layer(
        node.name,
        "Conv",
        node.input[0],
        node.input[1],
        bias,
        attributes["group"].i if "group" in attributes else 1,
        kernel,
        numbers("strides", ones),
        numbers("dilations", ones),
        numbers("pads", (0,) * (2 * len(kernel))),
    )


def _columns(layer: Layer, given: Array, random: np.random.Generator) -> Floats | None:
    """Some of what the layer's weights are multiplied with: [groups, inputs, columns]."""
    values = given.astype(np.float32, copy=False)
    if not layer.kernel:
        flat = values.reshape(-1, values.shape[-1])
        most = _places(flat.shape[1]) * max(1, len(values))
        return (flat if len(flat) <= most else flat[random.choice(len(flat), most, replace=False)]).T[None]
    dimensions = len(layer.kernel)
    examples, channels = values.shape[:2]
    inputs = channels // layer.groups * math.prod(layer.kernel)
    if any(layer.pads):
        sides = zip(layer.pads[:dimensions], layer.pads[dimensions:], strict=True)
        values = np.pad(values, [(0, 0), (0, 0), *sides])
    reach = [(size - 1) * step + 1 for size, step in zip(layer.kernel, layer.dilations, strict=True)]
    free = [size - need for size, need in zip(values.shape[2:], reach, strict=True)]
    if min(free) < 0:
        return None
    count = _places(inputs)
    corners = [
        random.integers(0, room // step + 1, count) * step for room, step in zip(free, layer.strides, strict=True)
    ]
    taken = np.empty((channels, math.prod(layer.kernel), examples, count), np.float32)
    for tap, offsets in enumerate(np.ndindex(*layer.kernel)):
        spots = [corner + offset * step for corner, offset, step in zip(corners, offsets, layer.dilations, strict=True)]
        taken[:, tap] = values[(slice(None), slice(None), *spots)].transpose(1, 0, 2)
    return taken.reshape(layer.groups, inputs, examples * count)


def _places(inputs: int) -> int:
    """How many of an example's places to look at: a covariance of many inputs needs many."""
    return min(max(_FEWEST_PLACES, inputs // 8), _MOST_PLACES)
