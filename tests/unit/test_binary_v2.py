"""Bodies with binary tensor data: where each tensor starts and ends, and which outputs are binary."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.utils import np_to_triton_dtype

from headrace.core.errors import HeadraceError, InvalidRequest, Kind, NotFound, TooLarge, Unsupported
from headrace.core.model import Signature, TensorSpec
from headrace.core.regions import MAX_READ_BYTES
from headrace.core.request import InferRequest, InferResponse, RequestedOutput
from headrace.core.tensor import NUMPY_DTYPES, DataType, Tensor, from_wire, pack_bytes
from headrace.shared_memory import SharedMemoryRegions
from headrace.wire.binary_v2 import decode_raw_request, decode_request, encode_response

CLIENT_ERRORS = {Kind.INVALID, Kind.UNSUPPORTED, Kind.TOO_LARGE}


def binary(name, size_bytes, **parameters):
    return {
        "name": name,
        "datatype": "UINT8",
        "shape": [4],
        "parameters": {"binary_data_size": size_bytes, **parameters},
    }


def body_of(inputs, blob=b"", **more):
    header = json.dumps({"inputs": inputs, **more}).encode()
    return header + blob, len(header)


def refused(inputs, blob=b"", kind=InvalidRequest, header_length=0, **more):
    body, length = body_of(inputs, blob, **more)
    with pytest.raises(kind) as caught:
        decode_request(body, length if header_length == 0 else header_length, "mlp", "")
    message = str(caught.value)
    assert "mlp" in message
    return message


def outcome(body, header_length):
    """What comes of a body: the kind of the error, or the request."""
    try:
        return None, decode_request(body, header_length, "mlp", "")
    except HeadraceError as error:
        return error.kind, None


def test_blobs_are_slices_of_the_body_in_the_order_of_the_inputs():
    json_input = {"name": "b", "datatype": "FP32", "shape": [1], "data": [1.5]}
    body, length = body_of([binary("a", 4), json_input, binary("c", 0), binary("d", 2)], b"aaaadd")
    request = decode_request(body, length, "mlp", "2")
    assert [tensor.name for tensor in request.inputs] == ["a", "b", "c", "d"]
    assert [bytes(tensor.data) for tensor in request.inputs] == [b"aaaa", struct.pack("<f", 1.5), b"", b"dd"]
    assert isinstance(request.inputs[0].data, memoryview)
    assert request.inputs[0].data.obj is body


@pytest.mark.parametrize("wrap", [bytes, memoryview])
def test_nested_and_flat_json_may_stand_beside_blobs(wrap):
    json_inputs = [
        {"name": "b", "datatype": "FP32", "shape": [1, 1], "data": [[1.5]]},
        {"name": "c", "datatype": "BOOL", "shape": [2], "data": [True, False]},
        {"name": "d", "datatype": "INT8", "shape": [2], "data": [1, -1]},
    ]
    body, length = body_of([binary("a", 4), *json_inputs], b"aaaa")
    data = [bytes(tensor.data) for tensor in decode_request(wrap(body), length, "mlp", "").inputs]
    assert data == [b"aaaa", struct.pack("<f", 1.5), b"\1\0", b"\1\xff"]


def test_a_header_length_that_covers_all_is_a_json_request():
    body, length = body_of([{"name": "x", "datatype": "INT8", "shape": [1], "data": [7]}])
    assert decode_request(body, length, "mlp", "") == decode_request(body, None, "mlp", "")


@pytest.mark.parametrize("header_length", [-1, 10_000])
def test_the_header_length_lies_within_the_body(header_length):
    assert str(header_length) in refused([binary("x", 4)], b"1234", header_length=header_length)


@pytest.mark.parametrize(("blob", "words"), [(b"123", "3 bytes follow"), (b"12345", "1 bytes follow the last")])
def test_blobs_fill_the_body_exactly(blob, words):
    assert words in refused([binary("x", 4)], blob)


def test_the_second_blob_may_be_the_short_one():
    message = refused([binary("x", 4), binary("z", 4)], b"1234123")
    assert "input 'z'" in message
    assert "has a binary_data_size of 4, and 3 bytes follow" in message


def test_a_blob_without_its_header_length_is_refused_with_the_header_s_name():
    assert "Inference-Header-Content-Length" in refused([binary("x", 4)], header_length=None)


def test_bytes_after_a_json_request_are_refused():
    assert "2 bytes follow" in refused([{"name": "x", "datatype": "INT8", "shape": [1], "data": [7]}], b"ab")


@pytest.mark.parametrize("size", [-1, 1.0, 4.5, True, "4", 10**30])
def test_a_blob_s_size_is_a_number_of_bytes(size):
    message = refused([binary("x", size)], b"1234")
    assert "input 'x'" in message
    assert "binary_data_size" in message


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({}, "no data"),
        ({"parameters": {"a": 1}}, "no data"),
        ({"parameters": None}, "no data"),
        ({"data": [1], "parameters": {"binary_data_size": 1}}, "data and binary_data_size"),
        ({"data": [1], "parameters": {"shared_memory_region": "r"}}, "data and shared_memory_region"),
        (
            {"parameters": {"shared_memory_region": "r", "binary_data_size": 1}},
            "binary_data_size and shared_memory_region",
        ),
    ],
)
def test_an_input_has_exactly_one_source(sources, words):
    message = refused([{"name": "x", "datatype": "UINT8", "shape": [1], **sources}], b"1")
    assert f"input 'x' has {words}, expected exactly one" in message


def placed(name, byte_size, offset=0, region="r"):
    parameters = {"shared_memory_region": region, "shared_memory_byte_size": byte_size, "shared_memory_offset": offset}
    return {"name": name, "datatype": "UINT8", "shape": [4], "parameters": parameters}


@pytest.fixture
def memory(tmp_path):
    """An object of ten bytes that is the region "r", and the regions."""
    path = tmp_path / "digits"
    path.write_bytes(b"0123456789")
    regions = SharedMemoryRegions(True, tmp_path)
    regions.register("r", "digits", 0, 10)
    yield path, regions
    regions.unregister()


def test_shared_memory_is_not_offered_without_regions():
    said = "is in shared memory, which is not enabled on this server; start it with --allow-client-shm"
    assert f"input 'x' {said}" in refused([placed("x", 4)], kind=Unsupported)
    assert f"output 'y' {said}" in refused([binary("x", 4)], b"1234", Unsupported, outputs=[placed("y", 4)])


@pytest.mark.parametrize("with_header_length", [True, False])
def test_an_input_may_be_in_shared_memory(memory, with_header_length):
    _, regions = memory
    body, length = body_of([placed("x", 4, 2), placed("z", 0)])
    request = decode_request(body, length if with_header_length else None, "mlp", "", regions)
    assert request.inputs == (Tensor("x", DataType.UINT8, (4,), b"2345"), Tensor("z", DataType.UINT8, (4,), b""))


def test_inputs_may_come_every_way_at_once(memory):
    _, regions = memory
    in_json = {"name": "b", "datatype": "UINT8", "shape": [1], "data": [7]}
    body, length = body_of([binary("a", 2), placed("x", 3, 7), in_json, binary("c", 1)], b"aac")
    request = decode_request(body, length, "mlp", "", regions)
    assert [(one.name, bytes(one.data)) for one in request.inputs] == [
        ("a", b"aa"),
        ("x", b"789"),
        ("b", b"\7"),
        ("c", b"c"),
    ]


def test_a_request_that_is_sent_again_reads_the_memory_again(memory):
    path, regions = memory
    body, length = body_of([placed("x", 4), binary("a", 1)], b"a", outputs=[placed("y", 4)])
    before = decode_request(body, length, "mlp", "", regions)
    path.write_bytes(b"abcdefghij")
    assert bytes(decode_request(body, length, "mlp", "", regions).inputs[0].data) == b"abcd"
    assert bytes(before.inputs[0].data) == b"0123"
    path.write_bytes(b"abc")
    with pytest.raises(InvalidRequest, match="shortened to 3 bytes"):
        decode_request(body, length, "mlp", "", regions)
    regions.unregister("r")
    with pytest.raises(NotFound, match="model 'mlp': input 'x': Unable to find shared memory region: 'r'"):
        decode_request(body, length, "mlp", "", regions)
    with pytest.raises(Unsupported, match="model 'mlp': input 'x'"):
        decode_request(body, length, "mlp", "")


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
        ({"shared_memory_byte_size": "4"}, InvalidRequest, "has shared_memory_byte_size '4'"),
        ({"shared_memory_offset": 7}, InvalidRequest, "shared_memory_offset 7 and shared_memory_byte_size 4"),
        ({"shared_memory_offset": -1}, InvalidRequest, "has shared_memory_offset -1"),
        ({"shared_memory_offset": False}, InvalidRequest, "has shared_memory_offset False"),
    ],
)
def test_a_place_that_is_none_is_refused_before_the_model_runs(memory, of, changed, kind, said):
    wrong = placed("t", 4)
    wrong["parameters"].update(changed)
    inputs, more = ([wrong], {}) if of == "input" else ([binary("x", 4)], {"outputs": [wrong]})
    body, length = body_of(inputs, b"" if of == "input" else b"1234", **more)
    with pytest.raises(kind) as caught:
        decode_request(body, length, "mlp", "", memory[1])
    assert str(caught.value).startswith(f"model 'mlp': {of} 't'")
    assert said in str(caught.value)


def test_a_place_needs_a_size(memory):
    wrong = placed("x", 4)
    del wrong["parameters"]["shared_memory_byte_size"]
    body, length = body_of([wrong])
    with pytest.raises(InvalidRequest, match="'x' has shared_memory_region 'r' without shared_memory_byte_size"):
        decode_request(body, length, "mlp", "", memory[1])


def test_what_one_request_reads_is_bounded_before_it_is_read(tmp_path):
    """A file with a hole that size takes no room on the disk, and would take it all in memory."""
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(MAX_READ_BYTES)
    regions = SharedMemoryRegions(True, tmp_path)
    regions.register("r", "hole", 0, MAX_READ_BYTES)
    half = MAX_READ_BYTES // 2 + 1
    body, length = body_of([placed("x", half), placed("z", half)])
    with pytest.raises(TooLarge, match=f"has {2 * half} bytes of inputs in shared memory"):
        decode_request(body, length, "mlp", "", regions)
    regions.unregister()


def answered(outputs, asked, regions, **parameters):
    requested = tuple(RequestedOutput(one["name"], one.get("parameters", {})) for one in asked)
    request = InferRequest("mlp", "", "", (), requested, parameters)
    chunks, header_length = encode_response(InferResponse("mlp", "1", "", outputs), request, regions)
    return json.loads(chunks[0])["outputs"], [bytes(chunk) for chunk in chunks[1:]], header_length


def test_outputs_go_where_each_is_wanted(memory):
    path, regions = memory
    outputs = (
        Tensor("a", DataType.UINT8, (1,), b"a"),
        Tensor("y", DataType.UINT8, (2,), memoryview(b"yy")),
        Tensor("j", DataType.UINT8, (1,), b"\7"),
        Tensor("s", DataType.BYTES, (1,), pack_bytes([b"s"])),
        Tensor("b", DataType.UINT8, (1,), b"b"),
    )
    asked = [
        {"name": "a", "parameters": {"binary_data": True}},
        placed("y", 3, 1),
        {"name": "j"},
        placed("s", 5, 5),
        {"name": "b", "parameters": {"binary_data": True}},
    ]
    written, blobs, header_length = answered(outputs, asked, regions)
    assert [one["name"] for one in written] == ["a", "y", "j", "s", "b"]
    assert written[1] == {
        "name": "y",
        "datatype": "UINT8",
        "shape": [2],
        "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 2, "shared_memory_offset": 1},
    }
    assert written[2]["data"] == [7]
    assert written[3]["parameters"]["shared_memory_byte_size"] == 5
    assert "data" not in written[3]
    assert [one["parameters"] for one in (written[0], written[4])] == [{"binary_data_size": 1}] * 2
    assert (blobs, header_length is None) == ([b"a", b"b"], False)
    assert path.read_bytes() == b"0yy34\1\0\0\0s"


@pytest.mark.parametrize("binary_data", [None, True, False])
def test_an_answer_in_shared_memory_alone_is_plain_json(memory, binary_data):
    path, regions = memory
    wanted = placed("y", 2)
    if binary_data is not None:
        wanted["parameters"]["binary_data"] = binary_data
    written, blobs, header_length = answered((ONE,), [wanted], regions, binary_data_output=True)
    assert set(written[0]) == {"name", "datatype", "shape", "parameters"}
    assert (blobs, header_length) == ([], None)
    assert path.read_bytes() == b"\1\x0223456789"


def test_an_output_that_does_not_fit_its_place_is_the_client_s_fault(memory):
    path, regions = memory
    with pytest.raises(InvalidRequest, match=r"model 'mlp': output 'y': .* 2 bytes are needed, .* gives 1"):
        answered((ONE,), [placed("y", 1)], regions)
    assert path.read_bytes() == b"0123456789"


def test_a_region_may_go_while_the_model_runs(memory):
    _, regions = memory
    body, length = body_of([placed("y", 2)], outputs=[placed("y", 2)])
    request = decode_request(body, length, "mlp", "", regions)
    regions.unregister("r")
    with pytest.raises(NotFound, match="model 'mlp': output 'y': Unable to find shared memory region: 'r'"):
        encode_response(InferResponse("mlp", "1", "", (ONE,)), request, regions)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_a_number_of_classes_is_positive(value):
    outputs = [{"name": "y", "parameters": {"classification": value}}]
    message = refused([binary("x", 4)], b"1234", outputs=outputs)
    assert f"output 'y' has classification {value!r}, expected a positive integer" in message


def test_classification_is_left_to_the_engine():
    body, length = body_of([binary("x", 4)], b"1234", outputs=[{"name": "y", "parameters": {"classification": 3}}])
    request = decode_request(body, length, "mlp", "")
    assert request.outputs == (RequestedOutput("y", {"classification": 3}),)
    classes = Tensor("y", DataType.BYTES, (1, 2), pack_bytes([b"0.500000:1:cat", b"0.250000:0"]))
    chunks, _ = encode_response(InferResponse("mlp", "1", "", (classes,)), request)
    (output,) = json.loads(chunks[0])["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1, 2])
    assert output["data"] == ["0.500000:1:cat", "0.250000:0"]


def arrays(datatype):
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
    if datatype is DataType.BYTES:
        return hnp.arrays(np.object_, shapes, elements=st.binary(max_size=6), fill=st.nothing())
    dtype = NUMPY_DTYPES[datatype]
    if datatype is DataType.BF16:  # hypothesis knows numpy's own dtypes only
        return hnp.arrays(np.dtype("<u2"), shapes).map(lambda bits: bits.view(ml_dtypes.bfloat16))
    return hnp.arrays(dtype, shapes)


def raw_of(array, datatype):
    return pack_bytes(array.ravel().tolist()) if datatype is DataType.BYTES else array.tobytes()


tensors = st.lists(
    st.sampled_from(list(DataType)).flatmap(lambda kind: st.tuples(st.just(kind), arrays(kind))), min_size=1, max_size=3
)


@given(tensors)
def test_any_tensors_survive_the_way_in(given_tensors):
    inputs, blobs = [], []
    for index, (datatype, array) in enumerate(given_tensors):
        blobs.append(raw_of(array, datatype))
        inputs.append(
            {
                "name": f"x{index}",
                "datatype": datatype,
                "shape": list(array.shape),
                "parameters": {"binary_data_size": len(blobs[-1])},
            }
        )
    body, length = body_of(inputs, b"".join(blobs))
    request = decode_request(body, length, "mlp", "")
    for tensor, (datatype, array), blob in zip(request.inputs, given_tensors, blobs, strict=True):
        assert (tensor.datatype, tensor.shape, bytes(tensor.data)) == (datatype, array.shape, blob)
        assert from_wire(tensor.data, tensor.datatype, tensor.shape).shape == array.shape


@given(tensors, st.lists(st.booleans(), min_size=3, max_size=3))
def test_any_tensors_survive_the_way_out(given_tensors, wanted_binary):
    outputs, asked = [], []
    for index, ((datatype, array), as_binary) in enumerate(zip(given_tensors, wanted_binary, strict=False)):
        binary_only = datatype in (DataType.FP16, DataType.BF16, DataType.BYTES)
        outputs.append(Tensor(f"y{index}", datatype, array.shape, raw_of(array, datatype)))
        asked.append(RequestedOutput(f"y{index}", {"binary_data": as_binary or binary_only}))
    chunks, header_length = encode_response(
        InferResponse("m", "1", "", tuple(outputs)), InferRequest("m", "", "", (), tuple(asked))
    )
    body = b"".join(chunks)
    header = json.loads(body[:header_length])
    position = len(body) if header_length is None else header_length
    for output, tensor, request in zip(header["outputs"], outputs, asked, strict=True):
        assert (output["name"], output["datatype"], output["shape"]) == (
            tensor.name,
            tensor.datatype,
            list(tensor.shape),
        )
        if request.parameters["binary_data"]:
            end = position + output["parameters"]["binary_data_size"]
            assert body[position:end] == tensor.data
            assert "data" not in output
            position = end
        else:
            got = np.array(output["data"], dtype=NUMPY_DTYPES[tensor.datatype])
            np.testing.assert_array_equal(got, np.frombuffer(tensor.data, got.dtype))
            assert "parameters" not in output
    assert position == len(body)


ONE = Tensor("y", DataType.UINT8, (2,), b"\1\2")
TWO = Tensor("z", DataType.UINT8, (1,), memoryview(b"\3"))


@pytest.mark.parametrize(
    ("default", "per_output", "expected"),
    [
        (None, None, [False, False]),
        (True, None, [True, True]),
        (False, None, [False, False]),
        (None, [True, None], [True, False]),
        (None, [None, True], [False, True]),
        (True, [None, None], [True, True]),
        (True, [False, None], [False, True]),
        (False, [True, False], [True, False]),
        (True, [False, False], [False, False]),
    ],
)
def test_an_output_s_own_wish_goes_before_the_request_s(default, per_output, expected):
    asked = (
        ()
        if per_output is None
        else tuple(
            RequestedOutput(name, {} if wish is None else {"binary_data": wish})
            for name, wish in zip("yz", per_output, strict=True)
        )
    )
    parameters = {} if default is None else {"binary_data_output": default}
    chunks, header_length = encode_response(
        InferResponse("m", "1", "", (ONE, TWO)), InferRequest("m", "", "", (), asked, parameters)
    )
    outputs = json.loads(chunks[0])["outputs"]
    assert ["parameters" in output for output in outputs] == expected
    assert ["data" not in output for output in outputs] == expected
    blobs = [bytes(tensor.data) for tensor, is_binary in zip((ONE, TWO), expected, strict=True) if is_binary]
    assert [bytes(chunk) for chunk in chunks[1:]] == blobs
    assert header_length == (len(chunks[0]) if any(expected) else None)


def test_an_answer_whose_blobs_are_empty_is_plain_json():
    empty = Tensor("y", DataType.FP16, (0, 3), b"")
    request = InferRequest("m", "", "", (), parameters={"binary_data_output": True})
    chunks, header_length = encode_response(InferResponse("m", "1", "", (empty,)), request)
    assert header_length is None
    (output,) = json.loads(b"".join(chunks))["outputs"]
    assert output == {"name": "y", "datatype": "FP16", "shape": [0, 3], "parameters": {"binary_data_size": 0}}


@pytest.mark.parametrize("as_binary", [True, False])
@pytest.mark.parametrize("values", [[[1.5, -2.0]], [[True, False]], [[b"a", b""]], [[7, -7]]])
def test_a_triton_client_is_understood_and_understands(values, as_binary):
    array = np.array(values, dtype=np.object_ if isinstance(values[0][0], bytes) else None)
    given_input = triton.InferInput("x", [1, 2], np_to_triton_dtype(array.dtype))
    given_input.set_data_from_numpy(array, binary_data=as_binary)
    body, length = triton.InferenceServerClient.generate_request_body(
        [given_input], outputs=[triton.InferRequestedOutput("x", binary_data=as_binary)], request_id="7"
    )
    request = decode_request(body, length, "mlp", "")
    (tensor,) = request.inputs
    assert from_wire(tensor.data, tensor.datatype, tensor.shape).tolist() == array.tolist()

    chunks, header_length = encode_response(InferResponse("mlp", "1", request.id, request.inputs), request)
    result = triton.InferResult.from_response_body(b"".join(chunks), header_length=header_length)
    assert result.get_response()["id"] == "7"
    got = result.as_numpy("x").tolist()
    assert got == (array.tolist() if as_binary or array.dtype != np.object_ else [["a", ""]])


def signature(datatype, *dimensions, max_batch_size=0):
    return Signature((TensorSpec("x", DataType(datatype), dimensions),), (), max_batch_size)


@pytest.mark.parametrize(
    ("model", "body", "shape"),
    [
        (signature("FP32", 2, 3), bytes(24), (2, 3)),
        (signature("FP32", -1, 3), bytes(24), (2, 3)),
        (signature("FP32", 2, -1), b"", (2, 0)),
        (signature("FP32", -1, 3, max_batch_size=8), bytes(12), (1, 3)),
        (signature("UINT8", -1, 2, -1, max_batch_size=8), bytes(12), (1, 2, 6)),
        (signature("FP32"), bytes(4), ()),
        (signature("FP32", 0), b"", (0,)),
    ],
)
def test_a_raw_request_takes_its_shape_from_the_signature(model, body, shape):
    request = decode_raw_request(body, model, "mlp", "4")
    assert (request.model, request.version, request.id, request.outputs) == ("mlp", "4", "", ())
    (tensor,) = request.inputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("x", model.inputs[0].datatype, shape)
    assert bytes(tensor.data) == body
    assert request.parameters == {"binary_data_output": True}


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (signature("BYTES", 1), (1,)),
        (signature("BYTES", -1, 1, max_batch_size=4), (1, 1)),
        (signature("BYTES", -1, -1, max_batch_size=4), (1, 1)),
    ],
)
@pytest.mark.parametrize("body", [b"", b"text", memoryview(b"\xff" * 300)])
def test_a_raw_request_may_be_one_element_of_bytes(model, shape, body):
    (tensor,) = decode_raw_request(body, model, "mlp", "").inputs
    assert tensor.shape == shape
    assert from_wire(tensor.data, tensor.datatype, shape).ravel().tolist() == [bytes(body)]


@pytest.mark.parametrize(
    ("model", "body", "words"),
    [
        (Signature((), ()), b"", "has 0"),
        (Signature(signature("FP32", 1).inputs * 2, ()), bytes(4), "has 2"),
        (Signature((TensorSpec("x", DataType.FP32, None),), ()), bytes(4), "no declared shape"),
        (signature("FP32", -1, -1), bytes(4), "do not tell its shape"),
        (signature("FP32", -1, 0), b"", "do not tell its shape"),
        (signature("FP32", 2, 3), bytes(20), "has 20 bytes of data, expected 24"),
        (signature("FP32", -1, 3), bytes(20), "expected a multiple of 12"),
        (signature("FP32", -1, 3, max_batch_size=8), bytes(24), "has 24 bytes of data, expected 12"),
        (signature("BYTES", 2), b"ab", "must be one element"),
        (signature("BYTES", -1, 0, max_batch_size=2), b"", "must be one element"),
    ],
)
def test_a_raw_request_that_does_not_fit_is_refused(model, body, words):
    with pytest.raises(InvalidRequest, match=words) as caught:
        decode_raw_request(body, model, "mlp", "")
    assert "model 'mlp'" in str(caught.value)


@given(st.binary(max_size=80), st.none() | st.integers(-2, 90))
def test_any_bytes_are_decoded_or_refused(body, header_length):
    kind, _ = outcome(body, header_length)
    assert kind in {None, *CLIENT_ERRORS}


@given(st.data())
def test_a_damaged_request_is_decoded_or_refused(data):
    blob = bytes(range(6))
    whole, length = body_of([binary("x", 4), binary("z", 2)], blob, outputs=[{"name": "y"}], id="a")
    body = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(body)))
    kind, request = outcome(bytes(body[:end]), length)
    assert kind in {None, *CLIENT_ERRORS}
    if request is not None:
        blobs = [tensor.data for tensor in request.inputs if isinstance(tensor.data, memoryview)]
        assert b"".join(blobs) == body[length:end]
