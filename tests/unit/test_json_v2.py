"""Requests whose tensors are JSON, and the JSON of answers."""

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import HeadraceError, InvalidRequest, Kind
from headrace.core.request import InferRequest, InferResponse, RequestedOutput
from headrace.core.tensor import NUMPY_DTYPES, DataType, Tensor, from_wire, pack_bytes, unpack_bytes
from headrace.wire.binary_v2 import decode_request, encode_response
from headrace.wire.json_v2 import encode_error, encode_json

INTEGERS = [datatype for datatype in DataType if "INT" in datatype]
CLIENT_ERRORS = {Kind.INVALID, Kind.UNSUPPORTED, Kind.TOO_LARGE}


def body_of(data, datatype="FP32", shape=None, **more):
    tensor = {"name": "x", "datatype": datatype, "shape": [len(data)] if shape is None else shape, "data": data}
    return json.dumps({"inputs": [tensor], **more}).encode()


def decode(body):
    return decode_request(body, None, "mlp", "3")


def outcome(body):
    """What comes of a body: the type of what was decoded, or the kind of the error."""
    try:
        return type(decode(body))
    except HeadraceError as error:
        return error.kind


def values_of(body):
    tensor = decode(body).inputs[0]
    return from_wire(tensor.data, tensor.datatype, tensor.shape).tolist()


def refused(body):
    with pytest.raises(InvalidRequest) as caught:
        decode(body)
    message = str(caught.value)
    assert "mlp" in message
    return message


def test_everything_a_request_says_is_kept():
    body = body_of(
        [1, 2],
        id="r-7",
        parameters={"priority": 2, "ratio": 0.5, "traced": True, "headers": "a"},
        outputs=[{"name": "y", "parameters": {"tag": 3}}, {"name": "z"}],
    )
    request = decode(body)
    assert (request.model, request.version, request.id, request.deadline_ns) == ("mlp", "3", "r-7", 0)
    assert request.parameters == {"priority": 2, "ratio": 0.5, "traced": True, "headers": "a"}
    assert type(request.parameters["traced"]) is bool
    assert request.outputs == (RequestedOutput("y", {"tag": 3}), RequestedOutput("z"))
    assert request.inputs == (Tensor("x", DataType.FP32, (2,), struct.pack("<2f", 1, 2)),)


def test_what_is_optional_may_be_missing_or_null_and_what_is_unknown_is_ignored():
    tensor = {"name": "x", "datatype": "BOOL", "shape": [1], "data": [True], "parameters": None, "layout": [1, {}]}
    body = json.dumps({"inputs": [tensor], "id": None, "parameters": None, "outputs": None, "extra": {"a": []}})
    request = decode(body.encode())
    assert (request.id, request.parameters, request.outputs) == ("", {}, ())
    assert bytes(request.inputs[0].data) == b"\x01"
    body = json.dumps({"inputs": [tensor], "outputs": [{"name": "y", "parameters": None}, {"name": "z", "extra": 1}]})
    assert decode(body.encode()).outputs == (RequestedOutput("y"), RequestedOutput("z"))


@pytest.mark.parametrize("wrap", [lambda body: body, memoryview, lambda body: b" \n" + body + b"\t "])
def test_any_buffer_and_any_white_space_will_do(wrap):
    assert values_of(wrap(body_of([1.5, -0.0]))) == [1.5, -0.0]


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        ([[1, 2, 3], [4, 5, 6]], [2, 3]),
        ([1, 2, 3, 4, 5, 6], [2, 3]),
        ([[1, 2, 3], [4, 5, 6]], [1, 2, 1, 3]),
        ([[[[1], [2], [3]], [[4], [5], [6]]]], [2, 3]),
        ([[[1, 2, 3, 4, 5, 6]]], [6]),
        ([[[1], [2]], [[3], [4]], [[5], [6]]], [3, 2, 1]),
    ],
)
@pytest.mark.parametrize("datatype", ["FP32", "INT8", "UINT64"])
def test_data_is_nested_as_the_shape_or_flat(data, shape, datatype):
    tensor = decode(body_of(data, datatype, shape)).inputs[0]
    assert tensor.shape == tuple(shape)
    assert from_wire(tensor.data, tensor.datatype, (6,)).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("data", "shape"),
    [([], [0]), ([], [0, 3]), ([[], []], [2, 0]), ([[], []], [2, 0, 3]), ([], [2, 0]), ([[[], []]], [1, 2, 0])],
)
def test_a_tensor_may_be_empty(data, shape):
    tensor = decode(body_of(data, "INT32", shape)).inputs[0]
    assert (tensor.shape, bytes(tensor.data)) == (tuple(shape), b"")


@pytest.mark.parametrize(("datatype", "value"), [("FP32", 2.5), ("BOOL", True), ("BYTES", "a"), ("INT8", -3)])
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: [value], lambda value: [[value]]])
def test_a_scalar_may_be_bare(datatype, value, wrap):
    expected = [value.encode() if isinstance(value, str) else value]
    tensor = decode(body_of(wrap(value), datatype, [])).inputs[0]
    assert from_wire(tensor.data, tensor.datatype, (1,)).tolist() == expected


@pytest.mark.parametrize(
    ("data", "shape", "words"),
    [
        ([[1, 2], [3]], [3], "ragged"),
        ([[1, 2], [3]], [2, 2], "ragged"),
        ([[1, 2], 3], [3], "ragged"),
        ([[[1], [2]], [[3], 4]], [2, 2], "ragged"),
        ([3, [1, 2]], [2], "element 1"),
        ([[1, 2, 3], [4, 5, 6]], [3, 2], "nested as [2, 3]"),
        ([[1, 2, 3], [4, 5, 6]], [6], "nested as [2, 3]"),
        ([[1, 2], [3, 4]], [4], "nested as [2, 2]"),
        ([1, 2], [3], "has 2 elements in its data, expected 3"),
        ([1, 2, 3, 4], [3], "has 4 elements in its data, expected 3"),
        ([[1, 2]], [1, 3], "expected 3"),
        ([], [1], "expected 1"),
        ([1], [0], "expected 0"),
        ([1], [1 << 40], "has 1 elements"),
        (5, [1], "expected an array"),
        ("abc", [1], "expected an array"),
        ({"a": 1}, [1], "expected an array"),
        (None, [1], "expected an array"),
        ([None], [1], "null as element 0"),
        ([[1.0, None]], [1, 2], "null as element 1"),
        ([1, {}], [2], "an object as element 1"),
    ],
)
def test_data_that_does_not_fit_its_shape_is_refused(data, shape, words):
    message = refused(body_of(data, "FP32", shape))
    assert "input 'x'" in message
    assert words in message


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        *[("BOOL", value) for value in (0, 1, 1.0, "true", None)],
        *[(datatype, value) for datatype in INTEGERS for value in (1.0, 1.5, True, "1", None, [], math.nan, 10**40)],
        *[(datatype, value) for datatype in ("FP32", "FP64") for value in (True, "1", "NaN", None, {}, 10**400)],
        *[("BYTES", value) for value in (1, 1.5, True, None, math.nan)],
        ("FP32", 1e39),
        ("FP32", -1e39),
        ("FP32", 10**39),
    ],
)
@pytest.mark.parametrize("nest", [False, True])
def test_an_element_of_another_kind_is_refused(datatype, value, nest):
    good = {"BOOL": True, "BYTES": "a"}.get(datatype, 1)
    data = [good, good, value]
    message = refused(body_of([data] if nest else data, datatype, [1, 3]))
    assert "input 'x'" in message
    assert "2" in message


@pytest.mark.parametrize("datatype", INTEGERS)
def test_integers_keep_to_their_range(datatype):
    limits = np.iinfo(NUMPY_DTYPES[datatype])
    extremes = [int(limits.min), int(limits.max)]
    assert values_of(body_of(extremes, datatype)) == extremes
    assert values_of(body_of([extremes], datatype, [1, 2])) == [extremes]
    for value in (extremes[0] - 1, extremes[1] + 1):
        message = refused(body_of([0, value], datatype))
        assert f"has {value} as element 1" in message
        assert f"from {limits.min} to {limits.max} for {datatype}" in message


def test_a_number_over_fp32_is_refused_where_rounding_would_make_it_infinite():
    largest = float(np.finfo(np.float32).max)
    assert values_of(body_of([largest, largest * (1 + 1e-9)])) == [largest, largest]
    assert "within the range of FP32" in refused(body_of([largest * (1 + 1e-7)]))


@pytest.mark.parametrize("text", [b"1e400", b"-1e400"])
@pytest.mark.parametrize("beside", [b"1", b"NaN"])
@pytest.mark.parametrize("datatype", [b"FP32", b"FP64"])
def test_a_finite_number_never_becomes_infinite(text, beside, datatype):
    body = b'{"inputs":[{"name":"x","shape":[2],"datatype":"%b","data":[%b,%b]}]}' % (datatype, beside, text)
    assert "out of range" in refused(body)


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
@pytest.mark.parametrize("nest", [False, True])
def test_floats_may_be_not_finite(datatype, nest):
    data = [math.nan, math.inf, -math.inf, 1, -0.0]
    tensor = decode(body_of([data] if nest else data, datatype, [1, 5], id="NaN")).inputs[0]
    np.testing.assert_array_equal(from_wire(tensor.data, tensor.datatype, (5,)), data)


def test_nan_as_text_is_only_text():
    request = decode(body_of(["NaN", "Infinity"], "BYTES", id="NaN"))
    assert unpack_bytes(request.inputs[0].data, 2) == [b"NaN", b"Infinity"]


def test_strings_are_utf8():
    texts = ["", "häuser", "\0", "😀", 'quo"te\\\n']
    assert unpack_bytes(decode(body_of(texts, "BYTES")).inputs[0].data, 5) == [text.encode() for text in texts]


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
@pytest.mark.parametrize("data", [[1.0], [[1.0]], [True]])
def test_half_floats_cannot_be_json(datatype, data):
    assert "binary_data" in refused(body_of(data, datatype, [1]))


def test_an_unknown_datatype_is_refused_with_the_known_ones():
    message = refused(body_of([1], "FLOAT"))
    assert all(word in message for word in ("input 'x'", "'FLOAT'", *DataType))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ([-1], "cannot be negative"),
        ([-1, -1], "cannot be negative"),
        ([1 << 40, 1 << 40], "elements"),
        ([0, 1 << 40, 1 << 40], "elements"),
        ([10**30], "elements"),
        ([1] * 33, "33 dimensions"),
        ([1 << 60] * 5000, "5000 dimensions"),
        ([1.5], "int"),
        ([True], "int"),
        (["1"], "int"),
        ([None], "int"),
        (3, "array"),
        (None, "array"),
    ],
)
def test_impossible_shapes_are_refused(shape, words):
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": shape, "data": [1]}]}).encode()
    message = refused(body)
    assert "input 'x'" in message
    assert words in message


def test_the_largest_rank_is_allowed():
    assert decode(body_of([1], shape=[1] * 32)).inputs[0].shape == (1,) * 32


@pytest.mark.parametrize("missing", ["name", "shape", "datatype", "data"])
def test_every_field_of_an_input_is_needed(missing):
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    del tensor[missing]
    assert missing in refused(json.dumps({"inputs": [tensor]}).encode())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b"{}", "inputs"),
        (b'{"inputs": 1}', "array"),
        (b'{"inputs": [1]}', "object"),
        (b'{"inputs": [], "id": 5}', "$.id"),
        (b'{"inputs": []} x', "not valid JSON"),
        (b'{"inputs": [], "parameters": []}', "$.parameters"),
        (b'{"inputs": [], "parameters": {"a": null}}', "$.parameters"),
        (b'{"inputs": [], "parameters": {"a": [1]}}', "$.parameters"),
        (b'{"inputs": [], "parameters": {"a": {}}}', "$.parameters"),
        (b'{"inputs": [], "parameters": {"binary_data_output": "yes"}}', "expected true or false"),
        (b'{"inputs": [], "parameters": {"binary_data_output": 1}}', "expected true or false"),
        (b'{"inputs": [], "outputs": [{}]}', "name"),
        (b'{"inputs": [], "outputs": ["y"]}', "object"),
        (b'{"inputs": [], "outputs": [{"name": "y", "parameters": {"a": null}}]}', "$.outputs[0].parameters"),
        (b'{"inputs": [], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}', "output 'y'"),
        (b'{"inputs": [], "id": "\xff"}', "UTF-8"),
        (b'{"inputs": [], "id": "\xff", "parameters": {"a": NaN}}', "UTF-8"),
        (b'{"inputs": [], "id": "\\ud800"}', "not valid JSON"),
        (b'{"inputs": [], "id": "\\ud800", "parameters": {"a": NaN}}', "UTF-8"),
        (b'{"inputs": NaN}', "array"),
        (b'{"inputs": [NaN}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"inputs": ' + b"[" * 100_000, "object"),
        (b'{"inputs": [], "extra": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"extra": NaN, "inputs": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_not_a_request_is_refused(body, words):
    assert words in refused(body)


@pytest.mark.parametrize(
    "data", [b"[" * 50_000 + b"]" * 50_000, b'["\xff"]', b'["\\ud800"]', b'["\\ud800", NaN]', b"[1,]", b"[01]", b"[+1]"]
)
def test_data_that_is_not_json_is_refused(data):
    refused(b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":%b}]}' % data)


def test_a_surrogate_half_in_data_is_refused_even_beside_a_nan():
    message = refused(
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":["\\ud800"]},'
        b'{"name":"z","shape":[1],"datatype":"FP32","data":[NaN]}]}'
    )
    assert "input 'x'" in message
    assert "surrogate" in message


def test_messages_stay_short():
    assert len(refused(body_of(["a" * 100_000], "FP32"))) < 300
    assert len(refused(body_of([10**3000], "INT8"))) < 300


json_arrays = st.sampled_from(["BOOL", "BYTES", "FP32", "FP64", *INTEGERS]).flatmap(
    lambda datatype: st.tuples(
        st.just(DataType(datatype)),
        st.lists(st.integers(0, 3), max_size=4).map(tuple),
    )
)


def elements(datatype):
    if datatype is DataType.BOOL:
        return st.booleans()
    if datatype is DataType.BYTES:
        return st.text()
    if datatype in (DataType.FP32, DataType.FP64):
        return st.floats(width=32 if datatype is DataType.FP32 else 64)
    limits = np.iinfo(NUMPY_DTYPES[datatype])
    return st.integers(int(limits.min), int(limits.max))


@given(json_arrays, st.booleans(), st.data())
def test_any_array_survives_the_way_in_and_the_way_out(kind, nest, data):
    datatype, shape = kind
    count = math.prod(shape)
    values = data.draw(st.lists(elements(datatype), min_size=count, max_size=count))
    array = np.empty(count, dtype=NUMPY_DTYPES[datatype])
    array[:] = values
    raw = pack_bytes(values) if datatype is DataType.BYTES else array.tobytes()
    request = decode(body_of(array.reshape(shape).tolist() if nest else values, datatype, list(shape)))
    tensor = request.inputs[0]
    assert (tensor.datatype, tensor.shape) == (datatype, shape)
    assert same_bits(bytes(tensor.data), raw, datatype)

    chunks, header_length = encode_response(InferResponse("mlp", "3", "", (tensor,)), request)
    assert header_length is None
    (output,) = json.loads(chunks[0])["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("x", datatype, list(shape))
    again = decode(body_of(output["data"], datatype, list(shape))).inputs[0]
    assert same_bits(bytes(again.data), raw, datatype)


def same_bits(got, wanted, datatype):
    """Whether raw tensors are the same; JSON has one NaN, so any NaN is like any other."""
    if datatype not in (DataType.FP32, DataType.FP64):
        return got == wanted
    left, right = (np.frombuffer(raw, NUMPY_DTYPES[datatype]) for raw in (got, wanted))
    return np.array_equal(left, right, equal_nan=True) and np.array_equal(
        np.signbit(left[~np.isnan(left)]), np.signbit(right[~np.isnan(right)])
    )


@given(st.integers(0, 2**32 - 1))
def test_every_fp32_is_written_exactly(bits):
    raw = struct.pack("<I", bits)
    response = InferResponse("m", "1", "", (Tensor("y", DataType.FP32, (1,), raw),))
    chunks, _ = encode_response(response, InferRequest("m", "", "", ()))
    (value,) = json.loads(chunks[0])["outputs"][0]["data"]
    assert same_bits(np.float32(value).tobytes(), raw, DataType.FP32)


def answer(*tensors, request_id="", parameters=None):
    response = InferResponse("m", "1", request_id, tensors, parameters or {})
    return encode_response(response, InferRequest("m", "", request_id, ()))


def test_an_answer_has_what_the_protocol_says_and_no_more():
    (chunk,), header_length = answer(Tensor("y", DataType.FP32, (1, 2), struct.pack("<2f", 1, 0.1)))
    assert header_length is None
    assert json.loads(chunk) == {
        "model_name": "m",
        "model_version": "1",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 0.10000000149011612]}],
    }


def test_id_parameters_and_names_come_back_escaped():
    tensor = Tensor('y"\\', DataType.BYTES, (2,), pack_bytes(["ä\n", ""]))
    (chunk,), _ = answer(tensor, request_id='a"b', parameters={"sequence_end": True})
    assert json.loads(chunk) == {
        "model_name": "m",
        "model_version": "1",
        "id": 'a"b',
        "parameters": {"sequence_end": True},
        "outputs": [{"name": 'y"\\', "datatype": "BYTES", "shape": [2], "data": ["ä\n", ""]}],
    }


def test_what_is_not_finite_is_written_as_bare_tokens():
    raw = struct.pack("<4d", math.nan, math.inf, -math.inf, 1.5)
    (chunk,), _ = answer(Tensor("y", DataType.FP64, (4,), raw))
    assert b'"data":[NaN,Infinity,-Infinity,1.5]' in chunk


def test_text_that_says_null_is_left_alone():
    (chunk,), _ = answer(Tensor("y", DataType.BYTES, (1,), pack_bytes(["null"])))
    assert json.loads(chunk)["outputs"][0]["data"] == ["null"]


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (Tensor("y", DataType.FP16, (1,), b"\0\0"), "FP16"),
        (Tensor("y", DataType.BF16, (0,), b""), "BF16"),
        (Tensor("y", DataType.BYTES, (2,), pack_bytes([b"a", b"\xff"])), "element 1"),
    ],
)
def test_what_json_cannot_carry_is_refused(tensor, words):
    with pytest.raises(InvalidRequest) as caught:
        answer(tensor)
    message = str(caught.value)
    assert all(word in message for word in ("model 'm'", "output 'y'", "binary_data", words))


@pytest.mark.parametrize("message", ["plain", 'quo"te', "häuser", "half \ud800 pair"])
def test_an_error_is_one_string(message):
    assert json.loads(encode_error(message)) == {"error": message.replace("\ud800", "?")}


def test_json_of_builtin_values():
    assert json.loads(encode_json({"a": [1, None, True, "x"], "b": {}})) == {"a": [1, None, True, "x"], "b": {}}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
inputs_like = st.fixed_dictionaries(
    {"name": st.just("x"), "shape": st.lists(st.integers(-1, 3), max_size=3) | json_values},
    optional={
        "datatype": st.sampled_from(DataType) | json_values,
        "data": json_values,
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "shared_memory_region", "a"]), json_values, max_size=2
        ),
    },
)


@given(
    st.fixed_dictionaries(
        {"inputs": st.lists(inputs_like, max_size=2) | json_values},
        optional={"id": json_values, "parameters": json_values, "outputs": json_values},
    ).map(json.dumps)
    | json_values.map(json.dumps)
)
def test_any_json_is_decoded_or_refused(text):
    assert outcome(text.encode()) in {InferRequest, *CLIENT_ERRORS}


@given(st.data())
def test_a_damaged_request_is_decoded_or_refused(data):
    body = bytearray(body_of([[1.5, -2, 1e10]], "FP32", [1, 3], id="a", outputs=[{"name": "y"}]))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    assert outcome(bytes(body)) in {InferRequest, *CLIENT_ERRORS}
