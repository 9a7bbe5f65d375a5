"""Malformed and hostile requests: each is refused with a reason, and the server is as it was."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import echo_repository
import grpc
import hostile
import psutil
import pytest
from fronts import UNLIMITED
from raw_http import RawConnection, request
from running_server import RunningServer

from headrace.wire import pb

MAX_REQUEST_BYTES = 1_000_000
READ_TIMEOUT_S = 1
PATIENCE_S = 60  # for one answer
BRIEF_S = 0.25  # for an answer that comes at once if at all
PROMPT_S = 1
MAX_GROWTH_BYTES = 96 << 20
REFUSED = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory):
    """A server with small bounds."""
    repository = echo_repository.write_small(tmp_path_factory.mktemp("hostile"))
    bounds = ["--max-request-bytes", str(MAX_REQUEST_BYTES), "--read-timeout", str(READ_TIMEOUT_S)]
    with RunningServer(repository, "--model-control", "none", *bounds) as running:
        _good_requests(running)
        yield running


@pytest.fixture(autouse=True)
def unharmed(target: RunningServer):
    """After each test: the same workers live, good requests are answered, nothing was kept, nothing went wrong."""
    workers, descriptors, memory = _state(target)
    logged = len(target.output)
    yield
    _good_requests(target)
    assert {worker.pid for worker in target.workers()} == workers, "a worker has died"
    target.wait_for(lambda: _state(target)[1] <= descriptors + 4, PATIENCE_S)
    assert _state(target)[2] - memory < MAX_GROWTH_BYTES
    log = target.output[logged:]
    assert "Traceback" not in log, log[log.index("Traceback") - 200 :][:3000]


def _state(target: RunningServer) -> tuple[set[int], int, int]:
    front = psutil.Process(target.process.pid)
    return {worker.pid for worker in target.workers()}, front.num_fds(), front.memory_info().rss


def _good_requests(target: RunningServer) -> None:
    assert target.get("/v2/health/ready")[0] == 200
    for path in (hostile.INFER, hostile.ROUTE):
        status, body = target.post(path, {"inputs": [hostile.X]})
        assert status == 200, body
        assert body["outputs"][0]["data"] == [1, 2, 3]
    with grpc.insecure_channel(target.grpc) as channel:
        answer = _call(channel, hostile.good_message().SerializeToString())
        assert answer == ("OK", "")


def _ask(target: RunningServer, data: bytes) -> tuple[int, str]:
    """The status and the error of one request; an answer that is not in the protocol's form fails."""
    for _ in range(5):
        began = time.monotonic()
        with RawConnection(target.http, PATIENCE_S) as connection:
            connection.send(data)
            in_time = time.monotonic() - began < READ_TIMEOUT_S / 2
            answer = connection.answer()
        if answer.status or in_time:  # else this end was too slow for the server's small bound
            break
    return answer.status, answer.error if answer.status >= 300 else ""


@pytest.mark.parametrize("cases", [hostile.http_infer, hostile.http_other], ids=["inference", "everything else"])
def test_malformed_requests_are_refused_with_a_reason(target: RunningServer, cases: Callable):
    wrong, count = [], 0
    for name, data, statuses in cases():
        count += 1
        try:
            status, error = _ask(target, data)
        except (TimeoutError, AssertionError, ValueError, KeyError) as problem:
            wrong.append(f"{name}: {problem!r}")
            continue
        if status not in statuses or (status >= 300 and not error):
            wrong.append(f"{name}: {status} {error[:200]}")
    assert not wrong, "\n".join(wrong)
    assert count > 100


@pytest.mark.parametrize(
    ("body", "headers", "says"),
    [
        ({"inputs": [hostile.X | {"shape": [1, -3]}]}, {}, ["onnx_fp32", "'x'", "[1, -3]"]),
        ({"inputs": [hostile.X | {"datatype": "FP31"}]}, {}, ["onnx_fp32", "'x'", "FP31", "FP32"]),
        ({"inputs": [hostile.X | {"data": [1, 2, "3"]}]}, {}, ["onnx_fp32", "'x'", "element 2", "FP32"]),
        ({"inputs": [hostile.X | {"data": [1, 2]}]}, {}, ["onnx_fp32", "'x'", "2 elements", "expected 3"]),
        ({"inputs": [hostile.X | {"name": 5}]}, {}, ["onnx_fp32", "str", "inputs[0].name"]),
        ({"inputs": 5}, {}, ["onnx_fp32", "inputs"]),
        ({}, {}, ["onnx_fp32", "inputs"]),
        ({"inputs": [hostile.X]}, {hostile.LENGTH: "ten"}, ["onnx_fp32", "Inference-Header-Content-Length", "ten"]),
        ({"inputs": [hostile.X]}, {"Content-Encoding": "br"}, ["onnx_fp32", "br", "gzip"]),
        ({"inputs": [hostile.X], "parameters": {"timeout": "soon"}}, {}, ["onnx_fp32", "timeout", "soon", "micro"]),
        ({"inputs": [hostile.X]}, {"Grpc-Timeout": "soon"}, ["onnx_fp32", "grpc-timeout", "soon"]),
    ],
)
def test_the_reason_names_what_is_wrong(target: RunningServer, body: object, headers: dict[str, str], says: list[str]):
    _, error = _ask(target, request("POST", hostile.INFER, json.dumps(body).encode(), headers))
    for text in says:
        assert text in error


def _all_statuses(target: RunningServer, data: bytes) -> list[int]:
    """The statuses of everything that comes back for ``data``, however long the server waits for more of it."""
    statuses = []
    with RawConnection(target.http, BRIEF_S) as connection:
        connection.send(data)
        while True:
            try:
                answer = connection.answer()
            except TimeoutError:  # it waits for more, or for the next request
                connection.half_close()
                connection.socket.settimeout(PATIENCE_S)
                answer = connection.answer()
            if not answer.status:
                return statuses
            statuses.append(answer.status)
            if answer.status >= 300:
                assert answer.error


def _wrong_answers(
    target: RunningServer, cases: Iterable[tuple[str, bytes]], is_right: Callable[[list[int]], bool]
) -> list[str]:
    """The cases that got a wrong answer, or none where there should be one."""

    def problem(case: tuple[str, bytes]) -> str:
        name, data = case
        try:
            statuses = _all_statuses(target, data)
        except (TimeoutError, AssertionError, ValueError, KeyError) as error:
            return f"{name}: {error!r}: {data[:300]!r}"
        return "" if is_right(statuses) else f"{name}: {statuses}: {data[:300]!r}"

    with ThreadPoolExecutor(24) as pool:
        return [found for found in pool.map(problem, cases) if found]


def test_what_is_hardly_http_gets_an_error_or_a_closed_connection(target: RunningServer):
    wrong = _wrong_answers(
        target,
        hostile.broken_http(),
        lambda statuses: all(400 <= status < 500 or status in (501, 505) for status in statuses),
    )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: {length}\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: {length}",
        "Content-Length: {length}\r\nContent-Length: 0",
        "Transfer-Encoding: xchunked\r\nContent-Length: {length}",
    ],
)
def test_no_request_is_smuggled_inside_another(target: RunningServer, framing: str):
    hidden = request("GET", "/v2/health/live")
    body = b"0\r\n\r\n" + hidden
    head = f"POST {hostile.INFER} HTTP/1.1\r\nHost: t\r\n{framing.format(length=len(body))}\r\n\r\n"
    assert 200 not in _all_statuses(target, head.encode() + body)


def test_mutated_requests_never_fail_the_server(target: RunningServer):
    wrong = _wrong_answers(
        target,
        hostile.mutations(400),
        lambda statuses: all(status < 500 or status in (501, 505) for status in statuses),
    )
    assert not wrong, "\n".join(wrong)


def test_slow_clients_are_let_go_and_hold_nobody_up(target: RunningServer):
    head = f"POST {hostile.INFER} HTTP/1.1\r\nHost: t\r\n".encode()
    beginnings = [
        b"",
        b"P",
        head,
        head + b"Content-Length: 100\r\n\r\n",
        head + b"Content-Length: 100\r\n\r\n{",
        head + b"Transfer-Encoding: chunked\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
        head.replace(b"/infer", b"/%69nfer") + b"Content-Length: 100\r\n\r\n{",
        b"POST /v2/repository/index HTTP/1.1\r\nHost: t\r\nContent-Length: 100\r\n\r\n{",
    ]

    def ends(beginning: bytes, drip: bytes) -> float:
        """Seconds until the server has let a client go that goes on at one byte in a while."""
        started = time.monotonic()
        with RawConnection(target.http, 0.1) as connection:
            connection.send(beginning)
            while time.monotonic() - started < PATIENCE_S:
                with contextlib.suppress(TimeoutError):
                    if not connection.more():
                        break
                connection.send(drip)
        return time.monotonic() - started

    with ThreadPoolExecutor(2 * len(beginnings)) as pool:
        waits = [pool.submit(ends, beginning, drip) for beginning in beginnings for drip in (b"", b"1")]
        for _ in range(5):
            _good_requests(target)
        slow = [index for index, wait in enumerate(waits) if wait.result() > READ_TIMEOUT_S + 20]
    assert not slow


def test_clients_that_leave_in_the_middle_leave_nothing_behind(target: RunningServer):
    whole = request("POST", hostile.INFER, json.dumps({"inputs": [hostile.X]}).encode())
    for cut in range(0, len(whole), 3):
        with RawConnection(target.http) as connection:
            connection.send(whole[:cut])
    for _ in range(100):
        with RawConnection(target.http) as connection:
            connection.send(whole)
    assert _ask(target, request("POST", hostile.INFER, b"{"))[0] == 400


def test_a_client_that_closes_its_side_is_not_left_waiting(target: RunningServer):
    whole = request("POST", hostile.INFER, json.dumps({"inputs": [hostile.X]}).encode())
    for data in (whole, whole[:-5], whole[:20], b""):
        with RawConnection(target.http, PATIENCE_S) as connection:
            connection.send(data)
            connection.half_close()
            while connection.more():  # an answer, or nothing, and then the end
                pass


def test_endless_headers_are_not_kept(target: RunningServer):
    front = psutil.Process(target.process.pid)
    before = front.memory_info().rss
    with RawConnection(target.http, PATIENCE_S) as connection:
        connection.send(f"POST {hostile.INFER} HTTP/1.1\r\n".encode())
        for index in range(64):
            connection.send(f"X-{index}: ".encode() + b"v" * (1 << 20) + b"\r\n")
        connection.half_close()
        grown = front.memory_info().rss - before
        with contextlib.suppress(TimeoutError):
            connection.answer()
    assert grown < 32 << 20


# -- gRPC -------------------------------------------------------------------------------------------------


def _call(channel: grpc.Channel, data: bytes, name: str = "ModelInfer") -> tuple[str, str]:
    """The code and details of one call whose message is ``data`` as it is."""
    try:
        channel.unary_unary(f"/{pb.SERVICE}/{name}")(data, timeout=PATIENCE_S)
    except grpc.RpcError as error:
        return error.code().name, error.details()
    return "OK", ""


@pytest.fixture(scope="module")
def channel(target: RunningServer):
    with grpc.insecure_channel(target.grpc, options=UNLIMITED) as opened:
        yield opened


def test_messages_that_say_something_wrong_are_refused_with_a_reason(channel: grpc.Channel):
    wrong = []
    for name, data in hostile.grpc_infer():
        for _ in range(3):  # a machine may be slow once
            started = time.monotonic()
            code, details = _call(channel, data)
            took_s = time.monotonic() - started
            if took_s <= PROMPT_S:
                break
        if code not in REFUSED or not details or took_s > PROMPT_S:
            wrong.append(f"{name}: {code} after {took_s:.3f} s: {details[:200]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "name",
    [
        "ModelInfer",
        "ModelReady",
        "ModelMetadata",
        "ModelConfig",
        "RepositoryIndex",
        "RepositoryModelLoad",
        "RepositoryModelUnload",
        "ServerLive",
    ],
)
def test_bytes_that_are_no_message_are_the_clients_fault(channel: grpc.Channel, name: str):
    # Some bytes are a message of fields that the procedure does not know, which the protocol lets pass.
    allowed = REFUSED | {"OK"} | ({"UNAVAILABLE"} if name.startswith("RepositoryModel") else set())
    answers = {what: _call(channel, data, name) for what, data in hostile.grpc_garbage()}
    wrong = {what: answer for what, answer in answers.items() if answer[0] not in allowed}
    assert not wrong


def test_bytes_that_are_no_message_are_refused(channel: grpc.Channel):
    answers = {what: _call(channel, data)[0] for what, data in hostile.grpc_garbage()}
    assert {what: code for what, code in answers.items() if code not in REFUSED} == {}


def test_mutated_messages_never_fail_the_server(channel: grpc.Channel):
    wrong, refused = [], 0
    for name, data in hostile.grpc_mutations(400):
        code, details = _call(channel, data)
        refused += code in REFUSED
        if code not in REFUSED | {"OK"}:
            wrong.append(f"{name}: {code} {details[:100]}: {data!r}")
    assert not wrong, "\n".join(wrong)
    assert refused > 100


def test_garbage_on_the_grpc_port_is_not_answered_for_long(target: RunningServer):
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for data in (
        b"GET / HTTP/1.1\r\nHost: t\r\n\r\n",
        request("POST", hostile.INFER, json.dumps({"inputs": [hostile.X]}).encode()),
        b"\0" * 5000,
        b"\xff" * 5000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        preface + b"\xff" * 100,
        preface + b"\0\0\x04\x01\x05\0\0\0\x01\xff\xff\xff\xff",
        preface + b"\xff\xff\xff\0\x01\0\0\0\x01" + b"x" * 1000,
    ):
        with RawConnection(target.grpc, PATIENCE_S) as connection:
            connection.send(data)
            connection.half_close()
            deadline = time.monotonic() + PATIENCE_S
            while connection.more():
                assert time.monotonic() < deadline
