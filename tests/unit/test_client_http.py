"""The client over HTTP, with a made-up server in the place of the network."""

import asyncio
import json
from itertools import pairwise

import httpx
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.client import (
    AsyncClient,
    Client,
    ClientError,
    ConnectionFailed,
    DeadlineError,
    ForbiddenError,
    InferenceError,
    InvalidRequestError,
    NotFoundError,
    ProtocolError,
    Sequence,
    UnavailableError,
)
from headrace.client.address import parse_address
from headrace.client.events import EventReader
from headrace.client.http_transport import AsyncHttpTransport, HttpTransport
from headrace.client.transport import Limits

LENGTH = "Inference-Header-Content-Length"
LIMITS = Limits(4, 1 << 20)
URL = "http://server:8000"
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def sync_client(server, limits=LIMITS, **options):
    client = Client(URL, **options)
    client._transport.close()
    client._transport = HttpTransport(parse_address(URL), limits, httpx.MockTransport(server))
    return client


def async_client(server, limits=LIMITS, **options):
    client = AsyncClient(URL, **options)
    client._transport = AsyncHttpTransport(parse_address(URL), limits, httpx.MockTransport(server))
    return client


class Driven:
    """An AsyncClient that is called as a Client is; streams come as lists."""

    def __init__(self, server, limits=LIMITS, **options):
        self._make = lambda: async_client(server, limits, **options)

    def __getattr__(self, name):
        async def call(*arguments, **named):
            async with self._make() as client:
                if name == "stream":
                    return [part async for part in client.stream(*arguments, **named)]
                return await getattr(client, name)(*arguments, **named)

        return lambda *arguments, **named: asyncio.run(call(*arguments, **named))


@pytest.fixture(params=[sync_client, Driven], ids=["sync", "async"])
def client(request):
    """A maker of clients of a made-up server."""
    return request.param


def parsed(request):
    """The JSON of an inference request, and what follows it."""
    length = int(request.headers[LENGTH])
    return json.loads(request.content[:length]), request.content[length:]


def answer(outputs, blob=b"", **fields):
    header = json.dumps({"model_name": "m", "model_version": "3", "outputs": outputs, **fields}).encode()
    return httpx.Response(200, headers={LENGTH: str(len(header))}, content=header + blob)


def fresh(reply):
    """The same once more: httpx binds a response to the client that read it."""
    return httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)


def output(name, datatype, shape, size=None, data=None):
    value = {"name": name, "datatype": datatype, "shape": shape}
    return {**value, "data": data} if size is None else {**value, "parameters": {"binary_data_size": size}}


def events(*values):
    content = b"".join(b"data: %s\n\n" % json.dumps(value).encode() for value in values)
    return httpx.Response(200, headers={"content-type": "text/event-stream; charset=utf-8"}, content=content)


def part(number):
    return {"model_name": "m", "model_version": "1", "outputs": [output("y", "INT32", [1], data=[number])]}


# -- requests ------------------------------------------------------------------------------------------------------


def test_a_request_is_json_and_then_every_input(client):
    seen = []

    def server(request):
        seen.append(request)
        return answer([])

    client(server, headers={"x-all": "1"}).infer(
        "a model/ü",
        {"x": X, "text": np.array(["ab", "c"])},
        version="2",
        id="7",
        parameters={"priority": 2},
        sequence=Sequence(5, end=True),
        headers={"x-one": "2"},
    )
    (request,) = seen
    assert request.method == "POST"
    assert request.url.raw_path == b"/v2/models/a%20model%2F%C3%BC/versions/2/infer"
    assert (request.headers["x-all"], request.headers["x-one"]) == ("1", "2")
    assert request.headers["accept-encoding"] == "identity"
    header, blob = parsed(request)
    assert header == {
        "id": "7",
        "parameters": {
            "priority": 2,
            "sequence_id": 5,
            "sequence_start": False,
            "sequence_end": True,
            "binary_data_output": True,
        },
        "inputs": [
            {"name": "x", "shape": [2, 3], "datatype": "FP32", "parameters": {"binary_data_size": 24}},
            {"name": "text", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": 11}},
        ],
    }
    assert blob == X.tobytes() + b"\2\0\0\0ab\1\0\0\0c"


def test_wanted_outputs_are_asked_for_as_binary(client):
    seen = []

    def server(request):
        seen.append(parsed(request)[0])
        return answer([])

    client(server).infer("m", {"x": X}, outputs={"y": {"classification": 2}, "z": {"binary_data": False}})
    assert seen[0]["outputs"] == [
        {"name": "y", "parameters": {"binary_data": True, "classification": 2}},
        {"name": "z", "parameters": {"binary_data": False}},
    ]
    assert "parameters" not in seen[0]


def test_only_a_limit_of_the_call_itself_is_told_to_the_server(client):
    seen = []

    def server(request):
        seen.append(parsed(request)[0]["parameters"].get("timeout"))
        return answer([])

    for options in ({}, {"timeout_s": 1.5}, {"timeout_s": 1.5, "parameters": {"timeout": 9}}):
        client(server).infer("m", {"x": X}, **options)
    assert seen == [None, 1_500_000, 9]


def test_lists_ask_for_the_metadata_once(client):
    paths = []

    def server(request):
        paths.append(request.url.path)
        if request.method == "GET":
            return httpx.Response(200, json={"name": "m", "inputs": [output("x", "INT16", [-1])], "outputs": []})
        assert parsed(request)[0]["inputs"][0]["datatype"] == "INT16"
        return answer([])

    one = client(server)
    if isinstance(one, Driven):  # which makes a client for each call
        one.infer("m", {"x": [1, 2]})
        assert paths == ["/v2/models/m", "/v2/models/m/infer"]
        return
    one.infer("m", {"x": [1, 2]})
    one.infer("m", {"x": [3]})
    one.infer("m", {"x": np.array([3], np.int16)})
    assert paths == ["/v2/models/m", *["/v2/models/m/infer"] * 3]


def test_metadata_are_read_again_when_a_request_was_refused_and_after_a_load():
    reads = []

    def server(request):
        if request.method == "GET":
            reads.append(request.url.path)
            datatype = "INT16" if len(reads) == 1 else "INT32"
            return httpx.Response(200, json={"name": "m", "inputs": [output("x", datatype, [-1])]})
        if request.url.path.endswith("/load"):
            return httpx.Response(200)
        fits = parsed(request)[0]["inputs"][0]["datatype"] == "INT32"
        return answer([]) if fits else httpx.Response(400, json={"error": "has datatype INT16, expected INT32"})

    client = sync_client(server)
    with pytest.raises(InvalidRequestError, match="expected INT32"):
        client.infer("m", {"x": [1]})
    client.infer("m", {"x": [1]})
    assert len(reads) == 2
    client.infer("m", {"x": [1]})
    assert len(reads) == 2
    client.load("m")
    client.infer("m", {"x": [1]})
    assert len(reads) == 3


@pytest.mark.parametrize(
    "options", [{"headers": {"a b": "x"}}, {"headers": {"a": "x\r\ny: z"}}, {"headers": {"a": "ä"}}, {"timeout_s": 0}]
)
def test_terms_that_cannot_be_kept_are_refused(client, options):
    with pytest.raises(InvalidRequestError):
        client(lambda _: answer([])).infer("m", {"x": X}, **options)


@pytest.mark.parametrize("name", ["", ".", "..", "\ud800"])
def test_names_that_no_path_can_have(client, name):
    for method in ("metadata", "config", "load", "unload"):
        with pytest.raises(InvalidRequestError, match="no name of a model"):
            getattr(client(lambda _: answer([])), method)(name)
    with pytest.raises(InvalidRequestError):
        client(lambda _: answer([])).infer(name, {"x": X})


@pytest.mark.parametrize(
    ("asked", "said"),
    [((5,), "the model is 5"), (("m", 1), "the version is 1"), (("m", 0), "the version is 0"), ((b"m",), "b'm'")],
)
def test_names_and_versions_are_texts(client, asked, said):
    for method in ("metadata", "config"):
        with pytest.raises(InvalidRequestError, match=f"{said}, expected a text"):
            getattr(client(lambda _: answer([])), method)(*asked)


# -- answers -------------------------------------------------------------------------------------------------------


def test_an_answer_is_arrays_of_the_callers_own(client):
    halves = np.array([1.5, -2], ml_dtypes.bfloat16)
    reply = answer(
        [
            output("y", "FP32", [2, 3], 24),
            output("n", "INT64", [2], data=[1, -5]),
            output("h", "BF16", [2], 4),
            output("t", "BYTES", [1, 2], 11),
            output("b", "BOOL", [2, 1], data=[[True], [False]]),
            output("e", "FP32", [0, 4], 0),
        ],
        X.tobytes() + halves.tobytes() + b"\2\0\0\0\xffb\1\0\0\0c",
        id="7",
        parameters={"p": 1.5},
    )
    result = client(lambda _: reply).infer("m", {"x": X})
    assert (result.model_name, result.model_version, result.id, result.parameters) == ("m", "3", "7", {"p": 1.5})
    assert list(result.outputs) == ["y", "n", "h", "t", "b", "e"]
    np.testing.assert_array_equal(result["y"], X)
    np.testing.assert_array_equal(result["n"], [1, -5])
    assert result["h"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(result["h"], halves)
    assert result["t"].tolist() == [[b"\xffb", b"c"]]
    assert result["b"].tolist() == [[True], [False]]
    assert result["e"].shape == (0, 4)
    for array in result.outputs.values():
        assert array.flags.writeable
        assert array.flags.aligned
    with pytest.raises(KeyError, match="no output 'label', only y, n, h"):
        result["label"]


def test_numbers_that_json_has_no_words_for(client):
    text = (
        b'{"model_name": "m", "outputs": [{"name": "y", "datatype": "FP32", "shape": [3], "data": [NaN, -Infinity, 1]},'
        b'{"name": "h", "datatype": "FP16", "shape": [1], "data": [0.5]}]}'
    )
    result = client(lambda _: httpx.Response(200, content=text)).infer("m", {"x": X})
    np.testing.assert_array_equal(result["y"], np.array([np.nan, -np.inf, 1], np.float32))
    assert result["h"].dtype == np.float16


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (answer([output("y", "FP32", [2], 8)], b"\0" * 7), "binary_data_size 8, and 7 bytes follow"),
        (answer([output("y", "FP32", [2], 8)], b"\0" * 9), "1 bytes follow the last"),
        (answer([output("y", "FP32", [3], 8)], b"\0" * 8), "said to be FP32"),
        (answer([output("y", "FP33", [2], 8)], b"\0" * 8), "FP33"),
        (answer([output("y", "BYTES", [1], 4)], b"\5\0\0\0"), "output 'y'"),
        (answer([output("y", "INT8", [1], data=[300])]), "output 'y'"),
        (answer([{"name": "y", "datatype": "FP32", "shape": [1]}]), "neither data"),
        (answer([{"name": "y", "datatype": "FP32", "shape": "wide"}]), "not what the protocol says"),
        (httpx.Response(200, content=b"<html>"), "not what the protocol says"),
        (httpx.Response(200, content=b"{}", headers={LENGTH: "9"}), "'9'"),
        (httpx.Response(200, content=b"{}", headers={LENGTH: "x"}), "'x'"),
    ],
)
def test_answers_that_break_the_protocol_are_errors_of_their_own(client, reply, said):
    with pytest.raises(ProtocolError, match=said):
        client(lambda _: fresh(reply)).infer("m", {"x": X})


def test_an_answer_that_does_not_decompress(client):
    def server(_):
        return httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b"no gzip"))

    with pytest.raises(ProtocolError, match="does not decompress"):
        client(server).infer("m", {"x": X})


def test_an_answer_over_the_bound_is_not_read_to_its_end(client):
    read = []

    def pieces():
        for number in range(100):
            read.append(number)
            yield bytes(1000)

    async def async_pieces():
        for piece in pieces():
            yield piece

    def server(_):
        content = pieces() if client is sync_client else async_pieces()
        return httpx.Response(200, content=content)

    with pytest.raises(ProtocolError, match="over 5000 bytes"):
        client(server, Limits(1, 5000)).infer("m", {"x": X})
    assert len(read) < 10


@pytest.mark.parametrize(
    ("reply", "kind", "status", "said"),
    [
        (httpx.Response(404, json={"error": "no 'm'"}), NotFoundError, 404, "no 'm'"),
        (httpx.Response(503, json={"error": "full"}), UnavailableError, 503, "full"),
        (httpx.Response(403, json={"error": "no"}), ForbiddenError, 403, "no"),
        (httpx.Response(422, json={"detail": [{"msg": "x"}]}), InvalidRequestError, 422, '[{"msg": "x"}]'),
        (httpx.Response(500, content=b"oh\xff"), InferenceError, 500, "HTTP status 500: oh\N{REPLACEMENT CHARACTER}"),
        (httpx.Response(302, headers={"location": "/"}), InferenceError, 302, "HTTP status 302"),
    ],
)
def test_refusals_have_the_servers_words(client, reply, kind, status, said):
    with pytest.raises(InferenceError) as caught:
        client(lambda _: fresh(reply)).infer("m", {"x": X})
    assert (type(caught.value), caught.value.status, str(caught.value)) == (kind, status, said)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (httpx.ConnectError("refused"), ConnectionFailed),
        (httpx.RemoteProtocolError("cut"), ConnectionFailed),
        (httpx.ReadTimeout("slow"), DeadlineError),
        (httpx.PoolTimeout("busy"), DeadlineError),
    ],
)
def test_trouble_on_the_way(client, raised, kind):
    def server(_):
        raise raised

    with pytest.raises(kind, match="http://server:8000"):
        client(server).infer("m", {"x": X})


def test_a_call_is_sent_once(client):
    sent = []

    def server(_):
        sent.append(1)
        return httpx.Response(503, json={"error": "full"})

    with pytest.raises(UnavailableError):
        client(server).infer("m", {"x": X})
    assert len(sent) == 1


async def test_an_async_call_ends_at_its_deadline():
    async def server(_):
        await asyncio.Event().wait()

    async with async_client(server) as client:
        with pytest.raises(DeadlineError, match=r"within 0\.01 s"):
            await client.infer("m", {"x": X}, timeout_s=0.01)
        with pytest.raises(DeadlineError):
            await anext(client.stream("m", {"x": X}, timeout_s=0.01))


def test_a_closed_client_says_so():
    client = sync_client(lambda _: answer([]))
    with client:
        client.infer("m", {"x": X})
    with pytest.raises(ClientError, match="is closed"):
        client.infer("m", {"x": X})
    client.close()


# -- everything else -----------------------------------------------------------------------------------------------


def test_health_is_the_status(client):
    for status, body, wanted in ((200, b"", True), (200, b"OK", True), (400, b"", False), (503, b"{}", False)):
        one = client(lambda _, status=status, body=body: httpx.Response(status, content=body))
        assert one.is_live() is wanted
        assert one.is_ready() is wanted
        assert one.is_ready("m") is wanted
    with pytest.raises(ForbiddenError):
        client(lambda _: httpx.Response(403)).is_ready()


def test_nobody_there_is_not_ready(client):
    def server(_):
        raise httpx.ConnectError("refused")

    assert not client(server).is_live()
    with pytest.raises(DeadlineError, match=r"^model 'm' at http://server:8000 was not ready within 0\.3 s: refused$"):
        client(server).wait_until_ready(0.3, "m")


def test_waiting_ends_when_the_server_is_ready(client):
    paths = []

    def server(request):
        paths.append(request.url.path)
        return httpx.Response(200 if len(paths) > 1 else 503, json={"error": "2 models are loading"})

    client(server).wait_until_ready(60, "m", version="4")
    assert paths == ["/v2/models/m/versions/4/ready"] * 2


def test_the_rest_of_the_surface(client):
    seen = []
    replies = {
        "/v2": {"name": "s", "version": "1", "extensions": ["e"]},
        "/v2/models/m/versions/2": {"name": "m", "versions": ["2"], "platform": "p", "inputs": [], "outputs": []},
        "/v2/models/m/config": {"name": "m", "max_batch_size": 4},
        "/v2/models/m/stats": {"model_stats": [{"name": "m", "inference_stats": {"success": {"count": 2, "ns": 9}}}]},
        "/v2/models/stats": {"model_stats": []},
        "/v2/repository/index": [
            {"name": "b", "version": "1", "state": "READY"},
            {"name": "b", "version": "2"},
            {"name": "a"},
        ],
    }

    def server(request):
        seen.append((request.method, request.url.path, request.content))
        return (
            httpx.Response(200, json=replies[request.url.path]) if request.url.path in replies else httpx.Response(200)
        )

    one = client(server)
    assert one.server().extensions == ("e",)
    assert one.metadata("m", "2").versions == ("2",)
    assert one.config("m") == {"name": "m", "max_batch_size": 4}
    assert one.statistics("m")[0].inference_stats.success.ns == 9
    assert one.statistics() == ()
    assert one.models() == ["a", "b"]
    assert one.index(ready=True)[0].state == "READY"
    one.load("m", {"max_batch_size": 2}, {"1/model.onnx": b"\xff"})
    one.load("m")
    one.unload("m", unload_dependents=True)
    posts = [(path, json.loads(body)) for method, path, body in seen if method == "POST"]
    assert posts == [
        ("/v2/repository/index", {"ready": False}),
        ("/v2/repository/index", {"ready": True}),
        (
            "/v2/repository/models/m/load",
            {"parameters": {"config": '{"max_batch_size": 2}', "file:1/model.onnx": "/w=="}},
        ),
        ("/v2/repository/models/m/load", {}),
        ("/v2/repository/models/m/unload", {"parameters": {"unload_dependents": True}}),
    ]


def test_metadata_that_are_none(client):
    with pytest.raises(ProtocolError, match="/v2/models/m "):
        client(lambda _: httpx.Response(200, json=[1])).metadata("m")


# -- streams -------------------------------------------------------------------------------------------------------


def test_a_stream_is_a_result_for_each_event(client):
    seen = []

    def server(request):
        seen.append(request)
        return events(part(1), part(2), part(3))

    parts = list(client(server).stream("m", {"x": X}, outputs=["y"], version="2"))
    assert [one["y"].item() for one in parts] == [1, 2, 3]
    assert seen[0].url.path == "/v2/models/m/versions/2/infer_stream"
    assert seen[0].headers["accept"] == "text/event-stream"
    header, blob = parsed(seen[0])
    assert header["outputs"] == [{"name": "y", "parameters": {}}]
    assert "parameters" not in header
    assert blob == X.tobytes()


def test_a_stream_may_be_empty(client):
    assert list(client(lambda _: events()).stream("m", {"x": X})) == []


def test_an_error_in_the_midst_of_a_stream_comes_after_what_was_before_it():
    parts = sync_client(lambda _: events(part(1), {"error": "the model failed"})).stream("m", {"x": X})
    assert next(parts)["y"].item() == 1
    with pytest.raises(InferenceError, match=r"^the model failed$"):
        next(parts)


def test_a_stream_that_is_refused(client):
    with pytest.raises(NotFoundError, match="no 'm'"):
        list(client(lambda _: httpx.Response(404, json={"error": "no 'm'"})).stream("m", {"x": X}))
    reply = {"content-type": "text/event-stream; charset=utf-8"}
    said = b'data: {"error": "the queue is full"}\n\n'
    with pytest.raises(UnavailableError, match=r"^the queue is full$"):
        list(client(lambda _: httpx.Response(503, headers=reply, content=said)).stream("m", {"x": X}))
    with pytest.raises(ProtocolError, match="expected text/event-stream"):
        list(client(lambda _: httpx.Response(200, json={})).stream("m", {"x": X}))


def test_a_stream_that_is_cut_off(client):
    reply = {"content-type": "text/event-stream"}
    with pytest.raises(ProtocolError, match="midst of an event"):
        list(client(lambda _: httpx.Response(200, headers=reply, content=b'data: {"outputs"')).stream("m", {"x": X}))
    with pytest.raises(ProtocolError, match="not what the protocol says"):
        list(client(lambda _: httpx.Response(200, headers=reply, content=b"data: 1\n\n")).stream("m", {"x": X}))


class Endless(httpx.SyncByteStream, httpx.AsyncByteStream):
    """Events for as long as somebody reads them."""

    def __init__(self):
        self.sent = 0
        self.closed = False

    def __iter__(self):
        while True:
            self.sent += 1
            yield b"data: %s\n\n" % json.dumps(part(self.sent)).encode()

    async def __aiter__(self):
        for piece in self:
            yield piece

    def close(self):
        self.closed = True

    async def aclose(self):
        self.closed = True


def endless(stream):
    return lambda _: httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=stream)


def test_a_stream_is_read_no_further_than_its_caller_asks():
    stream = Endless()
    parts = sync_client(endless(stream)).stream("m", {"x": X})
    assert stream.sent == 0
    for number, one in enumerate(parts, 1):
        assert one["y"].item() == number == stream.sent
        if number == 3:
            break
    assert not stream.closed
    parts.close()
    assert stream.closed


async def test_an_async_stream_is_read_no_further_than_its_caller_asks():
    stream = Endless()
    async with async_client(endless(stream)) as client:
        parts = client.stream("m", {"x": X})
        assert (await anext(parts))["y"].item() == 1
        assert stream.sent == 1
        await parts.aclose()
        assert stream.closed


@given(st.lists(st.integers(0, 300), max_size=40), st.sampled_from([b"\n", b"\r\n"]))
def test_events_are_the_same_however_they_are_cut(cuts, end):
    lines = [
        b": a comment",
        b"",
        b"data: one",
        b"",
        b"event: x",
        b"data:two",
        b"data: lines",
        b"id: 5",
        b"",
        b"data",
        b"",
    ]
    text = end.join([*lines, b""])
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    reader = EventReader(1000)
    found = [event for a, b in pairwise(places) for event in reader.feed(text[a:b])]
    reader.finish()
    assert found == [b"one", b"two\nlines", b""]


@pytest.mark.parametrize("piece", [b"data: ", b"x" * 10, b"data: 12345\n", b"data:\n"])
def test_an_event_without_an_end_is_not_collected_for_ever(piece):
    reader = EventReader(1000)
    fed = 0

    def feed_all():
        nonlocal fed
        while fed < 300 * len(piece):
            fed += len(piece)
            reader.feed(piece)

    with pytest.raises(ProtocolError, match="over 1000 bytes"):
        feed_all()
    assert fed < 1500
