"""Static int8 of an ONNX model: weights and activations, with scales from calibration examples. Options: ``Recipe``."""

from pathlib import Path

from headrace_backends.optimize import onnx_model
from headrace_backends.optimize.quantizing import Quantizer, Recipe, ends, int8_layers
from headrace_backends.optimize.quiet import hushed
from headrace_backends.optimize.steps import options
from headrace_backends.optimize.steps.base import StepFailed, StepTask


def apply(task: StepTask) -> Path:
    """Quantise the model."""
    recipe = options.read("int8_static", Recipe, task.options)
    with hushed():
        quantizer = Quantizer(task, recipe)
        kept = ends(quantizer.model, recipe.keep_first, recipe.keep_last)
        model = quantizer.made([*recipe.keep, *kept])
        done = len(int8_layers(model))
        if not done:
            raise StepFailed("nothing of the model can be quantised")
        path = onnx_model.write(model, task, quantizer.original)
    used = min(recipe.samples, len(task.examples))
    task.note(f"{done} of {len(quantizer.weighted)} layers are in int8, calibrated with {used} examples")
    return path
