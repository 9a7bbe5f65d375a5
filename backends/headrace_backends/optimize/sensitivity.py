"""How much each layer of an ONNX model suffers from int8: nothing else is quantised, and the answers are compared.

The ranges of all activations are found once; every one-layer model is made from them in memory and run on a few
examples. Of a model with more layers than may be tried, neighbours are tried together first, and the worst of
these groups are taken apart.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np

from headrace_backends.base import Array
from headrace_backends.optimize.findings import LayerSensitivity

_Answers = Sequence[Mapping[str, Array]]


def scan(task: Mapping[str, Any], most: int = 64, examples: int = 8, seconds: float = 300.0) -> list[LayerSensitivity]:
    """The layers, worst first. ``task`` is as for a step, its options those of ``int8_static``.

    ``most`` is how many one-layer models are tried, on so many ``examples``. After ``seconds`` the scan stops, and
    layers that nothing is known of are left out.

    Raises:
        StepFailed: the model cannot be quantised.
    """
    from headrace_backends.optimize.onnx_model import run, session_of
    from headrace_backends.optimize.quantizing import Quantizer, Recipe
    from headrace_backends.optimize.quiet import hushed
    from headrace_backends.optimize.steps import options
    from headrace_backends.optimize.steps.base import StepTask
    from headrace_backends.optimize.traits import layer_macs

    started = perf_counter()
    step = StepTask(**task)
    with TemporaryDirectory(dir=step.folder) as folder, hushed():
        step = StepTask(**{**task, "folder": Path(folder)})
        quantizer = Quantizer(step, options.read("int8_static", Recipe, step.options))
        feeds = quantizer.few(examples)
        session = session_of(quantizer.model, step)
        right = [run(session, feed) for feed in feeds]
        del session
        operators = {node.name: node.op_type for node in quantizer.weighted}

        def error_of(layers: Sequence[str]) -> float | None:
            if perf_counter() - started > seconds:
                return None
            only = session_of(quantizer.made(only=layers), step)
            return relative_error(right, [run(only, feed) for feed in feeds])

        errors = errors_by_layer(list(operators), most, error_of)
        macs = layer_macs(quantizer.model)
    return sorted(
        (LayerSensitivity(layer, operators[layer], error, macs.get(layer)) for layer, error in errors.items()),
        key=lambda one: -one.error,
    )


def errors_by_layer(
    layers: Sequence[str], most: int, error_of: Callable[[Sequence[str]], float | None]
) -> dict[str, float]:
    """The error of each layer, from that of groups where there are more layers than ``most`` tries.

    The worst group is halved again and again as long as there are tries left. ``error_of`` says None when the time is
    over. Errors of several layers add up as those of independent causes do.
    """
    known: list[tuple[float, list[str]]] = []
    tries = 0
    waiting = neighbours(layers, most)
    while waiting:
        for group in waiting:
            error = error_of(group)
            tries += 1
            if error is not None:
                known.append((error, group))
        waiting = []
        splittable = [one for one in known if len(one[1]) > 1]
        if splittable and tries + 2 <= most:
            worst = max(splittable, key=lambda one: one[0])
            known.remove(worst)
            middle = len(worst[1]) // 2
            waiting = [worst[1][:middle], worst[1][middle:]]
    return {layer: error / math.sqrt(len(group)) for error, group in known for layer in group}


def ranked(sensitivities: Sequence[LayerSensitivity]) -> list[str]:
    """The layers in the order in which they are best kept in float.

    The next is always the one that takes most of the squared error away for the time that it costs.
    """
    return [one.layer for one in sorted(sensitivities, key=lambda one: -_worth(one, sensitivities))]


def neighbours(layers: Sequence[str], most: int) -> list[list[str]]:
    """The layers in their order; in about half as many groups of equal size as may be tried, if they are more."""
    if len(layers) <= most:
        return [[layer] for layer in layers]
    size = math.ceil(len(layers) / max(1, most // 2))
    return [list(layers[start : start + size]) for start in range(0, len(layers), size)]


def relative_error(right: _Answers, answers: _Answers) -> float:
    """The worst output's: root mean square of the differences, as a share of how far its values are spread.

    Of outputs that are no floats, the share of elements that differ.
    """
    worst = 0.0
    for name in right[0]:
        wanted = [one[name] for one in right]
        got = [one[name] for one in answers]
        if any(one.shape != other.shape for one, other in zip(wanted, got, strict=True)):
            return math.inf
        left, other = (np.concatenate([one.reshape(-1) for one in side]) for side in (wanted, got))
        if not left.size:
            continue
        if left.dtype.kind != "f":
            worst = max(worst, float(np.mean(left != other)))
            continue
        difference = math.sqrt(float(np.mean(np.square(other.astype(np.float64) - left))))
        spread = float(np.std(left.astype(np.float64))) or 1.0
        share = difference / spread
        worst = max(worst, share if math.isfinite(share) else math.inf)
    return worst


def _worth(one: LayerSensitivity, all_of_them: Sequence[LayerSensitivity]) -> float:
    """Squared error for time. Being between int8 and float costs time too: as much as a mean layer's arithmetic."""
    known = [other.macs for other in all_of_them if other.macs is not None]
    mean = sum(known) / len(known) if known else 1.0
    return one.error**2 / ((mean if one.macs is None else one.macs) + mean)
