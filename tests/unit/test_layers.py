"""Imports point one way, and the front process never loads a framework."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter import api
from importlinter.application import use_cases

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("onnxruntime", "torch", "tensorrt", "tensorrt_rtx", "openvino", "onnx", "sklearn")


@pytest.fixture(scope="module")
def options():
    api.read_configuration(str(ROOT / "pyproject.toml"))  # also sets the library up
    return use_cases.read_user_options(str(ROOT / "pyproject.toml"))


@pytest.mark.usefixtures("options")
def test_every_contract_is_kept(capsys):
    kept = use_cases.lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=None)
    assert kept, capsys.readouterr().out


@pytest.mark.usefixtures("options")
def test_a_contract_that_is_broken_is_noticed(tmp_path, capsys):
    """What the test above rests on."""
    rules = tmp_path / "rules.toml"
    rules.write_text(
        '[tool.importlinter]\nroot_packages = ["headrace"]\n'
        '[[tool.importlinter.contracts]]\nname = "wrong way round"\ntype = "layers"\n'
        'layers = ["headrace.core", "headrace.batching"]\n'
    )
    assert not use_cases.lint_imports(config_filename=str(rules), cache_dir=None)
    assert "wrong way round" in capsys.readouterr().out


def test_there_is_a_contract_for_each_direction(options):
    (layers,) = [one["layers"] for one in options.contracts_options if one["type"] == "layers"]
    order = ["cli", "app", "frontends", "engine", "repository", "workers", "batching", "core"]
    assert [layer for layer in layers if layer.removeprefix("headrace.") in order] == [f"headrace.{it}" for it in order]
    forbidden = {
        module: set(one["forbidden_modules"])
        for one in options.contracts_options
        if one["type"] == "forbidden"
        for module in one["source_modules"]
    }
    others = {"headrace.batching", "headrace.workers", "headrace.repository", "headrace.engine", "headrace.frontends"}
    for module in ("headrace.wire", "headrace.metrics", "headrace_backends"):
        assert others <= forbidden[module]


@pytest.mark.parametrize("module", ["headrace.app", "headrace.cli", "headrace.workers.main"])
def test_no_framework_is_imported_before_a_model_asks_for_it(module):
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "headrace" in loaded
    assert loaded.isdisjoint(FRAMEWORKS)


def test_a_worker_does_not_carry_the_front_ends_along():
    code = "import sys, headrace.workers.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert {"grpc", "fastapi", "uvicorn", "pydantic"}.isdisjoint(done.stdout.split())
