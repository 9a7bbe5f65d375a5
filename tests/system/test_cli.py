"""The commands beside ``serve``: their help, ``check``, ``explain``, and what they say to mistakes."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from system.load import broken_onnx, fake_model, onnx_model, python_model

import headrace
from headrace.config import Settings


def run(*arguments, env=None):
    """One command, in a terminal wide enough for its tables."""
    return subprocess.run(
        [sys.executable, "-m", "headrace", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", **(env or {})},
        check=False,
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    repository = tmp_path_factory.mktemp("good")
    onnx_model(repository, "adder", config="max_batch_size: 8\nbatching: {max_queue_delay_us: 500}\n")
    onnx_model(repository, "adder", version=2)
    python_model(repository, "mirror")
    return repository


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    repository = tmp_path_factory.mktemp("bad")
    onnx_model(repository, "adder")
    broken_onnx(repository, "garbage")
    fake_model(repository, "misspelled", "max_batch_sise: 4\nbatching: {max_queue_size: 0}\n")
    fake_model(repository, "crashing", "parameters: {fake_load_crash: segfault}\n")
    return repository


def test_the_installed_command_and_the_module_are_the_same():
    script = Path(sys.executable).with_name("headrace")
    ended = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout == run("--version").stdout == f"headrace {headrace.__version__}\n"


def test_help_lists_the_commands():
    ended = run("--help")
    assert ended.returncode == 0
    for command in ("serve", "check", "explain", "infer", "bench"):
        assert re.search(rf"\b{command}\b", ended.stdout)


def test_help_fills_the_lines_of_any_terminal():
    assert "bring no more answers a second. Each client waits" in run("bench", "--help", env={"COLUMNS": "300"}).stdout


def test_serve_shows_a_flag_and_a_variable_for_every_setting():
    ended = run("serve", "--help")
    assert ended.returncode == 0
    text = re.sub(r"\s+", " ", ended.stdout)
    for field in dataclasses.fields(Settings):
        assert f"HEADRACE_{field.name.upper()}" in text
        if field.name != "repository":
            assert f"--{field.name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["serve", "--no-such-flag"], "no-such-flag"),
        (["serve", "--http-port", "many"], "--http-port"),
        (["serve", "--http-port", "70000"], "65535"),
        (["serve", "--model-control", "sometimes"], "sometimes"),
        (["frobnicate"], "frobnicate"),
        (["explain"], "model"),
        (["check", "one", "-r", "other"], "REPOSITORY: is given twice"),
    ],
)
def test_mistakes_are_usage_errors(arguments, complaint):
    ended = run(*arguments)
    assert ended.returncode == 2
    assert complaint in ended.stderr
    assert "Traceback" not in ended.stderr


def test_check_of_a_good_repository(good):
    ended = run("check", good)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "2 model(s), 0 with problems"


def test_check_names_every_problem_of_every_model(bad):
    ended = run("check", bad)
    assert ended.returncode == 1
    lines = ended.stdout.splitlines()
    assert lines[-1] == "4 model(s), 3 with problems"
    assert any(line.startswith("garbage: version 1: ") for line in lines)
    assert any(line.startswith("misspelled: ") and "did you mean max_batch_size?" in line for line in lines)
    assert any(line.startswith("misspelled: ") and "batching.max_queue_size" in line for line in lines)
    assert any(line.startswith("crashing: ") and "SIGSEGV" in line for line in lines)
    assert not any(line.startswith("adder: ") for line in lines)
    assert "did you mean" not in ended.stderr, "it is said twice"


def test_check_misses_files_that_the_optimiser_would_read(tmp_path):
    onnx_model(tmp_path, "adder", config="optimize: {calibration: real.npz}\n")
    ended = run("check", tmp_path)
    assert ended.returncode == 1
    assert f"adder: optimize.calibration: 'real.npz' is not in {tmp_path / 'adder'}" in ended.stdout
    assert "not there: optimize.calibration: 'real.npz'" in run("explain", "adder", "-r", tmp_path).stdout
    (tmp_path / "adder" / "real.npz").write_bytes(b"")
    assert run("check", tmp_path).returncode == 0


def test_check_of_nothing(tmp_path):
    ended = run("check", tmp_path / "absent")
    assert ended.returncode == 1
    assert str(tmp_path / "absent") in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_check_tells_of_folders_that_are_no_models(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"x")
    ended = run("check", "--repository", tmp_path, env={"HEADRACE_REPOSITORY": "elsewhere"})
    assert ended.returncode == 0
    passed, none, count = ended.stdout.splitlines()
    assert passed.startswith("bert: is passed over: it has no version (a folder named 1, 2, ...)")
    assert none.startswith(f"there is no model in {tmp_path} yet")
    assert count == "0 model(s), 0 with problems"


def test_the_repository_may_come_from_the_environment(good):
    assert run("check", env={"HEADRACE_REPOSITORY": str(good)}).returncode == 0


def test_explain_says_what_is_served_and_why(good):
    ended = run("explain", "adder", "--repository", good)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    text = ended.stdout
    for part in ("version 2", "onnxruntime", "x FP32[-1, -1]", "y FP32[-1, -1]", "up to 8 rows", "500 us", "thread"):
        assert part in text
    assert re.search(r"\[2\] are served .*latest 1.*\[1\] are not", text)


def test_explain_says_where_an_ensemble_and_a_python_model_have_theirs_from(tmp_path):
    onnx_model(tmp_path, "adder")
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "config.yaml").write_text("ensemble: [{model: adder, inputs: {x: x}, outputs: {y: y}}]\n")
    assert run("explain", "both", "-r", tmp_path).stdout.splitlines()[2:8] == [
        "version 1",
        "  backend: ensemble (configured)",
        "  input: x FP32[-1, -1] (as its models have it)",
        "  output: y FP32[-1, -1] (as its models have it)",
        "  batching: up to 32 rows (as its models have it)",
        "  note: runs adder, each as soon as its tensors are there",
    ]
    python_model(tmp_path, "mirror")
    assert re.search(
        r"batching: up to \d+ rows \(read from the file\)", run("explain", "mirror", "-r", tmp_path).stdout
    )


def test_explain_says_why_a_model_is_refused(bad):
    ended = run("explain", f"{bad}/garbage/")  # as a shell completes it
    assert ended.returncode == 1
    assert re.search(r"refused: .*model\.onnx", ended.stdout)
    ended = run("explain", "misspelled", "-r", bad)
    assert ended.returncode == 1
    assert "versions: none are served" in ended.stdout
    assert "did you mean max_batch_size?" in ended.stdout


def test_explain_of_an_unknown_model_lists_the_known(good):
    ended = run("explain", "ader", "--repository", good)
    assert ended.returncode == 1
    said = ended.stdout + ended.stderr
    assert "no model 'ader'" in said
    assert "adder, mirror" in said
