"""Inputs of the client: arrays go as they are, lists as the model declares, and nothing is bent to fit."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.client import InvalidRequestError, ModelMetadata, Sequence, TensorMetadata
from headrace.client.request import build_request
from headrace.client.tensors import needs_metadata, to_tensors
from headrace.core.tensor import NUMPY_DTYPES, DataType, from_wire


def declared(datatype, *names):
    return ModelMetadata("m", inputs=tuple(TensorMetadata(name, datatype, (-1,)) for name in names or ("x",)))


def sent(value, datatype="FP32"):
    """What the server would see of one input."""
    (tensor,) = to_tensors("m", {"x": value}, declared(datatype))
    return tensor.datatype, from_wire(tensor.data, tensor.datatype, tensor.shape)


def refused(value, datatype="FP32"):
    with pytest.raises(InvalidRequestError, match="model 'm': input 'x' ") as caught:
        sent(value, datatype)
    assert caught.value.status is None
    return str(caught.value)


@pytest.mark.parametrize("datatype", [one for one in DataType if one is not DataType.BYTES])
def test_arrays_of_every_datatype_go_as_they_are(datatype):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(NUMPY_DTYPES[datatype])
    found, values = sent(array, "FP64")
    assert found is datatype
    np.testing.assert_array_equal(values, array)


@pytest.mark.parametrize(
    "array", [np.array(["ä", ""]), np.array([b"\xff", b"a"]), np.array(["x", b"y"], object), np.array("one")]
)
def test_texts_are_bytes(array):
    found, values = sent(array)
    assert found is DataType.BYTES
    assert values.shape == array.shape
    wanted = [one.encode() if isinstance(one, str) else one for one in array.reshape(-1).tolist()]
    assert values.reshape(-1).tolist() == wanted


def test_layout_and_byte_order_do_not_matter():
    array = np.arange(6, dtype=">f4").reshape(2, 3).T
    np.testing.assert_array_equal(sent(array)[1], array)


def test_an_array_is_never_converted():
    assert sent(np.zeros(2), "FP32")[0] is DataType.FP64
    assert not needs_metadata({"x": np.zeros(2), "y": np.float32(1)})
    assert needs_metadata({"x": np.zeros(2), "y": [1.0]})


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(2, complex), "complex128"),
        (np.array(["2020-01-01"], "M8[D]"), "datetime64"),
        (np.array([1, "a"], object), "element of type int"),
        (np.array(["\ud800"]), "surrogates"),
    ],
)
def test_arrays_that_the_protocol_cannot_carry(array, said):
    assert said in refused(array)


@pytest.mark.parametrize(
    ("datatype", "value", "wanted"),
    [
        ("FP32", [[1, 2.5], [3, 4]], np.array([[1, 2.5], [3, 4]], np.float32)),
        ("FP32", 3, np.array(3, np.float32)),
        ("FP64", [0.1], np.array([0.1])),
        ("FP16", [0.5, 65504], np.array([0.5, 65504], np.float16)),
        ("BF16", ((1, 2),), np.array([[1, 2]], ml_dtypes.bfloat16)),
        ("INT8", [-128, 127], np.array([-128, 127], np.int8)),
        ("UINT64", [2**64 - 1, 1], np.array([2**64 - 1, 1], np.uint64)),
        ("INT64", [np.int32(5), 6], np.array([5, 6])),
        ("INT32", [np.array([1, 2]), [3, 4]], np.array([[1, 2], [3, 4]], np.int32)),
        ("BOOL", [True, False], np.array([True, False])),
        ("BYTES", [["a", b"\xff"]], np.array([[b"a", b"\xff"]], object)),
        ("BYTES", "text", np.array(b"text", object)),
        ("BYTES", [], np.zeros(0, object)),
        ("FP32", [], np.zeros(0, np.float32)),
        ("INT32", [[], []], np.zeros((2, 0), np.int32)),
    ],
)
def test_lists_and_scalars_become_what_the_model_declares(datatype, value, wanted):
    found, values = sent(value, datatype)
    assert found == datatype
    assert values.shape == wanted.shape
    assert values.dtype == wanted.dtype
    np.testing.assert_array_equal(values, wanted)


@pytest.mark.parametrize(
    ("datatype", "value", "said"),
    [
        ("INT32", [1.0], "integer"),
        ("INT32", [True], "integer"),
        ("INT8", [128], "-128 to 127"),
        ("UINT8", [-1], "0 to 255"),
        ("FP32", ["1"], "number"),
        ("FP32", [1e39], "range"),
        ("FP16", [65536.0], "range"),
        ("BOOL", [1], "true or false"),
        ("BYTES", [1], "str or bytes"),
        ("FP32", [[1, 2], [3]], "ragged"),
        ("FP32", [[1], 2], "ragged"),
        ("FP32", [None], "NoneType"),
        ("FP32", {"a": 1}, "dict"),
    ],
)
def test_lists_that_do_not_fit_are_refused_before_they_are_sent(datatype, value, said):
    assert said in refused(value, datatype)


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3), min_size=1))
def test_lists_are_what_numpy_makes_of_them(rows):
    np.testing.assert_array_equal(sent(rows, "INT32")[1], np.array(rows, np.int32))


def test_an_unknown_input_is_refused_with_the_known():
    with pytest.raises(InvalidRequestError, match=r"input 'z' is not among the model's inputs \('x', 'y'\)"):
        to_tensors("m", {"z": [1]}, declared("FP32", "x", "y"))


def test_inputs_without_names_are_refused():
    with pytest.raises(InvalidRequestError, match="dict of arrays"):
        needs_metadata(np.zeros(3))


def test_a_request_has_what_the_caller_asked_for():
    request = build_request(
        "m",
        {"x": np.zeros(1, np.float32)},
        None,
        outputs={"y": {"classification": 3}, "z": {}},
        version="2",
        id="7",
        parameters={"priority": 1},
        sequence=Sequence("s", start=True),
    )
    assert (request.model, request.version, request.id) == ("m", "2", "7")
    assert [(one.name, one.parameters) for one in request.outputs] == [("y", {"classification": 3}), ("z", {})]
    assert request.parameters == {
        "priority": 1,
        "sequence_id": "s",
        "sequence_start": True,
        "sequence_end": False,
    }


@pytest.mark.parametrize("identity", [0, -1, 2**64, "", True, 1.5])
def test_sequences_need_an_id(identity):
    with pytest.raises(InvalidRequestError, match="sequence's id"):
        Sequence(identity)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"outputs": "y"}, "list of names"),
        ({"outputs": [""]}, "output's name"),
        ({"version": 1}, "model 'm': version is 1, expected a text"),
        ({"id": 7}, "model 'm': id is 7, expected a text"),
        ({"parameters": {"p": [1]}}, "parameter 'p'"),
        ({"parameters": {"p": 2**64}}, "64 bits"),
        ({"parameters": {"p": float("nan")}}, "parameter 'p'"),
    ],
)
def test_requests_that_the_protocol_cannot_carry(asked, said):
    with pytest.raises(InvalidRequestError, match=said):
        build_request("m", {}, None, **asked)
