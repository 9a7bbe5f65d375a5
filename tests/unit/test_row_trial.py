"""The proof that rows are independent: what it must let through, and every way of mixing that it must find."""

import numpy as np
import pytest

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import InputError
from headrace_backends.made_up import MAX_ROW_ELEMENTS, made_up
from headrace_backends.row_trial import inferred_batching, trial
from headrace_backends.specs import FoundTensor

X = [FoundTensor(TensorSpec("x", DataType.FP32, (-1, 4)), ("n", ""))]
Y = [FoundTensor(TensorSpec("y", DataType.FP32, (-1, 4)), ("n", ""))]


def verdict(function, datatype=DataType.FP32, shape=(-1, 4), limit=32):
    inputs = [FoundTensor(TensorSpec("x", datatype, shape), ("n", *[""] * (len(shape) - 1)))]
    return trial(lambda arrays: {"y": function(arrays["x"])}, inputs, Y, limit)


def by_size(x):
    """Another kernel, and so another rounding, for each number of rows: 3e-3 apart, as magika's."""
    return x * np.float32(1 + 0.003 * len(x))


def scaled_together(x):
    scale = np.abs(x).max() / 127
    return np.round(x / scale) * scale


def in_place(x):
    x += 1
    return x


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2,
        lambda x: x - x.mean(axis=1, keepdims=True),
        lambda x: x.argmax(axis=1),
        np.log,
        lambda x: x / np.float32(0),
        lambda x: np.zeros((len(x), 0), np.float32),
        lambda x: x * np.float32(1e-20),
        lambda x: (x * 3).astype(np.float16),
        lambda x: x > 0,
        by_size,
        in_place,
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_of_their_own(function):
    assert verdict(function) == (None, None)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x - x.mean(axis=0), "beside different others"),
        (lambda x: np.exp(x) / np.exp(x).sum(axis=0), "beside different others"),
        (lambda x: np.maximum(x, x.max(axis=0)), "beside different others"),
        (lambda x: np.roll(x, 1, axis=0), "beside different others"),
        (scaled_together, "beside different others"),
        (lambda x: (x - x.mean(axis=0)) * np.float32(1e-20), "beside different others"),
        (lambda x: (x - x.mean(axis=0)).astype(np.float16), "beside different others"),
        (lambda x: x > x.mean(axis=0), "beside different others"),
        (lambda x: np.cumsum(x, axis=0), "at different places"),
        (lambda x: np.cumsum(x, axis=0).astype(np.float16), "at different places"),
        (lambda x: x * np.arange(1, len(x) + 1, dtype=np.float32)[:, None], "at different places"),
        (lambda x: x / len(x), "depends on how many there are"),
        (lambda x: np.concatenate([x, x]), "has 2, 4 and 6 rows for 1, 2 and 3 rows"),
        (lambda x: x[:1], "has 1, 1 and 1 rows"),
        (lambda x: x.sum(), "has 0, 0 and 0 rows"),
        (lambda x: x @ x.T, "a shape that depends on how many rows"),
        (lambda x: x[:, : 1 + int(np.abs(x).max() > 6)], "a shape that depends on what the rows"),
    ],
)
def test_every_way_of_mixing_is_found(function, reason):
    found, doubt = verdict(function)
    assert doubt is None
    assert found is not None
    assert found.startswith("output 'y' ")
    assert reason in found


@pytest.mark.parametrize("datatype", [DataType.BOOL, DataType.INT64, DataType.UINT8, DataType.BF16, DataType.FP16])
@pytest.mark.parametrize("shape", [(-1,), (-1, 5)])
def test_mixing_of_every_kind_of_number(datatype, shape):
    assert verdict(lambda x: x, datatype, shape) == (None, None)
    found, _ = verdict(lambda x: x.astype(np.float32) + x.astype(np.float32).sum(axis=0), datatype, shape)
    assert "beside different others" in found


@pytest.mark.parametrize("datatype", [DataType.INT64, DataType.UINT8])
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x - np.float32(x.max()), "beside different others"),
        (lambda x: x - np.float32(x.min()), "beside different others"),
        (lambda x: np.zeros((len(x), int(x.max())), np.float32), "a shape that depends on what the rows"),
    ],
)
def test_mixing_by_the_extremes_of_whole_numbers(datatype, function, reason):
    found, _ = verdict(function, datatype)
    assert found is not None
    assert reason in found


def test_extremes_that_are_refused_prove_nothing():
    def picky(x):
        if not x.any(axis=1).all():
            raise InputError("a row is empty")
        return x

    assert verdict(picky, DataType.INT64) == (None, None)


def scaled_down(x):
    """As who would have pixels from 0 to 1, and gets them from 0 to 255 as well."""
    return x / np.float32(255) if x.max() > 1 else x / np.float32(1)


@pytest.mark.parametrize("datatype", [DataType.FP32, DataType.BF16, DataType.INT64, DataType.UINT8])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1), (-1, 3, 8, 8)])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x / max(np.float32(x.max()), np.float32(1e-9)),
        lambda x: x.astype(np.float32) / np.float32(np.abs(x.astype(np.float32)).max() + 1),
        lambda x: x - np.float32(x.min()),
        scaled_down,
    ],
)
def test_mixing_by_the_range_of_a_batch(datatype, shape, function):
    assert verdict(lambda x: x / np.float32(7), datatype, shape) == (None, None)
    found, _ = verdict(function, datatype, shape)
    assert found is not None
    assert "beside different others" in found


def embedding(vocabulary, indices):
    if indices.max(initial=0) >= len(vocabulary):
        raise InputError("index out of range")
    return vocabulary[indices]


TOKENS = [
    FoundTensor(TensorSpec(name, DataType.INT64, (-1, -1)), ("n", "tokens")) for name in ("ids", "types", "positions")
]


@pytest.mark.parametrize("mixes", [False, True])
def test_a_vocabulary_is_kept_to_and_the_numbers_beside_it_are_tried(mixes):
    def run(arrays):
        positions = arrays["positions"] / np.float32(max(arrays["positions"].max(), 1) if mixes else 1)
        words = embedding(np.arange(2, dtype=np.float32), arrays["types"]) + arrays["ids"]
        return {"y": words + positions}

    found, doubt = trial(run, TOKENS, Y)
    assert doubt is None
    assert bool(found) is mixes


@pytest.mark.parametrize("mixes", [False, True])
def test_no_index_is_out_of_range_where_that_does_harm(mixes):
    def run(arrays):
        x = arrays["x"]
        scale = np.abs(x).max() if mixes else np.float32(1)
        return {"y": x / scale + np.arange(2, dtype=np.float32)[arrays["types"]]}

    inputs = [FoundTensor(TensorSpec("x", DataType.FP32, (-1, -1)), ("n", "tokens")), TOKENS[1]]
    found, doubt = trial(run, inputs, Y, checks_indices=False)
    assert doubt is None
    assert bool(found) is mixes


def test_mixing_of_text():
    assert verdict(lambda x: x, DataType.BYTES) == (None, None)
    found, _ = verdict(lambda x: np.array([b"".join(x[:, 0])] * len(x), object), DataType.BYTES)
    assert "beside different others" in found


@pytest.mark.parametrize("shape", [(-1,), (-1, 2)])
def test_mixing_by_the_longest_text(shape):
    def words(x):
        return np.array([len(one.split()) for one in x.ravel()], np.int64).reshape(x.shape)

    assert verdict(words, DataType.BYTES, shape) == (None, None)
    found, _ = verdict(lambda x: np.zeros((len(x), words(x).max()), np.float32), DataType.BYTES, shape)
    assert found == "output 'y' has a shape that depends on what the rows of the input hold"


def test_a_limit_below_three_rows_is_kept_to():
    def at_most_two(x):
        if len(x) > 2:
            raise InputError("too many")
        return x

    assert verdict(at_most_two, limit=2) == (None, None)
    assert "several fail: too many" in verdict(at_most_two)[0]
    assert "beside different others" in verdict(lambda x: x - x.mean(axis=0), limit=2)[0]
    assert verdict(at_most_two, limit=1) == (None, None)


def test_doubts_are_told():
    def refuse(arrays):
        raise InputError("no")

    assert trial(refuse, X, Y) == (None, "batching could not be proved: the model refuses made-up inputs (no)")
    size, note = inferred_batching(refuse, X, Y, 8)
    assert size == 8
    assert note is not None
    large = [FoundTensor(TensorSpec("x", DataType.FP32, (-1, MAX_ROW_ELEMENTS + 1)), ("n", ""))]
    assert "too large to be made up" in trial(refuse, large, Y)[1]


def test_sizes_tied_together_are_tried_equal():
    inputs = [FoundTensor(TensorSpec(name, DataType.FP32, (-1, -1)), ("n", name)) for name in "xz"]
    seen = []

    def run(arrays):
        seen.append([array.shape[1] for array in arrays.values()])
        if len(set(seen[-1])) > 1:
            raise InputError("unequal")
        return {"y": arrays["x"] + arrays["z"]}

    assert trial(run, inputs, Y) == (None, None)
    assert seen[0] == [2, 3]
    assert seen[-1] == [8, 8]


@pytest.mark.parametrize("least", [9, 40])
def test_sizes_that_a_model_needs_are_found(least):
    inputs = [FoundTensor(TensorSpec("x", DataType.FP32, (-1, 3, -1, -1)), ("n", "", "height", "width"))]

    def pooled(arrays):
        if min(arrays["x"].shape[2:]) < least:
            raise InputError("the image is smaller than the window")
        return {"y": arrays["x"].mean((2, 3)) - arrays["x"].mean((0, 2, 3))}

    found, doubt = trial(pooled, inputs, Y)
    assert doubt is None
    assert "beside different others" in found


def test_sizes_beyond_what_is_made_up_are_left_out():
    inputs = [FoundTensor(TensorSpec("x", DataType.FP32, (-1, -1, -1, -1, -1)), ("n", "", "", "", ""))]

    def refuse(arrays):
        raise InputError("no")

    assert trial(refuse, inputs, Y) == (None, "batching could not be proved: the model refuses made-up inputs (no)")


def test_made_up_inputs():
    assert made_up([FoundTensor(TensorSpec("x", DataType.FP32, None))], 1) is None
    specs = [
        TensorSpec("a", DataType.INT8, ()),
        TensorSpec("s", DataType.BYTES, ()),
        TensorSpec("b", DataType.BF16, (-1, 2)),
    ]
    arrays = made_up([FoundTensor(spec) for spec in specs], None, 64)
    assert {name: array.shape for name, array in arrays.items()} == {"a": (), "s": (), "b": (64, 2)}
    assert [str(array.dtype) for array in arrays.values()] == ["int8", "object", "bfloat16"]
