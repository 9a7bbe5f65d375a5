"""The client over gRPC, with a made-up channel in the place of the network."""

import asyncio

import grpc
import grpc.aio
import ml_dtypes
import numpy as np
import pytest

from headrace.client import (
    ConnectionFailed,
    DeadlineError,
    InferenceError,
    InvalidRequestError,
    ModelMetadata,
    NotFoundError,
    ProtocolError,
    TensorMetadata,
)
from headrace.client import operations as ops
from headrace.client.address import parse_address
from headrace.client.grpc_form import decode_infer, encode_infer, encode_operation, to_plain
from headrace.client.grpc_transport import AsyncGrpcTransport, GrpcTransport
from headrace.client.operations import Operation
from headrace.client.request import Sequence, build_request
from headrace.client.terms import Terms, make_terms
from headrace.client.transport import Limits
from headrace.wire import pb

ADDRESS = parse_address("grpc://server:8001")
LIMITS = Limits(1, 1 << 20)
TERMS = Terms()
X = np.arange(6, dtype=np.float32).reshape(2, 3)
REQUEST = build_request("m", {"x": X}, None)


class Failed(grpc.RpcError):
    """What a call raises, of either library."""

    def __init__(self, code, details):
        self._code = code
        self._details = details

    def code(self):
        return self._code

    def details(self):
        return self._details


class Call:
    """A stream's responses, an exception among them to raise; of both kinds of iterator."""

    def __init__(self, responses):
        self._responses = iter(responses)
        self.read = 0
        self.cancelled = False

    def __iter__(self):
        return self

    def __next__(self):
        response = next(self._responses)
        self.read += 1
        if isinstance(response, Exception):
            raise response
        return response

    async def __aiter__(self):
        for response in self:
            yield response

    def cancel(self):
        self.cancelled = True


class Channel:
    """Answers every call with what it was given; keeps what it was asked."""

    def __init__(self, answer, *, is_async=False):
        self._answer = answer
        self._is_async = is_async
        self.asked = []
        self.closed = False

    def unary_unary(self, path, serialize, deserialize):
        def reply(message, timeout, metadata):
            self.asked.append((path, message, timeout, metadata))
            serialize(message)
            if isinstance(self._answer, Exception):
                raise self._answer
            return deserialize(self._answer.SerializeToString())

        async def async_reply(message, **terms):
            return reply(message, **terms)

        return async_reply if self._is_async else reply

    def stream_stream(self, path, serialize, deserialize):
        def reply(messages, timeout, metadata):
            self.asked.append((path, list(messages), timeout, metadata))
            return self._answer

        return reply

    def close(self):
        self.closed = True


class Driven:
    """An AsyncGrpcTransport called as a GrpcTransport is; streams come as lists."""

    def __init__(self, address, limits, channel):
        channel._is_async = True
        self._transport = AsyncGrpcTransport(address, limits, channel)

    def call(self, operation, terms):
        return asyncio.run(self._transport.call(operation, terms))

    def infer(self, request, terms):
        return asyncio.run(self._transport.infer(request, terms))

    def stream(self, request, terms):
        async def collect():
            return [part async for part in self._transport.stream(request, terms)]

        return asyncio.run(collect())


@pytest.fixture(params=[GrpcTransport, Driven], ids=["sync", "async"])
def transport(request):
    """A maker of transports over a made-up channel."""
    return lambda channel: request.param(ADDRESS, LIMITS, channel)


def response(**fields):
    message = pb.ModelInferResponse(model_name="m", model_version="3", **fields)
    message.outputs.add(name="y", datatype="FP32", shape=[2, 3])
    message.raw_output_contents.append(X.tobytes())
    return message


def part(number):
    message = pb.ModelStreamInferResponse()
    message.infer_response.outputs.add(name="y", datatype="INT32", shape=[1])
    message.infer_response.raw_output_contents.append(np.int32(number).tobytes())
    return message


# -- inference -----------------------------------------------------------------------------------------------------


def test_a_request_carries_raw_contents_and_parameters():
    message = encode_infer(
        build_request(
            "m",
            {"x": X, "text": np.array(["ab"])},
            None,
            outputs={"y": {"classification": 2}},
            version="2",
            id="7",
            parameters={"f": 1.5, "b": True, "big": 2**64 - 1, "s": "ä"},
            sequence=Sequence(5, start=True),
        )
    )
    assert (message.model_name, message.model_version, message.id) == ("m", "2", "7")
    assert [(one.name, one.datatype, list(one.shape)) for one in message.inputs] == [
        ("x", "FP32", [2, 3]),
        ("text", "BYTES", [1]),
    ]
    assert list(message.raw_input_contents) == [X.tobytes(), b"\2\0\0\0ab"]
    assert message.outputs[0].parameters["classification"].int64_param == 2
    held = {name: value.WhichOneof("parameter_choice") for name, value in message.parameters.items()}
    assert held == {
        "f": "double_param",
        "b": "bool_param",
        "big": "uint64_param",
        "s": "string_param",
        "sequence_id": "int64_param",
        "sequence_start": "bool_param",
        "sequence_end": "bool_param",
    }


def test_an_answer_is_arrays_of_the_callers_own():
    message = response(id="7")
    message.parameters["p"].double_param = 0.5
    message.outputs.add(name="h", datatype="BF16", shape=[1])
    message.raw_output_contents.append(np.array([2], ml_dtypes.bfloat16).tobytes())
    message.outputs.add(name="t", datatype="BYTES", shape=[1, 1])
    message.raw_output_contents.append(b"\1\0\0\0\xff")
    result = decode_infer(message)
    assert (result.model_name, result.model_version, result.id, result.parameters) == ("m", "3", "7", {"p": 0.5})
    np.testing.assert_array_equal(result["y"], X)
    assert result["h"].tolist() == [2]
    assert result["t"].tolist() == [[b"\xff"]]
    assert all(array.flags.writeable for array in result.outputs.values())


def test_answers_with_typed_contents_are_understood():
    message = pb.ModelInferResponse()
    message.outputs.add(name="n", datatype="INT8", shape=[2]).contents.int_contents.extend([-1, 2])
    message.outputs.add(name="t", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"ab")
    message.outputs.add(name="e", datatype="FP32", shape=[0])
    result = decode_infer(message)
    assert result["n"].tolist() == [-1, 2]
    assert result["t"].tolist() == [b"ab"]
    assert result["e"].shape == (0,)
    message.outputs[0].contents.int_contents[0] = 300
    with pytest.raises(ProtocolError, match="output 'n' is INT8"):
        decode_infer(message)


def test_answers_that_break_the_protocol():
    message = response()
    message.outputs[0].shape[0] = 3
    with pytest.raises(ProtocolError, match="output 'y' is said to be FP32"):
        decode_infer(message)
    message.outputs.add(name="z", datatype="FP32", shape=[1])
    with pytest.raises(ProtocolError, match="1 raw_output_contents for 2 outputs"):
        decode_infer(message)


def test_a_call_goes_to_its_rpc_with_its_terms(transport):
    channel = Channel(response())
    terms = make_terms(5, None, {"X-Key": "v"})
    np.testing.assert_array_equal(transport(channel).infer(REQUEST, terms)["y"], X)
    ((path, _, timeout_s, metadata),) = channel.asked
    assert path == "/inference.GRPCInferenceService/ModelInfer"
    assert 4 < timeout_s <= 5
    assert metadata == (("x-key", "v"),)


@pytest.mark.parametrize(
    ("code", "details", "kind", "said"),
    [
        (grpc.StatusCode.NOT_FOUND, "no 'm'", NotFoundError, "no 'm'"),
        (grpc.StatusCode.INTERNAL, "", InferenceError, "gRPC status INTERNAL"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "late", DeadlineError, "late"),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", ConnectionFailed, "grpc://server:8001: Socket closed"),
    ],
)
def test_a_status_is_an_error(transport, code, details, kind, said):
    with pytest.raises(kind) as caught:
        transport(Channel(Failed(code, details))).infer(REQUEST, TERMS)
    assert type(caught.value) is kind
    assert str(caught.value) == said


# -- everything else -----------------------------------------------------------------------------------------------


def test_answers_have_the_types_that_they_have_over_http(transport):
    message = pb.ModelMetadataResponse(name="m", versions=["2"], platform="p")
    message.inputs.add(name="x", datatype="FP32", shape=[-1, 3])
    metadata = transport(Channel(message)).call(ops.model_metadata("m", "2"), TERMS)
    assert metadata == ModelMetadata("m", ("2",), "p", (TensorMetadata("x", "FP32", (-1, 3)),))
    statistics = pb.ModelStatisticsResponse()
    one = statistics.model_stats.add(name="m", inference_count=2**60)
    one.inference_stats.success.ns = 9
    one.response_stats["0"].success.count = 4
    one.batch_stats.add(batch_size=8).compute_infer.ns = 5
    (found,) = transport(Channel(statistics)).call(ops.statistics("m", ""), TERMS)
    assert found.inference_count == 2**60
    assert found.inference_stats.success.ns == 9
    assert found.response_stats["0"].success.count == 4
    assert found.batch_stats[0].compute_infer.ns == 5
    index = pb.RepositoryIndexResponse()
    index.models.add(name="m", state="READY")
    assert transport(Channel(index)).call(ops.index(ready=True), TERMS)[0].state == "READY"
    assert transport(Channel(pb.ServerReadyResponse(ready=True))).call(ops.server_ready(), TERMS).ready
    assert not transport(Channel(pb.ModelReadyResponse())).call(ops.model_ready("m", ""), TERMS).ready


def test_a_configuration_is_what_json_has():
    config = pb.ModelConfig(name="m", max_batch_size=4)
    config.input.add(name="x", data_type=pb.DataType.Value("TYPE_FP32"), dims=[-1])
    config.dynamic_batching.max_queue_delay_microseconds = 2**40
    config.parameters["p"].string_value = "v"
    plain = to_plain(pb.ModelConfigResponse(config=config))["config"]
    assert plain["max_batch_size"] == 4
    assert plain["input"][0]["data_type"] == "TYPE_FP32"
    assert plain["input"][0]["dims"] == [-1]
    assert plain["dynamic_batching"]["max_queue_delay_microseconds"] == 2**40
    assert plain["parameters"] == {"p": {"string_value": "v"}}
    assert plain["output"] == []
    assert "sequence_batching" not in plain
    assert "optimization" not in plain


def test_load_parameters_have_their_types():
    message = encode_operation(ops.load("m", {"backend": "x"}, {"1/model.onnx": b"\xff"}))
    assert message.model_name == "m"
    assert message.parameters["config"].string_param == '{"backend": "x"}'
    assert message.parameters["file:1/model.onnx"].bytes_param == b"\xff"
    assert encode_operation(ops.unload("m", unload_dependents=True)).parameters["unload_dependents"].bool_param


def test_what_no_message_can_hold_is_refused():
    with pytest.raises(InvalidRequestError, match="ModelStatistics"):
        encode_operation(ops.statistics("", "\ud800"))
    with pytest.raises(InvalidRequestError, match="model 'm'"):
        encode_infer(build_request("m", {"x": X}, None, id="\ud800"))


@pytest.mark.parametrize(
    "operation",
    [
        ops.server_live(),
        ops.server_ready(),
        ops.model_ready("m", "1"),
        ops.server_metadata(),
        ops.model_metadata("m", "1"),
        ops.model_config("m", "1"),
        ops.statistics("m", "1"),
        ops.index(ready=True),
        ops.load("m", None, None),
        ops.unload("m", unload_dependents=False),
    ],
    ids=lambda operation: operation.rpc,
)
def test_every_operation_has_an_rpc_that_takes_its_fields(operation: Operation):
    assert isinstance(encode_operation(operation), pb.RPCS[operation.rpc].request)


# -- streams -------------------------------------------------------------------------------------------------------


def test_a_stream_is_a_result_for_each_response(transport):
    call = Call([part(1), part(2)])
    channel = Channel(call)
    parts = list(transport(channel).stream(REQUEST, make_terms(None, None, {"k": "v"})))
    assert [one["y"].item() for one in parts] == [1, 2]
    ((path, messages, timeout_s, metadata),) = channel.asked
    assert path == "/inference.GRPCInferenceService/ModelStreamInfer"
    assert len(messages) == 1
    assert timeout_s is None
    assert metadata == (("k", "v"), ("triton_grpc_error", "true"))


def test_a_stream_ends_with_the_error_that_the_server_ends_it_with(transport):
    failed = Failed(grpc.StatusCode.NOT_FOUND, "no 'm'")
    with pytest.raises(NotFoundError, match="no 'm'"):
        list(transport(Channel(Call([part(1), failed]))).stream(REQUEST, TERMS))


def test_an_error_within_a_response_is_one_without_a_status(transport):
    with pytest.raises(InferenceError, match="the model failed") as caught:
        list(
            transport(Channel(Call([pb.ModelStreamInferResponse(error_message="the model failed")]))).stream(
                REQUEST, TERMS
            )
        )
    assert caught.value.status is None


def test_a_caller_that_stops_early_cancels_the_stream():
    call = Call([part(1), part(2), part(3)])
    parts = GrpcTransport(ADDRESS, LIMITS, Channel(call)).stream(REQUEST, TERMS)
    assert next(parts)["y"].item() == 1
    assert (call.read, call.cancelled) == (1, False)
    parts.close()
    assert (call.read, call.cancelled) == (1, True)


async def test_an_async_caller_that_stops_early_cancels_the_stream():
    call = Call([part(1), part(2), part(3)])
    parts = AsyncGrpcTransport(ADDRESS, LIMITS, Channel(call)).stream(REQUEST, TERMS)
    assert (await anext(parts))["y"].item() == 1
    assert (call.read, call.cancelled) == (1, False)
    await parts.aclose()
    assert (call.read, call.cancelled) == (1, True)


def test_closing_closes_the_channel():
    channel = Channel(response())
    GrpcTransport(ADDRESS, LIMITS, channel).close()
    assert channel.closed
