"""The fast lane over a made-up transport and a made-up engine."""

import asyncio
import gc
import gzip
import json
import weakref
import zlib
from time import monotonic_ns
from types import SimpleNamespace

import numpy as np
import pytest
import uvicorn
from uvicorn.server import ServerState

from headrace.core.errors import InternalError, InvalidRequest, NotFound, Overloaded
from headrace.core.request import InferResponse
from headrace.core.tensor import DataType, Tensor
from headrace.frontends import http_incoming, http_lane
from headrace.frontends.arrivals import Arrivals
from headrace.frontends.http_lane import lane
from headrace.frontends.infer import HttpInfer
from headrace.frontends.infer_target import infer_target

LIMIT = 4096


class Transport(asyncio.Transport):
    """A client's end: keeps what it was sent."""

    def __init__(self):
        super().__init__({"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 80)})
        self.sent = b""
        self.closed = self.half_closed = self.aborted = False
        self.reading = True

    def write(self, data):
        # What asyncio and uvloop do.
        if self.half_closed:
            raise RuntimeError("Cannot call write() after write_eof()")
        if not self.closed:
            self.sent += bytes(data)

    def writelines(self, pieces):
        for piece in pieces:
            self.write(piece)

    def can_write_eof(self):
        return True

    def write_eof(self):
        self.half_closed = True

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    def abort(self):
        self.closed = self.aborted = True

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True


class Engine:
    """Accepts everything and answers when told to."""

    def __init__(self):
        self.repository = SimpleNamespace(lookup=None)
        self.accepted = []
        self.refusal = None
        self.unreadable = 0

    def count_unreadable(self, model, version):
        self.unreadable += 1

    def infer(self, request):
        if self.refusal is not None:
            raise self.refusal
        future = asyncio.get_running_loop().create_future()
        self.accepted.append((request, future))
        return future

    def answer(self, at=0, nbytes=1):
        request, future = self.accepted[at]
        y = Tensor("y", DataType.UINT8, (nbytes,), b"\x01" * nbytes)
        future.set_result(InferResponse(request.model, request.version or "1", request.id, (y,)))


class Answers:
    """Reads a stream of responses."""

    def __init__(self, data):
        self.found = []
        position = 0
        while position < len(data):
            end = data.index(b"\r\n\r\n", position)
            status, *lines = data[position:end].split(b"\r\n")
            headers = {
                name.lower().decode(): value.strip().decode() for name, _, value in (it.partition(b":") for it in lines)
            }
            body_at = end + 4
            position = body_at + int(headers.get("content-length", 0))
            assert position <= len(data), "the body is shorter than its header says"
            self.found.append(
                SimpleNamespace(status=int(status.split()[1]), headers=headers, body=data[body_at:position])
            )


async def application(scope, receive, send):
    """What stands behind the lane: says which path it was asked for, when it has read the body."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        if not message["more_body"]:
            break
    answer = f"{scope['method']} {scope['path']} {len(body)}".encode()
    headers = [(b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


class Connection:
    """One connection to the lane; to another one's, if that is given."""

    def __init__(self, other=None):
        self.engine = Engine() if other is None else other.engine
        self.transport = Transport()
        self.state = ServerState()
        self.arrivals = Arrivals(10**9) if other is None else other.arrivals
        self.lane = lane(HttpInfer(self.engine, LIMIT), LIMIT, self.arrivals) if other is None else other.lane
        config = uvicorn.Config(
            application, http=self.lane, ws="none", lifespan="off", log_config=None, access_log=False
        )
        config.load()
        self.protocol = self.lane(
            config=config, server_state=self.state, app_state={}, _loop=asyncio.get_running_loop()
        )
        self.protocol.connection_made(self.transport)

    def send(self, *pieces):
        for piece in pieces:
            self.protocol.data_received(piece)

    def hang_up(self, error=None):
        self.transport.closed = True
        self.protocol.connection_lost(error)

    @property
    def answers(self):
        return Answers(self.transport.sent).found

    @property
    def statuses(self):
        return [one.status for one in self.answers]

    @property
    def models(self):
        return [request.model for request, _ in self.engine.accepted]


@pytest.fixture(params=["new heads", "known heads"])
async def client(loop_errors, request):
    made = Connection()
    if request.param == "known heads":
        for model in ("a", "b", "c", "m", "digits"):
            other = Connection(made)
            other.send(infer(model))
            other.hang_up()
        await settle()
        made.engine.accepted.clear()
    yield made
    if made.protocol in made.state.connections:
        made.hang_up()
    await settle()


@pytest.fixture
async def loop_errors():
    errors = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    yield errors
    await settle()
    assert errors == []


async def settle():
    for _ in range(8):
        await asyncio.sleep(0)


def body_of(**more):
    x = {"name": "x", "datatype": "UINT8", "shape": [1], "data": [1]}
    return json.dumps({"inputs": [x], **more}).encode()


def infer(model="m", body=None, version="HTTP/1.1", target=None, **headers):
    body = body_of() if body is None else body
    headers = {"Host": "h", "Content-Length": str(len(body)), **headers}
    lines = [f"POST {target or f'/v2/models/{model}/infer'} {version}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join(line for line in lines if not line.endswith(": None")).encode() + b"\r\n\r\n" + body


def get(path):
    return f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode()


# -- which URLs are the lane's ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "target"),
    [
        (b"/v2/models/m/infer", ("m", "")),
        (b"/v2/models/m/infer?a=/b&c", ("m", "")),
        (b"/v2/models/m/versions/12/infer", ("m", "12")),
        (b"/v2/models/infer/infer", ("infer", "")),
        (b"/v2/models/a%20b%2Fc/infer", ("a b/c", "")),
        (b"/v2/models/%C3%A4/versions/%31/infer", ("ä", "1")),
        (b"/v2/models/versions/versions/1/infer", ("versions", "1")),
    ],
)
def test_inference_urls(url, target):
    assert infer_target(url) == target


@pytest.mark.parametrize(
    "url",
    [
        b"/",
        b"",
        b"*",
        b"/v2/models/m",
        b"/v2/models/m/infer/",
        b"/v2/models//infer",
        b"/v2/models/m/versions//infer",
        b"/v2/models/m/version/1/infer",
        b"/v2/models/m/ready",
        b"/v1/models/m/infer",
        b"/v2/models/a/b/infer",
        b"//v2/models/m/infer",
        b"/v2/models/m/infer#x",
        b"/v2/models/%ff/infer",
        b"/v2/repository/models/m/infer",
        b"http://host/v2/models/m/infer",
    ],
)
def test_other_urls(url):
    assert infer_target(url) is None


# -- one request --------------------------------------------------------------------------------------------


async def test_a_request_is_answered_and_the_connection_stays(client):
    client.send(infer("digits", body_of(id="r-1"), target="/v2/models/digits/versions/3/infer"))
    ((request, _),) = client.engine.accepted
    assert (request.model, request.version, request.id) == ("digits", "3", "r-1")
    assert client.transport.sent == b""
    client.engine.answer()
    await settle()
    (answer,) = client.answers
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert json.loads(answer.body)["outputs"][0]["data"] == [1]
    assert "connection" not in answer.headers
    assert not client.transport.closed


async def test_a_head_that_was_seen_before_is_not_parsed_again(client, monkeypatch):
    client.send(infer("digits"))
    client.engine.answer(0)
    await settle()
    monkeypatch.setattr(client.protocol, "parser", None)
    for number in (1, 2):
        client.send(infer("digits", body_of().replace(b'"data": [1]', b'"data": [%d]' % (number + 1))))
        client.engine.answer(number)
        await settle()
    assert client.statuses == [200, 200, 200]
    assert [bytes(request.inputs[0].data) for request, _ in client.engine.accepted] == [b"\1", b"\2", b"\3"]


async def test_known_and_unknown_heads_take_turns(client):
    both = infer("a"), infer("x")
    for turn in range(6):
        whole = both[turn % 2]
        client.send(*([whole] if turn % 3 else [whole[:20], whole[20:]]))
        client.engine.answer(turn)
        await settle()
    assert client.models == list("axaxax")
    assert client.statuses == [200] * 6


async def test_a_head_that_is_known_waits_for_the_answer_before_it(client):
    client.send(infer("a"), infer("b"), infer("b"))
    assert client.models == ["a"]
    for number in range(3):
        client.engine.answer(number)
        await settle()
    assert client.models == ["a", "b", "b"]
    assert client.statuses == [200] * 3


@pytest.mark.parametrize("headers", [{"Connection": "close"}, {"Expect": "100-continue"}])
async def test_heads_that_ask_for_more_are_parsed_each_time(client, headers):
    for _ in range(2):
        other = Connection(client)
        other.send(infer("a", **headers))
        client.engine.answer(len(client.engine.accepted) - 1)
        await settle()
        assert (b"100 Continue" in other.transport.sent) is ("Expect" in headers)
        assert (b"connection: close" in other.transport.sent) is ("Connection" in headers)
        other.hang_up()


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("250m", 0.25), ("2S", 2), (" 1M ", 60), ("1H", 3600), ("7u", 7e-6), ("99999999n", 0.099999999)],
)
async def test_a_header_says_how_long_the_client_waits(client, value, seconds):
    before_ns = monotonic_ns()
    client.send(infer("digits", body_of(), **{"Grpc-Timeout": value}))
    ((request, _),) = client.engine.accepted
    assert before_ns <= request.deadline_ns - round(seconds * 1e9) <= monotonic_ns()


async def test_without_that_header_there_is_no_deadline(client):
    client.send(infer("digits", body_of(timeout="soon")))
    assert client.engine.accepted[0][0].deadline_ns == 0


async def test_who_waits_for_thirty_years_waits_for_ever(client):
    client.send(infer("digits", **{"Grpc-Timeout": "99999999H"}))
    assert client.engine.accepted[0][0].deadline_ns == 0


@pytest.mark.parametrize("value", ["", "5", "m", "1.5S", "-1S", "123456789m", "1s", "1 S", "1D"])
async def test_a_header_that_says_no_time_is_the_clients_fault(client, value):
    client.send(infer("digits", body_of(), **{"Grpc-Timeout": value}))
    assert client.statuses == [400]
    assert b"header grpc-timeout is" in client.answers[0].body
    assert not client.engine.accepted


async def test_the_time_of_a_head_that_comes_again_begins_anew(client):
    for number in range(3):
        client.send(infer("digits", **{"Grpc-Timeout": "1S"}))
        client.engine.answer(number)
        await settle()
    first, *_, last = [request.deadline_ns for request, _ in client.engine.accepted]
    assert last > first


@pytest.mark.parametrize("size", [1, 7])
async def test_bytes_may_come_in_any_pieces(client, size):
    data = infer("digits") * 2
    client.send(*(data[start : start + size] for start in range(0, len(data), size)))
    for at in range(2):
        client.engine.answer(at)
        await settle()
    assert client.statuses == [200, 200]
    assert client.models == ["digits", "digits"]


async def test_a_chunked_body(client):
    body = body_of(id="chunked")
    head = infer(body=b"", **{"Content-Length": None, "Transfer-Encoding": "chunked"})
    client.send(head, b"%x\r\n%b\r\n" % (10, body[:10]), b"%x\r\n%b\r\n0\r\n\r\n" % (len(body) - 10, body[10:]))
    assert client.engine.accepted[0][0].id == "chunked"


async def test_binary_both_ways(client):
    x = {"name": "x", "datatype": "UINT8", "shape": [3], "parameters": {"binary_data_size": 3}}
    header = json.dumps({"inputs": [x], "parameters": {"binary_data_output": True}}).encode()
    client.send(infer(body=header + b"abc", **{"Inference-Header-Content-Length": len(header)}))
    assert bytes(client.engine.accepted[0][0].inputs[0].data) == b"abc"
    client.engine.answer(nbytes=100_000)
    await settle()
    (answer,) = client.answers
    length = int(answer.headers["inference-header-content-length"])
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.body[length:] == b"\x01" * 100_000


async def test_other_paths_are_the_applications(client):
    client.send(get("/v2/health/live"), infer(target="/v2/repository/index", body=b"{}"))
    await settle()
    assert [one.body for one in client.answers] == [b"GET /v2/health/live 0", b"POST /v2/repository/index 2"]
    assert client.engine.accepted == []


async def test_a_client_that_waits_for_leave_to_send_gets_it(client):
    body = body_of()
    head = infer(Expect="100-continue")[: -len(body)]
    client.send(head)
    assert client.transport.sent == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(body)
    assert client.models == ["m"]


@pytest.mark.parametrize("data", [infer(Connection="close"), infer(version="HTTP/1.0")])
async def test_a_client_that_wants_one_answer_gets_it_and_the_end(client, data):
    client.send(data)
    client.engine.answer()
    await settle()
    assert client.answers[0].headers["connection"] == "close"
    assert client.transport.closed


# -- refusals -----------------------------------------------------------------------------------------------


async def test_what_the_engine_refuses_is_told_and_the_connection_stays(client):
    client.engine.refusal = Overloaded("model 'm' has 5 requests waiting")
    client.send(infer())
    (answer,) = client.answers
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert json.loads(answer.body) == {"error": "model 'm' has 5 requests waiting"}
    client.engine.refusal = None
    client.send(infer())
    client.engine.answer()
    await settle()
    assert client.statuses == [503, 200]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"inputs": 1}'])
async def test_a_body_that_is_no_request_is_the_clients_fault(client, body):
    client.send(infer(body=body))
    (answer,) = client.answers
    assert answer.status == 400
    assert json.loads(answer.body)["error"]
    assert client.engine.accepted == []


@pytest.mark.parametrize("length", ["x", "-1", "999999", "1.5", ""])
async def test_a_header_length_that_is_none(client, length):
    client.send(infer(**{"Inference-Header-Content-Length": length}))
    assert client.statuses == [400]


@pytest.mark.parametrize(
    ("error", "status"),
    [(InvalidRequest("no"), 400), (NotFound("no"), 404), (InternalError("no"), 500), (RuntimeError("secret"), 500)],
)
async def test_a_failure_later_is_answered_too(client, caplog, error, status):
    client.send(infer())
    client.engine.accepted[0][1].set_exception(error)
    await settle()
    (answer,) = client.answers
    assert answer.status == status
    assert b"secret" not in answer.body
    assert not client.transport.closed


async def test_a_bug_in_the_engine_is_an_answer_and_a_log_line(client, caplog):
    client.engine.refusal = RuntimeError("secret")
    client.send(infer())
    assert client.statuses == [500]
    assert b"secret" not in client.transport.sent
    assert "secret" in caplog.text


async def test_an_answer_that_json_cannot_carry_is_an_error(client):
    client.send(infer())
    request, future = client.engine.accepted[0]
    y = Tensor("y", DataType.FP16, (1,), b"\0\0")
    future.set_result(InferResponse(request.model, "1", "", (y,)))
    await settle()
    assert client.statuses == [400]


# -- bounds -------------------------------------------------------------------------------------------------


async def test_a_body_that_is_declared_too_large_is_refused_before_it_is_sent(client):
    client.send(infer(body=b"", **{"Content-Length": LIMIT + 1}))
    (answer,) = client.answers
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert "--max-request-bytes" in json.loads(answer.body)["error"]
    assert client.transport.half_closed
    assert not client.transport.closed, "closing now would reset a client that is still sending"


async def test_a_chunked_body_is_refused_when_it_has_become_too_large(client):
    client.send(infer(body=b"", **{"Content-Length": None, "Transfer-Encoding": "chunked"}))
    for _ in range(5):
        client.send(b"400\r\n" + b" " * 1024 + b"\r\n")
    assert client.statuses == [413]
    client.send(b"400\r\n" + b" " * 1024 + b"\r\n")
    assert client.statuses == [413]
    assert client.engine.accepted == []


async def test_a_body_of_exactly_the_bound_is_taken(client):
    client.send(infer(body=body_of().ljust(LIMIT)))
    assert client.models == ["m"]


@pytest.mark.parametrize("chunked", [True, False])
async def test_bodies_for_the_application_are_bounded_as_well(client, chunked):
    if chunked:
        head = infer(
            target="/v2/repository/index", body=b"", **{"Content-Length": None, "Transfer-Encoding": "chunked"}
        )
        client.send(head, *[b"400\r\n" + b" " * 1024 + b"\r\n"] * 5)
    else:
        client.send(infer(target="/v2/repository/index", body=b"", **{"Content-Length": LIMIT + 1}))
    assert client.statuses == [413]


async def test_a_refused_connection_ends_after_a_while(client, monkeypatch):
    monkeypatch.setattr(http_lane, "LINGER_S", 0.01)
    client.send(infer(body=b"", **{"Content-Length": LIMIT + 1}))
    async with asyncio.timeout(60):
        while not client.transport.closed:
            await asyncio.sleep(0.001)


async def test_bodies_that_are_not_whole_are_bounded_together(client):
    """One may be as large as any request; the one that is too much is refused, and what it held is free again."""
    client.arrivals.max_bytes = 3000
    large = [infer(model, body_of().ljust(4000)) for model in "abc"]
    others = [Connection(client) for _ in large]
    client.send(infer("m", body_of().ljust(4000))[:-100])
    assert client.arrivals.bytes == 3900
    for other, data in zip(others, large, strict=True):
        other.send(data[:1500])
        assert other.statuses == [503]
        assert other.answers[0].headers["retry-after"] == "1"
        assert "3000 (--max-inflight-bytes)" in json.loads(other.answers[0].body)["error"]
    assert client.arrivals.bytes == 3900
    client.send(infer("m", body_of().ljust(4000))[-100:])
    assert client.models == ["m"]
    assert client.arrivals.bytes == 0


@pytest.mark.parametrize("target", ["/v2/models/a/infer", "/v2/repository/index"])
@pytest.mark.parametrize("end", ["whole", "left", "broken", "too large"])
async def test_what_has_arrived_is_forgotten_with_its_request(client, target, end):
    chunked = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    client.send(infer(target=target, body=b"", **chunked))
    assert client.arrivals.bytes == 0
    client.send(b"400\r\n" + b" " * 1024 + b"\r\n", b"b00\r\n" + b" " * 1000)
    assert client.arrivals.bytes == 2024
    if end == "left":
        client.hang_up()
    else:
        rest = {"whole": b"0\r\n\r\n", "broken": b"x\r\n", "too large": b"fff\r\n" + b" " * LIMIT}[end]
        client.send(b" " * (0xB00 - 1000) + b"\r\n" + rest)
    assert client.arrivals.bytes == 0
    await settle()


async def test_a_coding_may_be_told_in_several_lines(client):
    packed = zlib.compress(gzip.compress(body_of(id="packed")))
    lines = b"\r\nContent-Encoding: gzip\r\nContent-Encoding: deflate\r\n\r\n"
    client.send(infer(body=packed).replace(b"\r\n\r\n", lines, 1))
    assert client.engine.accepted[0][0].id == "packed"


@pytest.mark.parametrize("what", ["headers", "one header", "url"])
async def test_headers_without_end_are_refused(client, what):
    start = {"headers": get("/v2")[:-2], "one header": get("/v2")[:-2] + b"X: ", "url": b"GET /"}[what]
    client.send(start)
    line = b"X-Header: 0123456789\r\n" if what == "headers" else b"a" * 22
    piece = line * 3000
    for _ in range(64):
        client.send(piece)
        if client.transport.sent or client.transport.closed:
            break
    assert client.transport.sent or client.transport.closed, "4 MiB of headers were kept"
    assert all(400 <= status < 500 for status in client.statuses)


@pytest.mark.parametrize(
    "data", [b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"]
)
async def test_what_is_no_http_is_told_so(client, data):
    client.send(data)
    (answer,) = client.answers
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert json.loads(answer.body)["error"]
    client.send(data)
    assert len(client.answers) == 1


# -- several requests on one connection ---------------------------------------------------------------------


async def test_pipelined_requests_are_answered_in_their_order_one_at_a_time(client):
    client.send(infer("a") + infer("b") + infer("c"))
    assert client.models == ["a"]
    assert not client.transport.reading, "a client is not read ahead without bound"
    for at, models in enumerate(["ab", "abc", "abc"]):
        client.engine.answer(at)
        await settle()
        assert client.models == list(models)
    assert [json.loads(one.body)["model_name"] for one in client.answers] == ["a", "b", "c"]
    assert client.transport.reading


async def test_pipelined_requests_to_the_lane_and_the_application_keep_their_order(client):
    client.send(infer("a") + get("/one") + infer("b") + get("/two"))
    await settle()
    assert client.transport.sent == b""
    client.engine.answer(0)
    await settle()
    assert len(client.answers) == 2
    client.engine.answer(1)
    await settle()
    bodies = [one.body for one in client.answers]
    assert (bodies[1], bodies[3]) == (b"GET /one 0", b"GET /two 0")
    assert [json.loads(bodies[at])["model_name"] for at in (0, 2)] == ["a", "b"]


async def test_a_pipelined_request_that_is_not_whole_yet_waits_for_its_rest(client):
    second = infer("b")
    client.send(infer("a") + second[:-5])
    client.engine.answer(0)
    await settle()
    assert client.models == ["a"]
    client.send(second[-5:])
    assert client.models == ["a", "b"]
    client.engine.answer(1)
    await settle()
    assert client.statuses == [200, 200]


@pytest.mark.parametrize("turns", range(5))
async def test_a_pipelined_request_is_begun_once_whenever_its_rest_comes(client, turns):
    second = infer("b")
    client.send(infer("a") + second[:-5])
    client.engine.answer(0)
    for _ in range(turns):  # of the loop, in which its turn comes
        await asyncio.sleep(0)
    client.send(second[-5:])
    await settle()
    assert client.models == ["a", "b"]
    client.engine.answer(1)
    await settle()
    assert client.statuses == [200, 200]


async def test_only_so_many_requests_are_parsed_before_their_turns(client):
    """What a request is parsed into takes many times its bytes."""
    bad = infer("b", body=b"{")
    client.send(infer("a") + bad * 3000)
    assert len(client.protocol.pipeline) <= http_incoming.MAX_WAITING + http_incoming.SLICE_BYTES // len(bad) + 1
    assert not client.transport.reading
    client.engine.answer(0)
    async with asyncio.timeout(60):
        while len(client.statuses) < 3001:
            await settle()
    assert client.statuses == [200] + [400] * 3000
    assert client.transport.reading


async def test_requests_that_wait_are_bounded_also_where_reading_goes_on(client):
    """uvicorn reads on whenever an application asks whether its client is still there."""
    client.send(infer("a"))
    for _ in range(8):
        client.send(get("/one") * 10_000)
    parsed = len(client.protocol.pipeline)
    assert parsed < 1000
    client.engine.answer(0)
    async with asyncio.timeout(60):
        while not client.transport.half_closed:
            await settle()
    assert client.statuses == [200] * (1 + parsed) + [400]
    assert str(http_incoming.MAX_UNPARSED_BYTES) in json.loads(client.answers[-1].body)["error"]


async def test_headers_behind_many_requests_are_not_taken_for_long_ones(client):
    whole, last = infer("a"), infer("b")
    count = http_incoming.MAX_HEAD_BYTES // len(whole) + 1
    client.send(whole * count + last[:20])
    assert client.transport.sent == b""
    client.send(last[20:])
    for number in range(count + 1):
        client.engine.answer(number)
        await settle()
    assert client.statuses == [200] * (count + 1)
    assert client.models == ["a"] * count + ["b"]


async def test_refusals_keep_their_place_too(client):
    client.send(infer("a") + infer("b", body=b"{") + infer("c"))
    client.engine.answer(0)
    await settle()
    assert client.statuses == [200, 400]
    client.engine.answer(1)
    await settle()
    assert client.statuses == [200, 400, 200]


async def test_many_refused_at_once_are_all_answered(client):
    client.engine.refusal = Overloaded("full")
    client.send(infer() * 1500)
    await settle()
    assert client.statuses == [503] * 1500


async def test_many_refused_behind_one_that_runs_are_all_answered(client):
    client.send(infer("a") + infer("b", body=b"{") * 1500)
    client.engine.answer(0)
    for _ in range(300):
        await settle()
    assert client.statuses == [200] + [400] * 1500


@pytest.mark.parametrize(
    "bad",
    [infer(body=b"", **{"Content-Length": LIMIT + 1}), b"nonsense\r\n\r\n"],
    ids=["too large", "no http"],
)
async def test_a_refusal_that_ends_the_connection_does_not_overtake_an_answer(client, bad):
    """A client that pipelines takes the first answer for that of its first request."""
    client.send(infer("a") + bad)
    client.engine.answer(0)
    await settle()
    statuses = client.statuses
    assert statuses[0] == 200
    assert all(400 <= status < 500 for status in statuses[1:])


async def test_a_refusal_does_not_overtake_an_answer_of_the_application(client):
    chunked = infer("b", body=b"", **{"Content-Length": None, "Transfer-Encoding": "chunked"})
    client.send(get("/one") + chunked + (b"400\r\n" + b" " * 1024 + b"\r\n") * 5)
    await settle()
    assert client.statuses == [200, 413]
    assert client.answers[0].body == b"GET /one 0"


async def test_what_is_sent_behind_the_last_request_of_a_connection_is_not_run(client):
    client.send(infer("a", body=b"{", Connection="close") + infer("b"))
    await settle()
    assert client.statuses == [400]
    assert client.models == []


async def test_leave_to_send_does_not_overtake_an_answer(client):
    head = infer("b", Expect="100-continue")[: -len(body_of())]
    client.send(infer("a") + head)
    client.engine.answer(0)
    await settle()
    assert client.transport.sent.startswith(b"HTTP/1.1 200")
    client.send(body_of())
    assert client.models == ["a", "b"]


async def test_a_client_that_does_not_read_may_not_ask_for_more(client):
    client.send(infer())
    client.protocol.pause_writing()
    client.engine.answer()
    await settle()
    assert not client.transport.reading
    client.protocol.resume_writing()
    assert client.transport.reading


# -- the end ------------------------------------------------------------------------------------------------


async def test_what_a_client_that_left_waited_for_is_taken_back(client):
    client.send(infer("a") + infer("b"))
    client.hang_up()
    await settle()
    assert client.engine.accepted[0][1].cancelled()
    assert client.models == ["a"], "and what waited behind is not begun"
    assert client.transport.sent == b""


async def test_the_application_learns_that_a_client_has_left_whatever_that_has_pipelined(client):
    told = []

    async def waits(scope, receive, _):
        while (await receive())["type"] != "http.disconnect":
            pass
        told.append(scope["path"])

    client.protocol.app = waits
    client.send(get("/one") + get("/two") + infer("c"))
    await settle()
    client.hang_up()
    await settle()
    assert told == ["/one"]
    assert client.models == []


@pytest.mark.parametrize("error", [None, ConnectionResetError()])
async def test_leaving_in_the_middle_of_a_request_or_after_an_answer_is_no_fault(client, error):
    client.send(infer())
    client.engine.answer()
    await settle()
    client.send(infer()[:-3])
    client.hang_up(error)
    await settle()
    assert len(client.engine.accepted) == 1


@pytest.mark.parametrize("failed", [True, False])
async def test_an_answer_that_comes_as_the_client_leaves_is_dropped_quietly(client, failed):
    client.send(infer())
    future = client.engine.accepted[0][1]
    if failed:
        future.set_exception(InternalError("no"))
    else:
        client.engine.answer()
    client.hang_up()
    del future
    client.engine.accepted.clear()
    await settle()
    assert client.transport.sent == b""


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
async def test_who_ends_its_side_behind_a_get_is_answered_and_left(client, method):
    client.send(get("/one").replace(b"GET", method))
    assert client.protocol.eof_received(), "its answer is still to come"
    assert client.transport.sent == b""
    await settle()
    assert client.transport.sent.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"connection: close\r\n" in client.transport.sent
    assert client.transport.closed


@pytest.mark.parametrize(
    "data",
    [
        b"",
        get("/one")[:-2],
        get("/one").replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n1234"),
        infer("a"),
        infer("a")[:-1],
        infer("a") + get("/one"),
        get("/one") + infer("a"),
        infer(target="/v2/models/a/generate"),
    ],
)
async def test_who_ends_its_side_otherwise_has_left(client, data):
    """Whether it has closed its other side too cannot be seen, and a model's work would be for nobody."""
    client.send(data)
    assert not client.protocol.eof_received()


async def test_who_ends_its_side_behind_an_answer_has_left(client):
    client.send(get("/one"))
    await settle()
    assert client.statuses == [200]
    assert not client.protocol.eof_received()


async def test_draining_answers_what_runs_and_then_closes(client):
    client.send(infer())
    client.protocol.shutdown()
    client.protocol.close_if_idle()
    assert not client.transport.closed
    client.engine.answer()
    await settle()
    assert client.statuses == [200]
    assert client.answers[0].headers["connection"] == "close"
    assert client.transport.closed


async def test_draining_answers_one_more_request_that_was_under_way(client):
    client.send(infer())
    client.engine.answer()
    await settle()
    client.protocol.shutdown()
    assert not client.transport.closed, "its client may be sending right now"
    client.send(infer())
    client.engine.answer(1)
    await settle()
    assert client.statuses == [200, 200]
    assert client.answers[1].headers["connection"] == "close"
    assert client.transport.closed


async def test_draining_the_application_answers_and_closes_too(client):
    client.protocol.shutdown()
    client.send(get("/v2/health/ready"))
    await settle()
    assert client.statuses == [200]
    assert client.answers[0].headers["connection"] == "close"
    assert client.transport.closed


async def test_draining_closes_what_is_idle(client):
    client.protocol.shutdown()
    client.protocol.close_if_idle()
    assert client.transport.closed


async def test_a_client_that_takes_too_long_over_a_request_is_left(client):
    now = asyncio.get_running_loop().time()
    client.send(infer()[:20])
    client.protocol.check_time(now + 59, 60)
    assert not client.transport.closed
    client.protocol.check_time(now + 62, 60)
    assert client.transport.closed


async def test_a_client_that_never_says_anything_is_left(client):
    client.protocol.check_time(asyncio.get_running_loop().time() + 62, 60)
    assert client.transport.closed


async def test_however_long_the_model_takes_its_client_is_not_left(client):
    client.send(infer())
    client.protocol.check_time(asyncio.get_running_loop().time() + 10_000, 60)
    assert not client.transport.closed
    client.engine.answer()
    await settle()
    assert client.statuses == [200]


async def test_a_client_whose_next_request_we_do_not_read_is_not_left_for_that(client):
    second = infer("b")
    client.send(infer("a") + second[:-5])
    assert not client.transport.reading
    client.protocol.check_time(asyncio.get_running_loop().time() + 62, 60)
    assert not client.transport.closed


async def test_an_idle_connection_is_kept_for_a_while_and_not_for_ever(client):
    client.send(infer())
    client.engine.answer()
    await settle()
    now = asyncio.get_running_loop().time()
    keep_alive_s = client.protocol.timeout_keep_alive
    client.protocol.check_time(now + keep_alive_s - 1, 1)
    assert not client.transport.closed
    client.protocol.check_time(now + keep_alive_s + 1, 1)
    assert client.transport.closed


OFFER = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_an_offer_of_another_protocol_is_not_taken_and_costs_nothing(client, size):
    """Java's HttpClient and ``curl --http2`` make one, bodies and all."""
    data = infer("a", body_of(id="1"), **OFFER) + infer("b", body_of(id="2"), **OFFER)
    client.send(*(data[start : start + size] for start in range(0, len(data), size)))
    for number in range(2):
        client.engine.answer(number)
        await settle()
    assert client.statuses == [200, 200]
    assert [request.id for request, _ in client.engine.accepted] == ["1", "2"]
    assert not client.transport.closed


async def test_an_offer_in_front_of_a_chunked_body_and_of_none(client):
    body = body_of(id="chunked")
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    client.send(
        get("/one").replace(b"Host: h", b"Host: h\r\nConnection: upgrade\r\nUpgrade: websocket"),
        infer(body=b"", **OFFER, **{"Content-Length": None, "Transfer-Encoding": "chunked"}) + chunks + get("/two"),
    )
    await settle()
    client.engine.answer()
    await settle()
    assert client.statuses == [200, 200, 200]
    assert (client.answers[0].body, client.answers[2].body) == (b"GET /one 0", b"GET /two 0")


async def test_a_connection_that_is_to_end_ends_with_an_offer_too(client):
    client.send(infer(**{**OFFER, "Connection": "close, Upgrade, HTTP2-Settings"}))
    client.engine.answer()
    await settle()
    assert client.answers[0].headers["connection"] == "close"
    assert client.transport.closed


async def test_a_response_that_cannot_be_written_is_held_by_nobody(client):
    """An error that is kept where it was caught refers to itself, by way of all that was at hand there."""
    client.send(infer())
    memory = np.zeros(2, np.uint8)
    freed = weakref.ref(memory)
    gc.disable()
    try:
        ((_, future),) = client.engine.accepted
        future.set_result(InferResponse("m", "1", "", (Tensor("y", DataType.FP16, (1,), memory.data),)))
        client.engine.accepted.clear()
        del future, memory, _
        await settle()
        assert client.statuses == [400]
        assert freed() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("sent", ["a whole request", "a part of one", "two", "one for the application"])
async def test_a_connection_that_is_gone_is_held_by_nobody(loop_errors, sent):
    client = Connection()
    gone = weakref.ref(client.protocol)
    gc.disable()
    try:
        pieces = {"a whole request": infer(), "a part of one": infer()[:-9], "two": infer() * 2}
        client.send(pieces.get(sent, b"POST /other HTTP/1.1\r\nHost: h\r\nContent-Length: 99\r\n\r\n{"))
        await settle()
        client.hang_up()
        client.engine.accepted.clear()
        del client.protocol
        await settle()
        assert gone() is None
    finally:
        gc.enable()
