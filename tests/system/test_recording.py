"""Recording real inputs on a running server, over HTTP and gRPC, and the command for it."""

import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from running_server import RunningServer
from system.load import onnx_model, python_model

from headrace.client import Client

WORDS = """
    class Model:
        inputs = [{"name": "words", "datatype": "BYTES", "shape": [-1]}]
        outputs = [{"name": "count", "datatype": "INT32", "shape": [1]}]

        def infer(self, inputs):
            import numpy as np
            return {"count": np.array([len(inputs["words"])], np.int32)}
"""
PAIR = """
ensemble:
- {model: first, inputs: {x: x}, outputs: {y: between}}
- {model: second, inputs: {x: between}, outputs: {y: y}}
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    repository = tmp_path_factory.mktemp("recorded")
    onnx_model(repository, "first", config="max_batch_size: 8\n")
    onnx_model(repository, "second", config="max_batch_size: 8\nresponse_cache: true\n")
    python_model(repository, "words", WORDS)
    (repository / "pair" / "1").mkdir(parents=True)
    (repository / "pair" / "config.yaml").write_text(PAIR)
    return repository


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def server(repository, plans):
    with RunningServer(repository, "--allow-recording", "--plan-cache", str(plans)) as running:
        yield running


def ask(server, method, model, rest="recording", body=None):
    status, _, answer = server.request(method, f"/v2/models/{model}/{rest}", body)
    assert status == 200, answer
    return answer


def record(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "headrace", "record", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_rows_of_requests_are_kept(server, protocol):
    with Client(f"{protocol}://{server.http if protocol == 'http' else server.grpc}") as client:
        client.infer("first", {"x": np.full((1, 2), 9, np.float32)})  # before
        begun = ask(server, "POST", "first", body={"requests": 40, "seconds": 60})
        assert begun["state"] == "recording"
        client.infer("first", {"x": np.array([[1, 2]], np.float32)})
        client.infer("first", {"x": np.arange(40, dtype=np.float32).reshape(20, 2)})  # more than one batch
    status = ask(server, "GET", "first")
    assert (status["requests_seen"], status["examples_kept"]) == (2, 21)
    done = ask(server, "DELETE", "first")
    assert done["state"] == "written"
    file = Path(done["file"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with np.load(file) as found:
        assert found.files == ["x"]
        np.testing.assert_array_equal(
            found["x"], np.concatenate([[[1, 2]], np.arange(40).reshape(20, 2)]).astype(np.float32)
        )


def test_texts_of_a_model_that_merges_nothing(server):
    ask(server, "POST", "words", "versions/1/recording")
    for body in (["a", "bcd"], ["e"]):
        request = {"inputs": [{"name": "words", "datatype": "BYTES", "shape": [len(body)], "data": body}]}
        assert server.post("/v2/models/words/infer", request)[0] == 200
    with np.load(ask(server, "DELETE", "words")["file"]) as found:
        assert {name: found[name].tolist() for name in found.files} == {"words/0": [b"a", b"bcd"], "words/1": [b"e"]}


def test_what_an_ensemble_asks_of_its_models_is_real_traffic_and_what_the_cache_answers_is_not(server):
    for name in ("pair", "first", "second"):
        ask(server, "POST", name)
    with Client(f"http://{server.http}") as client:
        for _ in range(2):
            client.infer("pair", {"x": np.array([[5]], np.float32)})
    seen = {name: ask(server, "DELETE", name) for name in ("pair", "first", "second")}
    assert {name: one["requests_seen"] for name, one in seen.items()} == {"pair": 2, "first": 2, "second": 1}
    with np.load(seen["second"]["file"]) as found:
        assert found["x"].tolist() == [[6.0]]


def test_a_refused_request_is_not_recorded(server):
    ask(server, "POST", "first")
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}
    assert server.post("/v2/models/first/infer", body)[0] == 400
    done = ask(server, "DELETE", "first")
    assert (done["state"], done["requests_seen"]) == ("nothing", 0)


def test_the_file_is_fetched_and_removed(server, plans):
    ask(server, "POST", "first")
    with Client(f"http://{server.http}") as client:
        client.infer("first", {"x": np.array([[3]], np.float32)})
    file = Path(ask(server, "DELETE", "first")["file"])
    assert file == plans / "recorded" / "first.npz"
    assert ask(server, "GET", "first", "recording/file") == file.read_bytes()
    ask(server, "DELETE", "first", "recording/file")
    assert not file.exists()
    for method, rest in (("GET", "recording/file"), ("DELETE", "recording/file"), ("GET", "recording")):
        status, _, answer = server.request(method, f"/v2/models/first/{rest}")
        assert status == 404
        assert "recorded" in answer["error"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"requests": 0}, "'requests' is 0"),
        ({"seconds": -1}, "'seconds' is -1"),
        ({"requests": "many"}, "requests"),
        ({"examples": 3}, "examples"),
        (b"{", "body"),
        (b" " * 5000, "5000 bytes"),
    ],
)
def test_what_makes_no_sense_is_refused(server, body, told):
    status, answer = server.post("/v2/models/first/recording", body)
    assert status == 400
    assert told in answer["error"]


def test_unknown_models_are_not_found(server):
    for method, rest in (("POST", ""), ("GET", ""), ("DELETE", ""), ("GET", "/file"), ("DELETE", "/file")):
        assert server.request(method, f"/v2/models/nobody/recording{rest}")[0] == 404
    assert server.request("GET", "/v2/models/%2e%2e/recording/file")[0] == 404


def test_the_command_records_and_fetches(server, tmp_path):
    done = threading.Event()

    def traffic():
        with Client(f"http://{server.http}") as client:
            while not done.is_set():
                client.infer("first", {"x": np.array([[1, 2, 3]] * 8, np.float32)})
                time.sleep(0.01)

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        output = tmp_path / "mine.npz"
        asked = ("first", "--url", f"http://{server.http}", "--requests", "5", "--output", str(output))
        for seconds in ("1", "4", "16"):  # in which a busy machine may have sent nothing
            ended = record(*asked, "--seconds", seconds)
            if "no request came" not in ended.stderr:
                break
    finally:
        done.set()
        thread.join()
    assert ended.returncode == 0, ended.stderr
    assert "5 example(s) are kept" in ended.stdout
    assert f"saved: {output}" in ended.stdout
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    with np.load(output) as found:
        assert found["x"].tolist() == [[1.0, 2.0, 3.0]] * 5


def test_ctrl_c_ends_the_command_early_and_keeps_what_there_is(server):
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "record", "first", "--url", f"http://{server.http}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - whoever runs the tests may ignore it
    )
    begun = process.stdout.readline()
    assert begun.startswith("recording model first"), begun
    with Client(f"http://{server.http}") as client:
        client.infer("first", {"x": np.array([[7]], np.float32)})
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "1 request(s) came, 1 example(s) are kept" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nobody"], "'nobody' is not found"),
        (["words", "--seconds", "0.1"], "nothing was recorded of model 'words': no request came"),
        (["first", "--version", "7"], "version 7"),
    ],
)
def test_the_command_says_why_nothing_was_recorded(server, arguments, told):
    ended = record(*arguments, "--url", f"http://{server.http}")
    assert ended.returncode == 1
    assert told in ended.stderr


def test_the_command_says_that_nobody_answers():
    ended = record("m", "--url", "http://127.0.0.1:1")
    assert ended.returncode == 1
    assert "no server answers at http://127.0.0.1:1/" in ended.stderr


def test_a_restricted_api_is_opened_by_its_header(repository, tmp_path):
    flags = ["--plan-cache", str(tmp_path), "--allow-recording", "--restricted-api", "trace:key=sesame"]
    with RunningServer(repository, *flags) as running:
        asked = ["words", "--seconds", "0.1", "--url", f"http://{running.http}"]
        assert "expecting header 'key'" in record(*asked).stderr
        assert "no request came" in record(*asked, "--header", "key=sesame").stderr
        assert "expected NAME=VALUE" in record(*asked, "--header", "sesame").stderr


def test_it_is_off_unless_allowed_and_ends_with_the_server(repository, tmp_path):
    flags = ["--plan-cache", str(tmp_path)]
    with RunningServer(repository, *flags) as running:
        for method, rest in (("POST", ""), ("GET", ""), ("DELETE", ""), ("GET", "/file"), ("DELETE", "/file")):
            status, _, answer = running.request(method, f"/v2/models/first/recording{rest}")
            assert (status, answer) == (
                403,
                {"error": "recording of inputs is off; start the server with --allow-recording"},
            )
    with RunningServer(repository, *flags, "--allow-recording") as running:
        ask(running, "POST", "first")
        with Client(f"http://{running.http}") as client:
            client.infer("first", {"x": np.array([[3]], np.float32)})
        assert running.stop() == 0
    with np.load(tmp_path / "recorded" / "first.npz") as found:
        assert found["x"].tolist() == [[3.0]]
