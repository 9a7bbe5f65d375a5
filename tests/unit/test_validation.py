"""Requests against a signature."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import InvalidRequest
from headrace.core.model import Signature, TensorSpec
from headrace.core.request import InferRequest, RequestedOutput
from headrace.core.tensor import ITEM_BYTES, DataType, Tensor, pack_bytes
from headrace.core.validation import InputChecker

FP32, INT64, BYTES = DataType.FP32, DataType.INT64, DataType.BYTES
OUTPUTS = (TensorSpec("y", FP32, (-1, 10)), TensorSpec("z", FP32, (-1,)))


def checker(*inputs, max_batch_size=32, outputs=OUTPUTS):
    return InputChecker("mlp", Signature(inputs, outputs, max_batch_size))


def tensor(name, shape, datatype=FP32, nbytes=None):
    if nbytes is None:
        nbytes = ITEM_BYTES[datatype]
        for size in shape:
            nbytes *= size
    return Tensor(name, datatype, shape, bytes(nbytes))


def request(*inputs, outputs=()):
    return InferRequest("mlp", "", "", inputs, tuple(RequestedOutput(name) for name in outputs))


def refused(check, *inputs, outputs=()):
    with pytest.raises(InvalidRequest) as caught:
        check.check(request(*inputs, outputs=outputs))
    assert "'mlp'" in str(caught.value)
    return str(caught.value)


X = TensorSpec("x", FP32, (-1, 4))
MASK = TensorSpec("mask", INT64, (-1, -1))


def test_what_fits_is_given_back_with_its_rows():
    given_x = tensor("x", (3, 4))
    found = checker(X).check(request(given_x))
    assert (found.tensors, found.rows, found.key) == ((given_x,), 3, None)


def test_inputs_come_in_the_signatures_order():
    given_mask, given_x = tensor("mask", (2, 5), INT64), tensor("x", (2, 4))
    found = checker(X, MASK).check(request(given_mask, given_x))
    assert found.tensors == (given_x, given_mask)


def test_more_rows_than_a_batch_holds_are_no_fault():
    assert checker(X, max_batch_size=2).check(request(tensor("x", (7, 4)))).rows == 7


def test_without_batching_every_request_is_one_row():
    found = checker(TensorSpec("x", FP32, (2, 3)), max_batch_size=0).check(request(tensor("x", (2, 3))))
    assert found.rows == 1
    scalar = checker(TensorSpec("x", FP32, ()), max_batch_size=0).check(request(tensor("x", ())))
    assert scalar.rows == 1


def test_without_batching_nothing_at_all_is_a_shape_as_any_other():
    check = checker(TensorSpec("x", FP32, (-1, 3)), max_batch_size=0)
    assert check.check(request(tensor("x", (0, 3)))).rows == 1


def test_only_where_shapes_can_differ_do_requests_have_keys():
    check = checker(X, MASK)
    keys = [check.check(request(tensor("x", (n, 4)), tensor("mask", (n, m), INT64))).key for n, m in [(1, 5), (2, 5)]]
    assert keys[0] == keys[1] is not None
    other = check.check(request(tensor("x", (1, 4)), tensor("mask", (1, 6), INT64))).key
    assert other != keys[0]


def test_an_optional_input_that_is_left_out_keeps_requests_apart():
    check = checker(X, TensorSpec("bias", FP32, (-1, 2), optional=True))
    without = check.check(request(tensor("x", (2, 4))))
    with_it = check.check(request(tensor("x", (2, 4)), tensor("bias", (2, 2))))
    assert without.tensors[1] is None
    assert (without.rows, with_it.rows) == (2, 2)
    assert without.key != with_it.key


def test_an_undeclared_shape_takes_any_and_keeps_other_ones_apart():
    check = checker(TensorSpec("x", FP32, None))
    narrow, wide = (check.check(request(tensor("x", (2, width)))) for width in (3, 4))
    assert narrow.rows == wide.rows == 2
    assert narrow.key != wide.key
    assert "leading batch dimension" in refused(check, tensor("x", ()))


def test_a_missing_input_is_named_with_what_there_should_be():
    message = refused(checker(X, MASK), tensor("x", (1, 4)))
    assert "['mask']" in message
    assert "x FP32[-1, 4], mask INT64[-1, -1]" in message


def test_no_inputs_where_all_are_optional_is_refused():
    assert "has no inputs" in refused(checker(TensorSpec("x", FP32, (-1,), optional=True)))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((tensor("x", (1, 4)), tensor("q", (1, 4))), "no input 'q'"),
        ((tensor("q", (1, 4)),), "no input 'q'"),
        ((tensor("x", (1, 4)), tensor("x", (1, 4))), "'x' is given twice"),
        ((tensor("x", (1, 4), INT64),), "'x' has datatype INT64, expected FP32"),
        ((tensor("x", (4,)),), r"'x' has shape \[4\], expected \[-1, 4\]"),
        ((tensor("x", (1, 5)),), r"has shape \[1, 5\], expected \[-1, 4\]"),
        ((tensor("x", (1, 4, 1)),), r"has shape \[1, 4, 1\]"),
        ((tensor("x", ()),), r"has shape \[\]"),
        ((tensor("x", (0, 4)),), "has 0 rows"),
        ((tensor("x", (-1, 4), nbytes=16),), "cannot be negative"),
        ((tensor("x", (-2, -4), nbytes=32),), "cannot be negative"),
        ((tensor("x", (2, 4), nbytes=31),), r"has 31 bytes of data, expected 32 for FP32\[2, 4\]"),
        ((tensor("x", (2, 4), nbytes=0),), "has 0 bytes of data, expected 32"),
        ((tensor("x", (1 << 62, 4), nbytes=16),), "more than 32 or more than 281474976710656 elements"),
    ],
)
def test_what_does_not_fit_is_told_with_what_would(inputs, message):
    assert re.search(message, refused(checker(X), *inputs))


def test_the_signatures_own_minus_one_is_not_a_size():
    assert "cannot be negative" in refused(checker(X), tensor("x", (-1, 4), nbytes=0))


def test_inputs_of_one_request_have_equally_many_rows():
    message = refused(checker(X, MASK), tensor("x", (2, 4)), tensor("mask", (3, 4), INT64))
    assert "'mask' has 3 rows" in message
    assert "has 2" in message


def test_an_output_that_the_model_does_not_have():
    message = refused(checker(X), tensor("x", (1, 4)), outputs=["y", "logits"])
    assert "no output 'logits'" in message
    assert "['y', 'z']" in message


def test_bytes_elements_are_counted_where_the_request_can_still_be_refused():
    check = checker(TensorSpec("s", BYTES, (-1, 2)))
    good = Tensor("s", BYTES, (2, 2), pack_bytes([b"a", b"", b"cd", b"e"]))
    assert check.check(request(good)).rows == 2
    for data in (good.data[:-1], good.data + b"\0", b""):
        assert "'s'" in refused(check, Tensor("s", BYTES, (2, 2), data))


@pytest.mark.parametrize("shape", [(1, 0, 1 << 40, 1 << 40), (1, *[1] * 70)])
def test_a_shape_that_no_array_can_have_is_the_clients_fault(shape):
    """numpy refuses both in the worker, where it looks like a fault of the server."""
    check = checker(TensorSpec("x", FP32, None))
    refused(check, tensor("x", shape))


def test_a_batch_of_a_model_without_inputs_has_a_row():
    assert checker().check(request()).rows == 1


shapes = st.lists(st.integers(-3, 5), max_size=4).map(tuple)


@given(shape=shapes, declared=shapes, nbytes=st.integers(0, 200), batches=st.booleans())
def test_any_request_is_either_taken_with_consistent_sizes_or_refused(shape, declared, nbytes, batches):
    declared = tuple(size if size > 0 else -1 for size in declared)
    if batches:
        declared = (-1, *declared)
    check = checker(TensorSpec("x", FP32, declared), max_batch_size=8 if batches else 0)
    try:
        found = check.check(request(tensor("x", shape, nbytes=nbytes)))
    except InvalidRequest:
        return
    assert len(shape) == len(declared)
    assert all(size >= 0 for size in shape)
    assert all(wanted in (-1, size) for size, wanted in zip(shape, declared, strict=True))
    elements = 1
    for size in shape:
        elements *= size
    assert nbytes == elements * 4
    assert found.rows == (shape[0] if batches else 1) >= 1
