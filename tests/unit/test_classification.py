"""Classification: the highest values of an output with their indexes and labels."""

import math
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from headrace.core.classification import MAX_ELEMENTS, classification_count, classify
from headrace.core.errors import InvalidRequest
from headrace.core.request import RequestedOutput
from headrace.core.tensor import NUMPY_DTYPES, DataType, Tensor, from_wire, pack_bytes

CLASSIFIED = [datatype for datatype in DataType if datatype not in (DataType.FP16, DataType.BF16, DataType.BYTES)]


def tensor_of(array, datatype=DataType.FP32):
    made = np.asarray(array, NUMPY_DTYPES[datatype])
    return Tensor("y", datatype, made.shape, made.tobytes())


def classes_of(array, count, datatype=DataType.FP32, batched=True, labels=()):
    """The shape of the answer, and its elements in rows."""
    made = classify(tensor_of(array, datatype), count, batched, labels, "m")
    assert (made.name, made.datatype) == ("y", DataType.BYTES)
    rows = from_wire(made.data, DataType.BYTES, made.shape).tolist()
    return made.shape, rows


def test_each_row_gives_its_highest_first():
    shape, rows = classes_of([[0.1, 0.7, 0.2], [3, -1, 3.5]], 2)
    assert shape == (2, 2)
    assert rows == [[b"0.700000:1", b"0.200000:2"], [b"3.500000:2", b"3.000000:0"]]


def test_without_batching_the_tensor_is_one_row():
    assert classes_of([[0.1, 0.7], [3, -1]], 3, batched=False) == ((3,), [b"3.000000:2", b"0.700000:1", b"0.100000:0"])
    assert classes_of(5.0, 2, batched=False) == ((1,), [b"5.000000:0"])


def test_a_row_is_flattened():
    assert classes_of([[[1, 2], [4, 3]]], 2) == ((1, 2), [[b"4.000000:2", b"3.000000:3"]])
    assert classes_of([7, 8], 5) == ((2, 1), [[b"7.000000:0"], [b"8.000000:0"]])


def test_there_are_no_more_classes_than_elements():
    assert classes_of([[1, 2]], 10**12) == ((1, 2), [[b"2.000000:1", b"1.000000:0"]])


@pytest.mark.parametrize(
    ("shape", "answer"), [((2, 0), (2, 0)), ((0, 3), (0, 2)), ((0, 0), (0, 0)), ((2, 3, 0), (2, 0))]
)
def test_a_tensor_without_elements_has_no_classes(shape, answer):
    assert classes_of(np.zeros(shape), 2)[0] == answer


def test_labels_stand_behind_the_indexes_that_have_one():
    expected = [[b"4.000000:3", b"3.000000:2", b"2.000000:1:caf\xc3\xa9", b"1.000000:0:a:b"]]
    assert classes_of([[1, 2, 3, 4]], 4, labels=["a:b", "caf\u00e9", ""])[1] == expected


def test_of_equal_values_the_lower_index_comes_first():
    values = [5, 7, 5, 5, 7, 5]
    assert classes_of([values], 3)[1] == [[b"7.000000:1", b"7.000000:4", b"5.000000:0"]]
    assert classes_of([values], 5)[1][0][2:] == [b"5.000000:0", b"5.000000:2", b"5.000000:3"]
    assert classes_of([[0.0, -0.0, 0.0]], 3)[1] == [[b"0.000000:0", b"-0.000000:1", b"0.000000:2"]]
    assert classes_of([[1] * 100, range(100)], 2)[1] == [
        [b"1.000000:0", b"1.000000:1"],
        [b"99.000000:99", b"98.000000:98"],
    ]


def test_nan_comes_last_whatever_its_bits():
    quiet, signalling, negative = (
        struct.unpack("<f", struct.pack("<I", bits))[0] for bits in (0x7FC00000, 0x7FC00001, 0xFFC00000)
    )
    values = [[quiet, -math.inf, 1, signalling, math.inf, negative]]
    expected = [b"inf:4", b"1.000000:2", b"-inf:1", b"nan:0", b"nan:3", b"nan:5"]
    for count in (3, 4, 6):
        assert classes_of(values, count)[1] == [expected[:count]]


def test_a_signalling_nan_is_no_trouble():
    made = classify(Tensor("y", DataType.FP32, (1, 2), struct.pack("<If", 0x7F800001, -1)), 2, True, (), "m")
    assert from_wire(made.data, DataType.BYTES, (2,)).tolist() == [b"-1.000000:1", b"nan:0"]


@pytest.mark.parametrize(
    ("datatype", "values", "expected"),
    [
        ("INT8", [-128, 127, 0], [b"127:1", b"0:2", b"-128:0"]),
        ("UINT8", [0, 255, 128], [b"255:1", b"128:2", b"0:0"]),
        ("INT64", [-(2**63), 2**63 - 1, -1], [b"9223372036854775807:1", b"-1:2", b"-9223372036854775808:0"]),
        ("UINT64", [0, 2**64 - 1, 2**63], [b"18446744073709551615:1", b"9223372036854775808:2", b"0:0"]),
        ("FP64", [1e300, 1 / 3, -5e-7], [f"{1e300:.6f}:0".encode(), b"0.333333:1", b"-0.000000:2"]),
        ("BOOL", [False, True, True], [b"1:1", b"1:2", b"0:0"]),
    ],
)
def test_numbers_are_written_as_their_datatype_has_them(datatype, values, expected):
    assert classes_of([values], 3, DataType(datatype))[1] == [expected]


def test_any_byte_but_zero_is_true():
    made = classify(Tensor("y", DataType.BOOL, (4,), b"\0\2\1\xff"), 4, False, (), "m")
    assert from_wire(made.data, DataType.BYTES, (4,)).tolist() == [b"1:1", b"1:2", b"1:3", b"0:0"]


@pytest.mark.parametrize("wrap", [memoryview, bytearray])
def test_data_may_lie_anywhere(wrap):
    data = wrap(b"\0" + np.array([1, 2], "<f4").tobytes())[1:]  # not aligned
    made = classify(Tensor("y", DataType.FP32, (1, 2), data), 1, True, (), "m")
    assert bytes(made.data) == pack_bytes([b"2.000000:1"])


@given(st.data())
def test_it_is_what_sorting_gives(data):
    datatype = data.draw(st.sampled_from(CLASSIFIED))
    dtype = NUMPY_DTYPES[datatype]
    few = st.sampled_from(np.array([0, 1, 2, 3], dtype).tolist())
    array = data.draw(
        hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=2, max_dims=3, max_side=6),
            elements=data.draw(st.sampled_from([None, few])),
        )
    )
    count = data.draw(st.integers(1, 40))
    shape, rows = classes_of(array, count, datatype)
    flat = array.reshape(len(array), -1)
    assert shape == (len(array), min(count, flat.shape[1]))
    for row, got in zip(flat.tolist(), rows, strict=True):
        order = sorted(
            range(len(row)),
            key=lambda index: (row[index] != row[index], -row[index] if row[index] == row[index] else 0, index),
        )
        form = "{:.6f}:{}" if dtype.kind == "f" else "{:d}:{}"
        assert got == [form.format(row[index], index).encode() for index in order[:count]]


@pytest.mark.parametrize(
    ("array", "datatype"),
    [
        (np.zeros((1, 2), np.float16), "FP16"),
        (np.zeros((1, 2), ml_dtypes.bfloat16), "BF16"),
        (np.array([[b"a"]], object), "BYTES"),
    ],
)
def test_what_has_no_order_is_refused(array, datatype):
    with pytest.raises(
        InvalidRequest, match=f"model 'm': output 'y' is {datatype}, of which there is no classification"
    ):
        classify(Tensor("y", DataType(datatype), array.shape, b""), 1, True, (), "m")


def test_the_number_of_elements_is_bounded():
    assert classify(tensor_of(np.zeros((2, MAX_ELEMENTS // 2)), DataType.UINT8), 1, True, (), "m").shape == (2, 1)
    with pytest.raises(InvalidRequest, match=f"model 'm': output 'y' has {MAX_ELEMENTS + 1} elements"):
        classify(tensor_of(np.zeros((1, MAX_ELEMENTS + 1)), DataType.UINT8), 1, True, (), "m")


def test_what_is_not_asked_for_is_zero():
    assert classification_count(RequestedOutput("y", {"binary_data": True}), "m") == 0
    assert classification_count(RequestedOutput("y"), "m") == 0
    assert classification_count(RequestedOutput("y", {"classification": 3}), "m") == 3


@pytest.mark.parametrize("value", [0, -1, 1.0, True, False, "3", ""])
def test_a_count_is_a_positive_integer(value):
    with pytest.raises(
        InvalidRequest, match=r"model 'm': output 'y' has classification .* expected a positive integer"
    ) as caught:
        classification_count(RequestedOutput("y", {"classification": value}), "m")
    assert repr(value) in str(caught.value)
