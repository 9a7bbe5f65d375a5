"""tritonclient as it comes from PyPI: http, grpc and their aio twins, each call that this server answers."""

import gc
import inspect
import queue
from collections.abc import Callable
from types import ModuleType
from typing import Any

import echo_repository
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from running_server import RunningServer
from tritonclient.utils import InferenceServerException

# The aio client of HTTP looks at the status of a health check and leaves the body in its connection.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning")

CLIENTS: dict[str, ModuleType] = {
    "http": tritonclient.http,
    "grpc": tritonclient.grpc,
    "http.aio": tritonclient.http.aio,
    "grpc.aio": tritonclient.grpc.aio,
}
ARRAYS = {
    "BOOL": np.array([[True, False, True]]),
    "UINT8": np.array([[0, 1, 255]], np.uint8),
    "UINT16": np.array([[0, 1, 65535]], np.uint16),
    "UINT32": np.array([[0, 1, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 1, 2**64 - 1]], np.uint64),
    "INT8": np.array([[-128, 0, 127]], np.int8),
    "INT16": np.array([[-(2**15), 0, 2**15 - 1]], np.int16),
    "INT32": np.array([[-(2**31), 0, 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 0, 2**63 - 1]], np.int64),
    "FP16": np.array([[0.5, -65504, np.nan]], np.float16),
    "BF16": np.array([[1.0, -0.5, np.inf]], ml_dtypes.bfloat16),
    "FP32": np.array([[0.1, -np.inf, np.nan]], np.float32),
    "FP64": np.array([[0.1, 5e-324, np.nan]], np.float64),
    "BYTES": np.array([[b"", "caf\u00e9".encode(), b"a\0b"]], np.object_),
}


class Client:
    """A client whose calls are awaited whether they need it or not."""

    def __init__(self, name: str, server: RunningServer) -> None:
        self.name = name
        self.module = CLIENTS[name]
        self.real = self.module.InferenceServerClient(server.http if name.startswith("http") else server.grpc)

    @property
    def is_http(self) -> bool:
        return self.name.startswith("http")

    async def __call__(self, method: str, *given: Any, **named: Any) -> Any:
        result = getattr(self.real, method)(*given, **named)
        return await result if inspect.isawaitable(result) else result

    def input(self, name: str, array: np.ndarray, datatype: str, **how: Any) -> Any:
        made = self.module.InferInput(name, list(array.shape), datatype)
        made.set_data_from_numpy(array, **how)
        return made

    def output(self, name: str, **how: Any) -> Any:
        return self.module.InferRequestedOutput(name, **how)

    async def infer(self, model: str, inputs: list[Any], **named: Any) -> Any:
        return await self("infer", model, inputs, **named)


@pytest.fixture(params=CLIENTS)
async def client(request: pytest.FixtureRequest, server: RunningServer):
    made = Client(request.param, server)
    yield made
    closed = made.real.close()
    if inspect.isawaitable(closed):
        await closed
    if request.param == "http.aio":
        del made, closed
        gc.collect()  # so that the client's warnings come here, where they are expected


async def test_health(client: Client):
    assert await client("is_server_live")
    assert await client("is_server_ready")
    assert await client("is_model_ready", "onnx_fp32")
    assert await client("is_model_ready", "onnx_fp32", "1")
    for name, version in (("onnx_fp32", "2"), ("nobody", ""), ("broken", "")):
        assert not await client("is_model_ready", name, version)


def _as_dict(client: Client, message: Any) -> Any:
    if client.is_http:
        return message
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True)


async def test_metadata_and_configuration(client: Client):
    server = _as_dict(client, await client("get_server_metadata"))
    assert server["name"] == "headrace"
    assert "binary_tensor_data" in server["extensions"]
    model = _as_dict(client, await client("get_model_metadata", "onnx_bytes", "1"))
    assert model["versions"] == ["1"]
    assert [int(size) for size in model["inputs"][0]["shape"]] == [-1, 3]
    assert model["inputs"][0]["datatype"] == "BYTES"
    config = _as_dict(client, await client("get_model_config", "onnx_bytes"))
    config = config if client.is_http else config["config"]
    assert config["max_batch_size"] == 32
    assert config["input"][0]["data_type"] == "TYPE_STRING"
    if not client.is_http:
        assert await client("get_model_config", "onnx_bytes", as_json=True)
        assert await client("get_server_metadata", as_json=True)


@pytest.mark.parametrize("datatype", ARRAYS)
async def test_every_datatype_comes_back_as_it_was_sent(client: Client, datatype: str):
    array = ARRAYS[datatype]
    result = await client.infer(f"onnx_{datatype.lower()}", [client.input("x", array, datatype)])
    np.testing.assert_array_equal(result.as_numpy("y"), array)


@pytest.mark.parametrize("datatype", [name for name in ARRAYS if name not in ("FP16", "BF16")])
async def test_every_datatype_comes_back_through_json(server: RunningServer, datatype: str):
    client = Client("http", server)
    array = np.nan_to_num(ARRAYS[datatype], posinf=1, neginf=2) if datatype.startswith("FP") else ARRAYS[datatype]
    result = await client.infer(
        f"onnx_{datatype.lower()}",
        [client.input("x", array, datatype, binary_data=False)],
        outputs=[client.output("y", binary_data=False)],
    )
    received = result.as_numpy("y")
    if datatype == "BYTES":
        received = np.char.encode(received.astype(str), "utf-8").astype(object)
    np.testing.assert_array_equal(received, array)
    client.real.close()


def _rows(client: Client) -> list[Any]:
    return [
        client.input("numbers", np.array([[1, 2], [3, 4]], np.int32), "INT32"),
        client.input("texts", np.array([["a"], [""]], np.object_), "BYTES"),
    ]


async def test_several_inputs_and_outputs_by_name(client: Client):
    outputs = [client.output("texts_out"), client.output("sums")]
    result = await client.infer("rows", _rows(client), outputs=outputs, request_id="id-7", model_version="1")
    np.testing.assert_array_equal(result.as_numpy("sums"), [[3], [7]])
    np.testing.assert_array_equal(result.as_numpy("texts_out"), np.array([[b"a"], [b""]], np.object_))
    assert result.as_numpy("numbers_out") is None
    response = _as_dict(client, result.get_response())
    assert (response["id"], response["model_name"], response["model_version"]) == ("id-7", "rows", "1")
    assert [one["name"] for one in response["outputs"]] == ["texts_out", "sums"]


async def test_tensors_without_elements(client: Client):
    empty = np.zeros((2, 0, 3), np.float32)
    result = await client.infer("any", [client.input("x_FP32", empty, "FP32")], outputs=[client.output("y_FP32")])
    if client.is_http:
        assert result.get_output("y_FP32")["shape"] == [2, 0, 3]
    else:
        assert list(result.get_output("y_FP32").shape) == [2, 0, 3]


async def test_parameters_priority_and_timeout(client: Client):
    array = ARRAYS["FP32"]
    result = await client.infer(
        "onnx_fp32",
        [client.input("x", array, "FP32")],
        priority=1,
        timeout=10_000_000,
        parameters={"mine": "text", "count": 3, "flag": True},
    )
    np.testing.assert_array_equal(result.as_numpy("y"), array)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
async def test_compression(client: Client, algorithm: str):
    array = np.tile(np.arange(3, dtype=np.float32), (500, 1))
    how: dict[str, Any] = {"compression_algorithm": algorithm}
    if client.is_http:
        how = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
    result = await client.infer("onnx_fp32", [client.input("x", array, "FP32")], **how)
    np.testing.assert_array_equal(result.as_numpy("y"), array)


async def test_headers_and_queries_pass(client: Client):
    named: dict[str, Any] = {"headers": {"x-mine": "1"}}
    if client.is_http:
        named["query_params"] = {"a": "b", "c": 3}
    assert await client("is_server_ready", **named)
    result = await client.infer("onnx_fp32", [client.input("x", ARRAYS["FP32"], "FP32")], **named)
    assert result.as_numpy("y") is not None


async def test_asynchronous_inference(server: RunningServer):
    arrays = [np.full((1, 3), index, np.float32) for index in range(20)]
    over_http = Client("http", server)
    pending = [over_http.real.async_infer("onnx_fp32", [over_http.input("x", one, "FP32")]) for one in arrays]
    for one, array in zip(pending, arrays, strict=True):
        np.testing.assert_array_equal(one.get_result().as_numpy("y"), array)
    with pytest.raises(InferenceServerException, match="unknown model"):
        over_http.real.async_infer("nobody", [over_http.input("x", arrays[0], "FP32")]).get_result()
    over_http.real.close()

    over_grpc = Client("grpc", server)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    for index, array in enumerate(arrays):
        over_grpc.real.async_infer(
            "onnx_fp32",
            [over_grpc.input("x", array, "FP32")],
            lambda result, error: answers.put((result, error)),
            request_id=str(index),
        )
    for _ in arrays:
        result, error = answers.get(timeout=60)
        assert error is None
        np.testing.assert_array_equal(result.as_numpy("y"), arrays[int(result.get_response().id)])
    over_grpc.real.async_infer(
        "nobody", [over_grpc.input("x", arrays[0], "FP32")], lambda result, error: answers.put((result, error))
    )
    result, error = answers.get(timeout=60)
    assert result is None
    assert "unknown model" in error.message()
    over_grpc.real.close()


async def test_the_repository_is_listed_and_changed(client: Client, server: RunningServer):
    name = f"for_{client.name.replace('.', '_')}"
    echo_repository.onnx_echo(server.repository, name, "FP32", ["rows", 3])
    assert not await client("is_model_ready", name)
    await client("load_model", name)
    assert await client("is_model_ready", name)
    index = _as_dict(client, await client("get_model_repository_index"))
    entries = {one["name"]: one for one in (index if client.is_http else index["models"])}
    assert entries[name]["state"] == "READY"
    assert entries["broken"]["state"] == "UNAVAILABLE"
    assert "model.onnx" in entries["broken"]["reason"]
    await client("unload_model", name)
    assert not await client("is_model_ready", name)


def _no_such_model(client: Client) -> Any:
    return client.infer("nobody", [client.input("x", ARRAYS["FP32"], "FP32")])


def _no_such_metadata(client: Client) -> Any:
    return client("get_model_metadata", "nobody")


def _no_such_config(client: Client) -> Any:
    return client("get_model_config", "nobody")


def _wrong_datatype(client: Client) -> Any:
    return client.infer("onnx_fp32", [client.input("x", ARRAYS["INT32"], "INT32")])


def _wrong_shape(client: Client) -> Any:
    return client.infer("onnx_fp32", [client.input("x", np.zeros((1, 4), np.float32), "FP32")])


def _unknown_output(client: Client) -> Any:
    return client.infer("onnx_fp32", [client.input("x", ARRAYS["FP32"], "FP32")], outputs=[client.output("z")])


def _failing_model(client: Client) -> Any:
    x = client.input("x", np.zeros((1, 1), np.float32), "FP32")
    return client.infer("fake", [x], parameters={"fake_fail": "alas"})


def _broken_load(client: Client) -> Any:
    return client("load_model", "broken")


def _missing_load(client: Client) -> Any:
    return client("load_model", "nobody")


def _missing_unload(client: Client) -> Any:
    return client("unload_model", "nobody")


def _load_with_config(client: Client) -> Any:
    return client("load_model", "onnx_fp32", config='{"max_batch_size": "many"}')


@pytest.mark.parametrize(
    ("ask", "http", "grpc", "says"),
    [
        (_no_such_model, "404", "NOT_FOUND", "Request for unknown model"),
        (_no_such_metadata, "404", "NOT_FOUND", "Request for unknown model"),
        (_no_such_config, "404", "NOT_FOUND", "Request for unknown model"),
        (_wrong_datatype, "400", "INVALID_ARGUMENT", "INT32"),
        (_wrong_shape, "400", "INVALID_ARGUMENT", "[1, 4]"),
        (_unknown_output, "400", "INVALID_ARGUMENT", "'z'"),
        (_failing_model, "500", "INTERNAL", "alas"),
        (_broken_load, "400", "INVALID_ARGUMENT", "broken"),
        (_missing_load, "404", "NOT_FOUND", "failed to load"),
        (_missing_unload, "404", "NOT_FOUND", "nobody"),
        (_load_with_config, "400", "INVALID_ARGUMENT", "failed to load"),
    ],
)
async def test_errors_reach_the_user(client: Client, ask: Callable[[Client], Any], http: str, grpc: str, says: str):
    with pytest.raises(InferenceServerException) as caught:
        await ask(client)
    assert says in caught.value.message()
    assert caught.value.status() == (http if client.is_http else f"StatusCode.{grpc}")
