"""Static int8 of an ONNX model: ranges found once, and any number of models made with them, some layers kept in float.

Measured on EfficientNet-lite0 and 160 photos, every layer in int8: with weights rounded to the nearest step, 0.86 of
the best answers stay the same; with the layers' mean error taken out through their biases, 0.88; with the rounding of
``rounding`` as well, 0.94, at the same speed.
"""

import contextlib
import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from onnxruntime.quantization.shape_inference import quant_pre_process

from headrace_backends.base import Array
from headrace_backends.optimize import onnx_model
from headrace_backends.optimize.layer_inputs import Layer, Moments, layers_of, moments_of
from headrace_backends.optimize.rounding import rounded
from headrace_backends.optimize.steps.base import StepFailed, StepTask

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CALIBRATIONS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
_ACTIVATIONS = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
_ROWS = 8  # of a batch of examples: as many activations are in memory at once
_MOMENT_EXAMPLES = 32


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to quantise: the options of the step ``int8_static``."""

    calibrate: Literal["minmax", "entropy", "percentile"] = "minmax"
    percentile: float = 99.99  # of the values of an activation that are within its range
    per_channel: bool = True  # a scale for each output of a layer
    activations: Literal["uint8", "int8"] = "uint8"
    rounding: Literal["nearest", "best"] = "best"
    samples: Annotated[int, msgspec.Meta(ge=1)] = 64
    operators: tuple[str, ...] = ()  # to quantise; none named: every one that ONNX Runtime has in int8
    keep: tuple[str, ...] = ()  # layers or operators that stay in float
    # So many layers from the graph's start and end stay in float too, with all that lies between them: no tensor within
    # is rounded, as those between single kept layers still are. Measured on EfficientNet-lite0: the first 12 and the
    # last leave an error of 0.035 of the logits' spread, the 12 worst of a scan 0.040, and at more speed.
    keep_first: Annotated[int, msgspec.Meta(ge=0)] = 0
    keep_last: Annotated[int, msgspec.Meta(ge=0)] = 0


class Quantizer:
    """A model with the ranges of its activations, from which quantised ones are made."""

    def __init__(self, task: StepTask, recipe: Recipe) -> None:
        """Prepare the model and run the examples.

        Raises:
            StepFailed: the model cannot be quantised, or there is nothing to calibrate with.
        """
        self.recipe = recipe
        self.original = onnx_model.read(task.source)
        onnx_model.refuse_quantized(self.original)
        self.model, path = _prepared(self.original, task.folder)
        self.operators = list(recipe.operators) or sorted({*QDQRegistry, *QLinearOpsRegistry})
        self.weighted = [node for node in self.model.graph.node if node.op_type in LAYERS]
        if not self.weighted:
            raise StepFailed("the model has no convolutions and no matrix products")
        self.feeds = onnx_model.feeds(task, recipe.samples, _ROWS)
        self._ranges = _ranges(path, self.feeds, recipe, self.operators, task.folder)
        self._weights = {one.name: one for one in self.model.graph.initializer}
        self._layers = own_weights(self.model)
        self._moments = moments(self.model, self._layers, self.feeds, task) if recipe.rounding == "best" else {}
        self._chosen: dict[str, npt.NDArray[np.int8]] = {}
        self._followers = _followers(self.model)
        path.unlink()

    def few(self, examples: int) -> list[Mapping[str, Array]]:
        """Batches of about so many examples, to run the model on."""
        return list(_first_rows(self.feeds, examples))

    def group(self, name: str) -> list[str]:
        """A layer and the activation that nothing but the layer feeds: they are quantised together or not at all.

        The range of a layer before its Relu or Clip can be many times that after it.
        """
        return [name, *self._followers.get(name, ())]

    def made(self, keep: Iterable[str] = (), only: Iterable[str] = ()) -> Any:
        """A quantised model, but for the layers or operators ``keep``; of nothing but the layers ``only``, if any.

        Raises:
            StepFailed: it cannot be made, or there is no such layer.
        """
        keep, only = list(keep), list(only)
        names = {node.name for node in self.model.graph.node}
        kinds = {node.op_type for node in self.model.graph.node}
        unknown = [one for one in (*keep, *only) if one not in names and one not in kinds]
        if unknown:
            raise StepFailed(f"the model has no layers or operators {unknown[:5]}")
        kept = [node.name for node in self.model.graph.node if node.op_type in keep or node.name in keep]
        quantizer = QDQQuantizer(
            copy.deepcopy(self.model),
            self.recipe.per_channel,
            False,  # the full range of int8: processors without VNNI might saturate, but the answers are proved
            QuantType.QInt8,
            _ACTIVATIONS[self.recipe.activations],
            self._some_ranges(only),
            [one for name in only for one in self.group(name)],
            [one for name in kept for one in self.group(name)],
            self.operators,
            {"QDQOpTypePerChannelSupportToAxis": {"MatMul": 1}},
        )
        try:
            quantizer.quantize_model()
        except Exception as error:  # asserts, keys, values: whatever the tool stumbles over
            raise StepFailed(f"the model cannot be quantised: {type(error).__name__}: {str(error)[:200]}") from error
        model = quantizer.model.model
        self._round(model)
        _protect(model)
        return model

    def _some_ranges(self, only: Sequence[str]) -> TensorsData:
        """Copies, which the tool changes; without those that no layer of ``only`` needs, as it works on them all."""
        named = {one for name in only for one in self.group(name)}
        needed = {
            tensor for node in self.model.graph.node if node.name in named for tensor in (*node.input, *node.output)
        }
        return TensorsData(
            CalibrationMethod.MinMax,
            {name: copy.copy(one) for name, one in self._ranges.items() if not only or name in needed},
        )

    def _round(self, model: Any) -> None:
        """Put better whole numbers in the place of the weights, and take the mean error out of the biases."""
        if self.recipe.rounding != "best":
            return
        initializers = {one.name: one for one in model.graph.initializer}
        scaled = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
        nodes = {node.name: node for node in model.graph.node}
        for layer in self._layers:
            node, given = nodes[layer.name], self._moments.get(layer.name)
            weight = scaled.get(node.input[1])
            bias = scaled.get(node.input[2]) if layer.bias and len(node.input) > 2 else None
            if given is None or weight is None or weight.input[0] not in initializers:
                continue
            scales = numpy_helper.to_array(initializers[weight.input[1]]).astype(np.float32)
            matrices = layer.matrices(numpy_helper.to_array(self._weights[layer.weight]))
            steps = scales.reshape(layer.groups, -1, 1) if scales.size > 1 else scales.reshape(1, 1, 1)
            held = initializers[weight.input[0]]
            around = given.about_zero if bias is None else given.covariance
            if around is not None and layer.name not in self._chosen:
                self._chosen[layer.name] = rounded(matrices, steps, around)
            whole = self._chosen.get(layer.name)
            if whole is None:
                whole = layer.matrices(numpy_helper.to_array(held)).astype(np.int8)
            held.CopyFrom(numpy_helper.from_array(layer.stored(whole, held.dims), held.name))
            if bias is not None:
                error = ((matrices - whole * steps) @ given.mean[:, :, None]).reshape(-1)
                _shift(initializers[bias.input[0]], error, numpy_helper.to_array(initializers[bias.input[1]]))


def ends(model: Any, first: int, last: int) -> list[str]:
    """The names of the nodes up to the layer after the ``first`` ones, and from the layer that begins the ``last``."""
    places = [place for place, node in enumerate(model.graph.node) if node.op_type in LAYERS]
    if first + last >= len(places):
        raise StepFailed(f"the model has {len(places)} layers: none would be left for int8")
    names = [node.name for node in model.graph.node]
    head = names[: places[first]] if first else []
    return head + (names[places[-last] :] if last else [])


def moments(
    model: Any, layers: Sequence[Layer], feeds: Sequence[Mapping[str, Array]], task: StepTask
) -> dict[str, Moments]:
    """What the layers are given when the model runs the first of these examples."""
    wanted = {layer.given for layer in layers} - {one.name for one in model.graph.input}
    session = None
    if wanted:
        opened = copy.deepcopy(model)
        del opened.graph.output[:]
        opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted))
        session = onnx_model.session_of(opened, task)
    values = (
        {**feed, **(onnx_model.run(session, feed) if session else {})} for feed in _first_rows(feeds, _MOMENT_EXAMPLES)
    )
    return moments_of(layers, values, task.seed)


def int8_layers(model: Any) -> list[str]:
    """The names of the layers of a quantised model whose weights are int8."""
    whole = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return [node.name for node in model.graph.node if node.op_type in LAYERS and whole.intersection(node.input[1:2])]


def _prepared(original: Any, folder: Path) -> tuple[Any, Path]:
    """The model with shapes inferred, batch norms folded and nodes named; also as a file."""
    folder = folder.absolute()
    source, target = folder / "named.onnx", folder / "prepared.onnx"
    model = onnx_model.of_opset(copy.deepcopy(original))
    model = onnx_model.named(model)
    onnx.save(model, source)
    for symbolic in (True, False):
        try:
            # Where symbolic inference gives up it leaves the whole model in the working directory.
            with tempfile.TemporaryDirectory(dir=folder) as litter, contextlib.chdir(litter):
                quant_pre_process(source, target, skip_symbolic_shape=not symbolic)
            break
        except Exception as error:  # symbolic inference gives up on some graphs, by exceptions of every kind
            if not symbolic:
                raise StepFailed(f"the model cannot be prepared: {type(error).__name__}: {str(error)[:200]}") from error
    source.unlink()
    prepared = onnx_model.named(onnx.load(target))
    _flatten_biases(prepared)
    onnx.save(prepared, target)
    return prepared, target


def _flatten_biases(model: Any) -> None:
    """Give each Gemm a bias of one dimension: the tool stumbles over [1, n], which TensorFlow's models have."""
    weights = {one.name: one for one in model.graph.initializer}
    for node in model.graph.node:
        bias = weights.get(node.input[2]) if node.op_type == "Gemm" and len(node.input) > 2 else None
        if bias is None or len(bias.dims) != 2 or bias.dims[0] != 1:
            continue
        flat = numpy_helper.from_array(numpy_helper.to_array(bias).reshape(-1), f"{bias.name}_flat_{node.name}")
        model.graph.initializer.append(flat)  # of its own: the other may be used elsewhere
        node.input[2] = flat.name


def _ranges(
    path: Path, feeds: Sequence[Mapping[str, Array]], recipe: Recipe, operators: list[str], folder: Path
) -> TensorsData:
    augmented = folder / "calibrated.onnx"
    # 2,048 bins find the best threshold as well as any number; the entropy's search is slow beyond a few hundred.
    extra = {
        "minmax": {},
        "entropy": {"num_bins": 512},
        "percentile": {"percentile": recipe.percentile, "symmetric": False},
    }[recipe.calibrate]
    try:
        calibrator = create_calibrator(
            path, operators, str(augmented), _CALIBRATIONS[recipe.calibrate], extra_options=extra
        )
        for feed in feeds:  # one at a time: the tool holds all that it is given in memory
            calibrator.collect_data(_Once(feed))
        return calibrator.compute_data()
    except Exception as error:  # ONNX Runtime's, numpy's and the tool's own
        raise StepFailed(f"the examples cannot be run to calibrate: {str(error)[:300]}") from error
    finally:
        augmented.unlink(missing_ok=True)


class _Once(CalibrationDataReader):  # type: ignore[misc] # the base class is untyped
    def __init__(self, feed: Mapping[str, Array]) -> None:
        self._left: list[dict[str, Array]] = [dict(feed)]

    def get_next(self) -> dict[str, Array] | None:
        return self._left.pop() if self._left else None


def own_weights(model: Any) -> list[Layer]:
    """The layers whose weight and bias nobody else uses."""
    uses: dict[str, int] = {}
    for node in onnx_model.nodes_of(model.graph):
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    return [one for one in layers_of(model) if uses[one.weight] == 1 and (not one.bias or uses[one.bias] == 1)]


def _followers(model: Any) -> dict[str, list[str]]:
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {one.name for one in model.graph.output}
    return {
        node.name: [after.name for after in readers.get(node.output[0], []) if after.op_type in {"Relu", "Clip"}]
        for node in model.graph.node
        if node.op_type in LAYERS and node.output[0] not in outputs and len(readers.get(node.output[0], [])) == 1
    }


def _shift(bias: Any, error: npt.NDArray[np.float32], scales: npt.NDArray[np.float32]) -> None:
    limits = np.iinfo(np.int32)
    whole = numpy_helper.to_array(bias).astype(np.float64) + np.rint(error / scales)
    bias.CopyFrom(numpy_helper.from_array(np.clip(whole, limits.min, limits.max).astype(np.int32), bias.name))


def _protect(model: Any) -> None:
    """Keep ONNX Runtime from quantising by itself what was kept in float.

    It takes a float convolution between two quantised tensors for one whose weights were forgotten, and quantises them,
    a whole tensor with one scale: measured, an EfficientNet whose depthwise layers are kept in float then has three
    times the error of one that is quantised throughout. It does not do so to the same operator in its own domain.
    """
    weights = {one.name for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT}
    for node in model.graph.node:
        if node.op_type in {"Conv", "Gemm"} and node.domain in {"", "ai.onnx"} and node.input[1] in weights:
            if node.op_type == "Gemm":  # it wants an activation: one that changes nothing
                node.attribute.append(onnx.helper.make_attribute("activation", "LeakyRelu"))
                node.attribute.append(onnx.helper.make_attribute("activation_alpha", 1.0))
            node.op_type = f"Fused{node.op_type}"
            node.domain = "com.microsoft"
    onnx_model.import_own(model)


def _first_rows(feeds: Sequence[Mapping[str, Array]], most: int) -> Iterable[Mapping[str, Array]]:
    """The first batches, of ``most`` rows or a few more."""
    count = 0
    for feed in feeds:
        if count >= most:
            return
        yield feed
        count += max((len(array) for array in feed.values() if array.ndim), default=1)
