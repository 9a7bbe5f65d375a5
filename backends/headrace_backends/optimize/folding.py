"""Batch normalisations folded into the convolution or linear layer before them: the same answers, fewer layers."""

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold(module: nn.Module) -> int | None:
    """Fold them in place; the module is in evaluation mode. Returns how many, None where its code cannot be traced.

    A pair is folded where the layer's output goes nowhere but into the normalisation, and both are called once.
    """
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # noqa: BLE001 - the tracer runs the owner's code with stand-ins, which may raise anything
        return None
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    folded = 0
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        if calls.count(str(node.target)) > 1 or calls.count(str(before.target)) > 1:
            continue
        fused = _fused(module.get_submodule(str(before.target)), module.get_submodule(str(node.target)))
        if fused is not None:
            module.set_submodule(str(before.target), fused)
            module.set_submodule(str(node.target), nn.Identity())
            folded += 1
    return folded


def _fused(layer: nn.Module, norm: nn.Module) -> nn.Module | None:
    """One layer for both; None where they are not a pair."""
    if not isinstance(norm, _NORMS) or norm.running_mean is None:
        return None
    with torch.no_grad():
        if isinstance(layer, _CONVOLUTIONS):
            return fuse_conv_bn_eval(layer, norm)
        # Of sequences the normalisation is over places, and not over what the layer gives.
        if (
            isinstance(layer, nn.Linear)
            and isinstance(norm, nn.BatchNorm1d)
            and layer.out_features == norm.num_features
        ):
            return fuse_linear_bn_eval(layer, norm)
    return None
