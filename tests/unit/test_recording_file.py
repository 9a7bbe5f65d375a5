"""What requests are recorded as, and the arrays that they become in the file."""

import stat
from random import Random

import ml_dtypes
import numpy as np
import pytest

from headrace.core.tensor import Tensor, datatype_of, to_wire
from headrace.core.validation import ModelInputs
from headrace.recording.examples import examples_in, fits_arrays
from headrace.recording.file import arrays_of, recorded_file, write_examples


def tensor(name, array):
    array = np.asarray(array)
    return Tensor(name, datatype_of(array), array.shape, to_wire(array))


def texts(*elements):
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array


def request(rows, **arrays):
    return ModelInputs(tuple(tensor(name, array) for name, array in arrays.items()), rows, None)


def cut(inputs, *, merges, most=100):
    return [(size, copy()) for size, copy in examples_in(inputs, merges=merges, most=most, random=Random(0))]


def test_a_merging_models_request_is_cut_into_rows():
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    words = texts(b"a", b"", b"long one").reshape(3, 1)
    found = cut(request(3, x=x, words=words), merges=True)
    assert [size for size, _ in found] == [8 + 4 + 1, 8 + 4, 8 + 4 + 8]
    arrays = dict(arrays_of([example for _, example in found], merges=True))
    np.testing.assert_array_equal(arrays["x"], x)
    assert arrays["words"].tolist() == [[b"a"], [b""], [b"long one"]]
    assert arrays["words"].dtype == "S8"


def test_a_request_that_is_not_merged_is_one_example():
    x = np.arange(6, dtype=np.int64).reshape(3, 2)
    [(size, example)] = cut(request(1, x=x), merges=False)
    assert size == 48
    arrays = dict(arrays_of([example, example], merges=False))
    assert arrays["x"].shape == (2, 3, 2)
    np.testing.assert_array_equal(arrays["x"][1], x)


def test_nothing_of_the_request_is_held():
    data = bytearray(b"\x01\x00\x00\x00\x02\x00\x00\x00")
    inputs = ModelInputs((Tensor("x", datatype_of(np.int32(0)), (2, 1), memoryview(data)),), 2, None)
    found = cut(inputs, merges=True)
    data[:] = bytes(8)
    assert [example[0].data for _, example in found] == [b"\x01\x00\x00\x00", b"\x02\x00\x00\x00"]


def test_of_a_request_with_very_many_rows_only_some_are_looked_at():
    x = np.arange(1000, dtype=np.float32).reshape(1000, 1)
    found = cut(request(1000, x=x), merges=True, most=7)
    rows = [np.frombuffer(example[0].data, np.float32)[0] for _, example in found]
    assert len(rows) == 7
    assert rows == sorted(rows)
    assert rows[-1] > 100  # not just the first ones


def test_an_optional_input_that_was_left_out_is_not_there():
    inputs = ModelInputs((tensor("x", np.ones((1, 2), np.float32)), None), 1, None)
    [(_, example)] = cut(inputs, merges=True)
    assert [one.name for one in example] == ["x"]


def test_examples_of_several_shapes_are_numbered():
    requests = [request(1, ids=np.ones((1, size), np.int64), y=np.zeros((1, 2), np.float32)) for size in (3, 5)]
    arrays = dict(arrays_of([cut(one, merges=True)[0][1] for one in requests], merges=True))
    assert {name: array.shape for name, array in arrays.items()} == {"ids/0": (1, 3), "ids/1": (1, 5), "y": (2, 2)}


def test_texts_of_very_different_lengths_are_numbered_too():
    requests = [request(1, picture=texts(b"p" * size)) for size in (4_000_000, 10, 10, 10)]
    arrays = dict(arrays_of([cut(one, merges=False)[0][1] for one in requests], merges=False))
    assert {name: array.dtype.itemsize for name, array in arrays.items()} == {
        "picture/0": 4_000_000,
        "picture/1": 10,
        "picture/2": 10,
        "picture/3": 10,
    }


@pytest.mark.parametrize(
    "array",
    [
        np.array([[True, False]]),
        np.array([[1.5, -2]], dtype=np.float16),
        np.array([[1, 2]], dtype=np.uint64),
        np.array([[]], dtype=np.float32),
        texts(b"a\0b", "\N{SNOWMAN}".encode()).reshape(1, 2),
    ],
)
def test_every_datatype_comes_back(array, tmp_path):
    path = tmp_path / "deep" / "x.npz"
    [(_, example)] = cut(request(1, x=array), merges=True)
    assert write_examples(path, [example, example], merges=True) == 2
    with np.load(path, allow_pickle=False) as found:
        assert found.files == ["x"]
        back = found["x"]
    if array.dtype.kind == "O":
        assert back.tolist() == [*array.tolist(), *array.tolist()]
    else:
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, np.concatenate([array, array]))


def test_bf16_becomes_fp32():
    array = np.array([[1.5, -3.25]], dtype=ml_dtypes.bfloat16)
    [(_, example)] = cut(request(1, x=array), merges=True)
    [(name, found)] = arrays_of([example], merges=True)
    assert (name, found.dtype) == ("x", np.float32)
    assert found.tolist() == [[1.5, -3.25]]


def test_the_file_is_its_owners_alone_and_replaces_an_older_one(tmp_path):
    path = recorded_file(tmp_path / "plans", "a model")
    assert path == tmp_path / "plans" / "recorded" / "a model.npz"
    for value in (1.0, 2.0):
        [(_, example)] = cut(request(1, file=np.array([[value]])), merges=True)  # "file" is a name like any other
        write_examples(path, [example], merges=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    with np.load(path) as found:
        assert found["file"].tolist() == [[2.0]]


def test_what_arrays_cannot_hold_and_what_has_other_inputs_is_left_out(tmp_path):
    path = tmp_path / "x.npz"
    bad = cut(request(1, x=texts(b"ends in nul\0")), merges=False)[0][1]
    assert not fits_arrays(bad)
    assert write_examples(path, [bad], merges=False) == 0
    assert not path.exists()
    usual = [cut(request(1, x=texts(one)), merges=False)[0][1] for one in (b"a", b"b")]
    other = cut(request(1, x=texts(b"c"), y=texts(b"d")), merges=False)[0][1]
    assert write_examples(path, [usual[0], other, bad, usual[1]], merges=False) == 2
    with np.load(path) as found:
        assert found["x"].tolist() == [[b"a"], [b"b"]]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    [(_, example)] = cut(request(1, x=np.ones((1, 1))), merges=True)
    write_examples(path, [example], merges=True)
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headrace.recording.file.npy.write_array", fail)
    with pytest.raises(OSError, match="No space"):
        write_examples(path, [example], merges=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
