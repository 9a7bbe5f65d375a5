"""Tensors between arrays and their wire form."""

import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import InvalidRequest
from headrace.core.tensor import (
    DATATYPE_BY_NAME,
    ITEM_BYTES,
    NUMPY_DTYPES,
    DataType,
    Tensor,
    bytes_offsets,
    check_bytes,
    datatype_of,
    from_wire,
    pack_bytes,
    to_wire,
    unpack_bytes,
)

FIXED = [datatype for datatype in DataType if datatype is not DataType.BYTES]
SIZES = {"BOOL": 1, "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8, "BYTES": 0}
SIZES |= {f"{sign}INT{bits}": bits // 8 for sign in ("", "U") for bits in (8, 16, 32, 64)}
elements = st.lists(st.binary(max_size=12), max_size=12)


def test_the_protocols_datatypes_and_their_sizes():
    assert {str(datatype): ITEM_BYTES[datatype] for datatype in DataType} == SIZES
    assert {name: DataType(name) for name in SIZES} == DATATYPE_BY_NAME


@pytest.mark.parametrize("datatype", FIXED)
def test_every_datatype_has_one_numpy_dtype_and_back(datatype):
    array = np.zeros(2, dtype=NUMPY_DTYPES[datatype])
    assert datatype_of(array) is datatype
    assert array.itemsize == ITEM_BYTES[datatype]


@pytest.mark.parametrize("array", [np.array([b"a"], object), np.array(["a"]), np.array([b"a"])])
def test_strings_and_objects_are_bytes(array):
    assert datatype_of(array) is DataType.BYTES


@pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", "timedelta64[s]", [("a", "f4")], "longdouble"])
def test_other_dtypes_have_no_name_in_the_protocol(dtype):
    assert datatype_of(np.zeros(1, dtype=dtype)) is None


def test_big_endian_arrays_travel_little_endian():
    array = np.array([1, 258], dtype=">i4")
    assert datatype_of(array) is DataType.INT32
    assert bytes(to_wire(array)) == struct.pack("<2i", 1, 258)


def test_the_wire_form_is_row_major_whatever_the_layout():
    array = np.arange(6, dtype="<u2").reshape(2, 3)
    expected = struct.pack("<6H", 0, 1, 2, 3, 4, 5)
    assert bytes(to_wire(array)) == expected
    assert bytes(to_wire(np.asfortranarray(array))) == expected
    assert bytes(to_wire(np.repeat(array, 2, axis=1)[:, ::2])) == expected
    assert bytes(to_wire(array.T)) == struct.pack("<6H", 0, 3, 1, 4, 2, 5)


def test_bfloat16_is_the_upper_half_of_a_float():
    array = np.array([1.0, -2.5, np.inf], dtype=ml_dtypes.bfloat16)
    floats = np.array([1.0, -2.5, np.inf], dtype="<f4").tobytes()
    assert bytes(to_wire(array)) == b"".join(floats[at + 2 : at + 4] for at in (0, 4, 8))


def test_nothing_is_copied_where_nothing_need_be():
    array = np.arange(4, dtype="<f4")
    data = to_wire(array)
    array[1] = 9
    assert struct.unpack("<4f", data) == (0, 9, 2, 3)
    view = from_wire(data, DataType.FP32, (2, 2))
    array[0] = 7
    assert view.tolist() == [[7, 9], [2, 3]]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (2, 3), (1, 1, 4)])
@pytest.mark.parametrize("datatype", DataType)
def test_any_shape_of_any_datatype_comes_back_the_same(datatype, shape):
    count = int(np.prod(shape))
    if datatype is DataType.BYTES:
        array = np.array([b"%d" % at * at for at in range(count)], dtype=object).reshape(shape)
    else:
        array = np.arange(count).astype(NUMPY_DTYPES[datatype]).reshape(shape)
    back = from_wire(to_wire(array), datatype, shape)
    assert (back.shape, back.dtype) == (shape, NUMPY_DTYPES[datatype])
    assert back.tolist() == array.tolist()


def test_nan_keeps_its_bits():
    bits = np.array([0x7FC00001, 0xFF800001, 0x80000000], dtype="<u4")
    array = from_wire(bits.tobytes(), DataType.FP32, (3,))
    assert bytes(to_wire(array)) == bits.tobytes()


def test_a_read_only_buffer_gives_a_read_only_array():
    assert not from_wire(b"\0\0\0\0", DataType.FP32, (1,)).flags.writeable


def test_text_is_utf8():
    assert bytes(to_wire(np.array(["ä", ""]))) == b"\x02\0\0\0\xc3\xa4\0\0\0\0"
    assert pack_bytes(["ä", b"\xff"]) == b"\x02\0\0\0\xc3\xa4\x01\0\0\0\xff"


@given(elements)
def test_bytes_elements_come_back_the_same(values):
    data = pack_bytes(list(values))
    assert unpack_bytes(data, len(values)) == values
    assert unpack_bytes(memoryview(data), len(values)) == values
    assert unpack_bytes(bytearray(data), len(values)) == values
    offsets = bytes_offsets(data, len(values))
    assert offsets[0] == 0
    assert offsets[-1] == len(data)
    assert len(offsets) == len(values) + 1


@given(elements, st.integers(0, 200), st.integers(0, 20))
def test_bytes_data_that_does_not_hold_what_it_should_is_refused_and_never_read_past(values, cut, count):
    data = pack_bytes(list(values))[:cut]
    try:
        found = unpack_bytes(data, count)
    except InvalidRequest:
        return
    assert len(found) == count
    assert pack_bytes(list(found)) == data


@pytest.mark.parametrize(
    ("data", "count", "message"),
    [
        (b"", 1, "too few for its 1 elements"),
        (b"\x01\0\0\0a", 0, "5 bytes after the last"),
        (b"\x01\0\0\0ab", 1, "1 bytes after the last"),
        (b"\x05\0\0\0abcd", 1, "ends inside BYTES element 0"),
        (b"\x05\0\0\0abcde\x01\0", 2, "ends inside the length of BYTES element 1"),
        (b"\xff\xff\xff\xffabcd", 1, "ends inside BYTES element 0"),
        (b"", 1 << 60, "too few"),
    ],
)
def test_what_is_wrong_with_bytes_data_is_said(data, count, message):
    with pytest.raises(InvalidRequest, match=message):
        bytes_offsets(data, count)
    with pytest.raises(InvalidRequest, match=message):
        check_bytes(data, count)


def test_to_check_many_elements_takes_no_memory():
    data = bytes(4 * 50_000)
    tracemalloc.start()
    try:
        check_bytes(data, 50_000)
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()


def test_a_tensor_cannot_be_changed():
    tensor = Tensor("x", DataType.FP32, (1,), b"\0\0\0\0")
    with pytest.raises(AttributeError):
        tensor.shape = (2,)
