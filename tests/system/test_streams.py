"""Requests with any number of responses, on the real server: every route, slow and leaving clients, many at once."""

import asyncio
import http.client
import itertools
import json
import os
import queue
import signal
import socket
import threading
import time

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from running_server import RunningServer
from system.load import fake_model, infer, put, python_model, wait_for
from system.streams import (
    ENABLE_FINAL,
    HTTP_WAYS,
    MIB,
    MODELS,
    TELLER,
    TIMEOUT_S,
    WINDOW,
    Conversation,
    Item,
    assert_falls_to,
    event_item,
    generate_stream,
    infer_body,
    infer_stream,
    lines,
    message,
    message_item,
    resident_bytes,
    slow_reader,
    steady,
    stream_method,
    streaming_models,
)
from tritonclient.utils import InferenceServerException

from headrace.wire import pb

# Streams at once in the scale test; a thousand is a good number.
SCALE = int(os.environ.get("HEADRACE_TEST_STREAMS", "0"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = streaming_models(tmp_path_factory.mktemp("streams"))
    fake_model(repository, "echo")
    with RunningServer(repository) as running:
        yield running


# -- clients -----------------------------------------------------------------------------------------------------------


def grpc_stream(server, model, count, parameters=None):
    """The responses over a bare ModelStreamInfer."""
    with Conversation(server) as conversation:
        conversation.send(model, count, parameters)
        conversation.done()
        yield from conversation


def _triton_inputs(module, count):
    tensor = module.InferInput("count", [1], "INT32")
    tensor.set_data_from_numpy(np.array([count], np.int32))
    return [tensor]


def _triton_item(result, error):
    if error is not None:
        return Item(error=error.message())
    answer = pb.ModelStreamInferResponse()
    answer.infer_response.MergeFromString(result.get_response().SerializeToString())
    return message_item(answer)


def triton_stream(server, model, count, parameters=None):
    """The responses that tritonclient's callbacks are given."""
    answers = queue.SimpleQueue()
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(
            model,
            _triton_inputs(tritonclient.grpc, count),
            parameters=parameters or None,
            enable_empty_final_response=True,
        )
        while True:
            item = _triton_item(*answers.get(timeout=TIMEOUT_S))
            if item.final:
                break
            yield item
        client.stop_stream()


def triton_aio_stream(server, model, count, parameters=None):
    """The responses that tritonclient's aio client iterates over."""

    async def collect():
        async def requests():
            yield {
                "model_name": model,
                "inputs": _triton_inputs(tritonclient.grpc.aio, count),
                "parameters": parameters or None,
            }

        async with tritonclient.grpc.aio.InferenceServerClient(server.grpc) as client:
            return [_triton_item(*answer) async for answer in client.stream_infer(requests())]

    return iter(asyncio.run(collect()))


WAYS = [generate_stream, infer_stream, grpc_stream, triton_stream, triton_aio_stream]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def ask(request):
    """One way to ask after the other."""
    return request.param


@pytest.fixture(params=MODELS)
def model(request):
    """One model after the other."""
    return request.param


def stats(server, name):
    status, body = server.get(f"/v2/models/{name}/stats")
    assert status == 200
    return body["model_stats"][0]


def failures(server, name, reason):
    return server.metric("nv_inference_request_failure", model=name, reason=reason)


# -- how many responses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, WINDOW + 1, 200])
def test_every_response_comes_once_and_in_order(server, ask, model, count):
    items = list(ask(server, model, count))
    assert [item.error for item in items if item.error] == []
    assert [item.index for item in items] == list(range(count))
    assert [item.half for item in items] == [index / 2 for index in range(count)]


def test_a_model_that_answers_once_can_be_streamed(server):
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2.5]}]}
    for route, expected in (("infer_stream", None), ("generate_stream", [1.5, 2.5])):
        asked = {"x": [1.5, 2.5]} if route == "generate_stream" else body
        connection = http.client.HTTPConnection(server.http, timeout=TIMEOUT_S)
        connection.request("POST", f"/v2/models/echo/{route}", json.dumps(asked))
        response = connection.getresponse()
        (event,) = [json.loads(part[len("data: ") :]) for part in response.read().decode().split("\n\n") if part]
        connection.close()
        assert response.headers["content-type"].startswith("text/event-stream")
        if expected is None:
            assert event["outputs"][0]["data"] == [1.5, 2.5]
        else:
            assert event["y"] == expected


def test_generate_wants_exactly_one_response(server, model):
    def generate(count, **parameters):
        return server.post(f"/v2/models/{model}/generate", {"count": count, **parameters})

    status, body = generate(1)
    assert (status, body["index"], body["data"], body["half"]) == (200, 0, "x", 0.0)
    for count in (0, 2, 1000):
        status, body = generate(count)
        assert status == 400
        assert "exactly 1 response" in body["error"]
    status, body = generate(1, refuse_at=0)
    assert (status, "no 0 here" in body["error"]) == (400, True)
    status, body = generate(1, raise_at=0)
    assert status == 500


def test_generate_tells_the_error_that_follows_the_response(server, model):
    status, body = server.post(f"/v2/models/{model}/generate", {"count": 2, "refuse_at": 1})
    assert status == 400
    assert "no 1 here" in body["error"]


def test_the_last_response_is_told_where_that_is_asked_for(server, model):
    with Conversation(server) as conversation:
        conversation.send(model, 2, {ENABLE_FINAL: True}, "with")
        items = [next(iter(conversation)) for _ in range(3)]
        assert [(item.index, item.final) for item in items] == [(0, False), (1, False), (None, True)]
        assert {item.id for item in items} == {"with"}
        conversation.send(model, 0, {ENABLE_FINAL: True}, "empty")
        empty = next(iter(conversation))
        assert (empty.id, empty.index, empty.final) == ("empty", None, True)
        conversation.send(model, 2, None, "without")
        conversation.done()
        assert [(item.index, item.final) for item in conversation] == [(0, False), (1, False)]


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_error_before_the_first_response(server, ask, model):
    (item,) = ask(server, model, 3, {"refuse_at": 0})
    assert model in item.error
    assert "no 0 here" in item.error


@pytest.mark.parametrize("ask_http", HTTP_WAYS)
@pytest.mark.parametrize(("parameters", "status"), [({"refuse_at": 0}, 400), ({"raise_at": 0}, 500)])
def test_an_error_before_the_first_response_decides_on_the_status(server, ask_http, model, parameters, status):
    events = ask_http(server, model, 3, parameters)
    assert events.status == status
    assert events.response.headers["content-type"].startswith("text/event-stream")
    (item,) = events
    assert item.error
    events.close()


def test_an_error_between_responses_leaves_the_others(server, ask, model):
    items = list(ask(server, model, 4, {"error_at": 2}))
    assert [item.index for item in items] == [0, 1, None, 3]
    assert "2 is left out" in items[2].error


@pytest.mark.parametrize("parameters", [{"refuse_at": 2}, {"raise_at": 2}])
def test_an_error_that_ends_the_responses(server, ask, model, parameters):
    items = list(ask(server, model, 5, parameters))
    assert [item.index for item in items] == [0, 1, None]
    assert items[2].error


def test_an_error_leaves_the_grpc_stream_open(server, model):
    with Conversation(server) as conversation:
        answers = iter(conversation)
        conversation.send("nobody", 1, None, "one")
        assert next(answers).error.startswith("Request for unknown model")
        conversation.send(model, 3, {"refuse_at": 0}, "two")
        item = next(answers)
        assert (item.id, "no 0 here" in item.error) == ("two", True)
        conversation.send(model, 1, {"triton_other": 1}, "three")
        assert "triton_other" in next(answers).error
        conversation.send(model, 1, None, "four")
        assert next(answers).index == 0
        conversation.done()
        assert list(answers) == []
        assert conversation.call.code() is grpc.StatusCode.OK


def test_an_error_ends_the_grpc_stream_where_that_is_asked_for(server, model):
    with Conversation(server, metadata=[("triton_grpc_error", "true")]) as conversation:
        answers = iter(conversation)
        conversation.send(model, 5, {"refuse_at": 2})
        assert [next(answers).index, next(answers).index] == [0, 1]
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "no 2 here" in caught.value.details()


@pytest.mark.parametrize("route", ["generate", "generate_stream", "infer_stream"])
@pytest.mark.parametrize(
    ("name", "body", "status"),
    [
        ("nobody", {"count": 1}, 404),
        ("teller", b"{", 400),
        ("teller", {"count": "many"}, 400),
        ("teller", {"count": [1, 2]}, 400),
        ("teller", {}, 400),
        ("teller", {"count": 1, "timeout": -1}, 400),
    ],
)
def test_a_request_that_cannot_be_read_is_refused(server, route, name, body, status):
    if route == "infer_stream" and isinstance(body, dict):
        given = body.get("count", [])
        values = given if isinstance(given, list) else [given]
        tensor = {"name": "count", "datatype": "INT32", "shape": [len(values)], "data": values}
        parameters = {name: value for name, value in body.items() if name != "count"}
        body = {"inputs": [tensor] if "count" in body else [], "parameters": parameters}
    refused, _, answer = server.request("POST", f"/v2/models/{name}/{route}", body)
    assert refused == status, answer


# -- big responses, slow readers ---------------------------------------------------------------------------------------


def test_responses_of_ten_megabytes(server, ask, model):
    items = list(ask(server, model, 4, {"nbytes": 10 * MIB}))
    assert [(item.index, item.nbytes) for item in items] == [(index, 10 * MIB) for index in range(4)]


@pytest.mark.parametrize("way", ["generate_stream", "infer_stream", "grpc"])
def test_a_slow_reader_pauses_the_model_and_not_the_others(server, model, way, tmp_path):
    """Nobody makes thousands of responses ahead of a client that reads one."""
    journal = tmp_path / "journal"
    said = {"nbytes": 64 * 1024, "journal": str(journal)}
    with slow_reader(server, way, model, 3000, said) as read:
        assert read().index == 0
        steady(lambda: len(lines(journal)))
        ahead = len(lines(journal))
        assert ahead < 400, "it ran on although nobody read"
        assert [item.index for item in generate_stream(server, model, 50)] == list(range(50))
        assert len(lines(journal)) == ahead
        assert [read().index for _ in range(2999)] == list(range(1, 3000))
    wait_for(lambda: lines(journal)[-1] == "finally")
    assert lines(journal) == [*map(str, range(3000)), "finally"]


@pytest.mark.parametrize("way", ["generate_stream", "grpc"])
def test_a_slow_reader_of_big_responses_holds_little_memory(model, way, tmp_path):
    streaming_models(tmp_path)
    journal = tmp_path.with_name(f"{tmp_path.name}.journal")
    with RunningServer(tmp_path) as running:
        assert [item.index for item in generate_stream(running, model, 2, {"nbytes": 10 * MIB})] == [0, 1]
        before = resident_bytes(running)
        said = {"nbytes": 10 * MIB, "journal": str(journal)}
        with slow_reader(running, way, model, 100, said) as read:
            assert read().index == 0
            steady(lambda: len(lines(journal)), for_s=2)
            ahead, held = len(lines(journal)), resident_bytes(running) - before
    assert held < 150 * MIB, f"{held / MIB:.0f} MiB after {ahead} responses of 10 MiB"


# -- clients that leave ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["generate_stream", "infer_stream", "grpc", "grpc channel", "triton", "triton aio"])
def test_a_client_that_leaves_ends_its_request(server, model, way, tmp_path):
    journal = tmp_path / "journal"
    before = failures(server, model, "CANCELED")
    said = {"delay_ms": 5, "journal": str(journal)}
    leave = begin(server, way, model, 1_000_000, said)
    wait_for(lambda: len(lines(journal)) > 3)
    leave()
    wait_for(lambda: lines(journal)[-1] == "finally", what="the model to be told")
    assert len(lines(journal)) < 2000
    wait_for(lambda: failures(server, model, "CANCELED") == before + 1, what="the request to be counted")
    assert [item.index for item in generate_stream(server, model, 3)] == [0, 1, 2]
    assert server.metric("headrace_executing_batches", model=model) == 0


def begin(server, way, model, count, said):
    """Ask, read two responses, and return what leaves."""
    if way in ("generate_stream", "infer_stream"):
        events = {"generate_stream": generate_stream, "infer_stream": infer_stream}[way](server, model, count, said)
        assert [next(events).index, next(events).index] == [0, 1]
        return events.close
    if way == "triton aio":
        return _begin_triton_aio(server, model, count, said)
    if way == "triton":
        answers = queue.SimpleQueue()
        client = tritonclient.grpc.InferenceServerClient(server.grpc)
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(model, _triton_inputs(tritonclient.grpc, count), parameters=said)
        assert _triton_item(*answers.get(timeout=TIMEOUT_S)).index == 0

        def leave():
            client.stop_stream(cancel_requests=True)
            client.close()

        return leave
    conversation = Conversation(server)
    conversation.send(model, count, said)
    answers = iter(conversation)
    assert [next(answers).index, next(answers).index] == [0, 1]
    if way == "grpc":
        return conversation.__exit__
    return conversation._channel.close


def _begin_triton_aio(server, model, count, said):
    begun, left = threading.Event(), threading.Event()

    async def talk():
        async def requests():
            yield {"model_name": model, "inputs": _triton_inputs(tritonclient.grpc.aio, count), "parameters": said}

        async with tritonclient.grpc.aio.InferenceServerClient(server.grpc) as client:
            answers = client.stream_infer(requests())
            async for answer in answers:
                assert _triton_item(*answer).index == 0
                break
            begun.set()
            await asyncio.to_thread(left.wait)
            answers.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(talk()))
    thread.start()
    assert begun.wait(TIMEOUT_S)

    def leave():
        left.set()
        thread.join()

    return leave


@pytest.mark.parametrize("route", ["generate_stream", "infer_stream"])
def test_a_client_that_leaves_before_the_first_response_ends_its_request(server, route, tmp_path):
    """Whoever waits for something slow and gives up must not keep the model at it."""
    journal = tmp_path / "journal"
    said = {"delay_ms": 700, "journal": str(journal)}
    before = failures(server, "teller", "CANCELED")
    body = {"count": 1000, **said} if route != "infer_stream" else infer_body(1000, said)
    connection = http.client.HTTPConnection(server.http, timeout=TIMEOUT_S)
    connection.request("POST", f"/v2/models/teller/{route}", json.dumps(body))
    wait_for(lambda: server.metric("headrace_executing_batches", model="teller") == 1)
    connection.close()
    wait_for(lambda: lines(journal)[-1:] == ["finally"], what="the model to be told")
    assert len(lines(journal)) < 20
    wait_for(lambda: failures(server, "teller", "CANCELED") == before + 1, what="the request to be counted")


def test_the_statistics_of_responses_tell_of_a_client_that_left(server, tmp_path):
    journal = tmp_path / "journal"

    def cancelled():
        return sum(one["cancel"]["count"] for one in stats(server, "teller")["response_stats"].values())

    before = cancelled()
    leave = begin(server, "generate_stream", "teller", 1_000_000, {"delay_ms": 5, "journal": str(journal)})
    leave()
    wait_for(lambda: lines(journal)[-1:] == ["finally"])
    wait_for(lambda: cancelled() > before)


def test_what_was_streamed_is_in_the_statistics(server, model):
    before = stats(server, model)["inference_stats"]["success"]["count"]
    of_third = stats(server, model)["response_stats"].get("2", {}).get("success", {}).get("count", 0)
    assert len(list(generate_stream(server, model, 3))) == 3
    after = stats(server, model)
    assert after["inference_stats"]["success"]["count"] == before + 1
    assert after["response_stats"]["2"]["success"]["count"] == of_third + 1


# -- many --------------------------------------------------------------------------------------------------------------


def test_many_requests_on_one_grpc_stream_are_answered_side_by_side(server, model, tmp_path):
    """Two hundred requests of other lengths; one that goes on until all others are done does not hold them up."""
    done = tmp_path / "done"
    said = {"delay_ms": 10, "until": str(done), ENABLE_FINAL: True}
    lengths = {str(number): number % 7 for number in range(200)}
    with Conversation(server) as conversation:
        conversation.send(model, 1_000_000, said, "slow")
        for request_id, length in lengths.items():
            conversation.send(model, length, {ENABLE_FINAL: True}, request_id)
        conversation.done()
        items, over = [], 0
        for item in conversation:
            items.append(item)
            over += bool(item.final)
            if over == len(lengths):
                done.touch()
    assert [item.error for item in items if item.error] == []
    by_id = {}
    for item in items:
        by_id.setdefault(item.id, []).append(item.index)
    *indexes, last = by_id.pop("slow")
    assert (indexes, last) == ([*range(len(indexes))], None)
    assert by_id == {request_id: [*range(length), None] for request_id, length in lengths.items()}
    ids = [item.id for item in items]
    changes = sum(one != other for one, other in itertools.pairwise(ids))
    assert changes > len(by_id), "responses of different requests come between each other"


async def _stream_of(server, model, count, said):
    """One generate_stream on a bare connection; the indexes of its responses."""
    host, port = server.http.split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    body = json.dumps({"count": count, **said}).encode()
    head = f"POST /v2/models/{model}/generate_stream HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    indexes = []
    try:
        while line := await reader.readline():
            if line.startswith(b"data: "):
                indexes.append(event_item(json.loads(line[len(b"data: ") :])).index)
            elif line == b"0\r\n":
                break
    finally:
        writer.close()
        await writer.wait_closed()
    return indexes


async def _many(server, model, streams, count, said):
    """So many streams at once, half of them over HTTP and half over twenty gRPC channels; all indexes."""
    channels = [
        grpc.aio.insecure_channel(server.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(20)
    ]

    async def over_grpc(number):
        call = stream_method(channels[number % len(channels)])(timeout=TIMEOUT_S * 2)
        await call.write(message(model, count, said))
        await call.done_writing()
        return [message_item(answer).index async for answer in call]

    try:
        return await asyncio.gather(
            *(_stream_of(server, model, count, said) for _ in range(streams // 2)),
            *(over_grpc(number) for number in range(streams - streams // 2)),
        )
    finally:
        for channel in channels:
            await channel.close()


def _many_streams(server, model, streams):
    """Run them; what memory the server had before."""
    front = psutil.Process(server.process.pid)
    asyncio.run(_many(server, model, 50, 20, {"nbytes": 1000}))
    descriptors = front.num_fds()
    memory = resident_bytes(server)
    answers = asyncio.run(
        _many(server, model, streams, 40, {"delay_ms": 1 if model == "sender" else 0, "nbytes": 2000})
    )
    assert [one for one in answers if one != list(range(40))] == []
    wait_for(lambda: server.metric("headrace_executing_batches", model=model) == 0)
    wait_for(lambda: front.num_fds() <= descriptors + 5, what="descriptors to be closed")
    return memory


def test_three_hundred_streams_at_once_leave_no_memory_behind(server, model):
    _many_streams(server, model, 300)  # so that pools have their size
    assert_falls_to(server, _many_streams(server, model, 300) + 16 * MIB)


@pytest.mark.skipif(not SCALE, reason="the scale test wants HEADRACE_TEST_STREAMS=1000")
def test_streams_at_scale(server, model):
    _many_streams(server, model, SCALE)
    assert_falls_to(server, _many_streams(server, model, SCALE) + 32 * MIB)


# -- a model that changes while it streams -----------------------------------------------------------------------------


def test_a_new_version_takes_over_and_the_old_one_finishes(tmp_path):
    """The old version's streams cannot end before their clients read on."""
    python_model(tmp_path, "teller", TELLER)
    said = ("teller", 120, {"nbytes": MIB // 2})
    with (
        RunningServer(tmp_path) as running,
        slow_reader(running, "generate_stream", *said) as read_http,
        slow_reader(running, "grpc", *said) as read_grpc,
    ):
        assert (read_http().index, read_grpc().index) == (0, 0)
        put(tmp_path / "teller" / "2", "model.py", (tmp_path / "teller" / "1" / "model.py").read_bytes())
        running.wait_for(lambda: running.get("/v2/models/teller/versions/2/ready")[0] == 200)
        assert [item.index for item in generate_stream(running, "teller", 3)] == [0, 1, 2]
        assert len(running.workers()) == 2
        for read in (read_http, read_grpc):
            assert [read().index for _ in range(119)] == list(range(1, 120))
        running.wait_for(lambda: len(running.workers()) == 1)


def test_a_model_that_is_unloaded_finishes_its_streams(tmp_path):
    python_model(tmp_path, "teller", TELLER)
    with RunningServer(tmp_path, "--model-control", "explicit", "--load-model", "*") as running:
        events = generate_stream(running, "teller", 40, {"delay_ms": 50})
        assert next(events).index == 0
        assert running.post("/v2/repository/models/teller/unload")[0] == 200
        assert running.post("/v2/models/teller/generate_stream", {"count": 1})[0] == 404
        assert [item.index for item in events] == list(range(1, 40))
        running.wait_for(lambda: not running.workers())
        assert running.post("/v2/repository/models/teller/load")[0] == 200
        assert [item.index for item in generate_stream(running, "teller", 2)] == [0, 1]


# -- the end -----------------------------------------------------------------------------------------------------------


def test_streams_finish_while_the_server_drains(tmp_path):
    streaming_models(tmp_path)
    with RunningServer(tmp_path) as running, Conversation(running) as busy, Conversation(running) as idle:
        idle.send("teller", 1)
        assert next(iter(idle)).index == 0
        done = tmp_path.with_name(f"{tmp_path.name}.done")
        said = {"delay_ms": 20, "until": str(done)}
        streams = [way(running, name, 1_000_000, said) for way in HTTP_WAYS for name in MODELS]
        assert [next(stream).index for stream in streams] == [0] * 4
        busy.send("sender", 1_000_000, said)
        assert next(iter(busy)).index == 0
        running.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:  # before those that are busy are done
            next(iter(idle))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "stopping" in caught.value.details()
        done.touch()
        for stream in streams:
            indexes = [item.index for item in stream]
            assert indexes == list(range(1, 1 + len(indexes)))
        indexes = []
        with pytest.raises(grpc.RpcError) as caught:
            indexes.extend(item.index for item in busy)
        assert indexes == list(range(1, 1 + len(indexes)))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert running.process.wait(60) == 0


def test_idle_grpc_streams_do_not_hold_up_the_end(tmp_path):
    streaming_models(tmp_path)
    with RunningServer(tmp_path) as running, Conversation(running) as one, Conversation(running) as other:
        one.send("teller", 1)
        assert next(iter(one)).index == 0
        infer(running.http, "nobody", [1.0])
        began = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - began < 20, "less than the drain may take"
        for conversation in (one, other):
            with pytest.raises(grpc.RpcError) as caught:
                next(iter(conversation))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_streams_past_the_drain_time_are_cut(tmp_path):
    """An endless stream gets its time and no more, and its client sees that this was not the end."""
    streaming_models(tmp_path)
    with RunningServer(tmp_path, "--drain-timeout", "1") as running, Conversation(running) as conversation:
        raw = socket.create_connection(running.http.split(":"), timeout=TIMEOUT_S)
        body = json.dumps({"count": 1_000_000, "delay_ms": 20}).encode()
        head = f"POST /v2/models/teller/generate_stream HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        assert b" 200 " in raw.recv(1000)
        conversation.send("sender", 1_000_000, {"delay_ms": 20})
        assert next(iter(conversation)).index == 0
        running.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        with pytest.raises(grpc.RpcError):
            list(conversation)
        assert not ended_as_a_whole(raw)
        raw.close()
        assert running.process.wait(60) == 0
        assert time.monotonic() - began < 25


def ended_as_a_whole(connection):
    """Whether the response that is being read from a bare connection was ended as responses should be."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        return False
    return received.endswith(b"0\r\n\r\n")


def test_tritonclient_reports_the_servers_end(tmp_path):
    streaming_models(tmp_path)
    answers = queue.SimpleQueue()
    with RunningServer(tmp_path) as running, tritonclient.grpc.InferenceServerClient(running.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("teller", _triton_inputs(tritonclient.grpc, 1))
        assert _triton_item(*answers.get(timeout=TIMEOUT_S)).index == 0
        assert running.stop() == 0
        _, error = answers.get(timeout=TIMEOUT_S)
        assert isinstance(error, InferenceServerException)
        client.stop_stream()
