"""XGBoost's boosters to ONNX, by onnxmltools. Runs in the converting process."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import xgboost
from onnxmltools import convert_xgboost
from onnxmltools.convert.common.data_types import FloatTensorType

from headrace_backends.base import Array, LoadError
from headrace_backends.importers.conversion import Task
from headrace_backends.importers.graph_names import rename_outputs
from headrace_backends.importers.proof import ROWS, Ask, prove

INPUT = "features"

_CLASSES = ("label", "probabilities")


def convert(task: Task) -> list[str]:
    """Convert the booster; NaN stays a missing value."""
    path, target = Path(task.source), Path(task.target)
    booster = xgboost.Booster()
    try:
        booster.load_model(bytearray(path.read_bytes()))  # by its content, whatever it is called
    except (xgboost.core.XGBoostError, ValueError) as error:
        told = " ".join(str(error).split())[:300]
        raise LoadError(f"'{path.name}' is no model of XGBoost, in JSON or UBJSON: {told}") from error
    objective, kind = _objective(booster)
    if kind != "gbtree":
        raise LoadError(f"'{path.name}' is a {kind} booster, and only gbtree ones can be converted to ONNX")
    features = booster.num_features()
    booster.feature_names = None  # the converter takes no others than f0, f1, ...
    booster.feature_types = None
    made = convert_xgboost(booster, initial_types=[(INPUT, FloatTensorType([None, features]))])
    rename_outputs(made, {"variable": "prediction"})
    onnx.save(made, target)
    outputs = [output.name for output in made.graph.output]
    told = prove(target, _asker(booster, objective, outputs), f"XGBoost (objective {objective})", [_rows(features)])
    return [f"objective {objective}, {features} features", told]


def _objective(booster: Any) -> tuple[str, str]:
    learner = json.loads(booster.save_config())["learner"]
    return learner["objective"]["name"], learner["gradient_booster"]["name"]


def _rows(features: int) -> dict[str, Array]:
    """Some values are missing, as NaN: the trees know what to do then."""
    generator = np.random.default_rng(20240229)
    rows = generator.standard_normal((ROWS, features), dtype=np.float32) * 3
    rows[generator.random(rows.shape) < 0.1] = np.nan
    return {INPUT: rows}


def _asker(booster: Any, objective: str, outputs: list[str]) -> Ask:
    def ask(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        answered = np.asarray(booster.predict(xgboost.DMatrix(inputs[INPUT])))
        if tuple(outputs) != _CLASSES:
            return {"prediction": answered.reshape(len(answered), -1)}
        if objective == "multi:softmax":
            return {"label": answered.astype(np.int64)}
        if answered.ndim == 1:
            answered = np.stack([1 - answered, answered], axis=1)
        return {"label": answered.argmax(axis=1).astype(np.int64), "probabilities": answered}

    return ask
