"""The registry: names, aliases, endings, and what is said when a framework is missing."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import PurePath

import pytest

from headrace_backends import registry
from headrace_backends.base import BackendUnavailable, LoadError
from headrace_backends.fake import FakeBackend


def test_every_backend_has_its_files_and_every_ending_a_known_backend():
    assert set(registry.BACKENDS) == set(registry.MODEL_FILES)
    assert set(registry.ENDINGS.values()) <= set(registry.MODEL_FILES)
    assert set(registry.ALIASES.values()) <= set(registry.MODEL_FILES)
    assert set(registry.ALSO_READS) <= set(registry.MODEL_FILES)
    for name, files in registry.MODEL_FILES.items():
        assert all(registry.reads(name, PurePath(file)) for file in files)


@pytest.mark.parametrize(
    ("file", "backend"),
    [
        ("model.onnx", "onnxruntime"),
        ("m.pt2", "torch"),
        ("m.pt", "torch"),
        ("model.xml", "openvino"),
        ("model.py", "python"),
        ("M.ONNX", "onnxruntime"),
        ("model.plan", "tensorrt"),
        ("model.engine", "tensorrt"),
        ("model.tflite", "litert"),
        ("model.param", "ncnn"),
        ("model.ncnn.param", "ncnn"),
        ("model.savedmodel", "tensorflow"),
        ("saved_model.pb", "tensorflow"),
        ("model.keras", "tensorflow"),
        ("model.h5", "tensorflow"),
        ("model.skops", "sklearn"),
        ("model.joblib", "sklearn"),
        ("model.json", "xgboost"),
        ("model.ubj", "xgboost"),
    ],
)
def test_ending_chooses_the_backend(file, backend):
    assert registry.backend_of_file(PurePath("models/m/1") / file) == backend


def test_unknown_ending_and_unknown_backend_list_what_there_is():
    with pytest.raises(LoadError, match=r"'model\.params'.*\.onnx"):
        registry.backend_of_file(PurePath("model.params"))
    there = "fake, litert, ncnn, onnxruntime, openvino, python, sklearn, tensorflow, tensorrt, torch, xgboost"
    with pytest.raises(BackendUnavailable, match=f"no backend 'caffe'; there are {there}"):
        registry.resolve("caffe")


def test_aliases_of_triton():
    assert registry.canonical("onnxruntime_onnx") == "onnxruntime"
    assert registry.canonical("pytorch_libtorch") == registry.canonical("pytorch") == "torch"
    assert registry.canonical("python") == "python"
    assert registry.model_files("pytorch") == ("model.pt2", "model.pt")


@pytest.mark.parametrize(
    ("name", "beginning", "fits"),
    [
        ("model.json", b'{"learner":{"attributes":{}', True),
        ("model.json", b'\n{ "learner" : {', True),
        ("vocabulary.json", b'{"hello": 3}', False),
        ("model.json", b"", False),
        ("model.ubj", b"{L" + (7).to_bytes(8, "big") + b"learner{L", True),
        ("model.ubj", b"{L", False),
        ("model.bst", b'{"learner":{', True),
        ("model.bst", b"binf", False),
        ("model.keras", b"anything", True),
    ],
)
def test_what_many_things_are_called_is_told_by_how_it_begins(name, beginning, fits):
    assert registry.content_fits(name, beginning) is fits


def test_what_often_belongs_to_a_model_gives_way():
    assert registry.gives_way("saved_model.pb")
    assert {ending for ending in registry.ENDINGS if not registry.gives_way(f"model{ending}")} == {
        ".onnx", ".pt2", ".pt", ".py", ".plan", ".engine", ".xml", ".param",
    }  # fmt: skip
    assert set(registry.ENDINGS) >= registry.GIVES_WAY


def test_resolve_gives_the_class():
    assert registry.resolve("fake") is FakeBackend


def test_missing_framework_says_what_to_install(monkeypatch):
    for name, framework, modules in (
        ("pytorch", "torch", ["torch"]),
        ("openvino", "openvino", ["openvino", "openvino_model", "openvino_quietly"]),
        ("litert", "litert", ["litert", "litert_signature"]),
    ):
        monkeypatch.setitem(sys.modules, {"litert": "ai_edge_litert.interpreter"}.get(framework, framework), None)
        for module in modules:
            monkeypatch.delitem(sys.modules, f"headrace_backends.{module}", raising=False)
        with pytest.raises(BackendUnavailable, match=rf"pip install 'headrace\[{framework}\]'"):
            registry.resolve(name)


def test_a_backend_reads_its_own_endings_and_those_of_others_that_it_says():
    assert registry.reads("openvino", PurePath("model.xml"))
    assert registry.reads("openvino", PurePath("model.ONNX"))
    assert not registry.reads("onnxruntime", PurePath("model.xml"))
    assert not registry.reads("torch", PurePath("model.onnx"))


def test_plugin_is_found_and_checked(monkeypatch):
    points = {
        "mine": EntryPoint("mine", "headrace_backends.fake:FakeBackend", registry.ENTRY_POINT_GROUP),
        "wrong": EntryPoint("wrong", "pathlib:Path", registry.ENTRY_POINT_GROUP),
        "absent": EntryPoint("absent", "no_such_package:Backend", registry.ENTRY_POINT_GROUP),
    }
    monkeypatch.setattr(registry, "entry_points", lambda group: points.values() if group == "headrace.backends" else [])
    assert registry.resolve("mine") is FakeBackend
    assert "mine" in registry.backend_names()
    with pytest.raises(BackendUnavailable, match="expected a class derived from Backend"):
        registry.resolve("wrong")
    with pytest.raises(BackendUnavailable, match="no_such_package"):
        registry.resolve("absent")


def test_importing_the_registry_imports_no_framework():
    frameworks = {
        "torch",
        "onnxruntime",
        "tensorrt",
        "tensorrt_rtx",
        "tensorflow",
        "sklearn",
        "xgboost",
        "ai_edge_litert",
    }
    code = f"import sys, headrace_backends.registry; sys.exit(bool({frameworks} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
