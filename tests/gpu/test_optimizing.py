"""The optimiser on a real GPU: forms are found there, proved against the model as dropped in, and served."""

import re
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from running_server import RunningServer
from system.load import infer, onnx_model

from headrace_backends.optimize.contest import Contest
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.findings import Fate
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.hardware import hardware
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.trial import TrialFailed
from headrace_backends.optimize.workshop import Workshop


def test_a_model_on_a_gpu_is_optimised_and_served(tmp_path):
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    assert re.search(r" \d+\.\d+, driver \d", hardware().gpu), hardware().gpu
    repository, cache = tmp_path / "repository", tmp_path / "plans"
    repository.mkdir()
    onnx_model(repository, "adder", config='backend: tensorrt\ninstances: [{device: "gpu:0"}]\n')
    done = subprocess.run(
        [sys.executable, "-m", "headrace", "optimize", "adder", "--repository", repository, "--plan-cache", cache,
         "--time-limit", "120"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if "does not import" in done.stdout or "imports here" in done.stdout:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert "plan:" in done.stdout, done.stdout + done.stderr
    (plan,) = cache.glob("adder/1/*/plan.json")
    assert msgspec.json.decode(plan.read_bytes())["basis"]["hardware"]["gpu"] == hardware().gpu
    with RunningServer(repository, "--optimize", "plans", env={"HEADRACE_PLAN_CACHE": str(cache)}) as server:
        assert infer(server.http, "adder", [1.0]).values == [2.0]


def test_a_file_is_optimised_on_a_gpu(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
    rows = ({0: torch.export.Dim("rows", max=64)},)
    torch.export.save(torch.export.export(net, (torch.zeros(2, 64),), dynamic_shapes=rows), tmp_path / "net.pt2")
    done = subprocess.run(
        [sys.executable, "-m", "headrace", "optimize", "net.pt2", "--device", "gpu:0", "--time-limit", "60"],
        cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert "plan:" in done.stdout, done.stdout + done.stderr
    report = (tmp_path / "net-optimized" / "report.json").read_text()
    assert hardware().gpu in report
    assert "aot_inductor" in report


@pytest.mark.parametrize(
    "form",
    [
        Form("onnxruntime", parameters={"cuda_graphs": True}, max_batch_size=128),
        Form("tensorrt", parameters={"precision": "fp32", "cuda_graphs": True}, max_batch_size=128),
        Form("tensorrt", parameters={"precision": "fp32", "batch_profiles": "32"}, max_batch_size=128),
    ],
    ids=lambda form: form.name,
)
def test_larger_batches_are_measured_and_proved(tmp_path, form):
    onnx_model(tmp_path, "adder")
    path = tmp_path / "adder" / "1" / "model.onnx"
    subject = Subject("adder", "1", path, "onnxruntime", tmp_path, device="gpu:0")
    examples = Examples(tuple({"x": np.full((1, 1), place, np.float32)} for place in range(8)), ({},) * 8, "test")
    with Contest(subject, Goal(aim="throughput"), Workshop(tmp_path / "work", subject, 4), 4, None) as contest:
        try:
            contest.load_reference()
        except TrialFailed as error:
            pytest.skip(str(error))  # an onnxruntime without CUDA
        contest.measure_reference(*examples.halves(), [], 0.0)
        row = contest.try_form(form, 120.0)
    if row.fate is Fate.FAILED and ("does not import" in row.reason or "imports here" in row.reason):
        pytest.skip(row.reason)
    assert row.fate in (Fate.KEPT, Fate.SLOWER), row.reason
    assert row.curve[-1].rows == 128
    assert row.errors.faithful
