"""``headrace optimize`` and ``headrace.optimize`` from end to end, on small models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from running_server import RunningServer
from sklearn.datasets import load_digits

import headrace
from headrace_backends.optimize.findings import Fate
from headrace_backends.optimize.plan import REPLAY_FILE, read_plan
from headrace_backends.optimize.replay import problem, read_replay
from headrace_backends.optimize.report import read_report

DIGITS = Path(__file__).parents[2] / "model_repository" / "digits"
TIME_LIMIT_S = 15  # enough for a few candidates; the last ones may be tried a little longer


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    digits = load_digits()
    path = tmp_path_factory.mktemp("examples") / "digits.npz"
    np.savez(path, image=digits.images.reshape(-1, 64).astype(np.float32)[:200], digit=digits.target[:200])
    return path


def optimize(*arguments, folder, codes=(0, 3)):  # 3: nothing is faster than what was dropped in, on this machine
    command = [sys.executable, "-m", "headrace", "optimize", *map(str, arguments)]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode in codes, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.fixture
def repository(tmp_path):
    shutil.copytree(DIGITS, tmp_path / "models" / "digits")
    return tmp_path / "models"


def served(server, rows):
    body = {"inputs": [{"name": "image", "datatype": "FP32", "shape": list(rows.shape), "data": rows.tolist()}]}
    status, answer = server.post("/v2/models/digits/infer", body)
    assert status == 200, answer
    (output,) = answer["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def test_a_plan_is_made_and_served(repository, examples, tmp_path):
    plans = tmp_path / "plans"
    options = ("--repository", repository, "--plan-cache", plans, "--calibration", examples)
    said = optimize(
        *("digits", *options, "--objective", "throughput"),
        *("--budget", "top1_agreement>=0.99", "--allow", "int8_static", "--time-limit", TIME_LIMIT_S),
        folder=tmp_path,
    )
    (place,) = [Path(line.removeprefix("plan: ").strip()).parent for line in said.splitlines() if "plan.json" in line]
    plan = read_plan(place)
    findings = read_report(place / "report.json")
    chosen = [row for row in findings.rows if row.fate is Fate.CHOSEN]
    assert [row.form for row in chosen] == [plan.form] == [findings.chosen]
    assert plan.budget.problem(plan.errors) is None
    assert "<html" in (place / "report.html").read_text()
    # What was made is kept only for a search that had no time for everything, and is to go on there.
    assert bool(list(place.parent.glob(".work*"))) == (not findings.complete)
    with RunningServer(repository, "--plan-cache", str(plans), "--optimize", "plans") as server:
        images = load_digits()
        rows = images.images.reshape(-1, 64).astype(np.float32)[200:210]
        told = served(server, rows).argmax(-1)
        assert (told == images.target[200:210]).mean() >= 0.9
        # Proved by the worker when it loaded that form, and the same through the protocol: the form's own answers.
        assert server.metric("headrace_plan_info", model="digits", form=plan.form.name) == 1
        assert server.metric("headrace_plan_replays_total", model="digits", result="right") >= 1
        recorded, right = read_replay(place / REPLAY_FILE)
        answers = [{"probabilities": served(server, one["image"])} for one in recorded]
        assert problem(answers, right, plan.tolerance) is None


def test_a_model_file_of_its_own_is_optimised_beside_the_report(examples, tmp_path):
    (tmp_path / "judge.py").write_text(
        "def accuracy(outputs, labels):\n"
        "    pairs = zip(outputs['probabilities'], labels['digit'])\n"
        "    right = [row.argmax() == digit for row, digit in pairs]\n"
        "    return sum(right) / len(right)\n"
    )
    model = tmp_path / "net.onnx"
    model.write_bytes((DIGITS / "1" / "model.onnx").read_bytes())
    said = optimize(
        *(model, "--calibration", examples, "--budget", "judge.py:accuracy>=0.9", "--allow", "int8_static"),
        *("--time-limit", TIME_LIMIT_S, "--plan-cache", tmp_path / "plans"),
        folder=tmp_path,
    )
    made = tmp_path / "net-optimized"
    assert json.loads((made / "plan.json").read_text())["errors"]["own"] >= 0.9, said
    assert (made / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no_such_model"], "there is no model 'no_such_model'"),
        (["digits", "--allow", "int8_static"], "a budget is needed"),
        (["digits", "--budget", "cosine>0.9"], "expected METRIC>=N"),
        (["digits", "--calibration", "nowhere.npz"], "there is no 'nowhere.npz'"),
        (["digits", "--version", "7"], "has no version 7"),
    ],
)
def test_what_cannot_be_done_is_said(repository, tmp_path, arguments, told):
    said = optimize(
        *arguments, "--repository", repository, "--plan-cache", tmp_path / "plans", folder=tmp_path, codes=(1,)
    )
    assert told in said
    assert "Traceback" not in said


def test_as_a_library_a_module_comes_back_as_a_function():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)).eval()
    rows = torch.randn(40, 32)
    with headrace.optimize(net, rows, time_limit_s=TIME_LIMIT_S) as fast:
        assert torch.allclose(fast(rows[:3]), net(rows[:3]), atol=1e-4)
        assert fast.report.reference.form.backend == "torch"
        assert (fast.folder / "report.html").is_file()
        with pytest.raises(TypeError, match="expected"):
            fast(rows, rows)
    with pytest.raises(ValueError, match="a budget is needed"):
        headrace.optimize(net, rows, allow=["int8_static"])
