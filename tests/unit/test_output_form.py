"""What a request's outputs are made into: classes where that was asked for, with the model's labels."""

from types import SimpleNamespace

import numpy as np
import pytest

from headrace.core.errors import InvalidRequest
from headrace.core.request import InferRequest, RequestedOutput
from headrace.core.tensor import DataType, Tensor, from_wire, to_wire
from headrace.output_form import output_form


class Models:
    """A repository without ensembles: nobody asks it for another model."""

    def find(self, name, version):
        raise AssertionError("only an ensemble's labels may be another model's")


def served(max_batch_size=4, **labels):
    return SimpleNamespace(max_batch_size=max_batch_size, info=SimpleNamespace(labels=labels))


def request(*outputs):
    return InferRequest("m", "", "", (), tuple(RequestedOutput(name, parameters) for name, parameters in outputs))


def scores(name, *rows):
    values = np.array(rows, np.float32)
    return Tensor(name, DataType.FP32, values.shape, to_wire(values))


@pytest.mark.parametrize("outputs", [[], [("y", {})], [("y", {"binary_data": True})]])
def test_outputs_are_given_as_they_are_unless_classes_are_asked_for(outputs):
    assert output_form(Models(), served(), request(*outputs)) is None


def test_what_is_asked_for_becomes_classes_and_the_rest_stays():
    form = output_form(Models(), served(y=("cat", "dog")), request(("y", {"classification": 1}), ("z", {})))
    y, z = scores("y", [1, 2], [3, 0]), scores("z", [5, 6], [7, 8])
    classes, other = form((y, z))
    assert other is z
    assert (classes.name, classes.datatype, classes.shape) == ("y", DataType.BYTES, (2, 1))
    assert from_wire(classes.data, DataType.BYTES, (2,)).tolist() == [b"2.000000:1:dog", b"3.000000:0:cat"]


def test_an_output_without_labels_has_numbers_only():
    form = output_form(Models(), served(), request(("y", {"classification": 2})))
    (classes,) = form((scores("y", [1, 2]),))
    assert from_wire(classes.data, DataType.BYTES, (2,)).tolist() == [b"2.000000:1", b"1.000000:0"]


def test_a_number_of_classes_that_cannot_be_is_refused_before_anything_is_run():
    with pytest.raises(InvalidRequest, match="'y' has classification 0, expected a positive integer"):
        output_form(Models(), served(), request(("y", {"classification": 0})))
