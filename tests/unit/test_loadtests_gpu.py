"""The run for a GPU machine, as far as one without shows: its ledger, parts of wheels, networks, forms, and no GPU."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from loadtests.gpu import forms, gpu_tests, own_process, parts, serving, show, subjects
from loadtests.gpu.ledger import BEYOND, FAILED, NOT_SHOWN, OVER, SHOWN, Ledger, NotShown
from loadtests.gpu.own_process import StepFailed, ended, last_line, run_step
from loadtests.gpu.steps import STEPS

from headrace.repository.model_config import parse_config
from headrace_backends.tensorrt.profiles import asked_ranges

torch = pytest.importorskip("torch")
from loadtests.gpu import export  # noqa: E402 - it needs torch

ROOT = Path(__file__).parents[2]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_whatever_happens_has_its_line_and_the_next_thing_is_tried(tmp_path):
    clock, lines = Clock(), []
    ledger = Ledger(10.0, lines.append, clock, keep=tmp_path / "new" / "result.json")
    ledger.machine = {"gpu": "none"}
    with ledger.showing("good") as showing:
        showing.due()
        showing.text, showing.values["rate"] = "5 rows/s", 5
        clock.now = 4.0
    with ledger.showing("bad") as showing:
        raise ValueError("no good")
    kept = json.loads((tmp_path / "new" / "result.json").read_text())  # a run that is cut off has that much
    assert [one["what"] for one in kept["entries"]] == ["good", "bad"]
    with ledger.showing("missing"):
        raise NotShown("there is no library")
    clock.now = 11.0
    with ledger.showing("late") as showing:
        showing.due()
    assert [one.outcome for one in ledger.entries] == [SHOWN, FAILED, NOT_SHOWN, NOT_SHOWN]
    assert lines[1] == "[FAILED] bad: ValueError: no good (0 s)"
    assert ledger.outcome("bad") == FAILED
    assert ledger.outcome("never tried") == ""
    assert ledger.left_s == 0
    assert ledger.entries[0].seconds == 4.0
    assert ledger.failed == 1
    table = ledger.table().splitlines()
    assert len(table) == 4 + len(BEYOND)
    assert table[0].split() == ["shown", "good", "5", "rows/s"]
    found = json.loads((tmp_path / "new" / "result.json").read_text())
    assert found["entries"][0]["values"] == {"rate": 5}
    assert found["not_shown"] == BEYOND


def test_wheels_are_cut_for_trips_and_joined(tmp_path):
    wheels = []
    for name, size in (("large.whl", 1000), ("small.whl", 3), ("empty.whl", 0), ("even.whl", 600)):
        (tmp_path / name).write_bytes(np.random.default_rng(size).bytes(size))
        wheels.append(tmp_path / name)
    assert parts.cut(wheels, tmp_path / "parts", trip_bytes=300) == 6
    trips = [list((tmp_path / "parts" / str(number)).glob("*.whl.*")) for number in range(1, 7)]
    sizes = [sum(one.stat().st_size for one in trip) for trip in trips]
    assert sizes == [300, 300, 300, 300, 300, 103]
    assert {one.name for one in trips[0]} == {"empty.whl.00", "small.whl.00", "even.whl.00"}  # the small ones first
    joined, problems = parts.join(tmp_path / "parts", tmp_path / "joined")
    assert not problems
    assert {one.name: one.read_bytes() for one in joined} == {one.name: one.read_bytes() for one in wheels}


def test_what_is_not_whole_is_told_and_the_others_are_there(tmp_path):
    for name in ("a.whl", "b.whl", "c.whl"):
        (tmp_path / name).write_bytes(bytes(100))
    assert parts.join(tmp_path, tmp_path / "joined") == ([], [f"{tmp_path} has no manifest.json"])
    parts.cut([tmp_path / name for name in ("a.whl", "b.whl", "c.whl")], tmp_path / "parts", part_bytes := 60)
    next((tmp_path / "parts").rglob("a.whl.01")).write_bytes(bytes(part_bytes - 1) + b"x")
    next((tmp_path / "parts").rglob("b.whl.01")).unlink()
    joined, problems = parts.join(tmp_path / "parts", tmp_path / "joined")
    assert [one.name for one in joined] == ["c.whl"]
    assert problems == ["a.whl is not what was cut: its hash is another one", "b.whl lacks b.whl.01"]


def test_a_wheel_that_pip_refuses_costs_no_other(tmp_path, monkeypatch):
    for name in ("good.whl", "bad.whl"):
        (tmp_path / name).write_bytes(name.encode())
    parts.cut([tmp_path / "good.whl", tmp_path / "bad.whl"], tmp_path / "parts")
    monkeypatch.setattr(
        parts, "_pip", lambda wheels, _: "bad.whl is no wheel" if any(one.name == "bad.whl" for one in wheels) else ""
    )
    found = parts.install(tmp_path / "parts", tmp_path / "site")
    assert found == (["good.whl"], ["bad.whl: bad.whl is no wheel"])


def test_what_the_run_needs_is_named_with_its_versions():
    asked = parts.needed(("headrace", "pytest-asyncio", "what_is_not_here"))
    names = {one.partition("==")[0] for one in asked}
    assert {"fastapi", "starlette", "uvicorn", "msgspec", "pytest-asyncio", "pytest"} <= names
    assert names.isdisjoint({"headrace", "numpy", "torch", "onnxruntime", "tritonclient", "ruff"})
    assert "what-is-not-here" in asked  # in whatever version there is


def test_the_networks_answer_for_rows_by_themselves():
    for subject in subjects.SUBJECTS:
        network = export.make_network(subject)
        inputs = subject.inputs(3, 1)
        if subject.name == "resnet50":
            inputs = {"data": inputs["data"][:, :, :32, :32]}
        with torch.inference_mode():
            together = network(*map(torch.from_numpy, inputs.values())).numpy()
            alone = network(*(torch.from_numpy(array[1:2].copy()) for array in inputs.values())).numpy()
        assert together.shape[0] == 3
        assert subjects.compare(alone, together[1:2])["error"] < 1e-5
        assert 0.01 < together.std() < 100  # neither dead nor grown out of every precision
        # A row that is another's would be found, also in bfloat16.
        assert subjects.compare(together[:1], together[1:2])["error"] > 0.1


def test_padding_is_masked():
    """The sentence's answer is that of its words, whatever lies behind them."""
    (_, minilm) = subjects.SUBJECTS
    inputs = minilm.inputs(2, 5)
    length = int(inputs["attention_mask"][0].sum())
    answer = export.answer_exactly(minilm, inputs)[:1]
    short = {name: array[:1, :length] for name, array in inputs.items()}
    assert subjects.compare(export.answer_exactly(minilm, short), answer)["error"] < 1e-6


def test_answers_are_compared_with_the_first_rows_of_the_reference():
    wanted = np.array([[3.0, 4.0], [0.0, 1.0], [9.0, 9.0]])
    assert subjects.compare(wanted[:2].astype(np.float32), wanted) == {"error": 0.0, "top1": 1.0, "cosine": 1.0}
    found = subjects.compare(np.array([[3.0, 4.0], [1.0, 0.0]]), wanted)
    assert found == {"error": pytest.approx((2 / 26) ** 0.5), "top1": 0.5, "cosine": 0.0}


@pytest.mark.parametrize("subject", subjects.SUBJECTS, ids=lambda subject: subject.name)
def test_the_configuration_of_every_form_can_be_read(tmp_path, subject):
    (tmp_path / "files").mkdir()
    for file in ("model.onnx", "model.pt2"):
        (tmp_path / "files" / file).write_bytes(b"a model")
    every = (*forms.CHIEF, *forms.OTHERS)
    names = [forms.place(form, subject, tmp_path / "files", tmp_path / "repository") for form in every]
    assert len(set(names)) == len(names)
    for name, form in zip(names, every, strict=True):
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    (result,) = tmp_path.glob("*.json")
    entries = json.loads(result.read_text())["entries"]
    assert {one["outcome"] for one in entries} == {NOT_SHOWN}
    assert "there is no GPU: there is no NVIDIA driver here" in done.stdout
    for what in ("workers killed under load lose nothing", "MIG: an instance on a part of a GPU"):
        assert what in done.stdout


def test_every_file_of_tests_for_gpus_has_its_line():
    assert set(gpu_tests.EVERY) == {file.name for file in (ROOT / "tests/gpu").glob("test_*.py")}


# -- steps: processes of their own --------------------------------------------------------------------------


def step(monkeypatch, tmp_path, code):
    """Have this be what a step's process runs: it has ``answer``, the path where one is expected."""
    monkeypatch.setattr(own_process, "ROOT", tmp_path)
    (tmp_path / "loadtests" / "gpu").mkdir(parents=True)
    (tmp_path / "loadtests" / "gpu" / "steps.py").write_text(f"import os, sys\nanswer = sys.argv[3]\n{code}\n")
    monkeypatch.delenv("PYTHONPATH", raising=False)  # else the project's own
    return run_step("step", {"subject": "s"}, 0.3 if "sleep" in code else 60.0)


def test_a_step_answers(monkeypatch, tmp_path):
    assert step(monkeypatch, tmp_path, "open(answer, 'w').write('{\"rows_per_s\": 5}')") == {"rows_per_s": 5}


@pytest.mark.parametrize(
    ("code", "raised", "told"),
    [
        ("import time; time.sleep(300)", StepFailed, "it was ended after "),
        ("print('Xid 31'); os.abort()", StepFailed, "its process ended by signal 6: Xid 31"),
        ("sys.exit('no CUDA')", StepFailed, "its process ended with 1: no CUDA"),
        ("print('well')", StepFailed, "its process ended with 0: well"),
        ("""open(answer, 'w').write('{"not_shown": "no library"}')""", NotShown, "no library"),
        ("""open(answer, 'w').write('{"failed": "MemoryError: full"}')""", StepFailed, "MemoryError: full"),
    ],
)
def test_whatever_becomes_of_a_step_is_told(monkeypatch, tmp_path, code, raised, told):
    with pytest.raises(raised, match=told):
        step(monkeypatch, tmp_path, code)


def test_what_a_process_has_started_ends_with_it(tmp_path):
    """A server that a killed test leaves behind would go on using the GPU."""
    lives = tmp_path / "lives"
    child = f"import time, pathlib; pathlib.Path({str(lives)!r}).touch(); time.sleep(300)"
    code = (
        "import subprocess, sys, time, os\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdin=subprocess.DEVNULL)\n"
        f"while not os.path.exists({str(lives)!r}): time.sleep(0.01)\n"
        "print(child.pid)"
    )
    status, said = ended([sys.executable, "-c", code], 60.0)
    assert status == 0
    ends = time.monotonic() + 30
    while Path(f"/proc/{int(said)}").exists() and " Z " not in Path(f"/proc/{int(said)}/stat").read_text():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_the_last_line_that_says_something_is_told():
    assert last_line("first\nRuntimeError: gone\n  \n") == "RuntimeError: gone"
    assert last_line("") == "it said nothing"


# -- the order of a run, with made-up steps -----------------------------------------------------------------


class Servers:
    """In place of a server: every model can be loaded, and gives its memory back."""

    def __init__(self):
        self.loaded_models = []

    def loaded(self, model, left_s):
        self.loaded_models.append(model)
        return self

    def __enter__(self):
        return serving.Address(1, 2, 3), {"load_s": 1.0, "before_bytes": 0, "loaded_bytes": 1 << 30, "after_bytes": 0}

    def __exit__(self, *_):
        pass


LOAD = {"requests_per_s": 300.0, "latency": {"p50_ms": 1.0, "p99_ms": 2.0, "max_ms": 3000.0}, "errors": {}}
FOUND = {
    "export": {"files": ["model.onnx"]},
    "reference": {},
    "build": {"load_s": 1.0, "notes": []},
    "eager": {"ms": 8.0, "rows_per_s": 1000.0},
    "loop": {"error": 1e-6, "rows_per_s": 4000.0, "engine_ms": 2.0, "single_rows_per_s": 500.0},
    "serve": {
        **dict.fromkeys(("alone", "singles", "shared", "body"), LOAD),
        "error": 1e-6,
        "shared_rows_per_s": 3900.0,
        "body_rows_per_s": 2000.0,
    },
    "saturate": {"shared_rows_per_s": 5000.0, "body_rows_per_s": 2000.0},
    "kill": {**LOAD, "server_processes_gone": 1},
    "lend": {"lent_ms": 1.0, "body_ms": 2.0, "error": 1e-6},
}


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A run whose steps give what FOUND says, or raise what ``broken`` has for a step and a form or model."""
    (tmp_path / "repository").mkdir()
    ledger = Ledger(100.0, lambda _: None, lambda: 0.0)
    made = SimpleNamespace(run=show.Run(ledger, tmp_path, 1.0), ledger=ledger, broken={}, asked=[])

    def step(name, given, timeout_s):
        assert timeout_s <= 100.0
        what = given.get("form") or given.get("model", "")
        made.asked.append(name)
        if (problem := made.broken.get((name, what))) is not None:
            raise problem
        for file in ("model.onnx", "model.pt2"):
            (Path(given["files"]) / file).touch()
        return dict(FOUND[name])

    monkeypatch.setattr(show, "run_step", step)
    monkeypatch.setattr(show.served, "metrics", lambda _: 'nv_gpu_utilization{gpu_uuid="GPU-1"} 0.5')
    return made


OTHERS = sum(form.suits(subject) for form in forms.OTHERS for subject in subjects.SUBJECTS)


def test_graphs_of_compiled_code_are_for_what_has_fixed_sizes():
    assert 2 * len(forms.OTHERS) - 1 == OTHERS
    resnet, minilm = subjects.SUBJECTS
    graphs = forms.form_of("torch-compiled-graphs")
    assert (graphs.suits(resnet), graphs.suits(minilm)) == (True, False)


def everything(made):
    servers = Servers()
    show.prepare(made.run)
    show.measure_chief(made.run, servers, made.run.folder / "repository")
    chief = len(made.ledger.entries)
    show.measure_others(made.run, servers, made.run.folder / "repository")
    return servers, chief


def test_a_run_shows_the_goals_before_anything_else(made_up):
    servers, chief = everything(made_up)
    assert {one.outcome for one in made_up.ledger.entries} == {SHOWN}, made_up.ledger.table()
    goals = {one.what: one.text for one in made_up.ledger.entries[:chief] if "is at least" in one.what}
    assert goals["resnet50: tensorrt-fp16 is at least 4 x eager fp32"] == (
        "4.00 x on the GPU alone, 4.00 x with copies there and back"
    )
    assert goals["minilm: served tensorrt-fp16 is at least 95% of its bare loop"] == (
        "98% with one instance, 125% with two"
    )
    assert len(goals) == 2 * (1 + len(forms.CHIEF))
    assert len(servers.loaded_models) == 2 * (len(forms.CHIEF) + 1) + OTHERS
    assert set(made_up.asked) == set(FOUND) == set(STEPS)


@pytest.mark.parametrize("problem", [StepFailed("its process ended by signal 6"), NotShown("no library")], ids=repr)
def test_what_breaks_costs_nothing_else(made_up, problem):
    made_up.broken["loop", "onnxruntime-cuda"] = made_up.broken["kill", "resnet50-tensorrt-fp16"] = problem
    made_up.broken["serve", "minilm-torch-cuda"] = made_up.broken["build", "tensorrt-bf16"] = problem
    everything(made_up)
    left = {one.what for one in made_up.ledger.entries if one.outcome != SHOWN}
    assert left == {
        "resnet50: onnxruntime-cuda in a bare loop",
        "resnet50: onnxruntime-cuda is loaded, and its memory comes back",
        "resnet50: served onnxruntime-cuda is at least 95% of its bare loop",
        "minilm: onnxruntime-cuda in a bare loop",
        "minilm: onnxruntime-cuda is loaded, and its memory comes back",
        "minilm: served onnxruntime-cuda is at least 95% of its bare loop",
        "resnet50-tensorrt-fp16: workers killed under load lose nothing",
        "minilm: torch-cuda served",
        "resnet50: tensorrt-bf16 built",
        "minilm: tensorrt-bf16 built",
    }


def test_what_is_done_to_one_form_is_done_to_the_first_that_is_served(made_up):
    for step in ("build", "loop"):
        made_up.broken[step, "tensorrt-fp16"] = StepFailed("TensorRT-RTX cannot build here")
    everything(made_up)
    shown = [one.what for one in made_up.ledger.entries if one.outcome == SHOWN]
    assert "resnet50-onnxruntime-cuda: workers killed under load lose nothing" in shown
    assert "GPU metrics" in shown
    assert "minilm: tensors in its client's memory on the GPU" in shown
    assert sum("killed under load" in what for what in shown) == 2


def test_nothing_is_measured_of_what_cannot_be_exported(made_up):
    made_up.broken["export", ""] = StepFailed("no exporter")
    everything(made_up)
    assert {one.outcome for one in made_up.ledger.entries} == {FAILED, SHOWN}
    assert "loop" not in made_up.asked


@pytest.mark.parametrize(
    ("step", "changed", "told"),
    [
        ("loop", {"error": 0.1}, "error 1.00e-01, allowed are "),
        ("serve", {"singles": {**LOAD, "errors": {"status 500": 3}}}, "{'status 500': 3}"),
        ("serve", {"shared_rows_per_s": 100.0, "body_rows_per_s": 100.0}, "2% with one instance"),
        ("kill", {"server_processes_gone": 0}, "no worker was killed"),
        ("kill", {"errors": {"connection lost": 1}}, "{'connection lost': 1}"),
        ("eager", {"ms": 4.0}, "2.00 x on the GPU alone"),
    ],
)
def test_what_is_not_as_good_as_it_has_to_be_has_failed(made_up, monkeypatch, step, changed, told):
    monkeypatch.setitem(FOUND, step, {**FOUND[step], **changed})
    everything(made_up)
    failed = [one for one in made_up.ledger.entries if one.outcome == FAILED]
    assert failed
    assert all(told in one.text for one in failed), [one.text for one in failed]


def test_memory_that_stays_away_has_failed(made_up, monkeypatch):
    facts = {"load_s": 1.0, "before_bytes": 0, "loaded_bytes": 1 << 30, "after_bytes": 1 << 29}
    monkeypatch.setattr(Servers, "__enter__", lambda _: (serving.Address(1, 2, 3), facts))
    everything(made_up)
    failed = [one for one in made_up.ledger.entries if one.outcome == FAILED]
    assert len(failed) == 2 * len(forms.CHIEF) + OTHERS
    assert "0 MiB in use before, 1024 MiB with it, 512 MiB after" in failed[0].text


def test_a_step_that_the_run_has_no_time_for_has_not_failed(made_up, monkeypatch):
    made_up.ledger._now = lambda: 101.0
    made_up.broken["export", ""] = StepFailed("it was ended after 0 s")
    with pytest.raises(NotShown, match=OVER):
        made_up.run.step("export", subjects.SUBJECTS[0], 60.0)
