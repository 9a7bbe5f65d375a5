"""What only HTTP has: forms of a body, codings, connections, and errors on every path."""

import gzip
import http.client
import json
import struct
import time
import zlib
from typing import Any

import httpx
import psutil
import pytest
from conftest import MAX_REQUEST_BYTES
from fronts import read_answer
from raw_http import RawConnection, request
from running_server import RunningServer
from wire_values import Given

X = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1.5, -2.0, 3.25]}
VALUES = (1.5, -2.0, 3.25)
RAW = struct.pack("<3f", *VALUES)
PATHS = ["/v2/models/onnx_fp32/infer", "/v2/models/onnx_fp32/%69nfer"]  # the lane, and the ordinary route
Y = Given("y", "FP32", (1, 3), VALUES)


@pytest.fixture(scope="module")
def client(server: RunningServer):
    with httpx.Client(base_url=f"http://{server.http}", timeout=60) as opened:
        yield opened


@pytest.fixture(params=PATHS, ids=["lane", "route"])
def path(request: pytest.FixtureRequest) -> str:
    return request.param


def _body(**changes: Any) -> bytes:
    return json.dumps({"inputs": [X]} | changes).encode()


def _binary(header: dict[str, Any], *blobs: bytes) -> tuple[bytes, dict[str, str]]:
    text = json.dumps(header).encode()
    return b"".join([text, *blobs]), {"Inference-Header-Content-Length": str(len(text))}


def _answered(response: httpx.Response) -> Given:
    answer = read_answer(response.status_code, response.headers, response.content)
    assert answer.ok, answer.message
    (output,) = answer.outputs
    return output


def _error(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert list(document) == ["error"]
    return document["error"]


# -- forms of the body ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [[1.5, -2.0, 3.25], [[1.5, -2, 3.25]], [[[1.5], [-2.0], [3.25]]]],
    ids=["flat", "nested", "with dimensions of 1"],
)
def test_json_data_may_be_flat_or_nested(client: httpx.Client, path: str, data: list[Any]):
    assert _answered(client.post(path, content=_body(inputs=[X | {"data": data}]))) == Y


@pytest.mark.parametrize(
    ("whole", "one", "binary"),
    [
        (None, None, False),
        (None, True, True),
        (None, False, False),
        (True, None, True),
        (True, False, False),
        (True, True, True),
        (False, True, True),
        (False, None, False),
    ],
)
def test_an_outputs_own_wish_goes_before_the_requests(
    client: httpx.Client, path: str, whole: bool | None, one: bool | None, binary: bool
):
    output = {"name": "y"} | ({} if one is None else {"parameters": {"binary_data": one}})
    changes = {"outputs": [output]} | ({} if whole is None else {"parameters": {"binary_data_output": whole}})
    response = client.post(path, content=_body(**changes))
    assert _answered(response) == Y
    assert ("inference-header-content-length" in response.headers) == binary


def test_binary_and_json_mix_among_inputs_and_outputs(client: httpx.Client):
    body, headers = _binary(
        {
            "inputs": [
                {"name": "numbers", "datatype": "INT32", "shape": [2, 2], "data": [[1, 2], [3, 4]]},
                {"name": "texts", "datatype": "BYTES", "shape": [2, 1], "parameters": {"binary_data_size": 11}},
            ],
            "outputs": [
                {"name": "numbers_out", "parameters": {"binary_data": True}},
                {"name": "sums"},
                {"name": "texts_out", "parameters": {"binary_data": True}},
            ],
        },
        struct.pack("<I", 3) + b"\xff\0a" + struct.pack("<I", 0),
    )
    response = client.post("/v2/models/rows/infer", content=body, headers=headers)
    answer = read_answer(response.status_code, response.headers, response.content)
    assert [tensor.values for tensor in answer.outputs] == [(1, 2, 3, 4), (3, 7), (b"\xff\0a", b"")]
    assert [("data" in one) for one in json.loads(response.content[: int(response.headers[_LENGTH])])["outputs"]] == [
        False,
        True,
        False,
    ]


_LENGTH = "inference-header-content-length"


def test_a_raw_request_is_the_data_of_the_one_input(client: httpx.Client, path: str):
    response = client.post(path, content=RAW, headers={_LENGTH: "0"})
    assert _answered(response) == Y
    assert _LENGTH in response.headers


def test_a_raw_text_is_one_element(client: httpx.Client):
    response = client.post("/v2/models/text/infer", content=b"\0whole \xc3\xa9 body", headers={_LENGTH: "0"})
    assert _answered(response).values == (b"\0whole \xc3\xa9 body",)


@pytest.mark.parametrize(
    ("model", "body", "says"),
    [("onnx_fp32", RAW[:-1], "11 bytes"), ("onnx_fp32", b"", "0 bytes"), ("rows", RAW, "one input"), ("no", b"", "no")],
)
def test_a_raw_request_that_does_not_fit_is_refused(client: httpx.Client, model: str, body: bytes, says: str):
    response = client.post(f"/v2/models/{model}/infer", content=body, headers={_LENGTH: "0"})
    assert says in _error(response, 404 if model == "no" else 400)


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_an_output_that_json_cannot_carry_must_be_asked_for_as_binary(client: httpx.Client, path: str, datatype: str):
    path = path.replace("fp32", datatype.lower())
    header = {"inputs": [{"name": "x", "datatype": datatype, "shape": [1, 3], "parameters": {"binary_data_size": 6}}]}
    body, headers = _binary(header, b"\0\x3c" * 3)
    message = _error(client.post(path, content=body, headers=headers), 400)
    assert "'y'" in message
    assert "binary_data" in message
    body, headers = _binary(header | {"parameters": {"binary_data_output": True}}, b"\0\x3c" * 3)
    assert _answered(client.post(path, content=body, headers=headers)).raw == b"\0\x3c" * 3


def test_text_that_is_not_utf8_must_be_asked_for_as_binary(client: httpx.Client):
    header = {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}}]}
    body, headers = _binary(header, struct.pack("<I", 1) + b"\xff")
    assert "UTF-8" in _error(client.post("/v2/models/text/infer", content=body, headers=headers), 400)


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_not_finite_are_bare_tokens(client: httpx.Client, path: str, token: str):
    body = _body().replace(b"1.5", token.encode())
    response = client.post(path, content=body)
    assert response.status_code == 200
    assert f"[{token},-2.0,3.25]" in response.text.replace(" ", "")


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        *(("UINT8", value) for value in (-1, 256, 1.0, True, "1", None)),
        ("INT8", 128),
        ("UINT16", 2**16),
        ("INT32", 2**31),
        ("UINT32", -1),
        ("INT64", 2**63),
        ("UINT64", 2**64),
        ("INT32", 1e3),
        ("FP32", 1e39),
        ("FP32", True),
        ("BOOL", 1),
        ("BYTES", 5),
        ("FP64", "1.0"),
    ],
)
def test_an_element_out_of_its_datatypes_range_is_refused(client: httpx.Client, datatype: str, value: object):
    given = {"name": "x", "datatype": datatype, "shape": [1, 3], "data": [value] * 3}
    path = f"/v2/models/onnx_{datatype.lower()}/infer"
    assert "'x'" in _error(client.post(path, content=_body(inputs=[given])), 400)


# -- content codings --------------------------------------------------------------------------------------


def _raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize(
    ("coding", "pack"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", _raw_deflate), ("identity", bytes)],
)
def test_requests_may_be_compressed(client: httpx.Client, path: str, coding: str, pack: Any):
    headers = {"Content-Encoding": coding}
    assert _answered(client.post(path, content=pack(_body()), headers=headers)) == Y
    blob = {key: value for key, value in X.items() if key != "data"} | {"parameters": {"binary_data_size": len(RAW)}}
    body, length = _binary({"inputs": [blob]}, RAW)  # the length is that of the JSON before it was compressed
    assert _answered(client.post(path, content=pack(body), headers=headers | length)) == Y


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip;q=0.5, deflate;q=0.8", "deflate"),
        ("gzip;q=0", None),
        ("identity", None),
        ("br", None),
    ],
)
@pytest.mark.parametrize("binary", [False, True])
def test_answers_are_compressed_as_the_client_accepts(
    client: httpx.Client, path: str, accept: str, coding: str | None, binary: bool
):
    rows = 200
    body = _body(
        inputs=[X | {"shape": [rows, 3], "data": list(VALUES) * rows}], parameters={"binary_data_output": binary}
    )
    response = client.post(path, content=body, headers={"Accept-Encoding": accept})  # httpx unpacks it
    assert response.headers.get("content-encoding") == coding
    assert _answered(response).values == VALUES * rows
    if coding:
        assert int(response.headers["content-length"]) < len(RAW) * rows


@pytest.mark.parametrize(
    ("coding", "body", "status"),
    [
        ("br", b"x", 501),
        ("gzip", b"not gzip", 400),
        ("gzip", gzip.compress(b"{}", mtime=0)[:-3], 400),
        ("deflate", b"\xff" * 20, 400),
        ("gzip", gzip.compress(b"{}", mtime=0) + b"more", 400),
        ("gzip, gzip, gzip, gzip, gzip", b"", 501),
        ("gzip", gzip.compress(b" " * (MAX_REQUEST_BYTES + 1), mtime=0), 413),
    ],
)
def test_a_body_that_cannot_be_unpacked_is_refused(
    client: httpx.Client, path: str, coding: str, body: bytes, status: int
):
    response = client.post(path, content=body, headers={"Content-Encoding": coding})
    assert "onnx_fp32" in _error(response, status)
    assert response.headers.get("accept-encoding") == ("gzip, deflate, identity" if status == 501 else None)


# -- connections ------------------------------------------------------------------------------------------


def test_a_body_may_come_in_chunks(client: httpx.Client, path: str):
    body = _body()
    pieces = (body[at : at + 7] for at in range(0, len(body), 7))
    assert _answered(client.post(path, content=pieces)) == Y


def test_an_offer_of_http2_is_passed_over(server: RunningServer, path: str):
    """By Java's HttpClient, for one, which makes it with each of its first requests."""
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    with RawConnection(server.http) as connection:
        for _ in range(2):
            connection.send(request("POST", path, _body(), offer))
            answer = connection.answer()
            assert read_answer(answer.status, answer.headers, answer.body).outputs == (Y,)


def test_a_client_may_ask_before_it_sends_the_body(server: RunningServer, path: str):
    whole = request("POST", path, _body(), {"Expect": "100-continue"})
    head, _, body = whole.partition(b"\r\n\r\n")
    with RawConnection(server.http) as connection:
        connection.send(head + b"\r\n\r\n")
        assert connection.answer().status == 100
        connection.send(body)
        answer = connection.answer()
        assert read_answer(answer.status, answer.headers, answer.body).outputs == (Y,)


def test_a_client_that_asks_first_is_told_at_once_of_too_large_a_body(server: RunningServer, path: str):
    headers = {"Expect": "100-continue", "Content-Length": str(MAX_REQUEST_BYTES + 1)}
    with RawConnection(server.http) as connection:
        connection.send(request("POST", path, b"", headers))
        answer = connection.answer()
    assert answer.status == 413
    assert str(MAX_REQUEST_BYTES) in answer.error


def _fake(delay_ms: int, number: float) -> bytes:
    return json.dumps(
        {
            "id": str(number),
            "parameters": {"fake_delay_ms": delay_ms},
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [number]}],
        }
    ).encode()


def test_a_pipelined_request_may_come_in_parts_while_the_one_before_it_runs(server: RunningServer):
    second = request("POST", "/v2/models/fake/infer", _fake(0, 2.0))
    with RawConnection(server.http) as connection:
        connection.send(request("POST", "/v2/models/fake/infer", _fake(150, 1.0)) + second[:-5])
        time.sleep(0.03)  # so that the rest lies there when the answer is sent
        connection.send(second[-5:] + request("GET", "/v2/nothing"))
        assert [json.loads(connection.answer().body)["id"] for _ in range(2)] == ["1.0", "2.0"]
        assert connection.answer().status == 404


def test_pipelined_requests_are_answered_in_order(server: RunningServer):
    lane, route = "/v2/models/fake/infer", "/v2/models/fake/%69nfer"
    paths = [lane, lane, route, lane, route, route, lane]
    sent = b""
    for index, path in enumerate(paths):
        sent += request("POST", path, _fake(60 if index == 0 else 0, index))
        sent += request("GET", "/v2/models/nobody")
    with RawConnection(server.http) as connection:
        connection.send(sent)
        for index in range(len(paths)):
            answer = connection.answer()
            assert answer.status == 200
            assert json.loads(answer.body)["id"] == str(index)
            assert connection.answer().status == 404


@pytest.mark.parametrize(
    ("second", "status"),
    [
        (request("POST", "/v2/models/fake/infer", b"{"), 400),
        (request("GET", "/v2/nothing"), 404),
        (request("POST", "/v2/models/fake/infer", b"", {"Content-Length": str(MAX_REQUEST_BYTES + 1)}), 413),
        (b"this is not HTTP\r\n\r\n", 400),
    ],
    ids=["malformed", "unknown path", "too large", "not HTTP"],
)
def test_an_error_waits_for_the_answers_before_it(server: RunningServer, second: bytes, status: int):
    with RawConnection(server.http) as connection:
        connection.send(request("POST", "/v2/models/fake/infer", _fake(80, 1.0)) + second)
        assert [connection.answer().status for _ in range(2)] == [200, status]


def test_a_connection_is_kept_after_answers_and_after_errors(server: RunningServer):
    host, _, port = server.http.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    socket = None
    for method, path, body, status in [
        ("POST", PATHS[0], _body(), 200),
        ("POST", PATHS[0], b"{", 400),
        ("POST", PATHS[1], b"{", 400),
        ("GET", "/v2/nothing", None, 404),
        ("GET", "/v2/models/onnx_fp32/infer", None, 405),
        ("POST", "/v2/models/nobody/infer", _body(), 404),
        ("GET", "/v2/health/ready", None, 200),
        ("POST", PATHS[0], _body(), 200),
    ]:
        connection.request(method, path, body)
        response = connection.getresponse()
        response.read()
        assert response.status == status
        assert socket in (None, connection.sock), "the server closed the connection"
        socket = connection.sock
        assert socket is not None
    connection.close()


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_connection_is_closed_when_the_client_asks_so(server: RunningServer, path: str, version: str):
    headers = {"Connection": "close"} if version == "1.1" else {}
    with RawConnection(server.http) as connection:
        connection.send(request("POST", path, _body(), headers).replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
        assert connection.answer().status == 200
        assert connection.at_end()


# -- errors on every path ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/models/onnx_fp32:predict",
        "/v2/nothing",
        "/v2/models/onnx_fp32/nothing",
        "/v2/models//infer",
        "/v2/models/onnx_fp32/versions//infer",
        "/v2/models/onnx_fp32/infer/",
        "/v2/models/a/b/infer",
        "/v2/health",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_is_a_404_with_a_reason(client: httpx.Client, method: str, path: str):
    assert path in _error(client.request(method, path), 404)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/models/onnx_fp32/infer"),
        ("PUT", "/v2/models/onnx_fp32/infer"),
        ("DELETE", "/v2/models/onnx_fp32"),
        ("POST", "/v2/models/onnx_fp32/config"),
        ("POST", "/v2/health/live"),
        ("GET", "/v2/repository/index"),
        ("PATCH", "/v2"),
        ("OPTIONS", "/v2/models/onnx_fp32/infer"),
        ("POST", "/metrics"),
    ],
)
def test_a_wrong_method_is_a_405_with_a_reason(client: httpx.Client, method: str, path: str):
    response = client.request(method, path)
    assert path in _error(response, 405)
    assert response.headers["allow"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/health/live", 200),
        ("/v2/health/ready", 200),
        ("/v2/models/onnx_fp32/ready", 200),
        ("/v2/models/onnx_fp32", 200),
        ("/v2/models/nothing/ready", 400),
        ("/metrics", 200),
        ("/openapi.json", 200),
        ("/v2/models/onnx_fp32/infer", 405),
        ("/v2/nothing", 404),
    ],
)
def test_a_head_request_is_answered_as_get_without_a_body(server: RunningServer, path: str, status: int):
    """Load balancers probe so. The connection can be used afterwards, which a body would make impossible."""
    with RawConnection(server.http) as connection:
        connection.send(request("HEAD", path))
        head = connection.answer(head=True)
        connection.send(request("GET", path))
        get = connection.answer()
    assert head.status == get.status == status
    assert head.headers.keys() == get.headers.keys()
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":  # whose numbers grow
        assert head.headers == get.headers


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/models/onnx_fp32/config", "/metrics", "/v2/nothing"])
def test_a_client_that_ends_its_side_behind_a_get_is_answered(server: RunningServer, path: str):
    with RawConnection(server.http) as connection:
        connection.send(request("GET", path))
        connection.half_close()
        assert connection.answer().status == (404 if path == "/v2/nothing" else 200)
        assert connection.at_end()


@pytest.mark.parametrize("before", [b"", request("GET", "/v2/health/live")[:-2]], ids=["nothing", "no whole request"])
def test_a_client_that_ends_its_side_and_waits_for_nothing_is_left(server: RunningServer, before: bytes):
    with RawConnection(server.http) as connection:
        connection.send(before)
        connection.half_close()
        assert connection.at_end()


def test_a_path_that_has_get_says_that_it_has_head(client: httpx.Client):
    assert client.post("/v2/health/live").headers["allow"] == "GET, HEAD"
    assert client.get("/v2/repository/index").headers["allow"] == "POST"


def test_the_metrics_port_has_errors_of_the_same_form(server: RunningServer):
    with httpx.Client(base_url=f"http://{server.metrics}", timeout=60) as client:
        assert _error(client.get("/nothing"), 404)
        assert _error(client.post("/metrics"), 405)
        assert client.get("/metrics").status_code == client.head("/metrics").status_code == 200


@pytest.mark.parametrize("target", ["/v2/models/onnx_fp32/infer", "/v2/models/onnx_fp32", "/v2/health/ready"])
def test_the_metrics_port_is_for_scraping_alone(server: RunningServer, target: str):
    with httpx.Client(base_url=f"http://{server.metrics}", timeout=60) as client:
        method = "POST" if target.endswith("infer") else "GET"
        assert _error(client.request(method, target, content=_body()), 404)


def test_a_503_says_when_to_come_back(client: httpx.Client, path: str):
    response = client.post(path.replace("onnx_fp32", "broken/versions/1"), content=_body())
    assert _error(response, 503)
    assert int(response.headers["retry-after"]) > 0


def test_queries_are_ignored(client: httpx.Client, path: str):
    assert _answered(client.post(f"{path}?a=b&c=/v2", content=_body())) == Y
    assert client.get("/v2/health/ready?x=1&x=2").status_code == 200


def test_names_are_percent_decoded(client: httpx.Client):
    assert _answered(client.post("/v2/models/%6fnnx_fp32/infer", content=_body())) == Y
    assert _answered(client.post("/v2/models/onnx_fp32/versions/%31/infer", content=_body())) == Y
    assert client.get("/v2/models/%6fnnx_fp32").json()["name"] == "onnx_fp32"
    assert "a/b" in _error(client.post("/v2/models/a%2Fb/infer", content=_body()), 404)


# -- bounds -----------------------------------------------------------------------------------------------


def _chunks(total: int):
    piece = b" " * (1 << 20)
    for _ in range(total // len(piece)):
        yield b"%x\r\n" % len(piece) + piece + b"\r\n"


@pytest.mark.parametrize("how", ["declared", "chunked"])
def test_too_large_a_body_is_refused_without_being_kept(server: RunningServer, path: str, how: str):
    total = 128 << 20
    front = psutil.Process(server.process.pid)
    before = front.memory_info().rss
    peak = before
    headers = {"Content-Length": str(total)} if how == "declared" else {"Transfer-Encoding": "chunked"}
    with RawConnection(server.http) as connection:
        connection.send(request("POST", path, b"", headers))
        pieces = _chunks(total) if how == "chunked" else (b" " * (1 << 20) for _ in range(128))
        for piece in pieces:
            connection.send(piece)
            peak = max(peak, front.memory_info().rss)
        answer = connection.answer()
    assert answer.status == 413
    assert str(MAX_REQUEST_BYTES) in answer.error
    assert peak - before < total // 4


def test_a_body_at_the_bound_is_taken(client: httpx.Client, path: str):
    body = _body()
    response = client.post(path, content=body + b" " * (MAX_REQUEST_BYTES - len(body)))
    assert _answered(response) == Y
    response = client.post(path, content=body + b" " * (MAX_REQUEST_BYTES - len(body) + 1))
    assert _error(response, 413)
