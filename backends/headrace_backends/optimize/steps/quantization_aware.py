"""Quantisation-aware training: the model is fine-tuned with weights and activations rounded as int8 will round them.

What comes out is ONNX with QuantizeLinear and DequantizeLinear, which ONNX Runtime runs in int8. Ranges are found in
training and, for the file, on the calibration examples; the weights' are those of their largest value in both.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import nn
from torch.nn.utils import parametrize

from headrace_backends.optimize.fitting import Schedule, fit
from headrace_backends.optimize.folding import fold
from headrace_backends.optimize.quiet import hushed
from headrace_backends.optimize.steps import options
from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.optimize.workpiece import Workpiece

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_CALIBRATION_BATCHES = 8
_MOST_SAMPLES = 64
_MOMENTUM = 0.01  # of an activation's range, once it has been found


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long to train. The model is trained already: a small learning rate is enough."""

    epochs: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 3
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=10)] = 1e-4


class RoundedWeight(nn.Module):
    """A weight as int8 has it: symmetric, with a scale for each output. Its gradient passes as if nothing had been."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight, rounded."""
        scale = weight.detach().abs().flatten(1).amax(1).clamp_min(1e-12) / 127
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


class RoundedInput(nn.Module):
    """A layer's input as uint8 has it; the range follows what is seen in training, slowly."""

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.momentum = 0.0  # of the range; 0 widens it to all that is seen

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """The value, rounded."""
        if self.training:
            self._follow(value.detach())
        scale = ((self.high - self.low) / 255).clamp_min(1e-12)
        zero = (-self.low / scale).round().clamp(0, 255).to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(value, scale, zero, 0, 255)

    def _follow(self, value: torch.Tensor) -> None:
        low, high = value.min().clamp_max(0), value.max().clamp_min(0)
        if self.momentum:
            self.low.lerp_(low, self.momentum)
            self.high.lerp_(high, self.momentum)
        else:
            self.low.copy_(torch.minimum(self.low, low))
            self.high.copy_(torch.maximum(self.high, high))


def apply(task: StepTask) -> Path:
    """Train with rounding, then quantise and write ONNX."""
    wanted = options.read("quantization_aware", Options, task.options)
    piece = Workpiece.begin(task)
    if not len(task.examples):
        raise StepFailed("there are no calibration examples to find the activations' ranges with")
    score = piece.score()
    if score is not None:
        task.note(f"score {score:.4g} before anything was changed")
    fold(piece.module)  # before the training, so that what is rounded in it is what will be rounded in the file
    layers = [one for one in piece.module.modules() if isinstance(one, _LAYERS)]
    if not layers:
        raise StepFailed("the model has no convolutions and no linear layers to train with rounding")
    hooks = _rounded(layers)
    _widen(piece)
    for one in _inputs_of(piece):
        one.momentum = _MOMENTUM
    fit(piece.module, piece.owner, Schedule(wanted.epochs, wanted.learning_rate), task)
    _unrounded(layers, hooks)
    plain = piece.export(name="float.onnx")
    path = task.folder / "model.onnx"
    with hushed():
        _quantize(plain, path, task)
    plain.unlink()
    task.note(f"{len(layers)} layers were trained with int8 weights and activations")
    return path


def _rounded(layers: list[Any]) -> list[Any]:
    hooks = []
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", RoundedWeight(), unsafe=True)
        layer.rounded_input = RoundedInput()
        hooks.append(layer.register_forward_pre_hook(_round_input))
    return hooks


def _unrounded(layers: list[Any], hooks: list[Any]) -> None:
    for layer, hook in zip(layers, hooks, strict=True):
        hook.remove()
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        del layer.rounded_input


def _round_input(layer: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.rounded_input(arguments[0]), *arguments[1:])


def _widen(piece: Workpiece) -> None:
    """Give the inputs' ranges their beginning: all that a few batches have."""
    piece.module.eval()
    for one in _inputs_of(piece):
        one.train()
    with torch.no_grad():
        for count, (inputs, _) in enumerate(piece.owner.batches(training=True), 1):
            piece.module(*inputs)
            if count == _CALIBRATION_BATCHES:
                break


def _inputs_of(piece: Workpiece) -> list[RoundedInput]:
    return [one for one in piece.module.modules() if isinstance(one, RoundedInput)]


def _quantize(plain: Path, path: Path, task: StepTask) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc] # onnxruntime has no annotations
        def __init__(self) -> None:
            self._left: Iterator[Any] = iter(task.examples.inputs[:_MOST_SAMPLES])

        def get_next(self) -> Any:
            return next(self._left, None)

    prepared = task.folder / "prepared.onnx"
    try:
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"QuantizeBias": True},
        )
    except Exception as error:
        raise StepFailed(
            f"ONNX Runtime cannot quantise what was trained: {type(error).__name__}: {str(error)[:300]}"
        ) from error
    finally:
        prepared.unlink(missing_ok=True)
