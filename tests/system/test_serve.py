"""``headrace serve`` from its first line to its last: start, readiness, settings, and a drain that loses nothing."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from running_server import TIMEOUT_S, RunningServer
from system.load import (
    Load,
    broken_onnx,
    fake_model,
    gated_model,
    infer,
    infer_body,
    onnx_model,
    python_model,
    wait_for,
)

from headrace.frontends.http_server import IDLE_GRACE_S

HEADRACE = [sys.executable, "-m", "headrace"]
FREE_PORTS = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]


def serve(*arguments, env=None):
    """Run a server that is expected to end by itself."""
    return subprocess.run(
        [*HEADRACE, "serve", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
        check=False,
    )


def status_of(url):
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def index(server):
    """The repository index by name and version."""
    status, entries = server.post("/v2/repository/index")
    assert status == 200
    return {(entry["name"], entry.get("version", "")): entry for entry in entries}


def family(server):
    """The server and its workers, as they are now."""
    return [psutil.Process(server.process.pid), *server.workers()]


def accepted(server):
    """Requests that wait or run, for a model that takes them one by one."""
    return server.metric("headrace_queue_requests") + server.metric("headrace_executing_batches")


def assert_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


# -- start -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A server whose repository has good models and broken ones."""
    repository = tmp_path_factory.mktemp("mixed")
    onnx_model(repository, "adder")
    python_model(repository, "mirror")
    fake_model(repository, "echo")
    broken_onnx(repository, "garbage")
    python_model(repository, "raises", "raise RuntimeError('no weights here')")
    fake_model(repository, "misspelled", "max_batch_sise: 4\nbatching: {max_queue_size: 0}\n")
    fake_model(repository, "refuses", "parameters: {fake_load_fail: the licence has expired}\n")
    (repository / "empty" / "1").mkdir(parents=True)
    with RunningServer(repository) as server:
        yield server


def test_prints_a_line_for_each_model_and_the_addresses(mixed):
    lines = mixed.output.splitlines()
    for start in (
        "adder 1: READY: onnxruntime, x FP32[-1, -1] -> y FP32[-1, -1], ",
        "echo 1: READY: fake, ",
        "mirror 1: READY: python, ",
        "garbage 1: UNAVAILABLE: ",
        "raises 1: UNAVAILABLE: ",
        "misspelled -: UNAVAILABLE: ",
        "refuses 1: UNAVAILABLE: ",
        "empty 1: UNAVAILABLE: ",
    ):
        assert sum(line.startswith(start) for line in lines) == 1, start
    ready = [number for number, line in enumerate(lines) if line.startswith("ready: ")]
    assert len(ready) == 1
    assert all(lines.index(line) < ready[0] for line in lines if re.match(r"\w+ [\d-]+: ", line))
    assert mixed.get("/v2/health/live") == (200, {"live": True})
    assert status_of(f"http://{mixed.metrics}/metrics") == 200
    with socket.create_connection(mixed.grpc.split(":"), timeout=60):
        pass


def test_good_models_serve_beside_broken_ones(mixed):
    assert infer(mixed.http, "adder", [1.0, 2.0]).values == [2.0, 3.0]
    assert infer(mixed.http, "mirror", [1.0, 2.0]).values == [1.0, 2.0]
    assert infer(mixed.http, "echo", [1.0, 2.0]).values == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "version", "reason"),
    [
        ("garbage", "1", "model.onnx|protobuf"),
        ("raises", "1", "no weights here"),
        ("misspelled", "", r"batching\.max_queue_size: .*max_batch_sise: unknown key; did you mean max_batch_size\?"),
        ("refuses", "1", "the licence has expired"),
        ("empty", "1", "no model file"),
    ],
)
def test_the_index_says_why_a_model_is_not_served(mixed, name, version, reason):
    entry = index(mixed)[name, version]
    assert entry["state"] == "UNAVAILABLE"
    assert re.search(reason, entry["reason"])
    assert mixed.get(f"/v2/models/{name}/ready")[0] == 400
    status, answer = mixed.post(f"/v2/models/{name}/infer", infer_body([1.0]))
    assert status == 404
    assert re.search(reason, answer["error"]), "a client is told the reason too"


def test_ready_once_every_model_was_loaded_or_refused(mixed):
    assert mixed.get("/v2/health/ready") == (200, {"ready": True})


def test_strict_readiness_waits_for_every_model(tmp_path):
    fake_model(tmp_path, "echo")
    broken_onnx(tmp_path, "garbage")
    with RunningServer(tmp_path, "--strict-readiness") as server:
        status, headers, answer = server.request("GET", "/v2/health/ready")
        assert status == 503
        assert "garbage" in answer["error"]
        assert "echo" not in answer["error"]
        assert headers["retry-after"]
        assert infer(server.http, "echo", [1.0]).ok
        onnx_model(tmp_path, "garbage", version=2)
        server.wait_for(lambda: server.get("/v2/health/ready")[0] == 200)


def test_not_ready_while_models_load(tmp_path):
    gate = gated_model(tmp_path, "slow")
    fake_model(tmp_path, "quick")
    with gate.shut(), _started(tmp_path) as server:
        process = psutil.Process(server.process.pid)

        def listening():
            ports = [one.laddr.port for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
            return [port for port in ports if _speaks_http(port)]

        def _speaks_http(port):
            try:
                return status_of(f"http://127.0.0.1:{port}/v2/health/live") == 200
            except (OSError, http.client.HTTPException):  # the gRPC port
                return False

        (port,) = server.wait_for(listening)
        server.http = f"127.0.0.1:{port}"
        assert "\nready: " not in server.output
        status, answer = server.get("/v2/health/ready")
        assert (status, answer) == (503, {"error": "the server is loading its models"})
        server.wait_for(lambda: server.model_ready("quick"))
        assert infer(server.http, "quick", [1.0]).ok, "what is loaded already serves"
        assert index(server)["slow", "1"]["state"] == "LOADING"
        waiting = infer(server.http, "slow", [1.0])
        assert waiting.status == 503
        assert "being loaded" in waiting.detail
        gate.open()
        server.wait_ready()
        assert server.get("/v2/health/ready")[0] == 200


@contextlib.contextmanager
def _started(repository):
    """A server that may not be ready yet."""
    server = RunningServer(repository)
    try:
        yield server
    finally:
        server.__exit__()


def test_an_empty_repository_is_served(tmp_path):
    with RunningServer(tmp_path) as server:
        assert server.get("/v2/health/ready")[0] == 200
        assert server.post("/v2/repository/index") == (200, [])
        assert server.stop() == 0
        assert f"there is no model in {tmp_path} yet" in server.output


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port", "--metrics-port"])
def test_a_taken_port_is_named(tmp_path, flag):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ports = [*FREE_PORTS, flag, port]
        ended = serve(tmp_path, *ports)
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert flag in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_host_that_is_not_this_machine_is_named(tmp_path):
    ended = serve(tmp_path, *FREE_PORTS, "--host", "nowhere.invalid")
    assert ended.returncode == 1
    assert "cannot listen on 'nowhere.invalid'" in ended.stderr
    assert "--host" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("there", ["nothing", "a file"])
def test_a_missing_repository_is_named(tmp_path, there):
    path = tmp_path / "models"
    if there == "a file":
        path.write_text("")
    ended = serve(path, *FREE_PORTS)
    assert ended.returncode == 1
    assert f"there is no model repository at '{path}'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_settings_come_from_the_environment_and_flags_win(tmp_path):
    fake_model(tmp_path, "one")
    fake_model(tmp_path, "two")
    env = {
        "HEADRACE_MODEL_CONTROL": "explicit",
        "HEADRACE_LOAD_MODEL": "one two",
        "HEADRACE_SERVER_NAME": "from the environment",
        "HEADRACE_LOG_FORMAT": "json",
    }
    with RunningServer(tmp_path, "--server-name", "triton", "--log-format", "text", env=env) as server:
        assert server.get("/v2")[1]["name"] == "triton"
        assert server.model_ready("one")
        assert server.model_ready("two")
        assert server.post("/v2/repository/models/two/unload")[0] == 200


def test_every_setting_may_come_from_the_environment(tmp_path):
    ended = serve(env={"HEADRACE_REPOSITORY": str(tmp_path / "absent"), "HEADRACE_HTTP_PORT": "0"})
    assert ended.returncode == 1
    assert str(tmp_path / "absent") in ended.stderr
    ended = serve(tmp_path, env={"HEADRACE_HTTP_PORT": "many"})
    assert ended.returncode == 2
    assert "HEADRACE_HTTP_PORT" in ended.stderr or "--http-port" in ended.stderr


def test_json_logs_are_json_throughout(tmp_path):
    fake_model(tmp_path, "echo")
    broken_onnx(tmp_path, "garbage")
    server = RunningServer(tmp_path, "--log-format", "json")
    try:
        found = server.wait_for(lambda: re.search(r"ready: http://(\S+) ", server.output))
        assert infer(found[1], "echo", [1.0], {"fake_fail": "on purpose"}).status == 500
        assert server.stop() == 0
        records = [json.loads(line) for line in server.output.splitlines()]
    finally:
        server.__exit__()
    assert all({"time", "level", "process", "message"} <= record.keys() for record in records)
    assert any(record["level"] == "error" and "garbage" in record["message"] for record in records)
    assert any("on purpose" in record["message"] for record in records if record["process"] != "front")


# -- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whom", ["front", "group"])
def test_a_signal_under_load_loses_no_accepted_request(tmp_path, number, whom):
    """To the front process as from a service manager, or to all of its group as from a terminal."""
    fake_model(tmp_path, "slow", "parameters: {fake_delay_ms: 30}\nmax_batch_size: 4\n")
    with RunningServer(tmp_path) as server:
        processes = family(server)
        with Load(server, "slow", http=8, grpc=4, until_refused=True) as load:
            load.wait_answers(100)
            signalled_at = time.monotonic()
            for process in processes if whom == "group" else processes[:1]:
                with contextlib.suppress(psutil.NoSuchProcess):  # the front process has ended it already
                    process.send_signal(number)
            assert server.process.wait(60) == 0
            load.join()
        assert_gone(processes)
        # Who asks nothing more for half a second finds the connection closed; a busy machine may hold a client up.
        soon = signalled_at + IDLE_GRACE_S / 2
        in_time = [one for one in load.outcomes if one.status != "broken" or one.sent_at < soon]
        ends = {("http", 200), ("http", "refused"), ("grpc", "OK"), ("grpc", "UNAVAILABLE")}
        assert {(one.protocol, one.status) for one in in_time} <= ends, load.failed
        assert load.summary["http", "refused"] == 8, "every client was served until the port was closed"
        lost = [one for one in load.failed if one.status == "UNAVAILABLE" and one.sent_at < signalled_at]
        assert not lost
        assert server.output.splitlines()[-1] == "stopped"


def test_a_second_interrupt_ends_it_at_once(tmp_path):
    fake_model(tmp_path, "slow", f"parameters: {{fake_delay_ms: {TIMEOUT_S * 1000}}}\n")
    with RunningServer(tmp_path, "--drain-timeout", str(TIMEOUT_S)) as server:
        processes = family(server)
        client = threading.Thread(target=infer, args=(server.http, "slow", [1.0]), daemon=True)
        client.start()
        server.wait_for(lambda: server.metric("headrace_executing_batches", model="slow"))
        server.process.send_signal(signal.SIGINT)
        server.wait_for(lambda: "stopping: " in server.output)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(TIMEOUT_S / 2) == -signal.SIGINT
        assert_gone(processes)
        assert server.output.splitlines()[-1] == "stopped at once, by a second Ctrl-C"
        client.join(TIMEOUT_S)


def test_connections_made_anew_for_each_request_are_answered_or_refused(tmp_path):
    """Those that the kernel has accepted when the signal comes have sent their request already."""
    fake_model(tmp_path, "echo")
    statuses = []

    def client(address):
        while True:
            outcome = infer(address, "echo", [1.0])
            statuses.append(outcome.status)
            if not outcome.ok:
                return

    with RunningServer(tmp_path) as server:
        threads = [threading.Thread(target=client, args=(server.http,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(statuses) > 100)
        assert server.stop() == 0
        for thread in threads:
            thread.join(60)
    assert set(statuses) == {200, "refused"}


def test_requests_that_were_queued_when_the_signal_came_are_answered(tmp_path):
    gate = gated_model(tmp_path, "slow")
    outcomes = []

    def one(number):
        outcomes.append(infer(server.http, "slow", [float(number)]))

    with RunningServer(tmp_path) as server, gate.shut():
        threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        server.wait_for(lambda: accepted(server) == 6)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: server.metric("headrace_server_ready") == 0)
        gate.open()
        assert server.process.wait(60) == 0
        for thread in threads:
            thread.join()
    assert [one.status for one in outcomes] == [200] * 6, outcomes
    assert sorted(one.values[0] for one in outcomes) == [0, 1, 2, 3, 4, 5]
    assert all(one.headers["connection"] == "close" for one in outcomes)


def test_not_ready_while_draining(tmp_path):
    """A balancer that still has a connection is told to send no more, while accepted work goes on."""
    gate = gated_model(tmp_path, "slow")
    with RunningServer(tmp_path) as server, gate.shut():
        running = threading.Thread(target=lambda: outcomes.append(infer(server.http, "slow", [1.0])))
        outcomes = []
        running.start()
        server.wait_for(lambda: accepted(server) == 1)
        assert server.metric("headrace_server_ready") == 1
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: server.metric("headrace_server_ready") == 0)
        assert outcomes == [], "what was accepted is still being worked on"
        gate.open()
        running.join()
        assert outcomes[0].ok
        assert server.process.wait(60) == 0


def test_requests_are_in_flight_until_they_are_answered(tmp_path):
    fake_model(tmp_path, "slow", "parameters: {fake_delay_ms: 300}\nmax_batch_size: 1\n")
    with RunningServer(tmp_path) as server, Load(server, "slow", http=4) as load:
        load.wait_answers(4)
        server.wait_for(lambda: server.metric("headrace_inflight_requests") == 4)
        load.stop()
        assert server.metric("headrace_inflight_requests") == 0


def test_the_drain_ends_at_its_deadline_and_tells_who_waited(tmp_path):
    fake_model(tmp_path, "stuck", "parameters: {fake_hang: true}\n")
    with RunningServer(tmp_path, "--drain-timeout", "1") as server:
        processes = family(server)
        outcomes = []
        waiting = threading.Thread(target=lambda: outcomes.append(infer(server.http, "stuck", [1.0])))
        waiting.start()
        server.wait_for(lambda: accepted(server) == 1)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 20
        waiting.join()
        assert_gone(processes)
    assert outcomes[0].status == 503, outcomes


def test_standard_output_that_takes_nothing_costs_nothing_but_the_lines(tmp_path):
    """A full disk behind it, or a pipe whose reader has gone: the server goes on, and drains as ever."""
    repository = tmp_path / "models"
    gate = gated_model(repository, "slow")
    outcomes = []
    command = [*HEADRACE, "serve", str(repository), *FREE_PORTS]
    with Path("/dev/full").open("wb") as full, (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=full, stderr=log)
    try:
        address = wait_for(lambda: ready_address(process.pid))
        waiting = threading.Thread(target=lambda: outcomes.append(infer(address, "slow", [1.0])))
        with gate.shut():
            waiting.start()
            wait_for(lambda: b"\nheadrace_inflight_requests 1" in fetch(f"http://{address}/metrics"))
            process.terminate()
        assert process.wait(60) == 0
        waiting.join()
    finally:
        process.kill()
        process.wait()
    assert outcomes[0].ok
    said = (tmp_path / "log").read_text()
    assert "standard output cannot be written to" in said
    assert "Traceback" not in said


def ready_address(pid):
    """Where a server that has told nobody answers HTTP, once it is ready."""
    for one in psutil.Process(pid).net_connections("tcp"):
        address = f"127.0.0.1:{one.laddr.port}"
        with contextlib.suppress(OSError):
            if one.status == psutil.CONN_LISTEN and status_of(f"http://{address}/v2/health/ready") == 200:
                return address
    return ""


def fetch(url):
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read()


def test_a_signal_while_models_load_stops_the_server(tmp_path):
    fake_model(tmp_path, "slow", "parameters: {fake_load_delay_ms: 600000}\n")
    server = RunningServer(tmp_path)
    try:
        processes = server.wait_for(lambda: (found := family(server)) and len(found) > 1 and found)
        assert server.stop() == 0
        assert_gone(processes)
    finally:
        server.__exit__()


def test_the_workers_end_with_a_killed_server(mixed_copy):
    workers = mixed_copy.workers()
    assert workers
    mixed_copy.kill()
    assert_gone(workers)


@pytest.fixture
def mixed_copy(tmp_path):
    onnx_model(tmp_path, "adder")
    fake_model(tmp_path, "hung", "parameters: {fake_hang: true}\n")
    python_model(tmp_path, "mirror")
    with RunningServer(tmp_path) as server:
        busy = threading.Thread(target=infer, args=(server.http, "hung", [1.0]))
        busy.start()
        server.wait_for(lambda: server.metric("headrace_executing_batches", model="hung") == 1)
        yield server
        if server.process.poll() is None:
            server.kill()
        busy.join()
