"""The load harness: its arithmetic and parsers by example, its drivers against a small server made here."""

import asyncio
import json
import os
import sys
from collections import deque
from contextlib import asynccontextmanager, suppress
from itertools import pairwise

import grpc
import numpy as np
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st
from loadtests import cpu, grpc_message, http_message
from loadtests.client import LengthCheck
from loadtests.drive import GrpcKind, Settings, Wire, describe, drive, parse_address
from loadtests.http_message import BadResponse
from loadtests.http_response import ProtocolError, ResponseParser
from loadtests.inputs import tensor_of_file, tensor_of_shape
from loadtests.latency import percentile, summarize
from loadtests.limit import Point, best, layouts, measure
from loadtests.loops import ClosedLoop, OpenLoop
from loadtests.metrics import counter, mean_batch_rows
from loadtests.models import MODELS, place, save_sample
from loadtests.recorder import MAX_PROBLEMS, Recorder
from loadtests.report import Cell, Run, plot, summarize_cell
from loadtests.run import QUICK, Plan
from loadtests.schedule import poisson_offsets_ns
from loadtests.server import Server, ServerFailure, free_ports
from loadtests.timer import PreciseTimer

from headrace.core.tensor import DataType, Tensor

ROW = Tensor("x", DataType.FP32, (1, 4), np.arange(4, dtype=np.float32).tobytes())
PAGE = """\
# HELP nv_inference_count rows
# TYPE nv_inference_count counter
nv_inference_count{model="m",version="1"} %s
nv_inference_count{model="m",version="2"} 5
nv_inference_count{version="1",model="other"} 1000
nv_inference_exec_count{model="m",version="1",_tag="a}\\"{b"} %s
"""


# Percentiles and schedules


def test_percentiles_are_values_that_were_measured():
    ordered = [10, 20, 30, 40]
    assert [percentile(ordered, fraction) for fraction in (0, 0.25, 0.5, 0.51, 0.99, 1)] == [10, 10, 20, 30, 40, 40]
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        percentile(ordered, 50)


@given(st.lists(st.integers(0, 10**12), min_size=1), st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]))
def test_percentiles_agree_with_numpy(values, fraction):
    assert percentile(sorted(values), fraction) == np.percentile(values, fraction * 100, method="inverted_cdf")


def test_summary_is_in_milliseconds_whatever_the_order():
    summary = summarize([3_000_000, 1_000_000, 2_000_000])
    assert (summary.count, summary.mean_ms, summary.p50_ms, summary.p99_ms, summary.max_ms) == (3, 2.0, 2.0, 3.0, 3.0)


def test_poisson_arrivals_have_the_rate_and_the_spread():
    offsets = poisson_offsets_ns(5000, 4, seed=1)
    gaps = np.diff(offsets)
    assert offsets == sorted(offsets)
    assert 0 <= offsets[0] <= offsets[-1] < 4e9
    assert len(offsets) == pytest.approx(20_000, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.05)  # 0 would be a metronome
    assert offsets == poisson_offsets_ns(5000, 4, seed=1)
    assert offsets != poisson_offsets_ns(5000, 4, seed=2)
    with pytest.raises(ValueError, match="above 0"):
        poisson_offsets_ns(0, 1, seed=1)


def test_poisson_arrivals_fill_the_time_for_every_seed():
    assert all(poisson_offsets_ns(1000, 0.1, seed)[-1] > 0.08e9 for seed in range(50))


# Metrics and CPU


def test_counters_are_summed_over_versions_of_one_model():
    page = PAGE % ("1.5e+01", "8")
    assert counter(page, "nv_inference_count", "m") == 20
    assert counter(page, "nv_inference_exec_count", "m") == 8
    assert counter(page, "nv_inference", "m") is None
    assert counter(page, "nv_inference_count", "unknown") is None


def test_mean_batch_is_of_the_rows_and_executions_between_two_pages():
    assert mean_batch_rows(PAGE % (10, 10), PAGE % (90, 30), "m") == 4
    assert mean_batch_rows("", PAGE % (1, 3), "m") == 2  # a model's first request makes its counters
    assert mean_batch_rows(PAGE % (10, 10), PAGE % (10, 10), "m") is None
    assert mean_batch_rows("", "", "m") is None


def stat_line(pid, parent, ticks, *, children_ticks=0, command="python", started=77):
    fields = ["S", parent, *["0"] * 9, ticks, 0, children_ticks, 0, 20, 0, 1, 0, started, 0, 0]
    return f"{pid} ({command}) " + " ".join(map(str, fields))


def test_stat_line_survives_a_command_with_parentheses():
    parsed = cpu.parse_stat(stat_line(12, 3, 40, children_ticks=2, command="a) S 1 (b c", started=99))
    assert parsed == cpu.ProcessTimes(pid=12, parent=3, ticks=42, started_ticks=99)


def test_tree_keeps_the_time_of_a_child_that_died():
    others = [stat_line(1, 0, 1000), stat_line(50, 1, 500)]
    before = [*others, stat_line(10, 1, 5), stat_line(11, 10, 20), stat_line(12, 11, 7)]
    after = [*others, stat_line(10, 1, 6), stat_line(11, 10, 21, children_ticks=9)]
    first = cpu.tree_times(10, map(cpu.parse_stat, before))
    second = cpu.tree_times(10, map(cpu.parse_stat, after))
    tick_us = 1_000_000 // os.sysconf("SC_CLK_TCK")
    assert second.cpu_us - first.cpu_us == 4 * tick_us
    assert cpu.left(first, second) == 1
    with pytest.raises(ProcessLookupError, match="10 is gone"):
        cpu.tree_times(10, map(cpu.parse_stat, others))


def test_own_process_is_found():
    found = cpu.tree_times(os.getpid(), cpu.read_processes())
    assert found.cpu_us > 0
    assert os.getpid() in {pid for pid, _ in found.members}


# HTTP


def fed(pieces):
    parser = ResponseParser()
    return [response for piece in pieces if (response := parser.feed(piece)) is not None]


WITH_LENGTH = b"HTTP/1.1 200 OK\r\nX: y\r\ncontent-LENGTH:  5\r\n\r\nhe\r\no"
CHUNKED = (
    b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3;name=value\r\nhe\r\r\n2\r\n\no\r\n0\r\nTrailer: t\r\n\r\n"
)
CHUNKED_PLAIN_END = b"HTTP/1.1 200 OK\r\ntransfer-encoding:chunked\r\n\r\nA\r\n0123456789\r\n0\r\n\r\n"
EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "status", "body"),
    [
        (WITH_LENGTH, 200, b"he\r\no"),
        (CHUNKED, 503, b"he\r\no"),
        (CHUNKED_PLAIN_END, 200, b"0123456789"),
        (EMPTY, 200, b""),
    ],
)
def test_response_is_whole_however_it_is_split(raw, status, body):
    splits = [[raw], [raw[index : index + 1] for index in range(len(raw))]]
    splits += [[raw[:cut], raw[cut:]] for cut in range(1, len(raw))]
    for pieces in splits:
        parser = ResponseParser()
        assert [parser.feed(piece) for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        response = parser.feed(pieces[-1])
        assert (response.status, response.body) == (status, body)
        assert response.head == raw[: raw.index(b"\r\n\r\n")]


def test_one_parser_reads_one_response_after_another():
    half = len(CHUNKED) // 2
    responses = fed([WITH_LENGTH, CHUNKED[:half], CHUNKED[half:], EMPTY, WITH_LENGTH[:3], WITH_LENGTH[3:]])
    assert [response.body for response in responses] == [b"he\r\no", b"he\r\no", b"", b"he\r\no"]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"SSH-2.0-OpenSSH\r\nContent-Length: 0\r\n\r\n", "status line"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "neither Content-Length nor chunked"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "whole number"),
        (EMPTY + b"more", "4 bytes follow"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "hexadecimal"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n", "does not end where it says"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000, "over 65536 bytes"),
    ],
)
def test_what_is_no_response_is_refused(raw, problem):
    with pytest.raises(ProtocolError, match=problem):
        ResponseParser().feed(raw)


def test_binary_request_has_json_then_blobs():
    ids = Tensor("ids", DataType.INT64, (1, 1), (7).to_bytes(8, "little"))
    head, _, body = http_message.encode_request("h:1", "m", [ROW, ids], binary=True).partition(b"\r\n\r\n")
    split = int(http_message.header_value(head, "inference-header-content-length"))
    document = json.loads(body[:split])
    assert head.startswith(b"POST /v2/models/m/infer HTTP/1.1\r\nHost: h:1\r\n")
    assert int(http_message.header_value(head, "content-length")) == len(body)
    assert [entry["parameters"] for entry in document["inputs"]] == [{"binary_data_size": 16}, {"binary_data_size": 8}]
    assert document["parameters"] == {"binary_data_output": True}
    assert body[split:] == ROW.data + ids.data


def test_json_request_has_the_numbers_and_the_strings():
    text = Tensor("t", DataType.BYTES, (1, 1), b"\x02\0\0\0\xc3\xa9")
    head, _, body = http_message.encode_request("h:1", "m", [ROW, text], binary=False).partition(b"\r\n\r\n")
    inputs = json.loads(body)["inputs"]
    assert http_message.header_value(head, "inference-header-content-length") is None
    assert inputs[0] == {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [0.0, 1.0, 2.0, 3.0]}
    assert inputs[1]["data"] == ["é"]


def answer(outputs, blob=b""):
    header = json.dumps({"outputs": outputs}).encode()
    length = f"\r\nInference-Header-Content-Length: {len(header)}" if blob else ""
    return f"HTTP/1.1 200 OK{length}".encode(), header + blob


def test_good_answers_pass_the_check():
    http_message.check_response(*answer([{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [[1, 2]]}]))
    size = {"binary_data_size": 8}
    http_message.check_response(
        *answer([{"name": "y", "datatype": "FP32", "shape": [1, 2], "parameters": size}], bytes(8))
    )


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        ((b"HTTP/1.1 200 OK", b"hello"), "not a JSON object"),
        ((b"HTTP/1.1 200 OK", b"[]"), "not a JSON object"),
        (answer([]), "no outputs"),
        (answer([{"name": "y", "datatype": "FP32", "shape": [1, 3], "data": [1, 2]}]), "2 elements, expected 3"),
        (answer([{"name": "y", "datatype": "float", "shape": [1], "data": [1]}]), "datatype 'float'"),
        (
            answer([{"name": "y", "datatype": "FP32", "shape": [3], "parameters": {"binary_data_size": 8}}], bytes(8)),
            "8 bytes, expected those of FP32",
        ),
        (
            answer([{"name": "y", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}], bytes(9)),
            "9 bytes of blobs; its outputs tell of 8",
        ),
    ],
)
def test_bad_answers_are_refused(response, problem):
    with pytest.raises(BadResponse, match=problem):
        http_message.check_response(*response)


def test_later_answers_are_as_long_as_the_first():
    exact, loose = LengthCheck(100, exact=True), LengthCheck(100, exact=False)
    assert exact.problem(100) is None
    assert exact.problem(101) == "an answer of 101 bytes, expected 100 to 100"
    assert loose.problem(110) is None
    assert loose.problem(20) is not None


# gRPC


def messages():
    """ModelInfer's messages as protobuf knows them, in a pool of their own."""
    text, int64, raw, message = 9, 3, 12, 11
    file = descriptor_pb2.FileDescriptorProto(name="check.proto", package="check", syntax="proto3")

    def add(name, *fields):
        kind = file.message_type.add(name=name)
        for number, field, field_type, repeated in fields:
            made = kind.field.add(name=field, number=number, type=field_type, label=3 if repeated else 1)
            if field_type == message:
                made.type_name = ".check.Described"

    add("Described", (1, "name", text, False), (2, "datatype", text, False), (3, "shape", int64, True))
    add("Request", (1, "model_name", text, False), (5, "inputs", message, True), (7, "raw", raw, True))
    add("Response", (1, "model_name", text, False), (5, "outputs", message, True), (6, "raw", raw, True))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return [
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"check.{name}")) for name in ("Request", "Response")
    ]


def grpc_answer(shape=(300, 1), data=bytes(1200), datatype="FP32"):
    _, response_class = messages()
    response = response_class(model_name="m", raw=[data])
    response.outputs.add(name="y", datatype=datatype, shape=shape)
    return response.SerializeToString()


def test_protobuf_reads_our_request():
    request_class, _ = messages()
    big = Tensor("big", DataType.UINT8, (300, 1), bytes(300))
    scalar = Tensor("s", DataType.BOOL, (), b"\1")
    request = request_class.FromString(grpc_message.encode_request("modèle", [ROW, big, scalar]))
    assert request.model_name == "modèle"
    assert [(entry.name, entry.datatype, list(entry.shape)) for entry in request.inputs] == [
        ("x", "FP32", [1, 4]),
        ("big", "UINT8", [300, 1]),
        ("s", "BOOL", []),
    ]
    assert list(request.raw) == [ROW.data, big.data, scalar.data]


def test_grpc_answers_are_checked():
    grpc_message.check_response(grpc_answer())
    with pytest.raises(BadResponse, match="1196 bytes, expected those of FP32"):
        grpc_message.check_response(grpc_answer(data=bytes(1196)))
    with pytest.raises(BadResponse, match="datatype 'FP99'"):
        grpc_message.check_response(grpc_answer(datatype="FP99"))
    with pytest.raises(BadResponse, match="0 outputs"):
        grpc_message.check_response(b"")
    with pytest.raises(BadResponse, match="not a ModelInferResponse"):
        grpc_message.check_response(grpc_answer()[:-5])


# Recording and loops


def test_windows_of_closed_and_open_loops():
    closed = Recorder(100, 200, by_start=False)
    opened = Recorder(100, 200, by_start=True)
    for recorder in (closed, opened):
        recorder.add(90, 99, None)
        recorder.add(90, 110, None)
        recorder.add(150, 160, None)
        recorder.add(190, 500, None)
        recorder.add(195, 199, "broken")
    assert list(closed.latencies_ns) == [20, 10]
    assert list(opened.latencies_ns) == [10, 310]
    assert (closed.finished_in_window, opened.finished_in_window) == (2, 2)
    assert closed.errors == opened.errors == {"broken": 1}
    assert closed.answered == 5


def test_kinds_of_problem_are_bounded():
    recorder = Recorder(0, 10, by_start=False)
    for number in range(100):
        recorder.add(1, 2, f"problem {number}")
    assert len(recorder.errors) == MAX_PROBLEMS + 1
    assert sum(recorder.errors.values()) == 100


class HeldClient:
    """A client whose answers come when the test says so."""

    def __init__(self):
        self.sent = deque()

    def send(self, slot):
        self.sent.append(slot)


async def test_closed_loop_keeps_every_slot_busy_until_the_window_is_over():
    client = HeldClient()
    recorder = Recorder(0, 2**62, by_start=False)
    loop = ClosedLoop(client, 2, recorder)
    loop.start()
    loop.done(client.sent.popleft(), None)
    assert list(client.sent) == [1, 0]
    recorder.to_ns = 0
    loop.done(1, None)
    assert loop.unanswered() == 1
    assert not loop.idle.is_set()
    loop.done(0, "late")
    assert loop.idle.is_set()
    assert len(recorder.latencies_ns) == 1


async def test_open_loop_counts_the_wait_for_a_slot():
    client = HeldClient()
    recorder = Recorder(0, 2**62, by_start=True)
    started_ns = asyncio.get_running_loop().time() * 1e9
    loop = OpenLoop(client, 1, recorder, [int(started_ns - 1e9), int(started_ns), int(started_ns + 2e6)])
    loop.start()
    await asyncio.sleep(0.02)
    assert list(client.sent) == [0]  # the second and third wait
    assert loop.unanswered() == 3
    for _ in range(3):
        loop.done(client.sent.popleft(), None)
    assert loop.idle.is_set()
    assert loop.unanswered() == 0
    loop.close()
    first, second, third = recorder.latencies_ns
    assert second < first <= second + 1_000_000_001
    assert third > 15e6
    assert loop.lags_ns[2] > 15e6


async def test_timer_is_never_early_and_can_be_set_again():
    loop = asyncio.get_running_loop()
    moments, done = [], asyncio.Event()

    def due():
        moments.append(loop.time() * 1e9)
        timer.arm(targets[len(moments)]) if len(moments) < 3 else done.set()

    timer = PreciseTimer(due)
    now_ns = loop.time() * 1e9
    targets = [int(now_ns + 300_000), int(now_ns + 600_000), int(now_ns - 5e9)]
    timer.arm(targets[0])
    await asyncio.wait_for(done.wait(), 30)
    timer.close()
    assert all(moment >= target for moment, target in zip(moments, targets, strict=True))


# Driving a server


class FakeServer(asyncio.Protocol):
    """A little of the protocol: identity over HTTP, its behaviour set by the path's model."""

    requests = 0

    def connection_made(self, transport):
        self.transport = transport
        self.data = b""

    def data_received(self, data):
        self.data += data
        head, end, rest = self.data.partition(b"\r\n\r\n")
        length = int(http_message.header_value(head, "content-length") or 0)
        if not end or len(rest) < length:
            return
        self.data = b""
        path = head.split(b" ")[1].decode()
        if path == "/metrics":
            self.reply(200, (PAGE % (FakeServer.requests * 6, FakeServer.requests * 2)).encode())
            return
        FakeServer.requests += 1
        self.infer(path.split("/")[3], http_message.header_value(head, "inference-header-content-length"))

    def infer(self, model, binary):
        nth = FakeServer.requests
        if model == "missing" or (model == "flaky" and nth % 10 == 9):
            self.reply(503, b'{"error":"busy"}')
        elif model == "dropping" and nth % 10 == 9:
            self.transport.close()
        elif model == "growing" and nth % 10 == 9:
            self.reply(200, b"x")
        elif binary:
            head, body = answer(
                [{"name": "y", "datatype": "FP32", "shape": [1, 1], "parameters": {"binary_data_size": 4}}], bytes(4)
            )
            self.reply(200, body, head.partition(b"\r\n")[2])
        else:
            self.reply(200, answer([{"name": "y", "datatype": "FP32", "shape": [1, 1], "data": [1]}])[1], chunked=True)

    def reply(self, status, body, header=b"X: y", chunked=False):
        start = b"HTTP/1.1 %d S\r\n%s\r\n" % (status, header)
        if chunked:
            self.transport.write(start + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        else:
            self.transport.write(start + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))


@asynccontextmanager
async def fake_http():
    FakeServer.requests = 0
    server = await asyncio.get_running_loop().create_server(FakeServer, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()
    finally:
        server.close()
        await server.wait_closed()


def settings(address, wire=Wire.HTTP_BINARY, model="m", rate=None, **changes):
    values = {
        "address": address,
        "wire": wire,
        "model": model,
        "concurrency": 3,
        "rate_per_s": rate,
        "seconds": 0.25,
        "warmup_s": 0.05,
        "server_pid": None,
        "metrics_address": None,
    }
    return Settings(**{**values, **changes})


async def driven(*arguments, **changes):
    """What driving gives and the seconds that it took, which are as many as give enough answers."""
    for seconds in (0.25, 2.5, 25):
        with suppress(BadResponse):  # there was none at all
            result = await drive(settings(*arguments, seconds=seconds, **changes), [ROW])
            if result.latency.count > 20:
                return result, seconds
    raise AssertionError("there were hardly any answers")


@pytest.mark.parametrize("wire", [Wire.HTTP_BINARY, Wire.HTTP_JSON])
async def test_driving_http(wire):
    async with fake_http() as address:
        result, seconds = await driven(address, wire, server_pid=os.getpid(), metrics_address=address)
    assert result.errors == {}
    assert result.latency.count == pytest.approx(result.requests_per_s * seconds)
    assert 20 < result.latency.count <= FakeServer.requests
    assert result.mean_batch_rows == pytest.approx(3)
    assert result.server_cpu_us > 0
    assert 0 < result.driver_cpu_share < 2
    assert result.send_lag is None


async def test_driving_at_a_rate():
    async with fake_http() as address:
        result = await drive(settings(address, rate=400), [ROW])
    expected = sum(0.05e9 <= offset < 0.3e9 for offset in poisson_offsets_ns(400, 0.3, seed=7))
    assert result.errors == {}
    assert result.latency.count == expected
    assert result.send_lag.count >= expected
    assert "send lag" in describe(result)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("flaky", "status 503"),
        ("dropping", "connection lost: closed by the server"),
        ("growing", "an answer of 1 byte"),
    ],
)
async def test_errors_are_counted_and_the_run_goes_on(model, problem):
    async with fake_http() as address:
        result, _ = await driven(address, model=model)
    (seen,) = result.errors
    assert seen.startswith(problem)
    assert 1 <= result.errors[seen] < result.latency.count


async def test_a_refused_first_request_stops_the_run():
    async with fake_http() as address:
        with pytest.raises(BadResponse, match=r"status 503: .*busy"):
            await drive(settings(address, model="missing"), [ROW])
    with pytest.raises(OSError, match=r"refused|[Cc]onnect"):
        await drive(settings(address), [ROW])


@pytest.mark.parametrize("kind", list(GrpcKind))
async def test_driving_grpc(kind):
    seen = []

    async def infer(request, context):
        seen.append(request)
        if len(seen) % 10 == 9:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "busy")
        return grpc_answer()

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(infer)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        result, _ = await driven(("127.0.0.1", port), Wire.GRPC, grpc_client=kind)
    finally:
        await server.stop(0)
    assert set(seen) == {grpc_message.encode_request("m", [ROW])}
    assert set(result.errors) == {"UNAVAILABLE: busy" if kind is GrpcKind.GRPCIO else "gRPC status 14: busy"}
    assert 5 < result.latency.count < len(seen)
    assert result.mean_batch_rows is None


def test_addresses_and_inputs_are_read_or_refused(tmp_path):
    assert parse_address("http://127.0.0.1:8000/") == ("127.0.0.1", 8000)
    with pytest.raises(ValueError, match="expected HOST:PORT"):
        parse_address("localhost")
    tensor = tensor_of_shape("ids=INT64:2x3")
    assert (tensor.name, tensor.datatype, tensor.shape, len(tensor.data)) == ("ids", DataType.INT64, (2, 3), 48)
    assert tensor_of_shape("s=BOOL:").shape == ()
    np.save(tmp_path / "x.npy", np.ones((1, 3), np.float16))
    assert tensor_of_file(f"x={tmp_path / 'x.npy'}") == Tensor("x", DataType.FP16, (1, 3), b"\x00\x3c" * 3)
    for wrong in ("x", "x=FP32", "x=FLOAT:1", "x=FP32:1,2", "=FP32:1"):
        with pytest.raises(ValueError, match="shape"):
            tensor_of_shape(wrong)


# Models and the limit


def session_of(name, repository):
    path = place(name, repository)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("name", "width"), [("identity", 16), ("mlp", 10)])
def test_small_models_batch_without_mixing_rows(tmp_path, name, width):
    session = session_of(name, tmp_path)
    (entry,) = session.get_inputs()
    assert entry.shape[0] == "batch"
    rows = np.random.default_rng(1).standard_normal((5, entry.shape[1]), dtype=np.float32)
    (together,) = session.run(None, {"x": rows})
    assert together.shape == (5, width)
    assert np.allclose(together[2:3], session.run(None, {"x": rows[2:3]})[0], rtol=1e-4, atol=1e-5)
    if name == "identity":
        assert np.array_equal(together, rows)
    else:
        assert together.std() > 0.05


def test_models_are_built_once_and_alike(tmp_path):
    path = place("mlp", tmp_path / "a")
    before = path.stat()
    assert place("mlp", tmp_path / "a").stat().st_mtime_ns == before.st_mtime_ns
    assert path.read_bytes() == place("mlp", tmp_path / "b").read_bytes()
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]
    with pytest.raises(ValueError, match="no load model 'bert'"):
        place("bert", tmp_path)


def test_encoder_ignores_what_the_mask_hides(tmp_path):
    session = session_of("minilm", tmp_path)
    sample = MODELS["minilm"].sample()
    ids, mask = sample["input_ids"], sample["attention_mask"].copy()
    mask[:, 20:] = 0
    (hidden,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    (short,) = session.run(None, {"input_ids": ids[:, :20], "attention_mask": mask[:, :20]})
    (whole,) = session.run(None, sample)
    assert hidden.shape == (1, 384)
    assert np.allclose(hidden, short, atol=1e-4)
    assert not np.allclose(hidden, whole, atol=1e-2)


def test_limit_measures_every_layout_at_every_batch(tmp_path):
    samples = save_sample("identity", tmp_path)
    row = {name: np.load(path) for name, path in samples.items()}
    points = measure(place("identity", tmp_path), row, [1, 4], threads=2, seconds=0.03)
    assert [(point.callers, point.session_threads, point.batch_rows) for point in points] == [
        (1, 2, 1),
        (1, 2, 4),
        (2, 1, 1),
        (2, 1, 4),
    ]
    assert all(point.rows_per_s > 100 and point.cpu_us_per_row > 0 for point in points)
    assert layouts(1) == [(1, 1)]


def test_best_limit_uses_no_batch_that_the_clients_cannot_fill():
    points = [Point(1, 1, 2, 10.0, 1), Point(1, 2, 1, 15.0, 1), Point(8, 1, 2, 80.0, 1), Point(32, 1, 2, 90.0, 1)]
    assert [best(points, most).rows_per_s for most in (1, 7, 8, 100)] == [15.0, 15.0, 80.0, 90.0]
    assert best(points[2:], 1).batch_rows == 8
    assert best([*points, Point(8, 9, 1, 5.0, 1.0)], 100, callers=9).rows_per_s == 5.0


# Report


def result_of(rate, p50_ms, errors=0):
    return {
        "requests_per_s": rate,
        "latency": {"p50_ms": p50_ms, "p99_ms": p50_ms * 2},
        "mean_batch_rows": None,
        "server_cpu_us": 50.0,
        "driver_cpu_share": 0.5,
        "errors": {"x": errors} if errors else {},
    }


def test_cell_is_summed_up_by_medians_and_ratios_within_a_repeat(tmp_path):
    cell, failed = Cell("m", "grpc", 8), Cell("m", "grpc", 1)
    limits = {
        ("m", repeat): [Point(1, 1, 2, limit, 1), Point(1, 2, 1, limit / 2, 1)]
        for repeat, limit in enumerate((100.0, 1000.0, 200.0, 1.0))
    }
    runs = [
        Run(cell, 0, result_of(90.0, 1.0), None),
        Run(cell, 1, result_of(500.0, 3.0, errors=2), None),
        Run(cell, 2, result_of(120.0, 2.0), None),
        Run(cell, 3, None, "broken"),
        Run(failed, 0, None, "broken"),
    ]
    row = summarize_cell(cell, runs, limits)
    assert (row.repeats, row.requests_per_s, row.p50_ms, row.p99_ms, row.errors) == (3, 120.0, 2.0, 4.0, 2)
    assert row.ratio == pytest.approx(0.6)
    assert row.same_ratio == pytest.approx(0.6)
    two = summarize_cell(cell, runs, limits, instances=2)
    assert (two.ratio, two.same_ratio) == pytest.approx((0.6, 1.2))
    assert row.batch_rows is None
    assert row.server_cpu_us == 50.0
    assert summarize_cell(failed, runs, limits) is None
    plot([row], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_repeats_go_there_and_back():
    plan = Plan(("a", "b"), (Wire.GRPC, Wire.HTTP_JSON), (1, 8), 2, 1.0, 0.1, 0.1, 1)
    assert len(set(plan.cells(0))) == 8
    assert plan.cells(1) == plan.cells(0)[::-1]
    assert all(first.model <= second.model for first, second in pairwise(plan.cells(0)))
    assert set(QUICK.models) <= set(MODELS)


# The server process

SERVER = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404 if "absent" in self.path else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(sys.argv[2])))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("code", [0, 3])
def test_server_is_ready_inside_and_must_end_well(tmp_path, code):
    server = Server(tmp_path, tmp_path / "log")
    assert server.command[1:4] == ["-m", "headrace", "serve"]
    server.command = [sys.executable, "-c", SERVER, str(server.http_port), str(code)]

    def use():
        with server:
            server.require_model("m")
            with pytest.raises(ServerFailure, match="model 'absent' is not"):
                server.require_model("absent")

    if code == 0:
        use()
    else:
        with pytest.raises(ServerFailure, match="exited with 3 after SIGTERM, expected 0"):
            use()


def test_server_that_does_not_start_says_why(tmp_path):
    server = Server(tmp_path, tmp_path / "log")
    server.command = [sys.executable, "-c", "raise SystemExit('no such repository')"]
    with pytest.raises(ServerFailure, match=r"(?s)exited with 1 before it was ready.*no such repository"), server:
        pass
    assert len(set(free_ports(3))) == 3
