"""int8 weights and activations for OpenVINO, with scales from examples (NNCF's post-training quantisation)."""

from pathlib import Path

import msgspec

from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.optimize.steps.openvino_source import layers_to_keep, nncf, read, save

_MOST_SAMPLES = 300  # more take longer and change nothing


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """``keep`` names layers, or kinds of them, that stay as they are."""

    preset: str = "mixed"  # or performance, which has activations symmetric: a little quicker where they are signed
    transformer: bool = False  # arrange for attention: what does not bear 8 bits there stays as it is
    keep: tuple[str, ...] = ()
    fast_bias_correction: bool = True
    samples: int = _MOST_SAMPLES


def apply(task: StepTask) -> Path:
    """Quantise the model, calibrated with the task's examples.

    Raises:
        StepFailed: as ``read`` does, or NNCF cannot do it.
    """
    try:
        options = msgspec.convert(task.options, Options)
    except msgspec.ValidationError as error:
        raise StepFailed(f"the options are wrong: {error}") from error
    if options.preset not in ("performance", "mixed"):
        raise StepFailed(f"the preset is {options.preset!r}, expected performance or mixed")
    count = min(options.samples, len(task.examples))
    if count < 1:
        raise StepFailed("there are no examples to calibrate with")
    model = read(task)
    keep = layers_to_keep(task, model, options.keep)
    examples = [dict(example) for example in task.examples.inputs[:count]]
    try:
        with nncf() as library:
            quantised = library.quantize(
                model,
                library.Dataset(examples),
                preset=library.QuantizationPreset(options.preset),
                model_type=library.ModelType.TRANSFORMER if options.transformer else None,
                ignored_scope=library.IgnoredScope(names=keep, validate=False) if keep else None,
                fast_bias_correction=options.fast_bias_correction,
                subset_size=count,
            )
    except StepFailed:
        raise
    except Exception as error:  # it promises no types
        raise StepFailed(f"NNCF cannot quantise it: {' '.join(str(error).split())[:500]}") from error
    made = sum(operator.get_type_name() == "FakeQuantize" for operator in quantised.get_ops())
    if not made:
        raise StepFailed("NNCF found nothing in it to quantise")
    task.note(f"{made} tensors are quantised by scales from {count} examples")
    return save(task, quantised)
