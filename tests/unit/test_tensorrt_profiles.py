"""Optimisation profiles: from batch sizes, from what the configuration says, and from a guess that is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import LoadError
from headrace_backends.specs import FoundTensor
from headrace_backends.tensorrt.profiles import (
    Range,
    asked_batches,
    asked_ranges,
    choose,
    derive,
    most_rows,
    refusal,
)


def tensor(name, *shape, symbols=()):
    return FoundTensor(TensorSpec(name, DataType.FP32, shape), symbols)


IMAGE = [tensor("x", -1, 3, 224, 224)]
TOKENS = [tensor("ids", -1, -1, symbols=("batch", "sequence")), tensor("mask", -1, -1, symbols=("batch", "sequence"))]


def test_the_batch_goes_up_to_what_is_configured():
    assert derive(IMAGE, 16, {}).profiles == ({"x": Range((1, 3, 224, 224), (16, 3, 224, 224), (16, 3, 224, 224))},)
    assert derive(IMAGE, None, {}).profiles[0]["x"].max[0] == 32


def test_rows_that_are_not_merged_are_still_free():
    assert derive(IMAGE, 0, {}).profiles[0]["x"] == Range((1, 3, 224, 224), (1, 3, 224, 224), (32, 3, 224, 224))
    mixed = [*IMAGE, tensor("scale", 4)]
    assert derive(mixed, None, {}).profiles[0]["scale"] == Range((4,), (4,), (4,))


def test_other_free_dimensions_are_guessed_and_that_is_told():
    derived = derive(TOKENS, 8, {})
    assert derived.profiles[0]["ids"] == Range((1, 1), (8, 128), (8, 512))
    assert len(derived.guesses) == 2
    assert "dimension 1 (sequence) of input 'ids' is taken to go from 1 to 512, quickest at 128" in derived.guesses[0]


def test_what_the_configuration_says_is_taken():
    ranges = asked_ranges({"min_shapes": "ids:1x8", "opt_shapes": " ids:4x64 ", "max_shapes": "ids:8x256, mask:8x256"})
    derived = derive(TOKENS, 8, ranges)
    assert derived.profiles == ({"ids": Range((1, 8), (4, 64), (8, 256)), "mask": Range((1, 1), (8, 256), (8, 256))},)
    assert derived.guesses == ()
    assert asked_ranges({"max_shapes": "a:b:7"}) == {"a:b": {"max": (7,)}}  # names may have colons


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_shapes": "x"}, r"parameters\.max_shapes has 'x', expected as data:32x3x224x224"),
        ({"max_shapes": "x:1x-1"}, "max_shapes has 'x:1x-1', expected"),
        ({"max_shapes": ":1x1"}, "max_shapes has ':1x1', expected"),
        ({"max_shapes": 5, "opt_shapes": "x:"}, "opt_shapes has 'x:', expected .*; .*max_shapes has '5', expected"),
        ({"min_shapes": "x:1", "opt_shapes": "y:1"}, r"max_shapes lacks 'x'; parameters\.max_shapes lacks 'y'"),
    ],
)
def test_what_it_says_is_checked(asked, message):
    with pytest.raises(LoadError, match=message):
        asked_ranges(asked)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"y": {"max": (1,)}}, r"parameters\.max_shapes has 'y', and the inputs are \['x'\]"),
        ({"x": {"max": (32, 3)}}, "another number of dimensions than the input"),
        ({"x": {"max": (32, 3, 225, 224)}}, "changes dimensions that the model fixes"),
        ({"x": {"min": (1, 2, 224, 224), "max": (32, 3, 224, 224)}}, "changes dimensions that the model fixes"),
        ({"x": {"opt": (64, 3, 224, 224), "max": (32, 3, 224, 224)}}, "do not rise"),
        ({"x": {"max": (8, 3, 224, 224)}}, "goes from 1 to 8 rows, and batches have from 1 to 32"),
        ({"x": {"min": (2, 3, 224, 224), "max": (32, 3, 224, 224)}}, "goes from 2 to 32 rows, and batches have from 1"),
    ],
)
def test_ranges_must_go_with_the_model(ranges, message):
    with pytest.raises(LoadError, match=message):
        derive(IMAGE, 32, ranges)


def test_an_input_without_a_shape_needs_one():
    with pytest.raises(LoadError, match="input 'x' has no declared shape; configure one"):
        derive([FoundTensor(TensorSpec("x", DataType.FP32, None))], None, {})


def test_batch_sizes_can_have_profiles_of_their_own():
    derived = derive(IMAGE, 32, {}, asked_batches({"batch_profiles": "1, 8"}))
    assert [(one["x"].min[0], one["x"].opt[0], one["x"].max[0]) for one in derived.profiles] == [
        (1, 1, 1),
        (2, 8, 8),
        (9, 32, 32),
    ]
    assert most_rows(derived.profiles) == 32
    with pytest.raises(LoadError, match=r"batch_profiles goes to 64 rows, and batches have at most 32"):
        derive(IMAGE, 32, {}, (64,))


@pytest.mark.parametrize("wrong", ["8, 1", "0, 1", "1,1", "1;2", True, "1,", [1, 8]])
def test_those_batch_sizes_are_checked(wrong):
    with pytest.raises(LoadError, match="expected rising batch sizes"):
        asked_batches({"batch_profiles": wrong})


@given(st.sets(st.integers(1, 40), min_size=1), st.integers(1, 40))
def test_every_size_of_batch_has_exactly_one_profile(sizes, rows):
    derived = derive(IMAGE, 40, {}, sorted(sizes))
    fitting = [one for one in derived.profiles if one["x"].covers((rows, 3, 224, 224))]
    assert len(fitting) == 1
    assert derived.profiles[choose(derived.profiles, {"x": (rows, 3, 224, 224)})] is fitting[0]


def test_who_asks_for_too_much_is_told_which_input():
    profiles = derive(TOKENS, 8, {}).profiles
    assert choose(profiles, {"ids": (8, 512), "mask": (8, 512)}) == 0
    assert choose(profiles, {"ids": (8, 512), "mask": (8, 513)}) is None
    assert "input 'mask' has shape [8, 513], and the engine takes [1, 1] to [8, 512]" in refusal(
        profiles, {"ids": (8, 512), "mask": (8, 513)}
    )
    split = [
        {"a": Range((1,), (1,), (1,)), "b": Range((1,), (1,), (1,))},
        {"a": Range((2,), (2,), (2,)), "b": Range((2,), (2,), (2,))},
    ]
    assert "no profile of the engine takes these together" in refusal(split, {"a": (1,), "b": (2,)})
