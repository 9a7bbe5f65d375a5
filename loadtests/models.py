"""The models under load: built on demand into a repository folder, never committed."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx

from headrace.core.tensor import Array
from loadtests.graph import FLOAT, Graph
from loadtests.inputs import SEED
from loadtests.minilm import VOCABULARY, build_minilm
from loadtests.resnet import build_resnet50

_TOKENS = 32
_MLP_SIZES = (784, 512, 256, 10)
_IDENTITY_SIZE = 16


@dataclass(frozen=True, slots=True)
class LoadModel:
    """One model: how to build it, and one row of input for it."""

    build: Callable[[], onnx.ModelProto]
    sample: Callable[[], dict[str, Array]]


def build_identity() -> onnx.ModelProto:
    """``x`` FP32 [batch, 16] to ``y``, the same: what is left is the server's own cost."""
    graph = Graph("identity")
    graph.add("Identity", "x", output="y")
    shape = ("batch", _IDENTITY_SIZE)
    return graph.model([("x", FLOAT, shape)], [("y", FLOAT, shape)])


def build_mlp() -> onnx.ModelProto:
    """``x`` FP32 [batch, 784] to ``y`` FP32 [batch, 10]: 784-512-256-10 with ReLU between."""
    graph = Graph("mlp")
    value = "x"
    layers = list(pairwise(_MLP_SIZES))
    for rows, columns in layers[:-1]:
        value = graph.add("Relu", graph.linear(value, rows, columns))
    graph.linear(value, *layers[-1], output="y")
    return graph.model([("x", FLOAT, ("batch", _MLP_SIZES[0]))], [("y", FLOAT, ("batch", _MLP_SIZES[-1]))])


def _floats(name: str, *shape: int) -> dict[str, Array]:
    return {name: np.random.default_rng(SEED).standard_normal((1, *shape), dtype=np.float32)}


def _sentence() -> dict[str, Array]:
    ids = np.random.default_rng(SEED).integers(0, VOCABULARY, (1, _TOKENS), dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones((1, _TOKENS), np.int64)}


MODELS: dict[str, LoadModel] = {
    "identity": LoadModel(build_identity, lambda: _floats("x", _IDENTITY_SIZE)),
    "mlp": LoadModel(build_mlp, lambda: _floats("x", _MLP_SIZES[0])),
    "minilm": LoadModel(build_minilm, _sentence),
    "resnet50": LoadModel(build_resnet50, lambda: _floats("data", 3, 224, 224)),
}


def place(name: str, repository: Path) -> Path:
    """The file of model ``name`` in ``repository``, built unless it is there already.

    Raises:
        ValueError: there is no such model.
    """
    model = MODELS.get(name)
    if model is None:
        raise ValueError(f"there is no load model '{name}'; there are {', '.join(MODELS)}")
    path = repository / name / "1" / "model.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".model.{os.getpid()}")
        onnx.save(model.build(), unfinished)
        unfinished.replace(path)  # in one step, so that nobody ever loads half a model
    return path


def save_sample(name: str, folder: Path) -> dict[str, Path]:
    """One row of input for model ``name``, as an .npy file for each input."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for tensor, array in MODELS[name].sample().items():
        paths[tensor] = folder / f"{name}.{tensor}.npy"
        np.save(paths[tensor], array)
    return paths
