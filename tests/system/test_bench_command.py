"""``headrace bench`` against real servers: one that runs already, and one of its own."""

import json
import os
import re
import subprocess
import sys

import psutil
import pytest
from running_server import RunningServer
from system.load import fake_model, onnx_model

WINDOW_S = 0.3
QUICKLY = ("--seconds", str(WINDOW_S), "--warmup", "0.1")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    onnx_model(folder, "adder")
    # 10 ms a batch of up to 4 rows, so at most 400 requests a second, and 4 clients are enough for them.
    fake_model(folder, "slow", "max_batch_size: 4\nparameters: {fake_delay_ms: 10}\n")
    fake_model(
        folder,
        "narrow",
        "max_batch_size: 1\nparameters: {fake_delay_ms: 20}\nbatching: {max_queue_size: 1}\n",
    )
    fake_model(folder, "picky", "parameters: {fake_fail: out of cheese}\n")
    return folder


@pytest.fixture(scope="module")
def server(repository):
    with RunningServer(repository) as running:
        yield running


def bench(*arguments, timeout_s=120):
    return subprocess.run(
        [sys.executable, "-m", "headrace", "bench", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"},
        check=False,
    )


def at(server):
    return "--url", f"http://{server.http}", "--grpc-url", f"grpc://{server.grpc}"


def test_both_protocols_are_measured_and_written(server, tmp_path):
    files = "--json", tmp_path / "numbers.json", "--plot", tmp_path / "plot.png"
    ended = bench("adder", *at(server), *QUICKLY, "-c", 1, "-c", 4, *files)
    assert ended.returncode == 0, ended.stderr
    assert re.match(r"adder: .*\(made up from its metadata\)", ended.stdout)
    document = json.loads((tmp_path / "numbers.json").read_text())
    assert [one["protocol"] for one in document["protocols"]] == ["http", "grpc"]
    for protocol in document["protocols"]:
        assert [step["clients"] for step in protocol["steps"]] == [1, 4]
        for step in protocol["steps"]:
            assert step["requests_per_s"] > 0
            assert step["errors"] == {}
            assert 0 < step["p50_ms"] <= step["p90_ms"] <= step["p99_ms"]
            assert 1 <= step["batch_rows"] <= 4
            assert 0 < step["client_cpu_share"] < 2
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_knee_is_where_batches_are_full(server, tmp_path):
    ended = bench("slow", *at(server), "--protocol", "http", *QUICKLY, "--json", tmp_path / "numbers.json")
    assert ended.returncode == 0, ended.stderr
    (found,) = json.loads((tmp_path / "numbers.json").read_text())["protocols"]
    steps = {step["clients"]: step for step in found["steps"]}
    assert steps[1]["requests_per_s"] < 110
    assert max(step["batch_rows"] for step in found["steps"]) > 1.5
    # A client that was held up finds an answer for each of its connections.
    assert all(step["requests_per_s"] < 400 + (4 + step["clients"]) / WINDOW_S for step in found["steps"])
    assert found["knee_clients"] >= 2
    assert "<- knee" in ended.stdout


def test_refusals_under_load_are_results(server):
    ended = bench("narrow", *at(server), *QUICKLY, "-c", 8)
    assert ended.returncode == 0, ended.stderr
    refused = [line for line in ended.stdout.splitlines() if re.match(r"\d+ x (503|UNAVAILABLE): ", line)]
    assert len(refused) == 2
    assert all("queue" in line for line in refused)


def test_where_inputs_that_were_made_up_are_refused_real_ones_are_asked_for(server):
    ended = bench("picky", *at(server))
    assert ended.returncode == 1
    assert "out of cheese; that input was made up from the model's metadata, --input NAME=VALUE gives" in ended.stderr


def test_an_unknown_model_and_unfit_inputs_are_told(server):
    ended = bench("absent", *at(server))
    assert ended.returncode == 1
    assert "absent" in ended.stderr
    ended = bench("adder", *at(server), "--shape", "nothing=1")
    assert ended.returncode == 1
    assert "no such input" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_server_of_its_own_is_started_and_ended(repository):
    ended = bench("slow", "--repository", repository, "--protocol", "grpc", *QUICKLY, "-c", 2)
    assert ended.returncode == 0, ended.stderr
    assert "grpc, grpc://127.0.0.1:" in ended.stdout
    assert not serving(repository)


def test_sigterm_ends_its_own_server_too(repository):
    command = [sys.executable, "-m", "headrace", "bench", "slow", "--repository", str(repository), "--seconds", "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout.readline().startswith("slow: ")  # which it says once the server answers
            assert serving(repository)
            process.terminate()
            assert process.wait(60) == 143
        finally:
            process.kill()
    assert not serving(repository)


def serving(repository):
    """The servers over this folder that were started for one model."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if "--load-model" in line and str(repository) in line]


def test_a_model_that_does_not_load_is_told(tmp_path):
    fake_model(tmp_path, "broken", "parameters: {fake_load_crash: segfault}\n")
    ended = bench("broken", "--repository", tmp_path, *QUICKLY)
    assert ended.returncode == 1
    assert "broken" in ended.stderr
    assert "Traceback" not in ended.stderr
