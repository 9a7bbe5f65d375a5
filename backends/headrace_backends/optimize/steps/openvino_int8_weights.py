"""int8 weights for OpenVINO; activations stay floats in the file (NNCF's weight compression)."""

from pathlib import Path

import msgspec

from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.optimize.steps.openvino_source import layers_to_keep, nncf, read, save


class Options(msgspec.Struct, forbid_unknown_fields=True):
    """``keep`` names layers, or kinds of them, that stay as they are."""

    symmetric: bool = False  # without a zero point
    keep: tuple[str, ...] = ()


def apply(task: StepTask) -> Path:
    """Store the weights of matrix products, convolutions and embeddings with 8 bits, a scale for each channel.

    Raises:
        StepFailed: as ``read`` does, or NNCF cannot do it.
    """
    try:
        options = msgspec.convert(task.options, Options)
    except msgspec.ValidationError as error:
        raise StepFailed(f"the options are wrong: {error}") from error
    model = read(task)
    keep = layers_to_keep(task, model, options.keep)
    try:
        with nncf() as library:
            modes = library.CompressWeightsMode
            compressed = library.compress_weights(
                model,
                mode=modes.INT8_SYM if options.symmetric else modes.INT8_ASYM,
                ignored_scope=library.IgnoredScope(names=keep, validate=False) if keep else None,
            )
    except StepFailed:
        raise
    except Exception as error:  # it promises no types
        raise StepFailed(f"NNCF cannot compress its weights: {' '.join(str(error).split())[:500]}") from error
    return save(task, compressed)
