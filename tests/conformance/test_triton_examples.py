"""What Triton's published examples do, each family as a program of our own, with tritonclient over the same models."""

import asyncio
import gc
import inspect
import io
import os
import queue
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import accumulate
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import triton_models
import tritonclient.utils.shared_memory as shm
from PIL import Image
from running_server import RunningServer
from test_tritonclient import CLIENTS, Client
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import (
    InferenceServerException,
    deserialize_bytes_tensor,
    serialize_byte_tensor,
    triton_to_np_dtype,
)

# The aio client of HTTP looks at the status of a health check and leaves the body in its connection.
# That it sends a large tensor in one piece, aiohttp thinks worth a warning.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning"),
]

FLAGS = ("--server-name", "triton", "--model-control", "explicit", "--load-model", "*", "--allow-client-shm")
TIMEOUT_S = 60
LEFT = np.arange(16, dtype=np.int32).reshape(1, 16)
RIGHT = np.ones((1, 16), np.int32)


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory):
    """A server that calls itself triton and has the models of the examples."""
    repository = triton_models.build(tmp_path_factory.mktemp("triton"))
    with RunningServer(repository, *FLAGS, "--max-own-workers", "4", "--max-shared-workers", "2") as running:
        yield running


async def _close(client: Client) -> None:
    closed = client.real.close()
    if inspect.isawaitable(closed):
        await closed


@pytest.fixture(params=CLIENTS)
async def client(request: pytest.FixtureRequest, triton: RunningServer):
    """One of tritonclient's clients after the other."""
    made = Client(request.param, triton)
    yield made
    await _close(made)
    if request.param == "http.aio":
        del made
        gc.collect()  # so that the client's warnings come here, where they are expected


@pytest.fixture(params=["grpc", "grpc.aio"])
async def streaming_client(request: pytest.FixtureRequest, triton: RunningServer):
    """One of the clients that can stream after the other."""
    made = Client(request.param, triton)
    yield made
    await _close(made)


def _both(client: Client, left: np.ndarray, right: np.ndarray, datatype: str) -> list[Any]:
    return [client.input("INPUT0", left, datatype), client.input("INPUT1", right, datatype)]


def _assert_sum_and_difference(result: Any, left: np.ndarray = LEFT, right: np.ndarray = RIGHT) -> None:
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), left + right)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), left - right)


def _texts(numbers: np.ndarray) -> np.ndarray:
    return np.array([str(number).encode() for number in numbers.reshape(-1)], np.object_).reshape(numbers.shape)


# ---- inference ----


async def _successes(client: Client, model: str) -> int:
    statistics = await client("get_inference_statistics", model_name=model)
    (one,) = statistics["model_stats"] if client.is_http else statistics.model_stats
    if client.is_http:
        assert (one["name"], one["version"]) == (model, "1")
        return one["inference_stats"]["success"]["count"]
    assert (one.name, one.version) == (model, "1")
    return one.inference_stats.success.count


async def test_infer(client: Client):
    before = await _successes(client, "simple")
    inputs = _both(client, LEFT, RIGHT, "INT32")
    outputs = [client.output("OUTPUT0"), client.output("OUTPUT1")]
    named: dict[str, Any] = {"headers": {"test": "1"}}
    if client.is_http:
        inputs[0].set_data_from_numpy(LEFT, binary_data=False)
        outputs[1] = client.output("OUTPUT1", binary_data=False)
        named["query_params"] = {"test_1": 1, "test_2": 2}
    _assert_sum_and_difference(await client.infer("simple", inputs, outputs=outputs, **named))
    _assert_sum_and_difference(await client.infer("simple", inputs, **named))
    assert await _successes(client, "simple") == before + 2
    with pytest.raises(InferenceServerException) as caught:
        await client.infer("wrong_model_name", inputs)
    assert caught.value.message().startswith("Request for unknown model")


async def test_infer_while_others_are_under_way(client: Client):
    lefts = [LEFT + number for number in range(10)]
    if client.name == "http":
        await _close(client)
        client.real = client.module.InferenceServerClient(client.real._parsed_url.netloc, concurrency=len(lefts))
        pending = [client.real.async_infer("simple", _both(client, left, RIGHT, "INT32")) for left in lefts]
        results = [one.get_result() for one in pending]
    elif client.name == "grpc":
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        for number, left in enumerate(lefts):
            client.real.async_infer(
                "simple",
                _both(client, left, RIGHT, "INT32"),
                lambda result, error: answers.put((result, error)),
                request_id=str(number),
                client_timeout=TIMEOUT_S,
            )
        received = [answers.get(timeout=TIMEOUT_S) for _ in lefts]
        assert [error for _, error in received if error] == []
        results = sorted((result for result, _ in received), key=lambda result: int(result.get_response().id))
    else:
        results = await asyncio.gather(*(client.infer("simple", _both(client, left, RIGHT, "INT32")) for left in lefts))
    for result, left in zip(results, lefts, strict=True):
        _assert_sum_and_difference(result, left)


async def test_numbers_as_strings(client: Client):
    result = await client.infer("simple_string", _both(client, _texts(LEFT), _texts(RIGHT), "BYTES"))
    _assert_sum_and_difference(
        _Converted({name: result.as_numpy(name).astype(np.int64) for name in ("OUTPUT0", "OUTPUT1")})
    )


class _Converted:
    """A result whose arrays are something else than what came."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.as_numpy = arrays.__getitem__


@pytest.mark.parametrize("value", [b"he\x00llo", b"\x00\x01\x02\x03", b"", "caf\u00e9".encode()])
async def test_strings_come_back_byte_for_byte(client: Client, value: bytes):
    array = np.full((1, 16), value, np.object_)
    result = await client.infer("simple_identity", [client.input("INPUT0", array, "BYTES")])
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), array)
    if client.is_http:
        result = await client.infer(
            "simple_identity",
            [client.input("INPUT0", array, "BYTES", binary_data=False)],
            outputs=[client.output("OUTPUT0", binary_data=False)],
        )
        np.testing.assert_array_equal(
            np.char.encode(result.as_numpy("OUTPUT0").astype(str), "utf-8"), array.astype("S")
        )


async def test_batches_of_every_size_up_to_the_largest(client: Client):
    for rows in (1, 2, 7, 8):
        left = np.arange(rows * 16, dtype=np.int32).reshape(rows, 16)
        result = await client.infer("simple", _both(client, left, np.repeat(RIGHT, rows, 0), "INT32"))
        _assert_sum_and_difference(result, left)


async def test_clients_that_come_and_go_leave_nothing_behind(triton: RunningServer):
    process = psutil.Process(triton.process.pid)
    array = np.arange(16, dtype=np.int32).reshape(1, 16)

    async def come_and_go(name: str, times: int) -> None:
        for _ in range(times):
            client = Client(name, triton)
            result = await client.infer("custom_identity_int32", [client.input("INPUT0", array, "INT32")])
            np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), array)
            await _close(client)

    for name in ("http", "grpc"):
        await come_and_go(name, 2)
        before = process.num_fds()
        await come_and_go(name, 30)
        triton.wait_for(lambda before=before: process.num_fds() <= before + 2)


# ---- shared memory ----


@asynccontextmanager
async def _region(client: Client, name: str, byte_size: int, contents: Sequence[np.ndarray] = ()) -> AsyncIterator[Any]:
    """Shared memory that the server may use too, under a name of this client's own; yields its handle and that name."""
    own = f"{client.name}-{name}-{os.getpid()}"
    handle = shm.create_shared_memory_region(own, f"/{own}", byte_size)
    try:
        if contents:
            shm.set_shared_memory_region(handle, list(contents))
        await client("register_system_shared_memory", own, f"/{own}", byte_size)
        yield handle, own
    finally:
        await client("unregister_system_shared_memory", own)
        shm.destroy_shared_memory_region(handle)


async def _region_names(client: Client) -> set[str]:
    status = await client("get_system_shared_memory_status")
    return {one["name"] for one in status} if client.is_http else set(status.regions)


def _read(client: Client, handle: Any, result: Any, name: str, offset: int = 0) -> np.ndarray:
    """An output that was left in shared memory: the response only tells what is there."""
    output = result.get_output(name)
    if client.is_http:
        assert "data" not in output
        datatype, shape = output["datatype"], output["shape"]
    else:
        assert set(result.get_response().raw_output_contents) <= {b""}
        datatype, shape = output.datatype, output.shape
    return np.array(shm.get_contents_as_numpy(handle, triton_to_np_dtype(datatype), list(shape), offset=offset))


async def test_tensors_in_shared_memory(client: Client):
    await client("unregister_system_shared_memory")
    await client("unregister_cuda_shared_memory")
    size = LEFT.nbytes
    async with _region(client, "in", 2 * size, [LEFT, RIGHT]) as (_, given), _region(client, "out", 2 * size) as made:
        handle, out = made
        assert await _region_names(client) == {given, out}
        inputs = [client.module.InferInput(f"INPUT{index}", [1, 16], "INT32") for index in (0, 1)]
        outputs = [client.output(f"OUTPUT{index}") for index in (0, 1)]
        for index in (0, 1):
            inputs[index].set_shared_memory(given, size, offset=index * size)
            outputs[index].set_shared_memory(out, size, offset=index * size)
        result = await client.infer("simple", inputs, outputs=outputs)
        arrays = {f"OUTPUT{index}": _read(client, handle, result, f"OUTPUT{index}", index * size) for index in (0, 1)}
        _assert_sum_and_difference(_Converted(arrays))
    assert await _region_names(client) == set()


async def test_strings_in_shared_memory(client: Client):
    inputs = [serialize_byte_tensor(_texts(numbers)) for numbers in (LEFT, RIGHT)]
    sizes = [len(array.item()) for array in inputs]
    expected = [_texts(LEFT + RIGHT), _texts(LEFT - RIGHT)]
    out_sizes = [len(serialize_byte_tensor(array).item()) for array in expected]
    async with (
        _region(client, "in", sum(sizes), inputs) as (_, given),
        _region(client, "out0", out_sizes[0]) as first,
        _region(client, "out1", out_sizes[1]) as second,
    ):
        asked = [client.module.InferInput(f"INPUT{index}", [1, 16], "BYTES") for index in (0, 1)]
        asked[0].set_shared_memory(given, sizes[0])
        asked[1].set_shared_memory(given, sizes[1], offset=sizes[0])
        outputs = [client.output(f"OUTPUT{index}") for index in (0, 1)]
        for output, (_, own), size in zip(outputs, (first, second), out_sizes, strict=True):
            output.set_shared_memory(own, size)
        result = await client.infer("simple_string", asked, outputs=outputs)
        for index, (handle, _) in enumerate((first, second)):
            np.testing.assert_array_equal(_read(client, handle, result, f"OUTPUT{index}"), expected[index])


async def test_objects_are_used_again_with_and_without_shared_memory(client: Client):
    size = LEFT.nbytes
    async with _region(client, "in", 2 * size, [LEFT, RIGHT]) as (_, given), _region(client, "out", 2 * size) as made:
        handle, out = made
        inputs = _both(client, LEFT, RIGHT, "INT32")
        outputs = [client.output(f"OUTPUT{index}") for index in (0, 1)]
        for shared in (True, False, True):
            right = RIGHT if shared else RIGHT * 2
            for index, array in enumerate((LEFT, right)):
                if shared:
                    inputs[index].set_shared_memory(given, size, offset=index * size)
                    outputs[index].set_shared_memory(out, size, offset=index * size)
                else:
                    inputs[index].set_data_from_numpy(array)
                    outputs[index].unset_shared_memory()
            result = await client.infer("simple", inputs, outputs=outputs)
            names = ("OUTPUT0", "OUTPUT1")
            if shared:
                result = _Converted(
                    {name: _read(client, handle, result, name, index * size) for index, name in enumerate(names)}
                )
            _assert_sum_and_difference(result, LEFT, right)


# ---- sequences ----

VALUES = [11, 7, 5, 3, 2, 0, 1]


def _begun_and_ended(values: Sequence[int], identity: int = 0) -> list[int]:
    """What simple_sequence answers, and with an identity simple_dyna_sequence."""
    return [values[0] + 1, *values[1:-1], values[-1] + identity]


def _summed(values: Sequence[int], identity: str) -> list[int]:
    """What simple_string_dyna_sequence answers."""
    *sums, last = accumulate(values)
    return [*sums, last + int(identity)]


def _sequences(offset: int) -> Iterable[tuple[str, int | str, list[int], list[int]]]:
    """Sequences as the examples send them: a model, an id, the values, the answers."""
    up, down, third = [0, *VALUES], [100, *(-value for value in VALUES)], [20, *(-value for value in VALUES)]
    one, other, word = 1000 + offset, 1001 + offset, str(1002 + offset)
    yield "simple_sequence", one, up, _begun_and_ended(up)
    yield "simple_sequence", other, down, _begun_and_ended(down)
    yield "simple_sequence", str(uuid.uuid4()), third, _begun_and_ended(third)
    yield "simple_dyna_sequence", one, up, _begun_and_ended(up, one)
    yield "simple_dyna_sequence", other, down, _begun_and_ended(down, other)
    yield "simple_string_dyna_sequence", word, third, _summed(third, word)


def _steps(client: Client, model: str, identity: int | str, values: Sequence[int]) -> Iterable[dict[str, Any]]:
    for index, value in enumerate(values):
        yield {
            "model_name": model,
            "inputs": [client.input("INPUT", np.array([[value]], np.int32), "INT32")],
            "outputs": [client.output("OUTPUT")],
            "request_id": f"{model} {identity}_{index}",
            "sequence_id": identity,
            "sequence_start": index == 0,
            "sequence_end": index == len(values) - 1,
        }


async def test_sequences_one_request_at_a_time(client: Client):
    for model, identity, values, expected in _sequences(10):
        steps = _steps(client, model, identity, values)
        answers = [(await client("infer", **step)).as_numpy("OUTPUT").tolist() for step in steps]
        assert answers == [[[one]] for one in expected], f"{model} {identity}"


async def test_sequences_that_run_side_by_side(client: Client):
    """Requests of all of them in turns: each has what is its own."""
    sequences = list(_sequences(20))
    answers: list[list[int]] = [[] for _ in sequences]
    for turn in zip(
        *(_steps(client, model, identity, values) for model, identity, values, _ in sequences), strict=True
    ):
        for step, answered in zip(turn, answers, strict=True):
            answered.append(int((await client("infer", **step)).as_numpy("OUTPUT")[0, 0]))
    assert answers == [expected for *_, expected in sequences]


async def test_a_stateful_model_wants_a_sequence(client: Client):
    x = client.input("INPUT", np.array([[1]], np.int32), "INT32")
    with pytest.raises(InferenceServerException, match="correlation ID"):
        await client.infer("simple_sequence", [x])
    with pytest.raises(InferenceServerException, match="4711"):
        await client.infer("simple_sequence", [x], sequence_id=4711)  # which nothing has begun


# ---- streams ----


async def _converse(client: Client, requests: Iterable[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """Send all of it on one stream; every response in the order in which they came, as result and error."""
    if client.name == "grpc":
        answers: list[tuple[Any, Any]] = []
        client.real.start_stream(lambda result, error: answers.append((result, error)), stream_timeout=TIMEOUT_S)
        for request in requests:
            client.real.async_stream_infer(**request)
        client.real.stop_stream()
        return answers

    async def each() -> AsyncIterator[dict[str, Any]]:
        for request in requests:
            yield request

    return [answer async for answer in client.real.stream_infer(each(), stream_timeout=TIMEOUT_S)]


async def _results(client: Client, requests: Iterable[dict[str, Any]]) -> list[Any]:
    answers = await _converse(client, requests)
    assert [error for _, error in answers if error is not None] == []
    return [result for result, _ in answers]


async def test_sequences_on_one_stream(streaming_client: Client):
    sequences = list(_sequences(30))
    steps = [
        step for model, identity, values, _ in sequences for step in _steps(streaming_client, model, identity, values)
    ]
    received: dict[str, list[int]] = {}
    for result in await _results(streaming_client, steps):
        name = result.get_response().id.rpartition("_")[0]
        received.setdefault(name, []).append(int(result.as_numpy("OUTPUT")[0, 0]))
    assert received == {f"{model} {identity}": expected for model, identity, _, expected in sequences}


def _repeat(client: Client, values: Sequence[int], delays_ms: Sequence[int], wait_ms: int = 1) -> dict[str, Any]:
    inputs = [
        client.input("IN", np.array(values, np.int32), "INT32"),
        client.input("DELAY", np.array(delays_ms, np.uint32), "UINT32"),
        client.input("WAIT", np.array([wait_ms], np.uint32), "UINT32"),
    ]
    return {"model_name": "repeat_int32", "inputs": inputs}


async def test_many_responses_to_one_request(streaming_client: Client):
    values = list(range(100, 110))
    request = _repeat(streaming_client, values, [20] * 10, wait_ms=100)
    results = await _results(streaming_client, [request])
    assert [result.as_numpy("OUT").tolist() for result in results] == [[value] for value in values]
    assert [result.as_numpy("IDX").tolist() for result in results] == [[index] for index in range(10)]
    only_one = [streaming_client.output("OUT")]
    results = await _results(streaming_client, [{**request, "outputs": only_one}])
    assert [[output.name for output in result.get_response().outputs] for result in results] == [["OUT"]] * 10


async def test_as_many_responses_as_are_asked_for(streaming_client: Client):
    requests = [
        {
            "model_name": "square_int32",
            "inputs": [streaming_client.input("IN", np.array([count], np.int32), "INT32")],
            "request_id": str(index),
        }
        for index, count in enumerate([4, 2, 0, 1])
    ]
    received: dict[str, list[int]] = {}
    for result in await _results(streaming_client, requests):
        received.setdefault(result.get_response().id, []).append(int(result.as_numpy("OUT")[0]))
    assert received == {"0": [4, 4, 4, 4], "1": [2, 2], "3": [1]}


async def test_the_last_response_says_so_where_that_is_asked_for(triton: RunningServer):
    client = Client("grpc", triton)  # the aio one cannot ask

    def final(result: Any) -> bool:
        return result.get_response().parameters["triton_final_response"].bool_param

    for values in ([], [7], [7, 8, 9]):
        request = _repeat(client, values, [1] * len(values))
        results = await _results(client, [{**request, "enable_empty_final_response": True}])
        assert [final(result) for result in results] == [False] * (len(results) - 1) + [True]
        numbers = [result.as_numpy("OUT").item() for result in results if result.get_response().outputs]
        assert numbers == values
    await _close(client)


async def test_errors_on_a_stream_leave_it_open(streaming_client: Client):
    good = _repeat(streaming_client, [5], [1])
    bad = _repeat(streaming_client, [5, 6], [1])
    unknown = {**good, "model_name": "wrong_model_name"}
    answers = await _converse(streaming_client, [bad, good, unknown, good])
    messages = [error.message() for _, error in answers if error is not None]
    assert len(answers) == 4
    assert len(messages) == 2
    assert any("and DELAY (1,)" in message for message in messages)
    assert any("Request for unknown model" in message for message in messages)
    assert [result.as_numpy("OUT").item() for result, error in answers if error is None] == [5, 5]


async def test_decoupled_models_are_for_streams_only(client: Client):
    with pytest.raises(InferenceServerException, match="decoupled") as caught:
        await client("infer", **_repeat(client, [1], [1]))
    assert caught.value.status() == ("501" if client.is_http else "StatusCode.UNIMPLEMENTED")


# ---- health, metadata, control ----


def _as_dict(client: Client, message: Any) -> Any:
    if client.is_http:
        return message
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True)


async def _config(client: Client, model: str) -> dict[str, Any]:
    config = _as_dict(client, await client("get_model_config", model))
    return config if client.is_http else config["config"]


async def test_health_and_metadata(client: Client):
    extra: dict[str, Any] = {"headers": {"test": "1", "dummy": "2"}}
    if client.is_http:
        extra["query_params"] = {"test_1": 1, "test_2": 2}
    assert await client("is_server_live", **extra)
    assert await client("is_server_ready")
    assert await client("is_model_ready", "simple")
    server = _as_dict(client, await client("get_server_metadata"))
    assert server["name"] == "triton"
    assert {"classification", "sequence", "statistics", "system_shared_memory"} <= set(server["extensions"])
    model = _as_dict(client, await client("get_model_metadata", "simple", **extra))
    assert (model["name"], model["versions"], model["platform"]) == ("simple", ["1"], "onnxruntime_onnx")
    for side, name in (("inputs", "INPUT"), ("outputs", "OUTPUT")):
        described = [(one["name"], one["datatype"], [int(size) for size in one["shape"]]) for one in model[side]]
        assert described == [(f"{name}{index}", "INT32", [-1, 16]) for index in (0, 1)]
    with pytest.raises(InferenceServerException, match="Request for unknown model"):
        await client("get_model_metadata", "wrong_model_name")
    assert (await _config(client, "simple"))["name"] == "simple"


async def test_what_clients_of_image_models_read_in_the_configuration(client: Client):
    config = await _config(client, "inception_onnx")
    (pixels,), (classes,) = config["input"], config["output"]
    assert (pixels["name"], pixels["format"]) == ("input", "FORMAT_NHWC")
    assert [int(size) for size in pixels["dims"]] == [299, 299, 3]
    assert classes["label_filename"] == "inception_labels.txt"
    assert (await _config(client, "densenet_onnx"))["input"][0]["format"] == "FORMAT_NCHW"
    ensemble = await _config(client, "preprocess_inception_ensemble")
    assert (ensemble["platform"], ensemble["max_batch_size"], len(ensemble["input"])) == ("ensemble", 128, 1)


async def test_model_control(client: Client, triton: RunningServer):
    name = f"controlled_by_{client.name}"
    triton_models.write(triton.repository, name, triton_models.add_sub(name))
    index = _as_dict(client, await client("get_model_repository_index"))
    listed = {one["name"] for one in (index if client.is_http else index["models"])}
    assert listed >= {*triton_models.PUBLISHED, name}
    await client("load_model", name)
    assert await client("is_model_ready", name)

    with pytest.raises(InferenceServerException, match="failed to load"):
        await client("load_model", name, config='"parameters": {"config": {{"max_batch_size": "16"}}}')
    assert (await _config(client, name))["max_batch_size"] == 8
    await client("load_model", name, config='{"max_batch_size":"16"}')
    assert (await _config(client, name))["max_batch_size"] == 16
    left = np.arange(12 * 16, dtype=np.int32).reshape(12, 16)
    result = await client.infer(name, _both(client, left, np.repeat(RIGHT, 12, 0), "INT32"))
    _assert_sum_and_difference(result, left)
    await client("load_model", name)
    assert (await _config(client, name))["max_batch_size"] == 8

    with pytest.raises(InferenceServerException, match="Invalid file path"):
        await client("load_model", name, config="{}", files={"file:" + "A" * 256: b"a"})
    assert await client("is_server_live")
    await client("unload_model", name)
    assert not await client("is_model_ready", name)
    with pytest.raises(InferenceServerException, match="failed to load"):
        await client("load_model", "wrong_model_name")


# ---- gRPC as such ----


@pytest.mark.parametrize("name", ["grpc", "grpc.aio"])
@pytest.mark.parametrize("way", ["keepalive", "channel arguments"])
async def test_channels_as_users_set_them_up(triton: RunningServer, name: str, way: str):
    client = Client(name, triton)
    await _close(client)
    named: dict[str, Any] = {
        "keepalive_options": client.module.KeepAliveOptions(
            keepalive_time_ms=2**31 - 1,
            keepalive_timeout_ms=20000,
            keepalive_permit_without_calls=False,
            http2_max_pings_without_data=2,
        )
    }
    if way == "channel arguments":
        named = {
            "channel_args": [
                ("grpc.max_send_message_length", 1024 * 1024),
                ("grpc.max_receive_message_length", 1024 * 1024),
                ("grpc.keepalive_permit_without_calls", False),
                ("grpc.dns_enable_srv_queries", 1),
            ]
        }
    client.real = client.module.InferenceServerClient(triton.grpc, **named)
    _assert_sum_and_difference(await client.infer("simple", _both(client, LEFT, RIGHT, "INT32")))
    await _close(client)


@pytest.fixture
def stub(triton: RunningServer):
    """The service by the classes that protoc makes."""
    with grpc.insecure_channel(triton.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def _explicit(model: str, datatype: str, field: str, left: Sequence[Any], right: Sequence[Any]) -> Any:
    """A request with its values in the typed fields of ``contents``."""
    request = service_pb2.ModelInferRequest(model_name=model, id="my request id")
    for index, values in enumerate((left, right)):
        tensor = request.inputs.add(name=f"INPUT{index}", datatype=datatype, shape=[1, 16])
        getattr(tensor.contents, field).extend(values)
        request.outputs.add(name=f"OUTPUT{index}")
    return request


@pytest.mark.parametrize(
    ("model", "datatype", "dtype"), [("simple", "INT32", np.int32), ("simple_int8", "INT8", np.int8)]
)
def test_values_in_typed_contents(stub: Any, model: str, datatype: str, dtype: type):
    response = stub.ModelInfer(_explicit(model, datatype, "int_contents", range(16), [1] * 16))
    arrays = {
        output.name: np.frombuffer(raw, dtype).reshape(output.shape)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    _assert_sum_and_difference(_Converted(arrays), LEFT.astype(dtype), RIGHT.astype(dtype))
    assert response.id == "my request id"


def test_strings_in_typed_contents(stub: Any):
    texts = [str(number).encode() for number in range(16)]
    response = stub.ModelInfer(_explicit("simple_string", "BYTES", "bytes_contents", texts, [b"1"] * 16))
    arrays = {
        output.name: deserialize_bytes_tensor(raw).astype(np.int64).reshape(output.shape)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    _assert_sum_and_difference(_Converted(arrays))


def test_contents_and_raw_contents_do_not_go_together(stub: Any):
    request = _explicit("simple", "INT32", "int_contents", range(8, 16), [1] * 16)
    request.raw_input_contents.append(np.arange(8, dtype=np.int32).tobytes())
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    said = "contents field must not be specified when using raw_input_contents for 'INPUT0' for model 'simple'"
    assert said in caught.value.details()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_version_is_a_number(stub: Any):
    request = _explicit("simple_int8", "INT8", "int_contents", range(16), [1] * 16)
    request.model_version = "wrong_specification"
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    said = "failed to get model version from specified version string 'wrong_specification'"
    assert said in caught.value.details()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# ---- pictures ----


def _pictures(count: int) -> list[bytes]:
    """JPEG files, no two alike."""
    files = []
    for seed in range(count):
        pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((160, 120)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files


def _scaled(file: bytes, size: int) -> np.ndarray:
    """A picture as the examples hand it to a classifier: channels last, from -1 to 1."""
    picture = Image.open(io.BytesIO(file)).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture, np.float32) / np.float32(127.5) - np.float32(1)


def _classes(probabilities: np.ndarray, count: int) -> list[bytes]:
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [f"{probabilities[index]:f}:{index}:thing {index}".encode() for index in best]


async def test_classes_of_a_batch_of_pictures(client: Client):
    pixels = np.stack([_scaled(file, 299) for file in _pictures(2)])
    inputs = [client.input("input", pixels, "FP32")]
    plain = (await client.infer("inception_onnx", inputs)).as_numpy(triton_models.INCEPTION_OUTPUT)
    assert plain.argmax(axis=1).tolist() != [plain.argmax(axis=1)[0]] * 2  # pictures are told apart
    asked = [client.output(triton_models.INCEPTION_OUTPUT, class_count=3)]
    result = await client.infer("inception_onnx", inputs, outputs=asked)
    found = result.as_numpy(triton_models.INCEPTION_OUTPUT)
    assert found.shape == (2, 3)
    assert found.tolist() == [_classes(row, 3) for row in plain]


async def test_classes_of_one_picture_without_a_batch(client: Client):
    pixels = np.transpose(_scaled(_pictures(1)[0], 224), (2, 0, 1))
    inputs = [client.input("data_0", pixels, "FP32")]
    plain = (await client.infer("densenet_onnx", inputs)).as_numpy("fc6_1")
    assert plain.shape == (1000,)
    result = await client.infer("densenet_onnx", inputs, outputs=[client.output("fc6_1", class_count=3)])
    assert result.as_numpy("fc6_1").tolist() == _classes(plain, 3)


async def test_classes_of_whole_numbers_without_labels(client: Client):
    inputs = _both(client, LEFT[0], RIGHT[0], "INT32")
    outputs = [client.output("OUTPUT0", class_count=2), client.output("OUTPUT1")]
    result = await client.infer("simple_no_batch", inputs, outputs=outputs)
    assert result.as_numpy("OUTPUT0").tolist() == [b"16:15", b"15:14"]
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), (LEFT - RIGHT)[0])


async def test_classes_on_a_stream(streaming_client: Client):
    requests = [
        {
            "model_name": "inception_onnx",
            "inputs": [streaming_client.input("input", _scaled(file, 299)[np.newaxis], "FP32")],
            "outputs": [streaming_client.output(triton_models.INCEPTION_OUTPUT, class_count=1)],
            "request_id": str(number),
        }
        for number, file in enumerate(_pictures(3))
    ]
    results = await _results(streaming_client, requests)
    assert sorted(result.get_response().id for result in results) == ["0", "1", "2"]
    for result in results:
        ((only,),) = result.as_numpy(triton_models.INCEPTION_OUTPUT)
        assert only.decode().split(":")[2] == f"thing {only.decode().split(':')[1]}"


async def test_an_ensemble_takes_the_files_themselves(client: Client):
    files = _pictures(3)
    pixels = np.stack([_scaled(file, 299) for file in files])
    direct = await client.infer("inception_onnx", [client.input("input", pixels, "FP32")])
    expected = direct.as_numpy(triton_models.INCEPTION_OUTPUT)
    inputs = [client.input("INPUT", np.array(files, np.object_).reshape(3, 1), "BYTES")]
    result = await client.infer("preprocess_inception_ensemble", inputs)
    np.testing.assert_allclose(result.as_numpy("OUTPUT"), expected, rtol=1e-4, atol=1e-7)
    asked = [client.output("OUTPUT", class_count=1)]
    result = await client.infer("preprocess_inception_ensemble", inputs, outputs=asked)
    found = [text.decode().split(":") for text in result.as_numpy("OUTPUT").reshape(3)]
    assert [int(index) for _, index, *_ in found] == expected.argmax(axis=1).tolist()
    assert [label for *_, label in found] == [f"thing {index}" for index in expected.argmax(axis=1)]


async def test_an_ensemble_passes_on_what_a_step_says(client: Client):
    no_picture = client.input("INPUT", np.array([[b"no picture"]], np.object_), "BYTES")
    with pytest.raises(InferenceServerException, match="INPUT is no picture") as caught:
        await client.infer("preprocess_inception_ensemble", [no_picture])
    assert caught.value.status() == ("400" if client.is_http else "StatusCode.INVALID_ARGUMENT")


# ---- models for Triton's Python backend ----

QUARTERS = np.array([0.25, 0.5, 0.75, 1.0], np.float32)
HALVES = np.array([0.5, 1.0, 1.5, 2.0], np.float32)


async def test_a_python_model(client: Client):
    result = await client.infer("add_sub", _both(client, QUARTERS, HALVES, "FP32"), request_id="1")
    _assert_sum_and_difference(result, QUARTERS, HALVES)


@pytest.mark.parametrize(("model", "max_batch_size"), [("nobatch_auto_complete", 0), ("batch_auto_complete", 4)])
async def test_python_models_that_complete_their_configuration(client: Client, model: str, max_batch_size: int):
    config = await _config(client, model)
    assert config.get("max_batch_size", 0) == max_batch_size
    assert ("dynamic_batching" in config) == (max_batch_size > 0)
    for side, name in (("input", "INPUT"), ("output", "OUTPUT")):
        described = [(one["name"], one["data_type"], [int(size) for size in one["dims"]]) for one in config[side]]
        assert described == [(f"{name}{index}", "TYPE_FP32", [4]) for index in (0, 1)]
    left, right = (np.stack([one, one + 1]) if max_batch_size else one for one in (QUARTERS, HALVES))
    _assert_sum_and_difference(await client.infer(model, _both(client, left, right, "FP32")), left, right)


@pytest.mark.parametrize("called", ["add_sub", "nobatch_auto_complete"])
async def test_a_python_model_that_calls_another(client: Client, called: str):
    inputs = _both(client, QUARTERS, HALVES, "FP32")
    inputs.append(client.input("MODEL_NAME", np.array([called], np.object_), "BYTES"))
    outputs = [client.output("OUTPUT0"), client.output("OUTPUT1")]
    _assert_sum_and_difference(await client.infer("bls_sync", inputs, outputs=outputs), QUARTERS, HALVES)


async def test_a_python_model_that_calls_one_that_is_not_there(client: Client):
    inputs = _both(client, QUARTERS, HALVES, "FP32")
    inputs.append(client.input("MODEL_NAME", np.array(["undefined_model"], np.object_), "BYTES"))
    with pytest.raises(InferenceServerException, match="undefined_model"):
        await client.infer("bls_sync", inputs)


async def test_a_python_model_that_calls_several_at_once(client: Client):
    _assert_sum_and_difference(
        await client.infer("bls_async", _both(client, QUARTERS, HALVES, "FP32")), QUARTERS, HALVES
    )


@pytest.mark.parametrize(("model", "times"), [("bls_decoupled_sync", 1), ("bls_decoupled_async", 2)])
async def test_a_python_model_that_calls_a_decoupled_one(client: Client, model: str, times: int):
    for count in (4, 2, 0, 1):
        result = await client.infer(model, [client.input("IN", np.array([count], np.int32), "INT32")])
        assert result.as_numpy("SUM").tolist() == [times * count * count]


async def test_error_codes_reach_a_model_that_calls(client: Client):
    for code in (1, 2, 3, 4, 5, 7):
        result = await client.infer(
            "bls_error_caller", [client.input("ERROR_CODE", np.array([code], np.int32), "INT32")]
        )
        assert result.as_numpy("RECEIVED_CODE").tolist() == [code]
        assert f"as asked, error {code}" in result.as_numpy("ERROR_MESSAGE")[0].decode()


@pytest.mark.parametrize(
    ("code", "http", "rpc"),
    [
        (1, "500", "INTERNAL"),
        (2, "404", "NOT_FOUND"),
        (3, "400", "INVALID_ARGUMENT"),
        (4, "503", "UNAVAILABLE"),
        (5, "501", "UNIMPLEMENTED"),
    ],
)
async def test_error_codes_reach_the_client(client: Client, code: int, http: str, rpc: str):
    with pytest.raises(InferenceServerException, match=f"as asked, error {code}") as caught:
        await client.infer("error_source", [client.input("ERROR_CODE", np.array([code], np.int32), "INT32")])
    assert caught.value.status() == (http if client.is_http else f"StatusCode.{rpc}")


async def test_metrics_of_a_model_s_own(client: Client, triton: RunningServer):
    inputs = [client.input("INPUT0", QUARTERS, "FP32")]
    labels = {"model": "custom_metrics", "version": "1"}
    before = triton.metric("example_values_seen", **labels)  # nobody else asks this model, so it has settled
    for _ in range(2):
        await client.infer("custom_metrics", inputs)
    # the worker tells of it some time after the answer
    triton.wait_for(lambda: triton.metric("example_values_seen", **labels) == before + 2 * len(QUARTERS))
    status, _, text = triton.request("GET", "/metrics")
    assert status == 200
    for line in (
        b"# HELP example_values_seen Values that came in\n",
        b"# TYPE example_values_seen counter\n",
        b'example_values_seen{model="custom_metrics",version="1"}',
    ):
        assert line in text
