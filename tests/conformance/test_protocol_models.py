"""What the server tells about itself and its models, and loading and unloading, the same over HTTP and gRPC."""

import os
from pathlib import Path
from typing import Any

import echo_repository
import grpc
import pytest
from fronts import TIMEOUT_S, rpc
from running_server import RunningServer
from wire_values import DATATYPES

import headrace
from headrace.wire import pb

BAD_CONFIG = '{"max_batch_size": "many"}'


@pytest.fixture(params=["http", "grpc"])
def door(request: pytest.FixtureRequest, server: RunningServer, channel: grpc.Channel):
    """A protocol for the calls that change what is served."""
    return HttpDoor(server) if request.param == "http" else GrpcDoor(channel)


class HttpDoor:
    """Loading and unloading over HTTP; the error's message, or nothing."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self.codes = {"missing": 404, "bad": 400, "unsupported": 501}

    def load(self, name: str, body: object = None) -> tuple[Any, str]:
        return self._change(name, "load", body)

    def unload(self, name: str) -> tuple[Any, str]:
        return self._change(name, "unload", None)

    def load_with(self, name: str) -> tuple[Any, str]:
        return self.load(name, {"parameters": {"config": BAD_CONFIG}})

    def index(self, *, ready: bool = False) -> dict[tuple[str, str], tuple[str, str]]:
        status, entries = self._server.post("/v2/repository/index", {"ready": ready})
        assert status == 200
        return {(one["name"], one.get("version", "")): (one.get("state", ""), one.get("reason", "")) for one in entries}

    def _change(self, name: str, what: str, body: object) -> tuple[Any, str]:
        status, answer = self._server.post(f"/v2/repository/models/{name}/{what}", body)
        if status == 200:
            assert answer == b""
            return None, ""
        return status, answer["error"]


class GrpcDoor:
    """The same over gRPC."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self.codes = {
            "missing": grpc.StatusCode.NOT_FOUND,
            "bad": grpc.StatusCode.INVALID_ARGUMENT,
            "unsupported": grpc.StatusCode.UNIMPLEMENTED,
        }

    def load(self, name: str) -> tuple[Any, str]:
        return self._change("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=name))

    def unload(self, name: str) -> tuple[Any, str]:
        return self._change("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=name))

    def load_with(self, name: str) -> tuple[Any, str]:
        message = pb.RepositoryModelLoadRequest(model_name=name)
        message.parameters["config"].string_param = BAD_CONFIG
        return self._change("RepositoryModelLoad", message)

    def index(self, *, ready: bool = False) -> dict[tuple[str, str], tuple[str, str]]:
        response = rpc(self._channel, "RepositoryIndex")(pb.RepositoryIndexRequest(ready=ready), timeout=TIMEOUT_S)
        return {(one.name, one.version): (one.state, one.reason) for one in response.models}

    def _change(self, name: str, message: Any) -> tuple[Any, str]:
        try:
            rpc(self._channel, name)(message, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return error.code(), error.details()
        return None, ""


# -- health and readiness ---------------------------------------------------------------------------------


def test_the_server_is_live_and_ready(server: RunningServer, channel: grpc.Channel):
    assert server.get("/v2/health/live") == (200, {"live": True})
    assert server.get("/v2/health/ready") == (200, {"ready": True})
    assert rpc(channel, "ServerLive")(pb.ServerLiveRequest(), timeout=TIMEOUT_S).live
    assert rpc(channel, "ServerReady")(pb.ServerReadyRequest(), timeout=TIMEOUT_S).ready


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [
        ("onnx_fp32", "", True),
        ("onnx_fp32", "1", True),
        ("onnx_fp32", "2", False),
        ("onnx_fp32", "one", False),
        ("versions", "2", True),
        ("broken", "", False),
        ("broken", "1", False),
        ("nobody", "", False),
        ("nobody", "1", False),
    ],
)
def test_model_readiness(server: RunningServer, channel: grpc.Channel, name: str, version: str, ready: bool):
    path = f"/v2/models/{name}" + (f"/versions/{version}" if version else "")
    status, body = server.get(f"{path}/ready")
    assert status == (200 if ready else 400)
    assert body == {"name": name, "ready": True} if ready else name in body["error"]
    message = pb.ModelReadyRequest(name=name, version=version)
    assert rpc(channel, "ModelReady")(message, timeout=TIMEOUT_S).ready == ready


# -- metadata and configuration ---------------------------------------------------------------------------


def test_server_metadata(server: RunningServer, channel: grpc.Channel):
    status, body = server.get("/v2")
    assert status == 200
    assert (body["name"], body["version"]) == ("headrace", headrace.__version__)
    assert {"binary_tensor_data", "model_configuration", "model_repository"} <= set(body["extensions"])
    response = rpc(channel, "ServerMetadata")(pb.ServerMetadataRequest(), timeout=TIMEOUT_S)
    assert body == {"name": response.name, "version": response.version, "extensions": list(response.extensions)}


def _tensors(tensors: Any) -> list[dict[str, Any]]:
    return [{"name": one.name, "datatype": one.datatype, "shape": list(one.shape)} for one in tensors]


@pytest.mark.parametrize("datatype", DATATYPES)
def test_model_metadata_tells_the_datatypes(server: RunningServer, channel: grpc.Channel, datatype: str):
    name = f"onnx_{datatype.lower()}"
    for version in ("", "1"):
        status, body = server.get(f"/v2/models/{name}" + (f"/versions/{version}" if version else ""))
        assert status == 200
        assert body["inputs"] == [{"name": "x", "datatype": datatype, "shape": [-1, 3]}]
        assert body["outputs"] == [{"name": "y", "datatype": datatype, "shape": [-1, 3]}]
        message = pb.ModelMetadataRequest(name=name, version=version)
        response = rpc(channel, "ModelMetadata")(message, timeout=TIMEOUT_S)
        assert body == {
            "name": response.name,
            "versions": list(response.versions),
            "platform": response.platform,
            "inputs": _tensors(response.inputs),
            "outputs": _tensors(response.outputs),
        }


def test_model_metadata_lists_the_versions_and_the_inputs_in_order(server: RunningServer):
    assert server.get("/v2/models/versions")[1]["versions"] == ["1", "2", "7"]
    rows = server.get("/v2/models/rows")[1]
    assert [one["name"] for one in rows["inputs"]] == ["numbers", "texts", "offset"]
    assert [one["name"] for one in rows["outputs"]] == ["sums", "texts_out", "numbers_out"]
    assert server.get("/v2/models/fixed")[1]["inputs"][0]["shape"] == [2, 3]
    assert server.get("/v2/models")[1]["models"] == sorted(server.get("/v2/models")[1]["models"])


@pytest.mark.parametrize("name", ["rows", "onnx_bytes", "fixed", "fake"])
def test_a_models_configuration_has_what_was_inferred(server: RunningServer, channel: grpc.Channel, name: str):
    status, body = server.get(f"/v2/models/{name}/config")
    assert status == 200
    message = pb.ModelConfigRequest(name=name)
    config = rpc(channel, "ModelConfig")(message, timeout=TIMEOUT_S).config
    assert body["name"] == config.name == name
    assert body["max_batch_size"] == config.max_batch_size
    metadata = server.get(f"/v2/models/{name}")[1]
    batch = [-1] if config.max_batch_size else []
    for told, in_json, in_message in (
        (metadata["inputs"], body["input"], config.input),
        (metadata["outputs"], body["output"], config.output),
    ):
        assert [one["name"] for one in told] == [one["name"] for one in in_json] == [one.name for one in in_message]
        assert [one["shape"] for one in told] == [[*batch, *one["dims"]] for one in in_json]
        assert [one["dims"] for one in in_json] == [list(one.dims) for one in in_message]
        assert [one["datatype"].replace("BYTES", "STRING") for one in told] == [
            one["data_type"].removeprefix("TYPE_") for one in in_json
        ]
    assert (config.max_batch_size, [one.optional for one in config.input]) == {
        "rows": (4, [False, False, True]),
        "onnx_bytes": (32, [False]),
        "fixed": (0, [False]),
        "fake": (1, [False]),
    }[name]


@pytest.mark.parametrize(
    ("model", "status"),
    [
        (("nobody", ""), 404),
        (("nobody", "1"), 404),
        (("onnx_fp32", "9"), 404),
        (("onnx_fp32", "x"), 400),
        (("broken", ""), 404),
        (("broken", "1"), 503),
    ],
)
@pytest.mark.parametrize("what", ["metadata", "config"])
def test_what_is_not_served_has_no_metadata(
    server: RunningServer, channel: grpc.Channel, what: str, model: tuple[str, str], status: int
):
    name, version = model
    path = f"/v2/models/{name}" + (f"/versions/{version}" if version else "") + ("/config" if what == "config" else "")
    answer, body = server.get(path)
    assert answer == status
    kind, message = (
        ("ModelConfig", pb.ModelConfigRequest) if what == "config" else ("ModelMetadata", pb.ModelMetadataRequest)
    )
    with pytest.raises(grpc.RpcError) as caught:
        rpc(channel, kind)(message(name=name, version=version), timeout=TIMEOUT_S)
    codes = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 503: "UNAVAILABLE"}
    assert caught.value.code().name == codes[status]
    assert caught.value.details() == body["error"]
    assert name in body["error"]
    if name == "nobody":
        assert body["error"].startswith("Request for unknown model")


# -- index, load and unload -------------------------------------------------------------------------------


def test_the_index_lists_every_version_with_its_reason(door: HttpDoor | GrpcDoor):
    entries = door.index()
    assert entries["onnx_fp32", "1"] == ("READY", "")
    assert [entries["versions", version][0] for version in ("1", "2", "7")] == ["READY"] * 3
    state, reason = entries["broken", "1"]
    assert state == "UNAVAILABLE"
    assert "model.onnx" in reason
    ready = door.index(ready=True)
    assert set(ready) == {key for key, (state, _) in entries.items() if state == "READY"}


def test_the_index_needs_no_body(server: RunningServer):
    # another test's model may still be on its way out
    server.wait_for(lambda: server.post("/v2/repository/index") == server.post("/v2/repository/index", {}))
    assert server.post("/v2/repository/index", b"  ")[0] == 200


def test_a_model_is_loaded_unloaded_and_loaded_again(server: RunningServer, door: HttpDoor | GrpcDoor):
    name = f"late_{type(door).__name__.lower()}"
    hidden = server.repository / f".{name}"
    echo_repository.onnx_echo(server.repository, hidden.name, "FP32", ["rows", 3])
    hidden.rename(server.repository / name)
    assert door.index()[name, ""] == ("", "")
    assert not server.model_ready(name)
    for _ in range(2):
        assert door.load(name) == (None, "")
        assert server.model_ready(name)
        assert door.index()[name, "1"] == ("READY", "")
        assert door.unload(name) == (None, "")
        assert not server.model_ready(name)
        server.wait_for(lambda: door.index()[name, "1"][0] == "UNAVAILABLE")
        assert (name, "1") not in door.index(ready=True)


def test_what_cannot_be_loaded_says_why(door: HttpDoor | GrpcDoor):
    code, message = door.load("nobody")
    assert code == door.codes["missing"]
    assert "failed to load" in message
    assert "nobody" in message
    code, message = door.load("broken")
    assert code == door.codes["bad"]
    assert "broken" in message
    assert "UNAVAILABLE" in message
    assert door.unload("nobody")[0] == door.codes["missing"]


def test_a_bad_override_is_refused_and_changes_nothing(door: HttpDoor | GrpcDoor):
    code, message = door.load_with("onnx_fp32")
    assert code == door.codes["bad"]
    assert "failed to load" in message
    assert "max_batch_size" in message
    assert door.index()["onnx_fp32", "1"] == ("READY", "")


def test_a_model_that_serves_may_be_loaded_again(server: RunningServer, door: HttpDoor | GrpcDoor):
    assert door.load("onnx_int8") == (None, "")
    assert server.model_ready("onnx_int8")


@pytest.mark.parametrize(("what", "field"), [("Load", "isLoaded"), ("Unload", "isUnloaded")])
def test_the_model_may_stand_where_kserve_puts_it(server: RunningServer, channel: grpc.Channel, what: str, field: str):
    # KServe's own messages have the name as field 1, in the request and in the response.
    kinds = pb.RPCS[f"RepositoryModel{what}"]
    message = kinds.request.FromString(b"\x0a\x0aonnx_int16")
    assert (message.repository_name, message.model_name) == ("onnx_int16", "")
    response = rpc(channel, f"RepositoryModel{what}")(message, timeout=TIMEOUT_S)
    assert (response.model_name, getattr(response, field)) == ("onnx_int16", True)
    assert server.model_ready("onnx_int16") == (what == "Load")
    assert rpc(channel, "RepositoryModelLoad")(message, timeout=TIMEOUT_S).isLoaded


def test_loading_nothing_is_refused(channel: grpc.Channel):
    with pytest.raises(grpc.RpcError) as caught:
        rpc(channel, "RepositoryModelLoad")(pb.RepositoryModelLoadRequest(), timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_repository_names_are_not_offered(server: RunningServer):
    for path in ("other/index", "other/models/onnx_fp32/load", "other/models/onnx_fp32/unload"):
        status, body = server.post(f"/v2/repository/{path}")
        assert status == 501
        assert "other" in body["error"]


@pytest.mark.parametrize("name", ["..", "%2e%2e", ".hidden", "..%2F..%2Fetc", "onnx_fp32%2F1", "%00", "a" * 5000])
def test_a_name_is_never_a_path(server: RunningServer, tmp_path: Path, name: str):
    echo_repository.onnx_echo(server.repository, ".hidden", "FP32", [1])
    try:
        status, body = server.post(f"/v2/repository/models/{name}/load")
        assert status in (404, 501)
        assert body["error"]
    finally:
        os.unlink(server.repository / ".hidden/1/model.onnx")  # noqa: PTH108
        os.removedirs(server.repository / ".hidden/1")
