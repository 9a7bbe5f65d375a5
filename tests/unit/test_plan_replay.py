"""Recorded answers: written and read as they were, and told apart from others."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from headrace_backends.optimize.plan import BadPlan
from headrace_backends.optimize.replay import MAX_BYTES, MAX_EXAMPLES, problem, read_replay, write_replay

FLOATS = {"y": np.array([[1.0, -2.0, 4.0]], np.float32)}


def test_arrays_of_every_kind_come_back_as_they_were(tmp_path: Path) -> None:
    words = np.empty((2, 2), np.object_)
    words[:] = [[b"", b"a\0"], [b"\xff" * 300, b"/"]]
    inputs = {
        "in/a:0": np.arange(6, dtype=np.int64).reshape(1, 6),
        "words": words,
        "half": np.array([[1.5, -2.0]], ml_dtypes.bfloat16),
        "flag": np.array(True),
        "none": np.zeros((0, 3), np.float16),
    }
    assert write_replay(tmp_path / "replay.npz", [inputs], [FLOATS]) == 1
    (read,), (answers,) = read_replay(tmp_path / "replay.npz")
    assert read.keys() == inputs.keys()
    for name, array in inputs.items():
        assert read[name].dtype == array.dtype
        assert read[name].shape == array.shape
        assert np.array_equal(read[name], array)
    assert np.array_equal(answers["y"], FLOATS["y"])


def test_no_more_is_recorded_than_the_bounds_allow_and_one_in_any_case(tmp_path: Path) -> None:
    path = tmp_path / "replay.npz"
    assert write_replay(path, [FLOATS] * 20, [FLOATS] * 20) == MAX_EXAMPLES
    assert len(read_replay(path)[0]) == MAX_EXAMPLES
    large = {"x": np.zeros(MAX_BYTES // 8 + 1, np.float64)}
    assert write_replay(path, [large, FLOATS], [FLOATS, FLOATS]) == 1


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_a_bad_plan(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "replay.npz"
    write_replay(path, [FLOATS] * 3, [FLOATS] * 3)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(BadPlan, match=r"replay\.npz cannot be read"):
        read_replay(path)


def test_a_file_with_pickles_is_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "replay.npz", **{"0/in/x": np.array([{}], np.object_)})  # type: ignore[arg-type]
    with pytest.raises(BadPlan, match="cannot be read"):
        read_replay(tmp_path / "replay.npz")


def test_examples_without_answers_are_a_bad_plan(tmp_path: Path) -> None:
    np.savez(tmp_path / "replay.npz", **{"0/in/x": np.zeros(1)})  # type: ignore[arg-type]
    with pytest.raises(BadPlan, match="has not both"):
        read_replay(tmp_path / "replay.npz")


def test_floats_may_be_off_by_a_share_of_the_largest_value() -> None:
    near = {"y": FLOATS["y"] + np.float32(0.039)}
    far = {"y": FLOATS["y"] + np.float32(0.041)}
    assert problem([near], [FLOATS]) is None
    assert "is off by 0.0103" in (problem([far], [FLOATS]) or "")
    assert problem([far], [FLOATS], tolerance=0.02) is None


def test_the_largest_value_is_that_of_all_examples() -> None:
    small = {"y": np.array([[0.001]], np.float32)}
    large = {"y": np.array([[10.0]], np.float32)}
    off = {"y": np.array([[0.05]], np.float32)}
    assert problem([off, large], [small, large]) is None
    assert problem([off], [small]) is not None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_has_to_stay_where_it_was(value: float) -> None:
    strange = {"y": np.array([1.0, value], np.float32)}
    assert problem([strange], [strange]) is None
    assert problem([{"y": np.array([1.0, 1.0], np.float32)}], [strange]) is not None
    assert problem([strange], [{"y": np.array([1.0, 1.0], np.float32)}]) is not None


def test_an_output_of_zeros_has_no_scale() -> None:
    zeros = {"y": np.zeros(4, np.float32)}
    assert problem([{"y": np.full(4, 0.001, np.float32)}], [zeros]) is None
    assert problem([{"y": np.full(4, 0.1, np.float32)}], [zeros]) is not None


def test_of_integers_one_in_a_hundred_may_differ() -> None:
    right = {"label": np.zeros(200, np.int64)}
    two, three = np.zeros(200, np.int64), np.zeros(200, np.int64)
    two[:2], three[:3] = 7, 7
    assert problem([{"label": two}], [right]) is None
    assert "3 of 200" in (problem([{"label": three}], [right]) or "")
    assert problem([{"label": np.array([1])}], [{"label": np.array([2])}]) is not None


def test_strings_are_compared_whatever_they_are_kept_in() -> None:
    right = {"s": np.array([b"a", b"bc"], np.object_)}
    assert problem([{"s": np.array(["a", "bc"])}], [right]) is None
    assert problem([{"s": np.array([b"a", b"x"])}], [right]) is not None


def test_a_missing_output_another_shape_or_datatype_are_told() -> None:
    assert problem([{}], [FLOATS]) == "output 'y' is missing"
    assert "float64[1, 3], was float32[1, 3]" in (problem([{"y": FLOATS["y"].astype(np.float64)}], [FLOATS]) or "")
    assert "float32[3], was float32[1, 3]" in (problem([{"y": FLOATS["y"][0]}], [FLOATS]) or "")
    assert problem([], [FLOATS]) == "0 answers, expected 1"
