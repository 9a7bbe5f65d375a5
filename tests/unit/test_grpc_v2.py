"""gRPC messages to and from the engine's requests."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import HeadraceError, InvalidRequest, Kind, NotFound, TooLarge, Unsupported
from headrace.core.model import ModelInfo, Signature, TensorSpec
from headrace.core.regions import MAX_READ_BYTES
from headrace.core.request import InferRequest, InferResponse, RequestedOutput
from headrace.core.tensor import DataType, Tensor, pack_bytes
from headrace.shared_memory import SharedMemoryRegions
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
        (message(("x", "FP32", [1], ("fp32_contents", [1.0])), raw=[bytes(4)]), "must not be specified"),
    ],
)
def test_what_breaks_the_protocol_is_named(made, said):
    text = refused(made)
    assert said in text
    assert "'mlp'" in text


def test_a_tensor_of_no_elements_needs_no_contents():
    assert bytes(decode_request(message(("x", "INT32", [0, 3]))).inputs[0].data) == b""


def place(tensor, byte_size, offset=0, region="r"):
    encode_parameters(
        {"shared_memory_region": region, "shared_memory_byte_size": byte_size, "shared_memory_offset": offset},
        tensor.parameters,
    )


@pytest.fixture
def memory(tmp_path):
    """An object of ten bytes that is the region "r", and the regions."""
    path = tmp_path / "digits"
    path.write_bytes(b"0123456789")
    regions = SharedMemoryRegions(True, tmp_path)
    regions.register("r", "digits", 0, 10)
    yield path, regions
    regions.unregister()


@pytest.mark.parametrize("of", ["input", "output"])
def test_shared_memory_is_not_offered_without_regions(of):
    made = message(("x", "UINT8", [4]), raw=[] if of == "input" else [b"1234"])
    place(made.inputs[0] if of == "input" else made.outputs.add(name="x"), 4)
    (made.inputs[0] if of == "input" else made.outputs[0]).parameters.pop("shared_memory_byte_size")
    text = refused(made, Unsupported)
    assert f"model 'mlp': {of} 'x' is in shared memory, which is not enabled on this server" in text
    assert "--allow-client-shm" in text


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("raw", [True, False])
def test_inputs_in_shared_memory_take_no_raw_entry(memory, where, raw):
    contents = [] if raw else [("uint_contents", [97, 98])]
    inputs = [("a", "UINT8", [2], *contents), ("b", "UINT8", [2], *contents)]
    inputs.insert(where, ("x", "UINT8", [4]))
    made = message(*inputs, raw=[b"ab", b"ab"] if raw else [])
    place(made.inputs[where], 4, 3)
    expected = [("a", b"ab"), ("b", b"ab")]
    expected.insert(where, ("x", b"3456"))
    assert [(one.name, bytes(one.data)) for one in decode_request(made, 0, memory[1]).inputs] == expected


def test_every_input_may_be_in_shared_memory(memory):
    path, regions = memory
    made = message(("x", "UINT8", [2, 2]), ("z", "BF16", [0]))
    place(made.inputs[0], 4)
    place(made.inputs[1], 0, 10)
    assert decode_request(made, 0, regions).inputs == (
        Tensor("x", DataType.UINT8, (2, 2), b"0123"),
        Tensor("z", DataType.BF16, (0,), b""),
    )
    path.write_bytes(b"abcdefghij")
    assert decode_request(made, 0, regions).inputs[0].data == b"abcd"


@pytest.mark.parametrize("raw", [[b"1234", b"1234"], [b"1234", b""]])
def test_a_raw_entry_for_an_input_in_shared_memory_is_one_too_many(memory, raw):
    made = message(("x", "UINT8", [4]), ("z", "UINT8", [4]), raw=raw)
    place(made.inputs[1], 4)
    with pytest.raises(InvalidRequest, match=r"2 raw_input_contents for 2 inputs, .* none for those in shared memory"):
        decode_request(made, 0, memory[1])


@pytest.mark.parametrize(
    ("given_input", "said"),
    [
        (("x", "UINT8", [1], ("uint_contents", [1])), "has contents although it is in shared memory"),
        (("x", "UINT7", [1]), "datatype 'UINT7'"),
        (("x", "UINT8", [1] * 33), "33 dimensions"),
    ],
)
def test_an_input_in_shared_memory_is_one_like_others(memory, given_input, said):
    made = message(given_input)
    place(made.inputs[0], 1)
    with pytest.raises(InvalidRequest, match=f"model 'mlp': input 'x' has .*{said.removeprefix('has ')}"):
        decode_request(made, 0, memory[1])


@pytest.mark.parametrize("of", ["input", "output"])
@pytest.mark.parametrize(
    ("changed", "kind", "said"),
    [
        ({"shared_memory_region": "s"}, NotFound, "Unable to find shared memory region: 's'"),
        ({"shared_memory_region": 7}, InvalidRequest, "has shared_memory_region 7"),
        ({"shared_memory_byte_size": 11}, InvalidRequest, "region 'r' has 10 bytes"),
        ({"shared_memory_byte_size": -1}, InvalidRequest, "has shared_memory_byte_size -1"),
        ({"shared_memory_byte_size": True}, InvalidRequest, "has shared_memory_byte_size True"),
        ({"shared_memory_byte_size": 4.0}, InvalidRequest, "has shared_memory_byte_size 4.0"),
        ({"shared_memory_byte_size": 2**64 - 1}, InvalidRequest, "has shared_memory_byte_size"),
        ({"shared_memory_offset": 7}, InvalidRequest, "shared_memory_offset 7 and shared_memory_byte_size 4"),
        ({"shared_memory_offset": "0"}, InvalidRequest, "has shared_memory_offset '0'"),
    ],
)
def test_a_place_that_is_none_is_refused_before_the_model_runs(memory, of, changed, kind, said):
    made = message(("t", "UINT8", [4]), raw=[] if of == "input" else [b"1234"])
    tensor = made.inputs[0] if of == "input" else made.outputs.add(name="t")
    place(tensor, 4)
    encode_parameters(changed, tensor.parameters)
    with pytest.raises(kind) as caught:
        decode_request(made, 0, memory[1])
    assert str(caught.value).startswith(f"model 'mlp': {of} 't'")
    assert said in str(caught.value)


def test_what_one_request_reads_is_bounded_before_it_is_read(tmp_path):
    """A file with a hole that size takes no room on the disk, and would take it all in memory."""
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(MAX_READ_BYTES + 1)
    regions = SharedMemoryRegions(True, tmp_path)
    regions.register("r", "hole", 0, MAX_READ_BYTES + 1)
    made = message(("x", "UINT8", [1]), ("z", "UINT8", [1]))
    place(made.inputs[0], 1)
    place(made.inputs[1], MAX_READ_BYTES)
    with pytest.raises(TooLarge, match=f"has {MAX_READ_BYTES + 1} bytes of inputs in shared memory"):
        decode_request(made, 0, regions)
    regions.unregister()


def test_outputs_go_where_each_is_wanted(memory):
    path, regions = memory
    made = message(("x", "UINT8", [1]), raw=[b"x"])
    made.outputs.add(name="a")
    place(made.outputs.add(name="y"), 3, 1)
    place(made.outputs.add(name="s"), 5, 5)
    made.outputs.add(name="b")
    request = decode_request(made, 0, regions)
    outputs = (
        Tensor("a", DataType.UINT8, (1,), b"a"),
        Tensor("y", DataType.UINT8, (2,), memoryview(b"yy")),
        Tensor("s", DataType.BYTES, (1,), pack_bytes([b"s"])),
        Tensor("b", DataType.UINT8, (1,), b"b"),
    )
    answer = encode_response(InferResponse("mlp", "1", "", outputs), request, regions)
    assert [one.name for one in answer.outputs] == ["a", "y", "s", "b"]
    assert list(answer.raw_output_contents) == [b"a", b"", b"", b"b"]
    assert [decode_parameters(one.parameters) for one in answer.outputs] == [
        {},
        {"shared_memory_region": "r", "shared_memory_byte_size": 2, "shared_memory_offset": 1},
        {"shared_memory_region": "r", "shared_memory_byte_size": 5, "shared_memory_offset": 5},
        {},
    ]
    assert path.read_bytes() == b"0yy34\1\0\0\0s"


def test_an_output_that_does_not_fit_its_place_is_the_client_s_fault(memory):
    path, regions = memory
    made = message(("x", "UINT8", [1]), raw=[b"x"])
    place(made.outputs.add(name="y"), 1, 9)
    request = decode_request(made, 0, regions)
    answer = InferResponse("mlp", "1", "", (Tensor("y", DataType.UINT8, (2,), b"yy"),))
    with pytest.raises(InvalidRequest, match=r"model 'mlp': output 'y': .* 2 bytes are needed, .* gives 1"):
        encode_response(answer, request, regions)
    assert path.read_bytes() == b"0123456789"


def test_a_region_may_go_while_the_model_runs(memory):
    _, regions = memory
    made = message(("x", "UINT8", [1]), raw=[b"x"])
    place(made.outputs.add(name="y"), 4)
    request = decode_request(made, 0, regions)
    regions.unregister("r")
    answer = InferResponse("mlp", "1", "", (Tensor("y", DataType.UINT8, (2,), b"yy"),))
    with pytest.raises(NotFound, match="model 'mlp': output 'y': Unable to find shared memory region: 'r'"):
        encode_response(answer, request, regions)


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
    assert "model 'mlp': parameter 'odd'" in refused(made)


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


def test_classification_is_left_to_the_engine():
    made = message(("x", "FP32", [1]), raw=[bytes(4)])
    made.outputs.add(name="y").parameters["classification"].int64_param = 3
    assert decode_request(made).outputs == (RequestedOutput("y", {"classification": 3}),)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_a_number_of_classes_is_positive(value):
    made = message(("x", "FP32", [1]), raw=[bytes(4)])
    encode_parameters({"classification": value}, made.outputs.add(name="y").parameters)
    assert f"output 'y' has classification {value!r}, expected a positive integer" in refused(made)
