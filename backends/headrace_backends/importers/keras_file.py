"""Keras's files to ONNX, by way of a SavedModel with the model's own names. Runs in the converting process."""

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from headrace_backends.base import Array, LoadError
from headrace_backends.importers.conversion import Task
from headrace_backends.importers.proof import Ask, prove
from headrace_backends.importers.savedmodel import LARGE_BYTES, write_onnx
from headrace_backends.saved_signatures import DEFAULT_SIGNATURE

_SAFE = (
    "; layers that are code of yours cannot be taken from a file: save the model with model.export(FOLDER), "
    "and serve that SavedModel"
)


def convert(task: Task) -> list[str]:
    """Convert the model's call, as it is when it is not trained."""
    path, target = Path(task.source), Path(task.target)
    if task.parameters:
        raise LoadError(
            f"parameters {', '.join(sorted(task.parameters))} are for SavedModels, and '{path.name}' is none"
        )
    model = _read(path)
    names = [tensor.name for tensor in _flat(model.inputs)]
    outputs = _output_names(model)
    exported = target.parent / "exported"
    _export(model, names, outputs, exported)
    write_onnx(exported, target, DEFAULT_SIGNATURE, "serve", large=path.stat().st_size > LARGE_BYTES)
    shutil.rmtree(exported)
    return [prove(target, _asker(model, names, outputs), "Keras")]


def _read(path: Path) -> Any:
    if path.suffix.lower() == ".keras" and not zipfile.is_zipfile(path):  # of which Keras says that it is not found
        raise LoadError(f"Keras cannot load '{path.name}': it is not a zip file, as those of Keras 3 are")
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)  # never code from the file
    except (ValueError, TypeError, KeyError, OSError, AttributeError, ImportError) as error:
        told = " ".join(str(error).split())[:600]
        unknown = any(word in told for word in ("Could not locate", "Unknown layer", "ambda", "safe_mode", "custom"))
        raise LoadError(f"Keras cannot load '{path.name}': {told}{_SAFE if unknown else ''}") from error
    if not getattr(model, "inputs", None):
        raise LoadError(f"'{path.name}' does not say what inputs its model takes{_SAFE}")
    return model


def _output_names(model: Any) -> list[str]:
    """The names of a dict's entries, else those of the layers that make the outputs; numbered where they repeat."""
    structure = getattr(model, "_outputs_struct", None)
    if isinstance(structure, Mapping):
        return sorted(structure)
    names: list[str] = []
    for index, tensor in enumerate(_flat(model.outputs)):
        layer = getattr(getattr(tensor, "_keras_history", None), "operation", None)
        name = getattr(layer, "name", "") or f"output_{index}"
        names.append(f"{name}_{index}" if name in names else name)
    return names


def _export(model: Any, names: list[str], outputs: list[str], folder: Path) -> None:
    specs = [
        tf.TensorSpec(tensor.shape, tensor.dtype, name) for tensor, name in zip(_flat(model.inputs), names, strict=True)
    ]

    @tf.function(input_signature=specs)  # type: ignore[untyped-decorator] # TensorFlow has no types
    def serve(*arguments: Any) -> dict[str, Any]:
        return _called(model, names, outputs, arguments)

    module = tf.Module()
    module.model = model
    tf.saved_model.save(module, str(folder), signatures={DEFAULT_SIGNATURE: serve})


def _called(model: Any, names: list[str], outputs: list[str], arguments: Any) -> dict[str, Any]:
    """The model's answer to its inputs in their own order."""
    structure = getattr(model, "_inputs_struct", None)
    given = tf.nest.pack_sequence_as(structure, list(arguments)) if structure is not None else list(arguments)
    return _by_name(model(arguments[0] if len(names) == 1 else given, training=False), outputs)


def _asker(model: Any, names: list[str], outputs: list[str]) -> Ask:
    """The model as its users ask it: by its inputs' names."""

    def ask(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        structure = getattr(model, "_inputs_struct", None)
        if len(names) == 1:
            given: Any = inputs[names[0]]
        elif structure is not None:
            given = tf.nest.map_structure(lambda tensor: inputs[tensor.name], structure)
        else:
            given = [inputs[name] for name in names]
        return {name: np.asarray(value) for name, value in _by_name(model.predict_on_batch(given), outputs).items()}

    return ask


def _by_name(answered: Any, outputs: list[str]) -> dict[str, Any]:
    if isinstance(answered, Mapping):
        return {name: answered[name] for name in outputs}
    return dict(zip(outputs, tf.nest.flatten(answered), strict=True))


def _flat(tensors: Any) -> list[Any]:
    return list(tensors) if isinstance(tensors, list | tuple) else [tensors]
