"""Unstructured sparsity: the smallest weights become zero and stay so while the others are fine-tuned.

The runtimes on a CPU multiply by zeros as by anything else: below nine tenths of zeros nothing becomes faster, and
the 2:4 pattern is for the tensor cores of GPUs. What gets smaller is the file, once it is compressed.
"""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import torch
from torch import nn

from headrace_backends.optimize.fitting import Schedule, fit
from headrace_backends.optimize.steps import options
from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.optimize.workpiece import Workpiece

_SPARSE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_FOURS = 4


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``share`` of each layer's weights is zero; with ``pattern`` 2:4 it is two in every four, whatever it says."""

    share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.9
    pattern: Literal["any", "2:4"] = "any"
    epochs: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 3
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=10)] = 1e-3
    smallest: Annotated[int, msgspec.Meta(ge=1)] = 1024  # a layer with fewer weights keeps them


def apply(task: StepTask) -> Path:
    """Set weights to zero, fine-tune and write ONNX."""
    wanted = options.read("sparsify", Options, task.options)
    piece = Workpiece.begin(task)
    score = piece.score()
    if score is not None:
        task.note(f"score {score:.4g} before anything was changed")
    layers = [one for one in piece.module.modules() if isinstance(one, _SPARSE)]
    masks: dict[torch.Tensor, torch.Tensor] = {}
    for layer in layers:
        weight = layer.weight
        mask = two_in_four(weight) if wanted.pattern == "2:4" else largest(weight, 1 - wanted.share)
        if mask is not None and weight.numel() >= wanted.smallest:
            masks[weight] = mask
    if not masks:
        raise StepFailed(f"none of {len(layers)} layers has {wanted.smallest} weights or more that suit the pattern")

    def apply_masks() -> None:
        with torch.no_grad():
            for weight, mask in masks.items():
                weight.mul_(mask)

    apply_masks()
    fit(piece.module, piece.owner, Schedule(wanted.epochs, wanted.learning_rate), task, after_update=apply_masks)
    zeros = sum(int((weight == 0).sum()) for weight in masks)
    total = sum(parameter.numel() for parameter in piece.module.parameters())
    task.note(f"{zeros / total:.0%} of all weights are zero, in {len(masks)} of {len(layers)} layers")
    task.note("runtimes on a CPU gain nothing by zeros as long as they are fewer than nine in ten")
    return piece.export()


def largest(weight: torch.Tensor, share: float) -> torch.Tensor:
    """A mask, one where the weight is among that share of the largest."""
    values = weight.detach().abs().flatten()
    kept = max(1, round(share * values.numel()))
    mask = torch.zeros_like(values)
    mask[values.topk(kept).indices] = 1
    return mask.reshape(weight.shape)


def two_in_four(weight: torch.Tensor) -> torch.Tensor | None:
    """A mask that keeps the two largest of every four weights that are added up; None where there are no fours.

    The four are neighbours along the layer's inputs, as the hardware has it: channels, at one place of the kernel.
    """
    if weight.shape[1] % _FOURS:
        return None
    values = weight.detach().abs().movedim(1, -1)
    fours = values.reshape(-1, _FOURS)
    mask = torch.zeros_like(fours).scatter_(1, fours.topk(2).indices, 1)
    return mask.reshape(values.shape).movedim(-1, 1).contiguous()
