"""A whole search over a model of another framework: it starts from the ONNX form, and the plan has that form in it."""

import asyncio
import pickle
from importlib.util import find_spec

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from headrace.optimizing import NOTHING_BETTER, OptimizeArguments, run
from headrace.repository.layout import read_folder
from headrace.repository.plans import Plans
from headrace.workers.replayed import replay
from headrace_backends.base import ModelSource
from headrace_backends.optimize.listener import SilentListener
from headrace_backends.optimize.plan_cache import PlanCache
from headrace_backends.optimize.report import read_report
from headrace_backends.registry import resolve

missing = [module for module in ("skl2onnx", "onnx") if find_spec(module) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def test_a_scikit_learn_pipeline_is_optimised_and_its_plan_answers_as_it_does(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pixels, digits = load_digits(return_X_y=True)
    pixels = pixels.astype(np.float32)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=50, tol=0.1)).fit(pixels, digits)
    version = tmp_path / "models" / "digits" / "1"
    version.mkdir(parents=True)
    (version / "model.joblib").write_bytes(pickle.dumps(classifier))
    (version.parent / "config.yaml").write_text(
        "parameters: {allow_pickle: true}\n"
        "optimize: {budget: {metric: top1_agreement, min: 0.98}, calibration: digits.npz, allow: [int8_dynamic]}\n"
    )
    np.savez(version.parent / "digits.npz", features=pixels[:100], digit=digits[:100])
    said, complaints = [], []
    arguments = OptimizeArguments("digits", tmp_path / "models", tmp_path / "plans", time_limit_s=4.0)
    status = run(arguments, SilentListener(), said.append, complaints.append)
    assert status in (0, NOTHING_BETTER), complaints
    # As a server finds and trusts it.
    folder = read_folder(version.parent)
    (planned,) = asyncio.run(Plans(PlanCache(tmp_path / "plans")).choose(folder, [1])).values()
    plan = planned.plan
    assert planned.files.model_path.parent == planned.folder  # also where the ONNX form is served as it is
    assert plan.errors.top1_agreement >= 0.98
    assert plan.errors.same >= 0.98  # of the labels
    backend = resolve(plan.form.backend).load(
        ModelSource("digits", "1", planned.files.model_path, parameters=planned.config.parameters)
    )
    assert "as it did when they were recorded" in replay(backend, planned.replay, plan.tolerance)
    answered = backend.execute({"features": pixels[:50]}, ())
    assert (answered["label"] == classifier.predict(pixels[:50])).mean() >= 0.96
    # What ONNX Runtime's quantisers and OpenVINO make of operators for such models is a row each, whatever it is.
    tried = {row.form.name: row for row in read_report(planned.folder / "report.json").rows}
    assert {"openvino + openvino", "onnxruntime + int8_dynamic"} <= tried.keys()
    assert all(row.reason or row.speedup for row in tried.values())
