"""``headrace check --gpu``: what each machine is told, from what was found there, and that finding works here."""

import json
import subprocess
import sys

import onnxruntime
import pytest

from headrace import gpu_check
from headrace.gpu_check import MISSING, OK, OPTIONAL, check_gpu, findings
from headrace.workers import gpu_probing
from headrace.workers.gpu_probing import broken
from headrace_backends import gpu_probe

GPU = {"index": 0, "name": "NVIDIA H200", "capability": "9.0", "total_bytes": 139 << 30}
WORKING = {
    "driver": {"cuda": "13.0", "gpus": [GPU]},
    "nvml": {"driver": "580.95.05", "gpus": [{"name": "NVIDIA H200", "uuid": "GPU-1", "mig": [], "mig_mode": False}]},
    "onnxruntime": {
        "installed": {"onnxruntime-gpu": "1.30.0"},
        "version": "1.30.0",
        "offered": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
        "working": ["CUDAExecutionProvider"],
    },
    "torch": {"version": "2.11.0+cu130", "cuda": "13.0", "gpus": 1},
    "tensorrt": {"library": "TensorRT 11.1.0.106", "without_gpu": False},
}
NO_DRIVER = {"error": "there is no NVIDIA driver here (libcuda.so.1)"}


def told(**facts):
    return {finding.subject: finding for finding in findings({**WORKING, **facts})}


def serves(**facts):
    return [finding.subject for finding in told(**facts).values() if finding.serves]


def test_a_machine_that_has_everything():
    found = told()
    assert all(finding.mark == OK and not finding.advice for finding in found.values())
    assert str(found["GPUs"]) == "ok  GPUs: gpu:0 NVIDIA H200 (139 GiB, compute capability 9.0)"
    assert serves() == ["ONNX Runtime", "PyTorch", "TensorRT"]


def test_without_a_driver_nothing_serves():
    assert serves(driver=NO_DRIVER) == []
    found = told(driver=NO_DRIVER)
    assert found["driver"].mark == found["GPUs"].mark == MISSING
    rtx = told(driver=NO_DRIVER, tensorrt={"library": "TensorRT-RTX 1.7.1.116", "without_gpu": True})["TensorRT"]
    assert "can build engines, and there is no GPU to run them" in rtx.text


def test_gpus_that_are_hidden():
    found = told(driver={"cuda": "13.0", "gpus": []})
    assert found["driver"].mark == OK
    assert "CUDA_VISIBLE_DEVICES" in found["GPUs"].advice
    assert serves(driver={"cuda": "13.0", "gpus": []}) == []


def test_a_driver_that_is_too_old():
    found = told(driver={"cuda": "11.4", "gpus": [GPU]})["driver"]
    assert found.mark == MISSING
    assert "a newer driver is needed" in found.advice


@pytest.mark.parametrize(
    ("subject", "facts", "mark", "text", "advice"),
    [
        ("onnxruntime", {"installed": {"onnxruntime": "1", "onnxruntime-gpu": "1"}}, MISSING, "both", "pip uninstall"),
        ("onnxruntime", {"installed": {}, "error": "no"}, MISSING, "does not import: no", "onnxruntime-gpu"),
        (
            "onnxruntime",
            {
                "installed": {"onnxruntime": "1.32"},
                "version": "1.32",
                "offered": ["CPUExecutionProvider"],
                "working": [],
            },
            MISSING,
            "1.32 is the build for CPUs",
            "pip uninstall -y onnxruntime",
        ),
        (
            "onnxruntime",
            {**WORKING["onnxruntime"], "working": []},
            MISSING,
            "offers CUDA, and then runs on the CPU",
            "cudnn",
        ),
        (
            "onnxruntime",
            {**WORKING["onnxruntime"], "working": [], "reasons": {"CUDAExecutionProvider": "CUDA failure 35"}},
            MISSING,
            "offers CUDA, which fails: CUDA failure 35",
            "cudnn",
        ),
        ("torch", {"missing": True, "error": "No module"}, OPTIONAL, "is not installed", "pip install"),
        ("torch", {"missing": False, "error": "libcudart"}, MISSING, "does not import: libcudart", "pip install"),
        ("torch", {"version": "2.13.0+cpu", "cuda": None, "gpus": 0}, MISSING, "is the build for CPUs", "pip install"),
        ("torch", {"version": "2.13.0", "cuda": "13.0", "gpus": 0}, MISSING, "sees no GPU", ""),
        ("tensorrt", {"error": "neither"}, OPTIONAL, "is not installed, nor is TensorRT-RTX", "headrace[tensorrt]"),
        ("tensorrt", {"library": "TensorRT 10.0", "error": "cudaError 35"}, MISSING, "does not work: cudaError 35", ""),
    ],
)
def test_each_library_that_is_not_as_it_should_be(subject, facts, mark, text, advice):
    names = {"onnxruntime": "ONNX Runtime", "torch": "PyTorch", "tensorrt": "TensorRT"}
    found = told(**{subject: facts})[names[subject]]
    assert found.mark == mark
    assert text in found.text
    assert advice in found.advice
    assert not found.serves
    assert len(serves(**{subject: facts})) == 2


def test_metrics_and_mig():
    assert "nvidia-ml-py is not installed" in told(nvml={"missing": True})["GPU metrics"].text
    assert "Not Found" in told(nvml={"error": "NVML Shared Library Not Found"})["GPU metrics"].text
    mig = {
        "driver": "580",
        "gpus": [{"name": "NVIDIA H200", "uuid": "GPU-1", "mig_mode": True, "mig": ["MIG-1", "MIG-2"]}],
    }
    assert told(nvml=mig)["MIG"].text == "on for GPU 0 NVIDIA H200: MIG-1, MIG-2"


def test_two_builds_are_one_over_the_other_only_in_one_folder(tmp_path, monkeypatch):
    for folder, *names in (("a", "onnxruntime_gpu"), ("b", "onnxruntime", "onnxruntime_gpu")):
        for name in names:
            about = tmp_path / folder / f"{name}-9.0.dist-info"
            about.mkdir(parents=True)
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 9.0\n")
    monkeypatch.syspath_prepend(tmp_path / "b")
    both = {"onnxruntime": "9.0", "onnxruntime-gpu": "9.0"}
    assert gpu_probe.installed_into(tmp_path / "b" / "onnxruntime") == gpu_probe.installed_into(None) == both
    monkeypatch.syspath_prepend(tmp_path / "a")
    assert gpu_probe.installed_into(tmp_path / "a" / "onnxruntime") == {"onnxruntime-gpu": "9.0"}


async def test_a_probe_that_breaks_is_told_and_the_others_go_on(monkeypatch):
    async def facts_of(name):
        return broken(name, "ended with status -11") if name != "driver" else WORKING["driver"]

    monkeypatch.setattr(gpu_probing, "ask", facts_of)
    lines = []
    assert await check_gpu(lines.append) == 1
    assert "ok  driver: takes programs made with CUDA up to 13.0" in lines
    for subject in ("ONNX Runtime", "PyTorch", "TensorRT"):
        assert any(line.startswith(f"no  {subject}:") and "ended with status -11" in line for line in lines)


async def test_a_machine_that_serves_says_so(monkeypatch):
    async def facts_of(name):
        return WORKING[name]

    monkeypatch.setattr(gpu_probing, "ask", facts_of)
    lines = []
    assert await check_gpu(lines.append) == 0
    assert lines[-1] == "models can be served on a GPU here: set instances: [{device: gpu:0}]"


async def test_crashes_and_silence_of_a_probe(monkeypatch, tmp_path):
    (tmp_path / "crasher.py").write_text("import os, sys; print('noise'); sys.stderr.write('boom\\n'); os._exit(9)")
    (tmp_path / "sleeper.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_probing, "PROBE_MODULE", "crasher")
    assert await gpu_probing.ask("torch") == {"error": "ended with status 9: boom"}
    monkeypatch.setattr(gpu_probing, "PROBE_MODULE", "sleeper")
    monkeypatch.setattr(gpu_probing, "PROBE_TIMEOUT_S", 0.3)
    assert await gpu_probing.ask("torch") == {"error": "gave no answer within 0 s"}


def test_the_tiny_model_is_one():
    session = onnxruntime.InferenceSession(gpu_probe.TINY_MODEL, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": [2.5]})[0].tolist() == [2.5]


@pytest.mark.parametrize("name", gpu_check.PROBES)
def test_every_probe_answers_here(name):
    done = subprocess.run(
        [sys.executable, "-m", gpu_probing.PROBE_MODULE, name], capture_output=True, text=True, timeout=60, check=True
    )
    facts = json.loads(done.stdout.splitlines()[-1])
    assert findings({**WORKING, name: facts})
