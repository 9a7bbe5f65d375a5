"""Examples from files and folders."""

import numpy as np
import pytest

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.optimize.calibration import BadCalibration, given_examples, made_up_examples, read_examples
from headrace_backends.optimize.examples import Examples, merged, shapes_of
from headrace_backends.specs import FoundTensor

ROWS = Signature((TensorSpec("x", DataType.FP32, (-1, 4)),), (), max_batch_size=8)
TOKENS = Signature(
    (TensorSpec("ids", DataType.INT64, (-1, -1)), TensorSpec("mask", DataType.INT64, (-1, -1))), (), max_batch_size=8
)
FIXED = Signature((TensorSpec("x", DataType.FP32, (2, 4)),), ())
PICTURE = Signature((TensorSpec("x", DataType.UINT8, (-1, -1)),), ())


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_each_row_is_an_example_and_the_rest_are_labels(tmp_path):
    path = save(tmp_path / "c.npz", x=np.arange(12, dtype=np.float32).reshape(3, 4), digit=np.array([7, 8, 9]))
    examples = read_examples(path, ROWS)
    assert len(examples) == 3
    assert examples.inputs[1]["x"].tolist() == [[4, 5, 6, 7]]
    assert [int(one["digit"]) for one in examples.labels] == [7, 8, 9]
    assert examples.origin == "c.npz"
    assert examples.real


def test_one_array_is_enough_for_one_input(tmp_path):
    np.save(tmp_path / "c.npy", np.zeros((5, 4)))
    examples = read_examples(tmp_path / "c.npy", ROWS)
    assert len(examples) == 5
    assert examples.inputs[0]["x"].dtype == np.float32
    with pytest.raises(BadCalibration, match="2 inputs"):
        read_examples(tmp_path / "c.npy", TOKENS)


def test_numbered_arrays_may_differ_in_shape(tmp_path):
    arrays = {f"{name}/{place}": np.ones((1, 3 + place), np.int64) for name in ("ids", "mask") for place in range(12)}
    examples = read_examples(save(tmp_path / "c.npz", **arrays), TOKENS)
    assert [one["ids"].shape[1] for one in examples.inputs] == list(range(3, 15))


def test_a_folder_is_all_of_its_files(tmp_path):
    for place in range(3):
        save(tmp_path / f"{place}.npz", ids=np.ones((2, 3 + place), np.int32), mask=np.ones((2, 3 + place), np.int64))
    examples = read_examples(tmp_path, TOKENS)
    assert len(examples) == 6
    assert {one["ids"].dtype for one in examples.inputs} == {np.dtype(np.int64)}


def test_a_model_that_merges_nothing_gets_whole_inputs(tmp_path):
    examples = read_examples(save(tmp_path / "c.npz", x=np.zeros((6, 4), np.float32)), FIXED)
    assert [one["x"].shape for one in examples.inputs] == [(2, 4)] * 3
    examples = read_examples(save(tmp_path / "d.npz", x=np.zeros((3, 5, 7), np.uint8)), PICTURE)
    assert [one["x"].shape for one in examples.inputs] == [(5, 7)] * 3


def test_text_is_bytes(tmp_path):
    signature = Signature((TensorSpec("t", DataType.BYTES, (-1, 1)),), (), max_batch_size=4)
    examples = read_examples(save(tmp_path / "c.npz", t=np.array([["ab"], ["c"]])), signature)
    assert examples.inputs[0]["t"].tolist() == [[b"ab"]]


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"y": np.zeros((3, 4), np.float32)}, "no examples of input 'x'"),
        ({"x": np.zeros((3, 5), np.float32)}, "has shape \\[3, 5\\]"),
        ({"x": np.zeros((3, 4), np.int64)}, "is int64, expected FP32"),
        ({"x": np.zeros((3, 4), np.float32), "digit": np.zeros(2)}, "as many examples"),
        ({"x": np.zeros((0, 4), np.float32)}, "has shape"),
        ({"x": np.float32(1)}, "one number"),
    ],
)
def test_what_does_not_suit_the_model_is_refused(tmp_path, arrays, reason):
    with pytest.raises(BadCalibration, match=reason):
        read_examples(save(tmp_path / "c.npz", **arrays), ROWS)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(BadCalibration, match="there is no"):
        read_examples(tmp_path / "nothing.npz", ROWS)
    (tmp_path / "c.npz").write_bytes(b"PK nonsense")
    with pytest.raises(BadCalibration, match="cannot be read"):
        read_examples(tmp_path / "c.npz", ROWS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadCalibration, match=r"has no \.npz"):
        read_examples(tmp_path / "empty", ROWS)
    np.save(tmp_path / "pickled.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(BadCalibration, match="cannot be read"):
        read_examples(tmp_path / "pickled.npy", ROWS)


def test_integers_that_do_not_fit_are_refused(tmp_path):
    signature = Signature((TensorSpec("x", DataType.INT8, (-1, 1)),), (), max_batch_size=4)
    with pytest.raises(BadCalibration, match="expected INT8"):
        read_examples(save(tmp_path / "c.npz", x=np.array([[1], [300]])), signature)


def test_made_up_examples_say_so():
    examples = made_up_examples([FoundTensor(spec) for spec in ROWS.inputs], ROWS)
    assert not examples.real
    assert len(examples) > 1
    assert examples.inputs[0]["x"].shape == (1, 4)
    assert made_up_examples([FoundTensor(TensorSpec("x", DataType.FP32, None))], ROWS) is None


def test_halves_share_nothing_and_are_the_same_each_time():
    inputs = tuple({"x": np.array([place])} for place in range(11))
    examples = Examples(inputs, tuple({} for _ in inputs), "test")
    first, second = examples.halves()
    values = [[int(one["x"][0]) for one in half.inputs] for half in (first, second)]
    assert sorted(values[0] + values[1]) == list(range(11))
    assert examples.halves()[0].inputs == first.inputs
    alone = examples.first(1).halves()
    assert [len(half) for half in alone] == [1, 1]


def test_examples_of_one_shape_merge():
    one, other = ({"x": np.ones((1, 3))}, {"x": np.zeros((1, 3))})
    assert shapes_of(one) == shapes_of(other) != shapes_of({"x": np.ones((1, 4))})
    assert merged([one, other])["x"].shape == (2, 3)


def test_a_folder_of_single_examples_without_rows(tmp_path):
    for place in range(3):
        save(tmp_path / f"{place}.npz", x=np.full(4, place, np.float32), digit=np.int64(place))
    examples = read_examples(tmp_path, ROWS)
    assert [one["x"].tolist() for one in examples.inputs] == [[[place] * 4] for place in range(3)]
    assert [int(one["digit"]) for one in examples.labels] == [0, 1, 2]
    np.save(tmp_path / "one.npy", np.ones(4, np.float32))
    assert len(read_examples(tmp_path / "one.npy", ROWS)) == 1
    with pytest.raises(BadCalibration, match=r"has shape \[5\]"):
        read_examples(save(tmp_path / "other.npz", x=np.zeros(5, np.float32)), ROWS)


def test_arrays_are_examples_whatever_they_are_called():
    signature = Signature((TensorSpec("file", DataType.FP32, (-1, 2)),), (), max_batch_size=4)
    examples = given_examples({"file": np.zeros((3, 2)), "allow_pickle": np.arange(3)}, signature)
    assert len(examples) == 3
    assert [int(one["allow_pickle"]) for one in examples.labels] == [0, 1, 2]
    with pytest.raises(BadCalibration, match="'example inputs' has no examples of input 'file'"):
        given_examples({"x": np.zeros((3, 2))}, signature)


def test_texts_may_be_objects():
    signature = Signature((TensorSpec("t", DataType.BYTES, (-1, 1)),), (), max_batch_size=4)
    examples = given_examples({"t": np.array([["ab"], [b"c\0"]], object)}, signature)
    assert [one["t"].tolist() for one in examples.inputs] == [[[b"ab"]], [[b"c\0"]]]
    with pytest.raises(BadCalibration, match="expected text"):
        given_examples({"t": np.array([[1]], object)}, signature)
