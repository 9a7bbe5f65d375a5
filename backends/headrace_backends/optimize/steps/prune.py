"""Structured pruning: the channels with the smallest weights are taken out of every layer, and the rest is fine-tuned.

Channels are removed for real, so the layers get smaller and every runtime gets faster. The layers that make the outputs
keep theirs, and so do small ones, where each channel tells much and costs little.
"""

import math
from pathlib import Path
from typing import Annotated, Any

import msgspec
from torch import nn

from headrace_backends.optimize import module_size
from headrace_backends.optimize.fitting import Schedule, fit
from headrace_backends.optimize.quiet import hushed
from headrace_backends.optimize.steps import options
from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.optimize.workpiece import Workpiece

_PRUNABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``share`` of the channels of each layer goes, in ``rounds`` rounds with ``epochs`` of training after each."""

    share: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5
    rounds: Annotated[int, msgspec.Meta(ge=1, le=20)] = 1
    epochs: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 3
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=10)] = 1e-3
    smallest: Annotated[int, msgspec.Meta(ge=1)] = 16  # a layer with fewer channels keeps them
    multiple: Annotated[int, msgspec.Meta(ge=1)] = 8  # what is left is so many or a multiple, which vectors like


def apply(task: StepTask) -> Path:
    """Prune, fine-tune and write ONNX."""
    try:
        import torch_pruning
    except ImportError as error:
        raise StepFailed(f"torch-pruning is not installed: pip install 'headrace[optimize]' ({error})") from error
    wanted = options.read("prune", Options, task.options)
    piece = Workpiece.begin(task)
    before = module_size.size_of(piece.module, piece.inputs, piece.rows)
    score = piece.score()
    if score is not None:
        task.note(f"score {score:.4g} before anything was changed")
    pruner = _pruner(torch_pruning, piece, wanted)
    shapes = {name: array.shape for name, array in piece.answers().items()}
    for parameter in piece.module.parameters():
        parameter.requires_grad_(True)
    for _ in range(wanted.rounds):
        try:
            with hushed():
                pruner.step()
        except Exception as error:
            raise StepFailed(f"channels cannot be taken out: {type(error).__name__}: {str(error)[:300]}") from error
        left = {name: array.shape for name, array in piece.answers().items()}
        if left != shapes:
            raise StepFailed(f"without the channels the outputs have shapes {left}, expected {shapes}")
        fit(piece.module, piece.owner, Schedule(wanted.epochs, wanted.learning_rate), task)
    after = module_size.size_of(piece.module, piece.inputs, piece.rows)
    if after.parameters >= before.parameters:
        raise StepFailed(
            f"no layer has channels to spare: all are outputs, have fewer than {wanted.smallest} channels, or are tied "
            "to others that are"
        )
    task.note(module_size.told(before, after))
    return piece.export()


def _pruner(torch_pruning: Any, piece: Workpiece, wanted: Options) -> Any:
    try:
        with hushed():
            graph = torch_pruning.DependencyGraph().build_dependency(piece.module, example_inputs=piece.inputs)
            spared = [*_heads(graph), *_small(piece.module, wanted)]
            return torch_pruning.pruner.MagnitudePruner(
                piece.module,
                piece.inputs,
                importance=torch_pruning.importance.MagnitudeImportance(p=1),
                pruning_ratio=wanted.share,
                iterative_steps=wanted.rounds,
                ignored_layers=spared,
                round_to=wanted.multiple,
            )
    except Exception as error:
        raise StepFailed(
            f"it is not clear which channels hang together: {type(error).__name__}: {str(error)[:300]}"
        ) from error


def _heads(graph: Any) -> list[nn.Module]:
    """The layers whose channels are the outputs': the first ones on the way back from where nothing follows."""
    found: list[nn.Module] = []
    waiting = [node for node in graph.module2node.values() if not node.outputs]
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node.module, _PRUNABLE):
            found.append(node.module)
        else:
            waiting += node.inputs
    return found


def _small(module: nn.Module, wanted: Options) -> list[nn.Module]:
    """Layers with few channels, or with too few for a whole multiple to be left."""
    fewest = max(wanted.smallest, math.ceil(wanted.multiple / (1 - wanted.share)))
    return [one for one in module.modules() if isinstance(one, _PRUNABLE) and _channels(one) < fewest]


def _channels(layer: nn.Module) -> int:
    count: int = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[assignment] # torch's modules declare Any
    return count
