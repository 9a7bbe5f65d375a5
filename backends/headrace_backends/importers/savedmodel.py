"""TensorFlow's SavedModel to ONNX, by tf2onnx. Runs in the converting process."""

import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from headrace_backends.base import Array, LoadError
from headrace_backends.importers.conversion import Task
from headrace_backends.importers.formats import SAVED_MODEL
from headrace_backends.importers.proof import Ask, prove
from headrace_backends.saved_signatures import chosen_signature

LARGE_BYTES = 1_900_000_000  # of variables: protobuf holds 2 GB, so that larger weights go into files beside
_ZIPPED_MODEL = "__MODEL_PROTO.onnx"  # what tf2onnx calls it


def convert(task: Task) -> list[str]:
    """Convert the signature that the configuration names, else the one that is meant for serving."""
    folder = Path(task.source)
    if not (folder / SAVED_MODEL).is_file():
        raise LoadError(f"'{folder.name}' is no SavedModel: it has no '{SAVED_MODEL}'")
    tag = _text(task.parameters, "tag") or "serve"
    loaded = tf.saved_model.load(str(folder), tags=[tag])
    usable = [one for one in loaded.signatures if not one.startswith("_")]
    name = chosen_signature(usable, _text(task.parameters, "signature"), folder.name)
    if name is None:
        raise LoadError(
            f"'{folder.name}' has no signature; save it with signatures= in tf.saved_model.save, or model.export"
        )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    write_onnx(folder, Path(task.target), name, tag, large=size > LARGE_BYTES)
    told = prove(Path(task.target), asker(loaded.signatures[name]), "TensorFlow")
    others = sorted(one for one in usable if one != name)
    return [f"signature '{name}'" + (f"; it also has {', '.join(others)}" if others else ""), told]


def write_onnx(folder: Path, target: Path, signature: str, tag: str, *, large: bool) -> None:
    """Have tf2onnx write the file, and what it keeps beside it where it is ``large``. Tensors are the signature's."""
    from tf2onnx import convert as tf2onnx

    written = target.with_suffix(".zip") if large else target
    options = ["--saved-model", str(folder), "--tag", tag, "--signature_def", signature, "--output", str(written)]
    sys.argv = ["tf2onnx", *options, *(["--large_model"] if large else [])]
    if large:
        vars(np).setdefault("product", np.prod)  # tf2onnx 1.17 calls it there, and NumPy 2 has it no more
    tf2onnx.main()
    if large:
        with zipfile.ZipFile(written) as archive:
            archive.extractall(target.parent)
        written.unlink()
        (target.parent / _ZIPPED_MODEL).rename(target)


def asker(function: Any) -> Ask:
    """The signature's function, taking and giving arrays by name."""

    def ask(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        answered = function(**{name: tf.constant(array) for name, array in inputs.items()})
        return {name: np.asarray(tensor) for name, tensor in answered.items()}

    return ask


def _text(parameters: Mapping[str, Any], name: str) -> str | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, str):
        raise LoadError(f"parameters.{name} is {value!r}, expected text")
    return value or None
