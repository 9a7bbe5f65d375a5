"""What only gRPC has: its messages' own rules, their sizes, its compression, deadlines and the health service."""

import struct
from typing import Any

import grpc
import pytest
from fronts import TIMEOUT_S, UNLIMITED, rpc
from running_server import RunningServer

from headrace.wire import pb

RAW = struct.pack("<3f", 1.5, -2.0, 3.25)


def _message(**changes: Any) -> Any:
    message = pb.ModelInferRequest(model_name="onnx_fp32", raw_input_contents=[RAW])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def _refused(channel: grpc.Channel, message: Any, code: grpc.StatusCode, name: str = "ModelInfer") -> str:
    with pytest.raises(grpc.RpcError) as caught:
        rpc(channel, name)(message, timeout=TIMEOUT_S)
    assert caught.value.code() is code, caught.value.details()
    return caught.value.details()


def test_outputs_are_raw_even_when_the_inputs_were_typed(channel: grpc.Channel):
    message = _message()
    del message.raw_input_contents[:]
    message.inputs[0].contents.fp32_contents.extend([1.5, -2.0, 3.25])
    response = rpc(channel, "ModelInfer")(message, timeout=TIMEOUT_S)
    assert list(response.raw_output_contents) == [RAW]
    assert not response.outputs[0].HasField("contents")


def _contents_beside_raw(message: Any) -> None:
    message.inputs[0].contents.fp32_contents.extend([1, 2, 3])


def _empty_contents_beside_raw(message: Any) -> None:
    message.inputs[0].contents.SetInParent()


def _more_raw(message: Any) -> None:
    message.raw_input_contents.append(RAW)


def _less_raw(message: Any) -> None:
    message.inputs.add(name="z", datatype="FP32", shape=[1])


def _wrong_field(message: Any) -> None:
    del message.raw_input_contents[:]
    message.inputs[0].contents.fp64_contents.extend([1, 2, 3])


def _two_fields(message: Any) -> None:
    del message.raw_input_contents[:]
    message.inputs[0].contents.fp32_contents.extend([1, 2, 3])
    message.inputs[0].contents.int_contents.extend([1])


def _no_data(message: Any) -> None:
    del message.raw_input_contents[:]


def _empty_parameter(message: Any) -> None:
    message.parameters["timeout"].SetInParent()


def _unknown_datatype(message: Any) -> None:
    message.inputs[0].datatype = "FP31"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_contents_beside_raw, "'x'"),
        (_empty_contents_beside_raw, "'x'"),
        (_more_raw, "2 raw_input_contents"),
        (_less_raw, "1 raw_input_contents"),
        (_wrong_field, "fp64_contents"),
        (_two_fields, "int_contents"),
        (_no_data, "'x'"),
        (_empty_parameter, "timeout"),
        (_unknown_datatype, "FP31"),
    ],
)
def test_a_message_that_breaks_the_tensor_rules_is_refused(channel: grpc.Channel, spoil: Any, says: str):
    message = _message()
    spoil(message)
    assert says in _refused(channel, message, grpc.StatusCode.INVALID_ARGUMENT)


@pytest.mark.parametrize(
    ("datatype", "field", "value"),
    [
        ("UINT8", "uint_contents", 256),
        ("UINT16", "uint_contents", 65536),
        ("INT8", "int_contents", -129),
        ("INT16", "int_contents", 32768),
    ],
)
def test_a_typed_integer_out_of_its_datatypes_range_is_refused(
    channel: grpc.Channel, datatype: str, field: str, value: int
):
    message = pb.ModelInferRequest(model_name=f"onnx_{datatype.lower()}")
    tensor = message.inputs.add(name="x", datatype=datatype, shape=[1, 3])
    getattr(tensor.contents, field).extend([0, value, 0])
    details = _refused(channel, message, grpc.StatusCode.INVALID_ARGUMENT)
    assert "'x'" in details
    assert str(value) in details


@pytest.mark.parametrize("where", ["input", "output"])
def test_shared_memory_is_unimplemented(channel: grpc.Channel, where: str):
    message = _message()
    if where == "input":
        del message.raw_input_contents[:]
        message.inputs[0].parameters["shared_memory_region"].string_param = "region"
    else:
        message.outputs.add(name="y").parameters["shared_memory_region"].string_param = "region"
    assert "shared memory" in _refused(channel, message, grpc.StatusCode.UNIMPLEMENTED)


@pytest.mark.parametrize("name", ["CudaSharedMemory", "NoSuchThing"])
def test_a_procedure_that_is_not_offered_is_unimplemented(channel: grpc.Channel, name: str):
    call = channel.unary_unary(f"/{pb.SERVICE}/{name}")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def _echo(channel: grpc.Channel, size: int, **options: Any) -> None:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    message = pb.ModelInferRequest(model_name="any", raw_input_contents=[data])
    message.inputs.add(name="x_UINT8", datatype="UINT8", shape=[size])
    message.outputs.add(name="y_UINT8")
    response = rpc(channel, "ModelInfer")(message, timeout=60, **options)
    assert list(response.outputs[0].shape) == [size]
    assert response.raw_output_contents[0] == data


@pytest.mark.parametrize("size", [4 * 1024 * 1024 + 1, 100 * 1000 * 1000])
def test_messages_larger_than_the_librarys_usual_bound_pass_both_ways(channel: grpc.Channel, size: int):
    _echo(channel, size)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_messages_may_be_compressed(channel: grpc.Channel, compression: grpc.Compression):
    _echo(channel, 100_000, compression=compression)


def test_a_calls_deadline_is_kept(channel: grpc.Channel):
    message = pb.ModelInferRequest(model_name="fake", raw_input_contents=[b"\0" * 4])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    message.parameters["fake_delay_ms"].int64_param = 300
    with pytest.raises(grpc.RpcError) as caught:
        rpc(channel, "ModelInfer")(message, timeout=0.05)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert rpc(channel, "ServerLive")(pb.ServerLiveRequest(), timeout=TIMEOUT_S).live


def test_many_calls_share_one_connection(channel: grpc.Channel):
    calls = [rpc(channel, "ModelInfer").future(_message(id=str(index)), timeout=TIMEOUT_S) for index in range(200)]
    assert [call.result().id for call in calls] == [str(index) for index in range(200)]


@pytest.mark.parametrize("service", ["", "inference.GRPCInferenceService", "anything"])
def test_the_health_service_says_what_server_ready_says(channel: grpc.Channel, service: str):
    kinds = pb.HEALTH_RPCS["Check"]
    check = channel.unary_unary(
        f"/{pb.HEALTH_SERVICE}/Check",
        request_serializer=kinds.request.SerializeToString,
        response_deserializer=kinds.response.FromString,
    )
    assert rpc(channel, "ServerReady")(pb.ServerReadyRequest(), timeout=TIMEOUT_S).ready
    response = check(pb.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
    assert response.status == pb.HealthCheckResponse.SERVING
    # As any client that knows no more than the standard protocol would read it.
    assert response.SerializeToString() == b"\x08\x01"


def test_watching_health_gives_the_present_status_first(channel: grpc.Channel):
    kinds = pb.HEALTH_RPCS["Watch"]
    watch = channel.unary_stream(
        f"/{pb.HEALTH_SERVICE}/Watch",
        request_serializer=kinds.request.SerializeToString,
        response_deserializer=kinds.response.FromString,
    )(pb.HealthCheckRequest(), timeout=TIMEOUT_S)
    assert next(watch).status == pb.HealthCheckResponse.SERVING
    watch.cancel()


def test_a_client_with_the_usual_bounds_works(server: RunningServer):
    with grpc.insecure_channel(server.grpc) as channel:
        assert rpc(channel, "ModelInfer")(_message(), timeout=TIMEOUT_S).raw_output_contents[0] == RAW


def test_a_long_name_in_an_error_does_not_hide_the_error(server: RunningServer):
    with grpc.insecure_channel(server.grpc, options=UNLIMITED) as channel:
        message = _message(model_name="m" * 100_000)
        assert "unknown model" in _refused(channel, message, grpc.StatusCode.NOT_FOUND)
