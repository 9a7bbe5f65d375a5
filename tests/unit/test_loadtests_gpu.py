"""The run for a GPU machine, as far as one without shows: its ledger, parts of wheels, networks, forms, and no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loadtests.gpu import forms, parts, run
from loadtests.gpu.ledger import BEYOND, FAILED, NOT_SHOWN, SHOWN, Ledger, NotShown

from headrace.repository.model_config import parse_config
from headrace_backends.tensorrt.profiles import asked_ranges

torch = pytest.importorskip("torch")
from loadtests.gpu import subjects  # noqa: E402 - it needs torch

ROOT = Path(__file__).parents[2]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_whatever_happens_has_its_line_and_the_next_thing_is_tried(tmp_path):
    clock, lines = Clock(), []
    ledger = Ledger(10.0, lines.append, clock)
    with ledger.showing("good") as showing:
        showing.due()
        showing.text, showing.values["rate"] = "5 rows/s", 5
        clock.now = 4.0
    with ledger.showing("bad") as showing:
        raise ValueError("no good")
    with ledger.showing("missing"):
        raise NotShown("there is no library")
    clock.now = 11.0
    with ledger.showing("late") as showing:
        showing.due()
    assert [one.outcome for one in ledger.entries] == [SHOWN, FAILED, NOT_SHOWN, NOT_SHOWN]
    assert lines[1] == "[FAILED] bad: ValueError: no good"
    assert ledger.entries[0].seconds == 4.0
    assert ledger.failed == 1
    table = ledger.table().splitlines()
    assert len(table) == 4 + len(BEYOND)
    assert table[0].split() == ["shown", "good", "5", "rows/s"]
    ledger.write(tmp_path / "new" / "result.json", {"gpu": "none"})
    found = json.loads((tmp_path / "new" / "result.json").read_text())
    assert found["entries"][0]["values"] == {"rate": 5}
    assert found["not_shown"] == BEYOND


def test_wheels_are_cut_and_joined(tmp_path):
    wheels = []
    for name, size in (("large.whl", 1000), ("small.whl", 3), ("empty.whl", 0), ("even.whl", 600)):
        (tmp_path / name).write_bytes(np.random.default_rng(size).bytes(size))
        wheels.append(tmp_path / name)
    parts.cut(wheels, tmp_path / "parts", part_bytes=300)
    assert all(one.stat().st_size <= 300 for one in (tmp_path / "parts").glob("*.whl.*"))
    joined = parts.join(tmp_path / "parts", tmp_path / "joined")
    assert [one.read_bytes() for one in joined] == [one.read_bytes() for one in wheels]


def test_parts_that_are_not_whole_are_told(tmp_path):
    (tmp_path / "a.whl").write_bytes(bytes(100))
    parts.cut([tmp_path / "a.whl"], tmp_path / "parts", part_bytes=60)
    (tmp_path / "parts" / "a.whl.01").write_bytes(bytes(39) + b"x")
    with pytest.raises(parts.BadParts, match=r"a\.whl is not what was cut"):
        parts.join(tmp_path / "parts", tmp_path)
    (tmp_path / "parts" / "a.whl.01").unlink()
    with pytest.raises(parts.BadParts, match=r"a\.whl lacks a\.whl\.01"):
        parts.join(tmp_path / "parts", tmp_path)


def test_what_the_run_needs_is_named_with_its_versions():
    names = {one.partition("==")[0] for one in parts.needed(("headrace", "pytest-asyncio"))}
    assert {"fastapi", "starlette", "uvicorn", "msgspec", "pytest-asyncio", "pytest"} <= names
    assert names.isdisjoint({"headrace", "numpy", "torch", "onnxruntime", "tritonclient", "ruff"})


def test_the_networks_answer_for_rows_by_themselves():
    for subject in subjects.SUBJECTS:
        network = subjects.make_network(subject)
        inputs = subject.inputs(3, 1)
        if subject.name == "resnet50":
            inputs = {"data": inputs["data"][:, :, :64, :64]}
        with torch.inference_mode():
            together = network(*map(torch.from_numpy, inputs.values())).numpy()
            alone = network(*(torch.from_numpy(array[1:2].copy()) for array in inputs.values())).numpy()
        assert together.shape[0] == 3
        assert subjects.error(together[1:2], alone.astype(np.float64)) < 1e-5
        assert 0.01 < together.std() < 100  # neither dead nor grown out of every precision


def test_padding_is_masked():
    """The sentence's answer is that of its words, whatever lies behind them."""
    (_, minilm) = subjects.SUBJECTS
    inputs = minilm.inputs(2, 5)
    length = int(inputs["attention_mask"][0].sum())
    answer = subjects.reference(minilm, inputs)[:1]
    short = {name: array[:1, :length] for name, array in inputs.items()}
    assert subjects.error(subjects.reference(minilm, short), answer) < 1e-6


@pytest.mark.parametrize("subject", subjects.SUBJECTS, ids=lambda subject: subject.name)
def test_the_configuration_of_every_form_can_be_read(tmp_path, subject):
    (tmp_path / "files").mkdir()
    for file in ("model.onnx", "model.pt2"):
        (tmp_path / "files" / file).write_bytes(b"a model")
    names = [forms.place(form, subject, tmp_path / "files", tmp_path / "repository") for form in forms.FORMS]
    assert len(set(names)) == len(names)
    for name, form in zip(names, forms.FORMS, strict=True):
        config = parse_config((tmp_path / "repository" / name / "config.yaml").read_text())
        assert config.backend == form.backend
        assert [group.device for group in config.instances] == ["gpu:0"]
        free = [one for one, places in subject.free.items() if len(places) > 1]
        assert set(asked_ranges(config.parameters)) == (set(free) if form.backend == "tensorrt" else set())


def test_without_a_gpu_everything_is_listed_as_not_shown(tmp_path):
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("there is an NVIDIA driver here")
    command = [sys.executable, "-m", "loadtests.gpu.run", "--out", str(tmp_path), "--budget", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    (result,) = tmp_path.glob("*.json")
    entries = json.loads(result.read_text())["entries"]
    assert {one["outcome"] for one in entries} == {NOT_SHOWN}
    assert "there is no GPU: there is no NVIDIA driver here" in done.stdout
    for what in ("workers killed under load lose nothing", "MIG: an instance on a part of a GPU"):
        assert what in done.stdout


def test_every_file_of_tests_for_gpus_has_its_line():
    folder = Path(run.__file__).parents[2] / "tests/gpu"
    assert set(run._TESTS) == {file.name for file in folder.glob("test_*.py")}
