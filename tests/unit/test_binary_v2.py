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

from headrace.core.errors import HeadraceError, InvalidRequest, Kind, Unsupported
from headrace.core.model import Signature, TensorSpec
from headrace.core.request import InferRequest, InferResponse, RequestedOutput
from headrace.core.tensor import NUMPY_DTYPES, DataType, Tensor, from_wire, pack_bytes
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


def test_shared_memory_is_not_offered():
    region = {"shared_memory_region": "r", "shared_memory_byte_size": 4, "shared_memory_offset": 0}
    tensor = {"name": "x", "datatype": "UINT8", "shape": [4], "parameters": region}
    assert "input 'x': shared memory is not enabled on this server" in refused([tensor], kind=Unsupported)
    message = refused([binary("x", 4)], b"1234", Unsupported, outputs=[{"name": "y", "parameters": region}])
    assert "output 'y': shared memory is not enabled on this server" in message


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
