"""Which signatures can stand for the reference's."""

import pytest

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.optimize.misfit import misfit


def spec(name="x", datatype=DataType.FP32, shape=(-1, 4), optional=False):
    return TensorSpec(name, datatype, shape, optional)


@pytest.mark.parametrize(
    ("inputs", "most", "reason"),
    [
        ((spec(),), 8, ""),
        ((spec(),), 0, ""),
        ((spec(shape=(-1, -1)),), 8, ""),
        ((spec(shape=None),), 8, ""),
        ((spec("z"),), 8, "its inputs are ['z'], the reference has ['x']"),
        ((spec(), spec("z")), 8, "its inputs are ['x', 'z'], the reference has ['x']"),
        ((spec(datatype=DataType.FP16),), 8, "its input is x FP16[-1, 4], the reference has x FP32[-1, 4]"),
        ((spec(shape=(-1, 5)),), 8, "its input is x FP32[-1, 5], the reference has x FP32[-1, 4]"),
        ((spec(shape=(1, 4)),), 8, "its input is x FP32[1, 4], the reference has x FP32[-1, 4]"),
        ((spec(shape=(-1, 4, 1)),), 8, "its input is x FP32[-1, 4, 1], the reference has x FP32[-1, 4]"),
    ],
)
def test_a_form_has_to_take_what_the_reference_takes(inputs, most, reason):
    outputs = (spec("y"),)
    assert misfit(Signature((spec(),), outputs, 32), Signature(inputs, outputs, most)) == reason


def test_a_form_may_not_merge_what_the_reference_does_not():
    tensors = ((spec(),), (spec("y"),))
    assert misfit(Signature(*tensors, 0), Signature(*tensors, 32)) == "it merges rows, and the reference does not"
