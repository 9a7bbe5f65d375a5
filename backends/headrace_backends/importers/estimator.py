"""Scikit-learn's estimators and pipelines to ONNX, by skl2onnx. Runs in the converting process."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import sklearn
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import (
    BooleanTensorType,
    DoubleTensorType,
    FloatTensorType,
    Int32TensorType,
    Int64TensorType,
    StringTensorType,
)
from sklearn.base import BaseEstimator, is_classifier, is_regressor
from sklearn.linear_model import Perceptron, SGDClassifier
from sklearn.pipeline import Pipeline
from sklearn.svm import SVC, NuSVC

from headrace.core.tensor import DataType
from headrace_backends.base import Array, LoadError
from headrace_backends.importers.conversion import Task
from headrace_backends.importers.graph_names import rename_outputs
from headrace_backends.importers.missing_values import send_missing_as_fitted
from headrace_backends.importers.pickle_consent import refuse_unagreed
from headrace_backends.importers.proof import Ask, prove, prove_missing

DEFAULT_INPUT = "features"

_TYPES = {
    DataType.FP32: FloatTensorType,
    DataType.FP64: DoubleTensorType,
    DataType.INT64: Int64TensorType,
    DataType.INT32: Int32TensorType,
    DataType.BOOL: BooleanTensorType,
    DataType.BYTES: StringTensorType,
}
# Their scores are compared too: skl2onnx has the signs of the first two wrong where there are two classes.
_SCORED = (SVC, NuSVC, Perceptron, SGDClassifier)
_OPSETS = {"": 18, "ai.onnx.ml": 3}  # skl2onnx makes not all estimators of a later one
_COLUMNS = (
    "; if its columns are not all numbers, name each in config.yaml, as\n"
    "inputs: [{name: age, datatype: FP32, shape: [-1, 1]}, {name: city, datatype: BYTES, shape: [-1, 1]}]"
)


def convert(task: Task) -> list[str]:
    """Convert the estimator: its label and probabilities are plain tensors, its input is FP32 unless configured."""
    path, target = Path(task.source), Path(task.target)
    notes: list[str] = []
    model = _read(path, task.parameters, notes)
    types = _input_types(model, task, path.name)
    try:
        made = _made(model, types)
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        advice = _COLUMNS if "column" in told.lower() else ""
        raise LoadError(f"skl2onnx cannot convert '{path.name}', a {type(model).__name__}: {told}{advice}") from error
    rename_outputs(made, _output_names(model, [output.name for output in made.graph.output]))
    send_missing_as_fitted(made, model)
    onnx.save(made, target)
    ask = _asker(model, [name for name, _ in types], made)
    told = prove(target, ask, "scikit-learn")
    missing = prove_missing(target, ask, "scikit-learn")
    return [*notes, *([] if missing is None else [missing]), told]


def _made(model: Any, types: list[tuple[str, Any]]) -> Any:
    """The ONNX model, its probabilities or scores a tensor and not a sequence of maps.

    Which estimators would make maps is told by nothing but whether they know the option.
    """
    with warnings.catch_warnings():  # skl2onnx looks at attributes that scikit-learn is about to give up
        warnings.simplefilter("ignore", FutureWarning)
        if is_classifier(model):
            try:
                plain = {id(model): {"zipmap": False}}
                return convert_sklearn(model, initial_types=types, options=plain, target_opset=_OPSETS)
            except NameError as error:
                if "zipmap" not in str(error):
                    raise
        return convert_sklearn(model, initial_types=types, target_opset=_OPSETS)


def _read(path: Path, given: Mapping[str, Any], notes: list[str]) -> Any:
    """The estimator in the file.

    Raises:
        LoadError: it is none, or opening it would run code that nobody has agreed to.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if path.suffix.lower() == ".skops":
            model = _read_skops(path, given)
        else:
            import joblib

            refuse_unagreed(path, given)
            model = joblib.load(path)
    older = [str(one.message) for one in caught if type(one.message).__name__ == "InconsistentVersionWarning"]
    if older:
        notes.append(
            f"it was saved by another scikit-learn than {sklearn.__version__}: {older[0].splitlines()[0][:200]}"
        )
    if not isinstance(model, BaseEstimator):
        raise LoadError(f"'{path.name}' holds a {type(model).__name__}, expected a scikit-learn estimator or pipeline")
    return model


def _read_skops(path: Path, given: Mapping[str, Any]) -> Any:
    import skops.io

    text = given.get("trusted_types", "")
    if not isinstance(text, str):
        raise LoadError(f"parameters.trusted_types is {text!r}, expected names of types with commas between them")
    trusted = [name.strip() for name in text.split(",") if name.strip()]
    try:
        unknown = sorted(set(skops.io.get_untrusted_types(file=path)) - set(trusted))
    except Exception as error:
        raise LoadError(f"'{path.name}' is no skops file: {' '.join(str(error).split())[:300]}") from error
    if unknown:
        raise LoadError(
            f"'{path.name}' has types that are not known to be harmless: {', '.join(unknown)}; if you trust them, "
            f"set parameters.trusted_types to '{','.join([*trusted, *unknown])}'"
        )
    return skops.io.load(path, trusted=trusted)


def _input_types(model: Any, task: Task, name: str) -> list[tuple[str, Any]]:
    if not task.inputs:
        count = getattr(model, "n_features_in_", None)
        if count is None:
            raise LoadError(f"'{name}' does not say how many features it takes: is it fitted?{_COLUMNS}")
        return [(DEFAULT_INPUT, FloatTensorType([None, int(count)]))]
    unserved = [spec.name for spec in task.inputs if spec.datatype not in _TYPES or spec.shape is None]
    if unserved:
        known = ", ".join(sorted(_TYPES))
        raise LoadError(f"inputs {unserved} need a shape, and a datatype that skl2onnx takes: {known}")
    return [
        (spec.name, _TYPES[spec.datatype]([None if size == -1 else size for size in spec.shape or ()]))
        for spec in task.inputs
    ]


def _output_names(model: Any, found: Sequence[str]) -> dict[str, str]:
    """Ours for what skl2onnx calls the same whatever it means; it numbers them where a step before has that name."""
    if is_classifier(model):
        return {} if hasattr(model, "predict_proba") else {"probabilities": "scores"}
    named = [name for name in found if name.rstrip("0123456789") == "variable"]
    return dict.fromkeys(named, "prediction" if is_regressor(model) else "transformed") if len(named) == 1 else {}


def _asker(model: Any, inputs: list[str], made: Any) -> Ask:
    """The estimator itself, asked for those outputs whose meaning is known."""
    outputs = [output.name for output in made.graph.output]

    def ask(given: Mapping[str, Array]) -> Mapping[str, Array]:
        warnings.simplefilter("ignore", UserWarning)  # rows without the names of their columns
        rows = _rows(model, [(name, given[name]) for name in inputs])
        answered: dict[str, Array] = {}
        if "label" in outputs and hasattr(model, "predict"):
            label = np.asarray(model.predict(rows))
            ranks = {output.name: len(output.type.tensor_type.shape.dim) for output in made.graph.output}
            answered["label"] = label.reshape(-1, 1) if ranks["label"] == 2 and label.ndim == 1 else label
        if "probabilities" in outputs and hasattr(model, "predict_proba"):
            answered["probabilities"] = np.asarray(model.predict_proba(rows))
        if "scores" in outputs and isinstance(_last_step(model), _SCORED):
            scores = np.asarray(model.decision_function(rows), dtype=np.float32)
            answered["scores"] = np.stack([-scores, scores], axis=1) if scores.ndim == 1 else scores
        if "prediction" in outputs:
            predicted = np.asarray(model.predict(rows), dtype=np.float32)
            answered["prediction"] = predicted.reshape(len(predicted), -1)
        if "transformed" in outputs and hasattr(model, "transform"):
            transformed = model.transform(rows)
            answered["transformed"] = np.asarray(getattr(transformed, "toarray", lambda: transformed)())
        if not answered:
            raise LookupError(f"none of its outputs {outputs} has a counterpart")
        return answered

    return ask


def _last_step(model: Any) -> Any:
    """What makes the answers: of a pipeline its last step."""
    while isinstance(model, Pipeline):
        model = model.steps[-1][1]
    return model


def _rows(model: Any, columns: list[tuple[str, Array]]) -> Any:
    """One array, or a table where there is an input for each of the columns that the estimator was fitted with."""
    plain = [(name, _as_fitted(array)) for name, array in columns]
    if len(plain) > 1 and getattr(model, "feature_names_in_", None) is not None:
        import pandas as pd

        return pd.DataFrame({name: array.reshape(len(array)) for name, array in plain})
    return plain[0][1] if len(plain) == 1 else np.concatenate([array for _, array in plain], axis=1)


def _as_fitted(array: Array) -> Any:
    """Text for bytes, and numbers as wide as those that it was most likely fitted with."""
    if array.dtype.kind == "O":
        return np.array([bytes(one).decode() for one in array.ravel().tolist()], dtype=np.object_).reshape(array.shape)
    return array.astype(np.float64) if array.dtype.kind == "f" else array
