"""What an operator sets: logs, traces, restricted APIs, forwarded headers, load reports, compression."""

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

import echo_repository
import grpc
import pytest
import tritonclient.grpc
import tritonclient.http
from fronts import UNLIMITED, Call, GrpcFront, HttpFront, rpc
from raw_http import RawConnection, request
from running_server import RunningServer
from tritonclient.utils import InferenceServerException
from wire_values import Given

from headrace.wire import pb

TIMEOUT_S = 60
LOG_DEFAULT = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}
TRACE_KEYS = ["trace_level", "trace_rate", "trace_count", "log_frequency", "trace_file", "trace_mode"]
POINTS = ["REQUEST_START", "QUEUE_START", "COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END"]
ECHO = Call("onnx_fp32", (Given("x", "FP32", (1, 3), (0.5, -2.0, 3.0)),), id="call")
FRONTS = ("lane_binary", "lane_json", "route_binary", "route_json", "grpc_raw", "grpc_typed")


class Operated:
    """A server with flags of its own, and ways to its settings over both protocols."""

    def __init__(self, running: RunningServer) -> None:
        self.running = running
        self.channel = grpc.insecure_channel(running.grpc, options=UNLIMITED)

    def close(self) -> None:
        self.channel.close()

    def infer(self, front: str, call: Call = ECHO) -> Any:
        """Send a case over one of the front ends."""
        way, _, form = front.partition("_")
        if way == "grpc":
            opened: Any = GrpcFront(self.running.grpc, raw=form == "raw")
        else:
            opened = HttpFront(self.running.http, binary=form == "binary", ordinary=way == "route")
        try:
            return opened.infer(call)
        finally:
            opened.close()

    def call(self, name: str, message: Any, metadata: tuple[tuple[str, str], ...] = ()) -> Any:
        """An RPC's response, or its status and message where it fails."""
        try:
            return rpc(self.channel, name)(message, timeout=TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            return error.code().name, error.details()

    def log(self, protocol: str, change: dict[str, Any] | None = None) -> Any:
        """The log settings after a change, or status and message."""
        if protocol == "http":
            status, body = self._http("/v2/logging", change)
            return body if status == 200 else (status, body["error"])
        message = pb.LogSettingsRequest()
        for key, value in (change or {}).items():
            setting = message.settings[key]
            if isinstance(value, bool):
                setting.bool_param = value
            elif isinstance(value, int):
                setting.uint32_param = value
            elif value is not None:
                setting.string_param = value
        answer = self.call("LogSettings", message)
        if isinstance(answer, tuple):
            return answer
        return {key: getattr(one, one.WhichOneof("parameter_choice")) for key, one in answer.settings.items()}

    def trace(self, protocol: str, change: dict[str, Any] | None = None, model: str = "") -> Any:
        """The trace settings after a change, or status and message."""
        if protocol == "http":
            path = f"/v2/models/{model}/trace/setting" if model else "/v2/trace/setting"
            status, body = self._http(path, change)
            return body if status == 200 else (status, body["error"])
        message = pb.TraceSettingRequest(model_name=model)
        for key, value in (change or {}).items():
            message.settings[key].value.extend(value if isinstance(value, list) else [] if value is None else [value])
        answer = self.call("TraceSetting", message)
        if isinstance(answer, tuple):
            return answer
        return {
            key: list(one.value) if key == "trace_level" else "".join(one.value) for key, one in answer.settings.items()
        }

    def _http(self, path: str, change: dict[str, Any] | None) -> tuple[int, Any]:
        return self.running.get(path) if change is None else self.running.post(path, change)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory):
    """A function that starts a server with flags over the small repository; all end with the module."""
    repository = echo_repository.write_small(tmp_path_factory.mktemp("settings"))
    running: list[tuple[RunningServer, Operated]] = []

    def start(*flags: str) -> Operated:
        server = RunningServer(
            repository, "--model-control", "explicit", "--load-model", "*", "--max-own-workers", "2", *flags
        )
        try:
            server.wait_ready()
        except BaseException:
            server.kill()
            raise
        operated = Operated(server)
        running.append((server, operated))
        return operated

    yield start
    for server, operated in running:
        operated.close()
        server.__exit__()


def both(value: str) -> dict[str, Any]:
    """A status of HTTP and that of gRPC."""
    return {
        "bad": {"http": 400, "grpc": "INVALID_ARGUMENT"},
        "unsupported": {"http": 501, "grpc": "UNIMPLEMENTED"},
        "missing": {"http": 404, "grpc": "NOT_FOUND"},
        "restricted": {"http": 403, "grpc": "PERMISSION_DENIED"},
    }[value]


protocols = pytest.mark.parametrize("protocol", ["http", "grpc"])


# -- logs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(start):
    """A server without a flag."""
    return start()


@pytest.fixture
def logging_server(plain: Operated):
    """The same, with the log settings that it started with."""
    yield plain
    assert plain.log("http", {key: value for key, value in LOG_DEFAULT.items() if key != "log_file"}) == LOG_DEFAULT


def lines_of_a_load(server: RunningServer) -> list[str]:
    """What is logged while a model is loaded and unloaded."""
    before = len(server.output)
    assert server.post("/v2/repository/models/onnx_fp32/unload")[0] == 200
    assert server.post("/v2/repository/models/onnx_fp32/load")[0] == 200
    return server.output[before:].splitlines()


@protocols
def test_log_settings_are_told(logging_server: Operated, protocol: str):
    assert logging_server.log(protocol) == LOG_DEFAULT
    assert logging_server.log(protocol, {}) == LOG_DEFAULT
    assert logging_server.log(protocol, {"log_info": None}) == LOG_DEFAULT


@protocols
def test_a_change_of_levels_holds_at_once(logging_server: Operated, protocol: str):
    server = logging_server.running
    assert any(" INFO front: model onnx_fp32 version 1 is ready" in line for line in lines_of_a_load(server))
    assert logging_server.log(protocol, {"log_info": False}) == LOG_DEFAULT | {"log_info": False}
    assert lines_of_a_load(server) == []
    changed = {"log_info": True, "log_verbose_level": 1, "log_format": "ISO8601"}
    assert logging_server.log(protocol, changed) == LOG_DEFAULT | changed
    lines = lines_of_a_load(server)
    assert all(line[:4].isdecimal() and line[10] == "T" and line[23] == "Z" for line in lines), lines
    assert any(" INFO front: " in line for line in lines)


@protocols
def test_the_workers_follow(logging_server: Operated, protocol: str):
    def fail(message: str) -> None:
        call = Call("fake", (Given("x", "FP32", (1, 1), (1.0,)),), parameters={"fake_fail": message})
        assert not logging_server.infer("lane_json", call).ok

    fail(f"first {protocol}")
    logging_server.log(protocol, {"log_error": False})
    fail(f"second {protocol}")
    logging_server.log(protocol, {"log_error": True})
    fail(f"third {protocol}")
    server = logging_server.running
    server.wait_for(lambda: f"third {protocol}" in server.output)
    assert f"first {protocol}" in server.output
    assert f"second {protocol}" not in server.output


@protocols
@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        ({"log_file": "/tmp/x"}, "unsupported", "log_file"),
        ({"log_info": "yes"}, "bad", "log_info"),
        ({"log_verbose_level": True}, "bad", "log_verbose_level"),
        ({"log_format": "iso"}, "bad", "log_format"),
        ({"log_nothing": True}, "bad", "log_nothing"),
    ],
)
def test_wrong_log_settings_change_nothing(
    logging_server: Operated, protocol: str, change: dict[str, Any], kind: str, named: str
):
    status, message = logging_server.log(protocol, {"log_error": False, **change})
    assert status == both(kind)[protocol]
    assert named in message
    assert logging_server.log(protocol) == LOG_DEFAULT


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"1", b'"log_info"', b"\xff", b"[" * 60_000, b'{"log_info":' + b"[" * 900, b" " * 70_000]
)
@pytest.mark.parametrize("path", ["/v2/logging", "/v2/trace/setting", "/v2/models/onnx_fp32/trace/setting"])
def test_bodies_that_are_no_settings_are_refused(logging_server: Operated, path: str, body: bytes):
    status, _, answer = logging_server.running.request("POST", path, body)
    assert status == 400
    assert list(answer) == ["error"]


def test_tritonclient_reads_and_changes_log_settings(logging_server: Operated):
    http = tritonclient.http.InferenceServerClient(logging_server.running.http)
    rpcs = tritonclient.grpc.InferenceServerClient(logging_server.running.grpc)
    assert http.get_log_settings() == LOG_DEFAULT
    changed = rpcs.update_log_settings({"log_warning": False, "log_verbose_level": 2, "log_info": None}, as_json=True)
    assert changed["settings"]["log_verbose_level"] == {"uint32_param": 2}
    assert http.get_log_settings() == LOG_DEFAULT | {"log_warning": False, "log_verbose_level": 2}
    assert http.update_log_settings({"log_warning": True})["log_warning"] is True
    with pytest.raises(InferenceServerException, match="log_file"):
        http.update_log_settings({"log_file": "x"})
    http.close()
    rpcs.close()


# -- traces ---------------------------------------------------------------------------------------------------


@protocols
def test_without_a_trace_file_tracing_stays_off(plain: Operated, protocol: str):
    settings = plain.trace(protocol)
    assert sorted(settings) == sorted(TRACE_KEYS)
    assert (settings["trace_level"], settings["trace_file"], settings["trace_mode"]) == (["OFF"], "", "triton")
    status, message = plain.trace(protocol, {"trace_level": ["TIMESTAMPS"]})
    assert status == both("bad")[protocol]
    assert "trace_level" in message
    assert plain.trace(protocol) == settings


@pytest.fixture(scope="module")
def traced(start, tmp_path_factory: pytest.TempPathFactory):
    """A server that can trace, and does not yet."""
    file = tmp_path_factory.mktemp("traces") / "trace.json"
    operated = start("--trace-file", str(file), "--trace-rate", "100", "--trace-count", "50")
    operated.file = file
    return operated


@pytest.fixture
def tracing_server(traced: Operated):
    """The same, with the settings that it started with."""
    yield traced
    for model in ("onnx_fp32", "rows", ""):
        cleared = traced.trace("http", dict.fromkeys(TRACE_KEYS[:4]), model)
    assert cleared == {
        "trace_level": ["OFF"],
        "trace_rate": "100",
        "trace_count": "50",
        "log_frequency": "0",
        "trace_file": str(traced.file),
        "trace_mode": "triton",
    }


def written(path: Path) -> list[dict[str, Any]]:
    """The objects of a trace file, which can be read at any time."""
    return json.loads(path.read_bytes())


def find(server: RunningServer, path: Path, request_id: str) -> list[dict[str, Any]]:
    """The objects of the trace of one request, once it is in the file."""

    def look() -> list[dict[str, Any]]:
        try:
            objects = written(path)
        except (FileNotFoundError, ValueError):  # it is about to be made, or to be written to
            objects = []
        (number,) = [one["id"] for one in objects if one.get("request_id") == request_id] or [None]
        return [one for one in objects if number is not None and one["id"] == number]

    return server.wait_for(look)


@protocols
def test_trace_settings_of_the_server_and_of_a_model(tracing_server: Operated, protocol: str):
    server = tracing_server
    changed = server.trace(protocol, {"trace_rate": "7", "trace_level": ["TIMESTAMPS", "TENSORS"]})
    assert (changed["trace_rate"], changed["trace_level"]) == ("7", ["TIMESTAMPS", "TENSORS"])
    own = server.trace(protocol, {"trace_rate": "3", "trace_count": "-1"}, "rows")
    assert own == changed | {"trace_rate": "3", "trace_count": "-1"}
    assert server.trace(protocol) == changed
    assert server.trace(protocol, None, "onnx_fp32") == changed
    assert server.trace(protocol, {"trace_level": "OFF"})["trace_level"] == ["OFF"]
    assert server.trace(protocol, None, "rows")["trace_level"] == ["OFF"], "it has none of its own"
    assert server.trace(protocol, {"trace_rate": None}, "rows")["trace_rate"] == "7"
    assert server.trace(protocol, {"trace_rate": None})["trace_rate"] == "100"


def test_numbers_may_be_sent_as_such(tracing_server: Operated):
    assert tracing_server.trace("http", {"trace_rate": 9, "trace_count": [5]})["trace_rate"] == "9"


@protocols
@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        ({"trace_file": "/tmp/x"}, "unsupported", "trace_file"),
        ({"trace_mode": "opentelemetry"}, "unsupported", "trace_mode"),
        ({"trace_level": ["LOUD"]}, "bad", "trace_level"),
        ({"trace_level": ["OFF", "TENSORS"]}, "bad", "trace_level"),
        ({"trace_rate": "0"}, "bad", "trace_rate"),
        ({"trace_rate": "many"}, "bad", "trace_rate"),
        ({"trace_count": "-2"}, "bad", "trace_count"),
        ({"log_frequency": ["1", "2"]}, "bad", "log_frequency"),
        ({"trace_nothing": "1"}, "bad", "trace_nothing"),
    ],
)
@pytest.mark.parametrize("model", ["", "rows"])
def test_wrong_trace_settings_change_nothing(
    tracing_server: Operated, protocol: str, change: dict[str, Any], kind: str, named: str, model: str
):
    before = tracing_server.trace(protocol, None, model)
    status, message = tracing_server.trace(protocol, {"log_frequency": "5", **change}, model)
    assert status == both(kind)[protocol]
    assert named in message
    assert tracing_server.trace(protocol, None, model) == before


@pytest.mark.parametrize("value", [True, 1.5, {}, [True], [[]], [None]])
def test_values_of_no_use_are_refused(tracing_server: Operated, value: Any):
    status, message = tracing_server.trace("http", {"trace_rate": value})
    assert status == 400
    assert "trace_rate" in message


@protocols
@pytest.mark.parametrize("change", [None, {"trace_rate": "5"}])
def test_an_unknown_model_has_no_trace_settings(tracing_server: Operated, protocol: str, change: Any):
    status, message = tracing_server.trace(protocol, change, "nobody")
    assert status == both("missing")[protocol]
    assert "'nobody'" in message


def test_tritonclient_reads_and_changes_trace_settings(tracing_server: Operated):
    http = tritonclient.http.InferenceServerClient(tracing_server.running.http)
    rpcs = tritonclient.grpc.InferenceServerClient(tracing_server.running.grpc)
    answer = rpcs.update_trace_settings("rows", {"trace_level": ["TENSORS"], "trace_rate": "2"}, as_json=True)
    assert answer["settings"]["trace_level"] == {"value": ["TENSORS"]}
    assert http.get_trace_settings("rows")["trace_rate"] == "2"
    assert http.update_trace_settings("rows", {"trace_rate": None, "trace_level": None}) == http.get_trace_settings()
    assert http.get_trace_settings() == tracing_server.trace("grpc")
    with pytest.raises(InferenceServerException, match="trace_file"):
        http.update_trace_settings(settings={"trace_file": "x"})
    http.close()
    rpcs.close()


@pytest.mark.parametrize("front", FRONTS)
def test_a_request_is_traced_from_its_start_to_its_end(tracing_server: Operated, front: str):
    change = {"trace_level": ["TIMESTAMPS", "TENSORS"], "trace_rate": "1", "trace_count": "1"}
    tracing_server.trace("http", change, "onnx_fp32")
    call = Call("onnx_fp32", ECHO.inputs, id=f"trace over {front}")
    assert tracing_server.infer(front, call).ok
    assert tracing_server.trace("grpc", None, "onnx_fp32")["trace_count"] == "0"
    assert tracing_server.infer(front, ECHO).ok
    objects = find(tracing_server.running, tracing_server.file, call.id)
    assert objects[0] == {
        "id": objects[0]["id"],
        "model_name": "onnx_fp32",
        "model_version": 1,
        "request_id": call.id,
    }
    stamps = [(one["name"], one["ns"]) for it in objects for one in it.get("timestamps", ())]
    assert [name for name, _ in stamps] == [*POINTS, "REQUEST_END"]
    times = [ns for _, ns in stamps]
    assert times == sorted(times)
    assert 0 < times[-1] - times[0] < 30 * 10**9
    tensors = {it["activity"]: it["tensor"] for it in objects if "activity" in it}
    shown = {"data": "0.5,-2.0,3.0", "shape": "1,3", "dtype": "FP32"}
    assert tensors == {
        "TENSOR_QUEUE_INPUT": {"name": "x", **shown},
        "TENSOR_BACKEND_OUTPUT": {"name": "y", **shown},
    }
    assert not [one for one in written(tracing_server.file) if one.get("request_id") == ECHO.id]


def test_a_request_that_fails_is_traced_to_its_end(tracing_server: Operated):
    tracing_server.trace("http", {"trace_level": "TIMESTAMPS", "trace_rate": "1"}, "fake")
    call = Call("fake", (Given("x", "FP32", (1, 1), (1.0,)),), id="failing", parameters={"fake_fail": "no"})
    assert not tracing_server.infer("lane_json", call).ok
    names = [
        one["name"]
        for it in find(tracing_server.running, tracing_server.file, call.id)
        for one in it.get("timestamps", ())
    ]
    assert names[0] == "REQUEST_START"
    assert names[-1] == "REQUEST_END"
    tracing_server.trace("http", dict.fromkeys(TRACE_KEYS[:4]), "fake")


def test_every_so_manyth_request_is_traced_until_the_count_is_used_up(start, tmp_path: Path):
    file = tmp_path / "trace.json"
    flags = ("--trace-file", str(file), "--trace-level", "TIMESTAMPS", "--trace-rate", "3", "--trace-count", "5")
    operated = start(*flags)
    assert operated.trace("http", {"log_frequency": "2"})["trace_level"] == ["TIMESTAMPS"]
    for number in range(1, 22):
        assert operated.infer("lane_binary", Call("onnx_fp32", ECHO.inputs, id=str(number))).ok
    assert operated.trace("http")["trace_count"] == "0"
    assert operated.running.stop() == 0
    files = sorted(tmp_path.iterdir())
    assert [one.name for one in files] == ["trace.json.0", "trace.json.1", "trace.json.2"]
    ids = [[one["request_id"] for one in written(path) if "request_id" in one] for path in files]
    assert ids == [["3", "6"], ["9", "12"], ["15"]]


# -- restricted APIs ------------------------------------------------------------------------------------------

ADMIN = "model-config,model-repository,statistics,trace,logging,shared-memory"
ADMIN_PATHS = [
    ("GET", "/v2/models/onnx_fp32/config"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/nobody/load"),
    ("POST", "/v2/repository/models/nobody/unload"),
    ("GET", "/v2/trace/setting"),
    ("POST", "/v2/models/onnx_fp32/trace/setting"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
]


@pytest.fixture(scope="module")
def restricted(start):
    """A server whose administration needs one header and its inference another."""
    return start("--restricted-api", f"{ADMIN}:Admin-Key=s3cret=", "--restricted-api", "inference:user-key=open")


@pytest.mark.parametrize(("method", "path"), ADMIN_PATHS)
def test_http_asks_for_the_header(restricted: Operated, method: str, path: str):
    for headers in ({}, {"admin-key": "s3cret"}, {"user-key": "open"}):
        status, _, answer = restricted.running.request(method, path, b"" if method == "POST" else None, headers)
        assert status == 403
        assert answer == {"error": "This API is restricted, expecting header 'Admin-Key'"}
    headers = {"ADMIN-KEY": "s3cret="}
    assert restricted.running.request(method, path, b"" if method == "POST" else None, headers)[0] in (200, 404)


@pytest.mark.parametrize(
    "path", ["/v2/%6cogging", "/v2/logging%0A", "/v2/logging?x=1", "/v2/%72epository/index", "/v2/repository/a%0Ab/c"]
)
def test_no_spelling_of_a_path_gets_around(restricted: Operated, path: str):
    with RawConnection(restricted.running.http) as connection:
        connection.send(request("POST", path))
        assert connection.answer().status in (403, 404)


def test_the_lane_goes_on_after_a_refusal(restricted: Operated):
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}).encode()
    with RawConnection(restricted.running.http) as connection:
        connection.send(request("POST", "/v2/models/onnx_fp32/infer", body))
        connection.send(request("POST", "/v2/models/onnx_fp32/infer", body, {"user-key": "open"}))
        connection.send(request("POST", "/v2/models/onnx_fp32/%69nfer", body))
        connection.send(request("POST", "/v2/models/onnx_fp32/%69nfer", body, {"User-Key": "open"}))
        assert [connection.answer().status for _ in range(4)] == [403, 200, 403, 200]


def test_grpc_asks_for_the_header(restricted: Operated):
    right, name = ("triton-grpc-protocol-admin-key", "s3cret="), "triton-grpc-protocol-Admin-Key"
    message = pb.LogSettingsRequest()
    for metadata in ((), (("admin-key", "s3cret="),), ((right[0], "no"),)):
        status, details = restricted.call("LogSettings", message, metadata)
        assert status == both("restricted")["grpc"]
        assert name in details
    assert restricted.call("LogSettings", message, (right,)).settings["log_info"].bool_param
    assert restricted.call("RepositoryIndex", pb.RepositoryIndexRequest())[0] == "PERMISSION_DENIED"
    assert restricted.call("RepositoryIndex", pb.RepositoryIndexRequest(), (right,)).models
    infer = pb.ModelInferRequest(model_name="onnx_fp32")
    infer.inputs.add(name="x", datatype="FP32", shape=[1, 3]).contents.fp32_contents.extend([1, 2, 3])
    assert restricted.call("ModelInfer", infer, (right,))[0] == "PERMISSION_DENIED"
    key = ("triton-grpc-protocol-user-key", "open")
    assert restricted.call("ModelInfer", infer, (key,)).model_name == "onnx_fp32"


def test_a_stream_is_restricted_like_a_request(restricted: Operated):
    kinds = pb.RPCS["ModelStreamInfer"]
    stream = restricted.channel.stream_stream(
        f"/{pb.SERVICE}/ModelStreamInfer",
        request_serializer=kinds.request.SerializeToString,
        response_deserializer=kinds.response.FromString,
    )
    with pytest.raises(grpc.RpcError) as caught:
        list(stream(iter([pb.ModelInferRequest(model_name="onnx_fp32")]), timeout=TIMEOUT_S))
    assert caught.value.code().name == "PERMISSION_DENIED"
    for path in ("generate", "generate_stream"):
        assert restricted.running.post(f"/v2/models/onnx_fp32/{path}", {"x": [1, 2, 3]})[0] == 403


def test_what_is_not_restricted_needs_nothing(restricted: Operated):
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/onnx_fp32/ready", "/v2", "/v2/models/onnx_fp32"):
        assert restricted.running.get(path)[0] == 200
    assert restricted.call("ServerReady", pb.ServerReadyRequest()).ready
    assert restricted.running.get("/metrics")[0] == 200


# -- headers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forwarding(start):
    """A server whose fake model can be told what to do by a header."""
    return start("--forward-headers", "fake_.*|priority|timeout|triton_x")


FAKE_BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}


@pytest.mark.parametrize("path", ["/v2/models/fake/infer", "/v2/models/fake/%69nfer"])
def test_headers_become_parameters(forwarding: Operated, path: str):
    def message(headers: dict[str, str], parameters: dict[str, Any] | None = None) -> tuple[int, str]:
        body = FAKE_BODY if parameters is None else FAKE_BODY | {"parameters": parameters}
        status, _, answer = forwarding.running.request("POST", path, body, headers)
        return status, answer.get("error", "")

    assert message({"Fake_Input_Error": "told by a header"}) == (400, "model 'fake': told by a header")
    assert message({}) == (200, "")
    assert message({"X-Fake_Input_Error": "no"}) == (200, "")
    assert message({"priority": "u=1", "timeout": "never", "triton_x": "1"}) == (200, "")
    both_ways = message({"fake_input_error": "header"}, {"fake_input_error": "parameter"})
    assert both_ways == (400, "model 'fake': header")


def test_metadata_become_parameters(forwarding: Operated):
    infer = pb.ModelInferRequest(model_name="fake")
    infer.inputs.add(name="x", datatype="FP32", shape=[1, 1]).contents.fp32_contents.append(1)
    refused = forwarding.call("ModelInfer", infer, (("fake_input_error", "told by metadata"), ("priority", "high")))
    assert refused == ("INVALID_ARGUMENT", "model 'fake': told by metadata")
    assert forwarding.call("ModelInfer", infer, (("timeout", "never"),)).model_name == "fake"


@pytest.mark.parametrize("path", ["/v2/models/onnx_fp32/infer", "/v2/models/onnx_fp32/%69nfer"])
def test_the_load_is_reported_to_those_that_ask(plain: Operated, path: str):
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}

    def report(wanted: str) -> str | None:
        headers = {"endpoint-load-metrics-format": wanted} if wanted else {}
        status, answered, _ = plain.running.request("POST", path, body, headers)
        assert status == 200
        return answered.get("endpoint-load-metrics")

    text, document = report("text"), report("json")
    assert text is not None
    assert document is not None
    form, _, pairs = text.partition(" ")
    values = {name: float(value) for name, _, value in (pair.partition("=") for pair in pairs.split(", "))}
    assert form == "TEXT"
    assert 0 <= values["cpu_utilization"] <= 1
    assert 0 < values["mem_utilization"] < 1
    form, _, rest = document.partition(" ")
    load = json.loads(rest)
    assert form == "JSON"
    named = {f"named_metrics.{name}" for name in load.pop("named_metrics")}
    assert {*load, *named} == {*values}
    assert report("") is None
    assert report("bin") is None


# -- compression ----------------------------------------------------------------------------------------------


class CountingRelay:
    """Stands between a client and the server and counts the bytes that come back."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.nbytes = 0
        self._target = (host, int(port))
        self._thread = threading.Thread(target=self._relay)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(TIMEOUT_S)
        self._listener.close()

    def _relay(self) -> None:
        client, _ = self._listener.accept()
        with client, socket.create_connection(self._target) as server:
            there = threading.Thread(target=self._copy, args=(client, server))
            there.start()
            self.nbytes = self._copy(server, client)
            there.join(TIMEOUT_S)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> int:
        total = 0
        try:
            while piece := source.recv(1 << 16):
                target.sendall(piece)
                total += len(piece)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the other end has closed it
        return total


@pytest.mark.parametrize("compression", ["none", "gzip", "deflate"])
def test_grpc_responses_are_compressed(start, compression: str):
    operated = start("--grpc-compression", compression)
    rows = 50_000
    infer = pb.ModelInferRequest(model_name="any")
    infer.inputs.add(name="x_FP32", datatype="FP32", shape=[rows])
    infer.raw_input_contents.append(bytes(4 * rows))
    infer.outputs.add(name="y_FP32")
    with CountingRelay(operated.running.grpc) as relay, grpc.insecure_channel(relay.address) as channel:
        answer = rpc(channel, "ModelInfer")(infer, timeout=TIMEOUT_S)
        assert answer.raw_output_contents[0] == bytes(4 * rows)
    if compression == "none":
        assert relay.nbytes > 4 * rows
    else:
        assert relay.nbytes < rows


# -- flags that make no sense ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--restricted-api", "infer:key=s3cret"], ["--restricted-api", "'infer'"]),
        (["--forward-headers", "("], ["--forward-headers", "'('"]),
        (["--trace-level", "TENSORS"], ["--trace-level", "--trace-file"]),
        (["--trace-level", "LOUD", "--trace-file", "/tmp/trace.json"], ["--trace-level", "LOUD"]),
        (["--trace-file", "/no/such/folder/trace.json"], ["--trace-file", "/no/such/folder"]),
    ],
)
def test_the_server_does_not_start_with_flags_that_make_no_sense(tmp_path: Path, flags: list[str], named: list[str]):
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "headrace", "serve", str(tmp_path), *ports, *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    for one in named:
        assert one in done.stderr
    assert "Traceback" not in done.stderr
    assert "s3cret" not in done.stderr
