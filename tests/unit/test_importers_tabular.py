"""Scikit-learn's and XGBoost's models as ONNX: the frameworks' own answers, plain tensors, clear refusals."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("skl2onnx", reason="skl2onnx is not installed: pip install 'headrace[sklearn]'")

import joblib
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris
from sklearn.decomposition import PCA
from sklearn.ensemble import (
    BaggingRegressor,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.linear_model import LinearRegression, LogisticRegression, SGDClassifier
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, RobustScaler, StandardScaler
from sklearn.semi_supervised import LabelPropagation
from sklearn.svm import SVC, SVR, LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import LoadError, ModelSource
from headrace_backends.importers.backend import SklearnBackend
from headrace_backends.importers.conversion import Task
from headrace_backends.onnxruntime import OnnxRuntimeBackend

IRIS, KINDS = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])
ROWS = IRIS[::7].astype(np.float32)


def opened(module, path, inputs=(), **parameters):
    """What the converting process does, here; and the notes."""
    target = path.with_suffix(".onnx")
    task = Task(os.getpid(), "", str(path), str(target), parameters, inputs)
    notes = module.convert(task)
    return OnnxRuntimeBackend.load(ModelSource("m", "1", target)), notes


def estimator(tmp_path, model, inputs=(), name="m.joblib"):
    from headrace_backends.importers import estimator as module

    joblib.dump(model, tmp_path / name)
    return opened(module, tmp_path / name, inputs, allow_pickle=True)


@pytest.mark.parametrize(
    "model",
    [
        make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, KINDS),
        RandomForestClassifier(8, random_state=1).fit(IRIS, NAMES[KINDS]),
        GradientBoostingClassifier(n_estimators=4).fit(IRIS, KINDS),
    ],
    ids=["pipeline", "forest", "boosting"],
)
def test_classifiers_give_a_label_and_probabilities(tmp_path, model):
    backend, notes = estimator(tmp_path, model)
    signature = backend.signature
    label = DataType.BYTES if model.classes_.dtype.kind == "U" else DataType.INT64
    assert signature.inputs == (TensorSpec("features", DataType.FP32, (-1, 4)),)
    assert signature.outputs == (
        TensorSpec("label", label, (-1,)),
        TensorSpec("probabilities", DataType.FP32, (-1, 3)),
    )
    assert signature.max_batch_size == 32
    answered = backend.execute({"features": ROWS}, ())
    np.testing.assert_array_equal(answered["label"].astype(str), model.predict(ROWS.astype(float)).astype(str))
    np.testing.assert_allclose(answered["probabilities"], model.predict_proba(ROWS.astype(float)), atol=1e-5)
    assert "as scikit-learn does" in notes[-1]


def test_the_answer_of_a_pipeline_has_the_usual_name_whatever_its_steps_are_called(tmp_path):
    model = make_pipeline(RobustScaler(), KNeighborsRegressor(3)).fit(IRIS, KINDS * 1.5)
    backend, notes = estimator(tmp_path, model)
    answered = backend.execute({"features": ROWS}, ())
    np.testing.assert_allclose(answered["prediction"].ravel(), model.predict(ROWS.astype(float)), rtol=1e-5)
    assert "as scikit-learn does" in notes[-1]


HOLED = np.where(np.random.default_rng(1).random(IRIS.shape) < 0.3, np.nan, IRIS)
LARGE = np.where(np.isnan(HOLED[:, 2]), 5.0, HOLED[:, 2])  # a missing one is told from all others by its side


@pytest.mark.parametrize(
    "model",
    [
        DecisionTreeRegressor(max_depth=4, random_state=1).fit(HOLED, LARGE),
        RandomForestRegressor(6, max_depth=4, random_state=1).fit(HOLED, LARGE),
        make_pipeline(StandardScaler(), ExtraTreesRegressor(6, max_depth=4, random_state=1)).fit(HOLED, LARGE),
        BaggingRegressor(DecisionTreeRegressor(max_depth=3), 3, random_state=1).fit(HOLED, LARGE),
        pytest.param(
            HistGradientBoostingRegressor(max_iter=5, random_state=1).fit(HOLED, LARGE),
            marks=pytest.mark.filterwarnings("ignore"),  # skl2onnx's, which it takes for failures where they are raised
        ),
        RandomForestRegressor(6, max_depth=4, random_state=1).fit(IRIS, KINDS),
        CalibratedClassifierCV(DecisionTreeClassifier(max_depth=4, random_state=1)).fit(HOLED, KINDS),
    ],
    ids=["tree", "forest", "pipeline", "bagging", "histograms", "nothing_missing", "calibrated"],
)
def test_missing_values_go_where_the_trees_send_them(tmp_path, model):
    rows = HOLED[::2].astype(np.float32)
    backend, notes = estimator(tmp_path, model)
    name, ask = ("probabilities", "predict_proba") if hasattr(model, "classes_") else ("prediction", "predict")
    wanted = getattr(model, ask)(rows.astype(float))
    answered = backend.execute({"features": rows}, ())[name]
    np.testing.assert_allclose(answered.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-6)
    assert not any("missing" in note for note in notes)


def test_missing_values_that_went_astray_are_told(tmp_path, monkeypatch):
    from headrace_backends.importers import estimator as module

    monkeypatch.setattr(module, "send_missing_as_fitted", lambda made, model: None)
    _, notes = estimator(tmp_path, DecisionTreeRegressor(max_depth=4, random_state=1).fit(HOLED, LARGE))
    assert notes[0].startswith("rows with missing values (NaN) are not to be sent: the model as ONNX does not answer")
    assert "as scikit-learn does" in notes[1]


@pytest.mark.parametrize(
    ("model", "output", "ask"),
    [
        (LinearRegression().fit(IRIS, np.stack([KINDS, KINDS * 2], 1)), "prediction", "predict"),
        (SVR().fit(IRIS, KINDS), "prediction", "predict"),
        (PCA(2).fit(IRIS), "transformed", "transform"),
        (KMeans(3, n_init=1, random_state=1).fit(IRIS), "label", "predict"),
        (IsolationForest(n_estimators=4, random_state=1).fit(IRIS), "label", "predict"),
        (LinearSVC().fit(IRIS, KINDS), "label", "predict"),
        (LinearSVC().fit(IRIS, KINDS), "scores", "decision_function"),
        (SVC().fit(IRIS, KINDS), "scores", "decision_function"),
        (
            make_pipeline(StandardScaler(), SGDClassifier(random_state=1)).fit(IRIS, KINDS),
            "scores",
            "decision_function",
        ),
    ],
    ids=["two-outputs", "svr", "pca", "k-means", "outliers", "no-probabilities", "scores", "svc", "sgd"],
)
def test_others_are_named_by_what_they_give(tmp_path, model, output, ask):
    backend, _ = estimator(tmp_path, model)
    wanted = getattr(model, ask)(ROWS.astype(float))
    answered = backend.execute({"features": ROWS}, ())[output]
    np.testing.assert_allclose(answered.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-4)


def test_columns_of_their_own_types_are_configured(tmp_path):
    cities = np.array([["Ulm"], ["Bonn"]] * 6, dtype=object)
    model = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(cities)
    backend, _ = estimator(tmp_path, model, (TensorSpec("city", DataType.BYTES, (-1, 1)),))
    given = np.array([[b"Bonn"], [b"Ulm"], [b"Rom"]], dtype=object)
    answered = backend.execute({"city": given}, ())["transformed"]
    np.testing.assert_array_equal(answered, [[1, 0], [0, 1], [0, 0]])


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"a": 1}, "'m.joblib' holds a dict, expected a scikit-learn estimator or pipeline"),
        (
            SVC().fit(IRIS, KINDS == 0),
            "the model as ONNX does not answer as scikit-learn does: output 'scores' differs by 2",
        ),
        (LogisticRegression(), "'m.joblib' does not say how many features it takes: is it fitted?"),
        (LabelPropagation().fit(IRIS, KINDS), "skl2onnx cannot convert 'm.joblib', a LabelPropagation: "),
    ],
)
def test_what_cannot_be_converted_is_told(tmp_path, model, told):
    with pytest.raises(LoadError) as caught:
        estimator(tmp_path, model)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("name", ["m.joblib", "m.pkl", "m.pickle"])
def test_a_pickle_is_not_opened_unless_its_owner_agrees(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(_Touch(tmp_path / "touched")))
    for given in ({}, {"allow_pickle": False}, {"allow_pickle": "false"}):
        with pytest.raises(LoadError, match=f"'{name}' is a pickle, which could run any code and is not opened"):
            SklearnBackend.load(ModelSource("m", "1", path, parameters=given))
    assert not (tmp_path / "touched").exists()


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_skops_files_are_opened_as_far_as_their_types_are_harmless(tmp_path):
    skops = pytest.importorskip("skops.io", reason="skops is not installed: pip install 'headrace[sklearn]'")
    from headrace_backends.importers import estimator as module

    plain = make_pipeline(StandardScaler(), LogisticRegression()).fit(IRIS, KINDS)
    skops.dump(plain, tmp_path / "plain.skops")
    backend, _ = opened(module, tmp_path / "plain.skops")
    np.testing.assert_array_equal(backend.execute({"features": ROWS}, ())["label"], plain.predict(ROWS.astype(float)))
    skops.dump(make_pipeline(_Odd(), LogisticRegression()).fit(IRIS, KINDS), tmp_path / "odd.skops")
    with pytest.raises(LoadError, match=r"types that are not known to be harmless: .*_Odd; if you trust them, set"):
        opened(module, tmp_path / "odd.skops")
    (tmp_path / "no.skops").write_bytes(b"no")
    with pytest.raises(LoadError, match=r"'no\.skops' is no skops file"):
        opened(module, tmp_path / "no.skops")


class _Odd(StandardScaler):
    pass


# -- XGBoost -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def booster(tmp_path):
    xgboost = pytest.importorskip("xgboost", reason="XGBoost is not installed: pip install 'headrace[xgboost]'")
    pytest.importorskip("onnxmltools", reason="onnxmltools is not installed: pip install 'headrace[xgboost]'")

    def make(labels, name="model.json", names=None, **parameters):
        data = xgboost.DMatrix(np.where(IRIS > 6.5, np.nan, IRIS), label=labels, feature_names=names)
        depth = {} if parameters.get("booster") == "gblinear" else {"max_depth": 2}
        trained = xgboost.train({"nthread": 1, **depth, **parameters}, data, 4)
        trained.save_model(tmp_path / name)
        trained.feature_names = None
        return trained, tmp_path / name

    return make


def rows_with_gaps():
    import xgboost

    rows = np.where(ROWS > 6, np.nan, ROWS)
    return rows, xgboost.DMatrix(rows)


@pytest.mark.parametrize("name", ["model.json", "model.ubj"])
@pytest.mark.parametrize("objective", ["reg:squarederror", "reg:absoluteerror", "count:poisson"])
def test_boosted_regressors(booster, objective, name):
    from headrace_backends.importers import booster as module

    trained, path = booster(KINDS, name, objective=objective, names=["a", "b", "c", "d e"])
    backend, notes = opened(module, path)
    assert backend.signature.inputs == (TensorSpec("features", DataType.FP32, (-1, 4)),)
    assert backend.signature.outputs == (TensorSpec("prediction", DataType.FP32, (-1, 1)),)
    rows, matrix = rows_with_gaps()
    answered = backend.execute({"features": rows}, ())["prediction"]
    np.testing.assert_allclose(answered[:, 0], trained.predict(matrix), rtol=1e-4, atol=1e-5)
    assert notes[0] == f"objective {objective}, 4 features"


@pytest.mark.parametrize(
    ("labels", "parameters", "classes"),
    [
        (KINDS > 0, {"objective": "binary:logistic"}, 2),
        (KINDS, {"objective": "multi:softprob", "num_class": 3}, 3),
        (KINDS, {"objective": "multi:softmax", "num_class": 3}, 3),
    ],
)
def test_boosted_classifiers(booster, labels, parameters, classes):
    from headrace_backends.importers import booster as module

    trained, path = booster(labels, **parameters)
    backend, _ = opened(module, path)
    assert [(spec.name, spec.shape) for spec in backend.signature.outputs] == [
        ("label", (-1,)),
        ("probabilities", (-1, classes)),
    ]
    rows, matrix = rows_with_gaps()
    answered, wanted = backend.execute({"features": rows}, ()), trained.predict(matrix)
    if parameters["objective"] == "multi:softmax":
        np.testing.assert_array_equal(answered["label"], wanted)
        return
    shares = np.stack([1 - wanted, wanted], 1) if classes == 2 else wanted
    np.testing.assert_allclose(answered["probabilities"], shares, atol=1e-5)
    np.testing.assert_array_equal(answered["label"], shares.argmax(1))


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"objective": "reg:logistic"}, r"does not answer as XGBoost \(objective reg:logistic\) does"),
        ({"booster": "dart"}, r"'model\.json' is a dart booster, and only gbtree ones can be converted"),
        ({"booster": "gblinear"}, r"'model\.json' is a gblinear booster"),
    ],
)
def test_boosters_that_come_out_wrong_are_refused(booster, parameters, told):
    from headrace_backends.importers import booster as module

    _, path = booster(KINDS > 0, **parameters)
    with pytest.raises(LoadError, match=told):
        opened(module, path)


def test_a_file_that_is_no_booster(booster):
    from headrace_backends.importers import booster as module

    _, path = booster(KINDS)
    path.write_text('{"learner":{"a":1}}')
    with pytest.raises(LoadError, match=r"'model\.json' is no model of XGBoost, in JSON or UBJSON"):
        opened(module, path)
