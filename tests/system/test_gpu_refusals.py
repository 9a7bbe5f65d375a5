"""A server on a machine that cannot serve models for GPUs says of each why, and serves the others."""

import ctypes
import os
import struct
import subprocess
import sys

import pytest
from running_server import RunningServer
from system.load import infer, onnx_model

NO_LIBRARY = 'raise ImportError("this one is not here")\n'


def has_driver():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(has_driver(), reason="there is an NVIDIA driver here: tests/gpu has its tests")


@pytest.fixture
def repository(tmp_path):
    onnx_model(tmp_path, "adder")
    onnx_model(tmp_path, "built", config="backend: tensorrt\n")
    onnx_model(tmp_path, "on_gpu", config="instances: [{device: gpu:0}]\n")
    engine_file(tmp_path, "engine", struct.pack("<4sIQQ4B", b"ftrt", 0, 2, 28, 10, 13, 3, 9))
    return tmp_path


def engine_file(repository, name, data):
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / "model.plan").write_bytes(data)


def reasons(server):
    status, entries = server.post("/v2/repository/index")
    assert status == 200
    return {entry["name"]: entry["reason"] for entry in entries if entry["state"] == "UNAVAILABLE"}


def test_without_the_library(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nothing")
    for module in ("tensorrt", "tensorrt_rtx"):
        (folder / f"{module}.py").write_text(NO_LIBRARY)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    with RunningServer(repository, env={"PYTHONPATH": path}) as server:
        found = reasons(server)
        assert set(found) == {"engine", "built", "on_gpu"}
        for name in ("engine", "built"):
            assert "neither TensorRT nor TensorRT-RTX imports here" in found[name]
            assert "pip install 'headrace[tensorrt]'" in found[name]
        assert "needs an onnxruntime with CUDA" in found["on_gpu"]
        assert infer(server.http, "adder", [1.0]).values == [2.0]


def test_without_a_driver(repository):
    rtx = pytest.importorskip("tensorrt_rtx", reason="pip install 'headrace[tensorrt-rtx]'")
    onnx, engine = repository / "built" / "1" / "model.onnx", repository / "model.plan"
    build = [sys.executable, "-m", "headrace_backends.tensorrt", str(onnx), str(engine)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    whole = engine.read_bytes()
    engine_file(repository, "whole", whole)
    engine_file(repository, "cut_short", whole[:-100])
    engine_file(repository, "stale", whole[:24] + bytes([0, 9]) + whole[26:])
    engine_file(repository, "something_else", b"PK" + bytes(100))
    with RunningServer(repository) as server:
        found = reasons(server)
        for name in ("whole", "built"):
            assert "there is no NVIDIA driver here" in found[name]
        # What is wrong with a file is told also where there is no GPU.
        assert f"it was built by TensorRT 10.13.3.9, and here is TensorRT-RTX {rtx.__version__}" in found["engine"]
        assert "it was built by TensorRT-RTX 0.9." in found["stale"]
        assert f"has {len(whole) - 100} bytes, and its header speaks of {len(whole)}" in found["cut_short"]
        assert "'model.plan' is no TensorRT engine" in found["something_else"]
        assert infer(server.http, "adder", [1.0]).values == [2.0]


def test_the_preflight_says_what_is_missing():
    command = [sys.executable, "-m", "headrace", "check", "--gpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("no  driver: there is no NVIDIA driver here")
    assert "ONNX Runtime: " in done.stdout
    assert done.stdout.splitlines()[-1].startswith("no model can be served on a GPU here")
