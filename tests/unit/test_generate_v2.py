"""The generate extension's flat JSON, both ways."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import InvalidRequest
from headrace.core.model import Signature, TensorSpec
from headrace.core.request import InferResponse
from headrace.core.tensor import DataType, Tensor, pack_bytes
from headrace.wire.generate_v2 import decode_generate, encode_generate
from headrace.workers.frames import RequestFrame, encode


def signature(*inputs, max_batch_size=0):
    return Signature(tuple(inputs), (), max_batch_size)


TEXT = TensorSpec("text", DataType.BYTES, (1,))
ROWS = TensorSpec("text", DataType.BYTES, (-1, 1))


def decode(body, *inputs, max_batch_size=0):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return decode_generate(text, "m", "2", signature(*inputs or (TEXT,), max_batch_size=max_batch_size))


def shaped(value, shape, datatype=DataType.INT32, max_batch_size=0):
    request = decode({"x": value}, TensorSpec("x", datatype, shape), max_batch_size=max_batch_size)
    return request.inputs[0].shape


# ---- requests ----


def test_keys_of_inputs_become_those_and_all_others_parameters():
    request = decode(
        {"text": "héllo", "temperature": 0.5, "tokens": 7, "stream": False, "stop": "x", "none": None, "id": "i-1"}
    )
    assert (request.model, request.version, request.id) == ("m", "2", "i-1")
    assert request.inputs == (Tensor("text", DataType.BYTES, (1,), pack_bytes(["héllo"])),)
    assert request.parameters == {"temperature": 0.5, "tokens": 7, "stream": False, "stop": "x"}
    assert [type(value) for value in request.parameters.values()] == [float, int, bool, str]
    assert request.outputs == ()


def test_what_stands_under_parameters_stands_beside_everything_else():
    request = decode({"parameters": {"text": "a", "k": 1}, "j": 2})
    assert request.inputs[0].data == pack_bytes(["a"])
    assert request.parameters == {"k": 1, "j": 2}
    assert decode({"text": "a", "parameters": None}).parameters == {}


@pytest.mark.parametrize(("given_id", "expected"), [("a", "a"), (7, "7"), ("", ""), (None, "")])
def test_an_id_is_text(given_id, expected):
    assert decode({"text": "a", "id": given_id}).id == expected


@pytest.mark.parametrize(
    ("value", "shape", "expected"),
    [
        (5, (), ()),
        (5, (1,), (1,)),
        (5, (1, 1), (1, 1)),
        ([5, 6], (2,), (2,)),
        ([5, 6], (-1,), (2,)),
        ([5, 6], (2, -1), (2, 1)),
        ([5, 6], (-1, -1), (2, 1)),
        ([5, 6, 7, 8], (2, -1), (2, 2)),
        ([], (-1,), (0,)),
        (5, None, (1,)),
        ([5, 6], None, (2,)),
    ],
)
def test_an_inputs_shape_is_the_declared_one_with_its_number_of_elements(value, shape, expected):
    assert shaped(value, shape) == expected


@pytest.mark.parametrize(("shape", "expected"), [((-1, 2), (1, 2)), ((-1, -1), (1, 2)), (None, (1, 2))])
def test_where_the_model_batches_there_is_a_batch_of_one(shape, expected):
    assert shaped([5, 6], shape, max_batch_size=8) == expected
    assert decode({"text": "a"}, ROWS, max_batch_size=8).inputs[0].shape == (1, 1)


@given(st.lists(st.integers(1, 4) | st.just(-1), max_size=4), st.integers(0, 40))
def test_a_shape_always_holds_its_elements_or_the_request_is_refused(dimensions, count):
    try:
        shape = shaped(list(range(count)), tuple(dimensions))
    except InvalidRequest:
        return
    elements = 1
    for got, declared in zip(shape, dimensions, strict=True):
        assert declared in {-1, got}
        elements *= got
    assert elements == count


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b"{", "not a JSON object"),
        (b'{"text": "\xff"}', "not a JSON object"),
        (b'{"text": "\\ud800"}', "not a JSON object"),
        (b'{"text": "a", "k": 1e999}', "not a JSON object"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not a JSON object"),
        ({"text": "a", "id": 1.5}, "id is a number, expected a string"),
        ({"text": "a", "id": True}, "id is a boolean, expected a string"),
        ({"text": "a", "parameters": [1]}, "parameters is a list, expected an object"),
        ({"text": "a", "parameters": {"text": "b"}}, "'text' is given twice"),
        ({"k": 1, "parameters": {"k": 2}}, "'k' is given twice"),
        ({"text": "a", "k": [1]}, r"'k' is a list and no input of the model, whose inputs are \['text'\]"),
        ({"text": "a", "k": {"a": 1}}, "'k' is an object and no input"),
        ({"text": "a", "parameters": {"parameters": {}}}, "'parameters' is an object"),
        ({"text": "a", "k": 1 << 64}, "'k' is an integer of more than 64 bits"),
        ({"text": "a", "k": -(1 << 63) - 1}, "'k' is an integer of more than 64 bits"),
        ({"text": None}, "input 'text' is null, expected one BYTES value or a flat list"),
        ({"text": {"a": 1}}, "input 'text' is an object"),
        ({"text": [["a"]]}, "input 'text' is a list of lists, objects or nulls"),
        ({"text": [None]}, "input 'text' is a list of lists, objects or nulls"),
        ({"text": ["a", "b"]}, r"input 'text' has 2 element\(s\), expected \[1\]"),
        ({"text": []}, r"input 'text' has 0 element\(s\)"),
        ({"text": 5}, "input 'text' has 5 as element 0"),
        ({"text": True}, "input 'text' has true as element 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(body, message):
    with pytest.raises(InvalidRequest, match=f"model 'm': .*{message}"):
        decode(body)


@pytest.mark.parametrize(("datatype", "value"), [("INT8", 300), ("UINT8", -1), ("BOOL", 1), ("FP16", 1.0)])
def test_an_element_must_fit_its_datatype(datatype, value):
    with pytest.raises(InvalidRequest, match="model 'm': input 'x'"):
        shaped(value, (1,), DataType(datatype))


@given(
    st.dictionaries(
        st.text(max_size=5) | st.sampled_from(["id", "parameters", "text"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=4,
    )
)
def test_whatever_comes_is_a_request_that_can_be_handed_on_or_is_refused(body):
    try:
        request = decode(json.dumps(body).encode())
    except InvalidRequest:
        return
    encode(RequestFrame(1, request.id, request.parameters))


# ---- responses ----


def encoded(*outputs, request_id="", **parameters):
    return json.loads(encode_generate(InferResponse("m", "2", request_id, outputs, parameters)))


def test_a_response_is_one_flat_object():
    plain = encoded(
        Tensor("text", DataType.BYTES, (1, 1), pack_bytes(["hé"])),
        Tensor("ids", DataType.INT64, (1, 2), (5).to_bytes(8, "little") * 2),
        Tensor("stop", DataType.BOOL, (), b"\1"),
        Tensor("none", DataType.INT64, (0,), b""),
        request_id="i-1",
        k=1,
    )
    assert plain == {
        "model_name": "m",
        "model_version": "2",
        "id": "i-1",
        "k": 1,
        "text": "hé",
        "ids": [5, 5],
        "stop": True,
        "none": [],
    }


def test_without_an_id_there_is_none():
    assert encoded() == {"model_name": "m", "model_version": "2"}


@pytest.mark.parametrize(
    "tensor",
    [Tensor("y", DataType.FP16, (1,), b"\0\0"), Tensor("y", DataType.BYTES, (1,), pack_bytes([b"\xff"]))],
)
def test_an_output_that_json_cannot_carry_is_an_error_that_names_it(tensor):
    with pytest.raises(InvalidRequest, match="model 'm': output 'y' "):
        encoded(tensor)
