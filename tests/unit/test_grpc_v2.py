"""gRPC messages to and from the engine's requests."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import HeadraceError, InvalidRequest, Kind, Unsupported
from headrace.core.model import ModelInfo, Signature, TensorSpec
from headrace.core.request import InferRequest, InferResponse, RequestedOutput
from headrace.core.tensor import DataType, Tensor, pack_bytes
from headrace.wire import pb
from headrace.wire.grpc_v2 import (
    decode_parameters,
    decode_request,
    encode_metadata,
    encode_parameters,
    encode_response,
)

TYPED = {
    "BOOL": ("bool_contents", [True, False], b"\x01\x00"),
    "INT8": ("int_contents", [-128, 127], b"\x80\x7f"),
    "INT16": ("int_contents", [-32768, 2], struct.pack("<2h", -32768, 2)),
    "INT32": ("int_contents", [-(2**31), 2], struct.pack("<2i", -(2**31), 2)),
    "INT64": ("int64_contents", [-(2**63), 2], struct.pack("<2q", -(2**63), 2)),
    "UINT8": ("uint_contents", [0, 255], b"\x00\xff"),
    "UINT16": ("uint_contents", [0, 65535], b"\0\0\xff\xff"),
    "UINT32": ("uint_contents", [0, 2**32 - 1], struct.pack("<2I", 0, 2**32 - 1)),
    "UINT64": ("uint64_contents", [0, 2**64 - 1], struct.pack("<2Q", 0, 2**64 - 1)),
    "FP32": ("fp32_contents", [1.5, float("-inf")], struct.pack("<2f", 1.5, float("-inf"))),
    "FP64": ("fp64_contents", [0.1, float("nan")], struct.pack("<2d", 0.1, float("nan"))),
    "BYTES": ("bytes_contents", [b"\xff", b""], b"\x01\0\0\0\xff\0\0\0\0"),
}


def message(*inputs, raw=(), **more):
    made = pb.ModelInferRequest(model_name="mlp", raw_input_contents=raw, **more)
    for name, datatype, shape, *contents in inputs:
        tensor = made.inputs.add(name=name, datatype=datatype, shape=shape)
        for field, values in contents:
            getattr(tensor.contents, field).extend(values)
    return made


def refused(made, kind=InvalidRequest):
    with pytest.raises(kind) as caught:
        decode_request(made)
    return str(caught.value)


def test_everything_a_request_says_is_kept():
    made = message(("x", "FP32", [1]), raw=[bytes(4)], model_version="3", id="r-7")
    made.parameters["priority"].int64_param = 2
    made.outputs.add(name="y").parameters["tag"].int64_param = 3
    made.outputs.add(name="z")
    request = decode_request(made, 99)
    assert request == InferRequest(
        "mlp",
        "3",
        "r-7",
        (Tensor("x", DataType.FP32, (1,), bytes(4)),),
        (RequestedOutput("y", {"tag": 3}), RequestedOutput("z")),
        {"priority": 2},
        99,
    )


def test_what_is_not_said_is_empty():
    request = decode_request(message())
    assert (request.version, request.id, request.inputs, request.outputs, request.parameters) == ("", "", (), (), {})


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_contents_become_raw(datatype):
    field, values, raw = TYPED[datatype]
    (tensor,) = decode_request(message(("x", datatype, [2, 1], (field, values)))).inputs
    assert (tensor.datatype, tensor.shape, bytes(tensor.data)) == (DataType(datatype), (2, 1), raw)


@pytest.mark.parametrize("datatype", DataType)
def test_raw_contents_of_every_datatype_are_used_as_they_are(datatype):
    made = message(("x", datatype, [1]), ("y", datatype, [0]), raw=[b"12345678", b""])
    assert [bytes(tensor.data) for tensor in decode_request(made).inputs] == [b"12345678", b""]


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_typed_field(datatype):
    assert "raw_input_contents only" in refused(message(("x", datatype, [1], ("fp32_contents", [1.0]))))


@pytest.mark.parametrize(
    ("datatype", "value"),
    [("INT8", 128), ("INT8", -129), ("INT16", 40000), ("UINT8", 256), ("UINT16", 65536)],
)
def test_integers_out_of_their_range_do_not_wrap(datatype, value):
    text = refused(message(("x", datatype, [2], (TYPED[datatype][0], [1, value]))))
    assert str(value) in text
    assert datatype in text


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (message(("x", "FP32", [2], ("fp32_contents", [1.0]))), "has 1 elements in fp32_contents, expected 2"),
        (message(("x", "FP32", [1], ("fp32_contents", [1.0, 2.0]))), "has 2 elements"),
        (message(("x", "FP32", [1])), "has 0 elements"),
        (message(("x", "FP32", [1], ("fp64_contents", [1.0]))), "has fp64_contents, expected fp32_contents"),
        (message(("x", "FP32", [1], ("fp32_contents", [1.0]), ("int_contents", [1]))), "has int_contents"),
        (message(("x", "FP32", [-1], ("fp32_contents", [1.0]))), "negative"),
        (message(("x", "FP31", [1])), "datatype 'FP31', expected one of BOOL"),
        (message(("x", "", [1])), "datatype ''"),
        (message(("x", "fp32", [1])), "datatype 'fp32'"),
        (message(("x", "FP32", [1]), ("y", "FP32", [1]), raw=[bytes(4)]), "1 raw_input_contents for 2 inputs"),
        (message(("x", "FP32", [1]), raw=[bytes(4), bytes(4)]), "2 raw_input_contents for 1 inputs"),
        (message(("x", "FP32", [1], ("fp32_contents", [1.0])), raw=[bytes(4)]), "although"),
    ],
)
def test_what_breaks_the_protocol_is_named(made, said):
    text = refused(made)
    assert said in text
    assert "'mlp'" in text


def test_a_tensor_of_no_elements_needs_no_contents():
    assert bytes(decode_request(message(("x", "INT32", [0, 3]))).inputs[0].data) == b""


@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_shared_memory_is_not_offered(where):
    made = message(("x", "FP32", [1], ("fp32_contents", [1.0])))
    tensor = made.inputs[0] if where == "inputs" else made.outputs.add(name="y")
    tensor.parameters["shared_memory_region"].string_param = "r"
    assert "shared memory" in refused(made, Unsupported)


def test_parameters_of_every_kind_come_and_go():
    values = {"b": True, "i": -(2**63), "s": "ä", "d": 0.5, "u": 2**63 - 1}
    made = pb.ModelInferRequest()
    encode_parameters(values, made.parameters)
    found = decode_parameters(made.parameters)
    assert found == values
    assert {name: type(value) for name, value in found.items()} == {name: type(it) for name, it in values.items()}


def test_a_large_unsigned_parameter_comes_and_goes():
    made = pb.ModelInferRequest()
    made.parameters["u"].uint64_param = 2**64 - 1
    values = decode_parameters(made.parameters)
    assert values == {"u": 2**64 - 1}
    back = pb.ModelInferRequest()
    encode_parameters(values, back.parameters)
    assert decode_parameters(back.parameters) == values


def test_a_parameter_without_a_value_is_named():
    made = message()
    made.parameters["odd"].SetInParent()
    assert "'odd'" in refused(made)


def test_an_answer_is_raw_one_entry_an_output():
    outputs = (
        Tensor("y", DataType.FP32, (1, 2), memoryview(struct.pack("<2f", 1, 2))),
        Tensor("s", DataType.BYTES, (1,), pack_bytes([b"ab"])),
        Tensor("e", DataType.BF16, (0,), b""),
    )
    made = encode_response(InferResponse("mlp", "3", "r-7", outputs, {"n": 1}))
    assert (made.model_name, made.model_version, made.id) == ("mlp", "3", "r-7")
    assert [(one.name, one.datatype, list(one.shape)) for one in made.outputs] == [
        ("y", "FP32", [1, 2]),
        ("s", "BYTES", [1]),
        ("e", "BF16", [0]),
    ]
    assert list(made.raw_output_contents) == [struct.pack("<2f", 1, 2), b"\x02\0\0\0ab", b""]
    assert made.parameters["n"].int64_param == 1


def test_metadata():
    signature = Signature(
        (TensorSpec("x", DataType.FP32, (-1, 784)),),
        (TensorSpec("y", DataType.BYTES, (-1, 10)), TensorSpec("n", DataType.INT64, None)),
        32,
    )
    made = encode_metadata(ModelInfo("mlp", "2", "onnxruntime_onnx", "onnxruntime", signature), ["1", "2"])
    assert (made.name, list(made.versions), made.platform) == ("mlp", ["1", "2"], "onnxruntime_onnx")
    assert [(one.name, one.datatype, list(one.shape)) for one in made.inputs] == [("x", "FP32", [-1, 784])]
    assert [(one.name, one.datatype, list(one.shape)) for one in made.outputs] == [
        ("y", "BYTES", [-1, 10]),
        ("n", "INT64", [-1]),
    ]


@given(st.lists(st.floats(width=32), max_size=6))
def test_floats_keep_their_bits(values):
    (tensor,) = decode_request(message(("x", "FP32", [len(values)], ("fp32_contents", values)))).inputs
    expected = np.array(values, dtype="<f4")
    assert np.array_equal(np.frombuffer(tensor.data, dtype="<f4"), expected, equal_nan=True)


@given(
    datatype=st.sampled_from([*map(str, DataType), "X", ""]),
    shape=st.lists(st.integers(-2, 2**40), max_size=4),
    fields=st.lists(
        st.sampled_from([(field, values) for field, values, _ in TYPED.values()]),
        max_size=2,
        unique_by=lambda it: it[0],
    ),
    raw=st.lists(st.binary(max_size=8), max_size=3),
)
def test_hostile_messages_are_only_ever_the_clients_fault(datatype, shape, fields, raw):
    try:
        request = decode_request(message(("x", datatype, shape, *fields), raw=raw))
    except HeadraceError as error:
        assert error.kind in {Kind.INVALID, Kind.UNSUPPORTED}  # noqa: PT017 - either outcome is right
        return
    assert request.inputs[0].shape == tuple(shape)


def test_classification_is_refused_and_not_answered_with_raw_values():
    made = message(("x", "FP32", [1]), raw=[bytes(4)])
    made.outputs.add(name="y").parameters["classification"].int64_param = 3
    assert "'y': classification is not offered" in refused(made, Unsupported)
