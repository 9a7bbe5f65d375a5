"""Tensors that clients see in other shapes than the model has them."""

import numpy as np
import pytest

from headrace.core.model import ReshapeSpec, Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace.workers.reshaped import Reshaped
from headrace_backends.base import Answer, Backend, LoadError, RequestInfo


class Doubling(Backend):
    """y = 2 x, in the shapes that it is made with; remembers what it was given."""

    def __init__(self, inner, max_batch_size, apart):
        self.specs = tuple(TensorSpec(name, DataType.FP32, inner) for name in ("x", "y"))
        self.max_batch_size, self.apart = max_batch_size, apart
        self.wants_requests = apart
        self.seen = None

    @classmethod
    def load(cls, source):
        raise NotImplementedError

    @property
    def signature(self):
        return Signature(self.specs[:1], self.specs[1:], self.max_batch_size)

    def execute(self, inputs, requests):
        self.seen = inputs["x"].shape
        y = inputs["x"] * 2
        return [Answer({"y": y[at : at + 1]}) for at in range(len(requests))] if self.apart else {"y": y}


def reshaped(seen, own, max_batch_size=0, apart=False):
    inner = Doubling(own, max_batch_size, apart)
    return inner, Reshaped(inner, [ReshapeSpec("x", seen, own), ReshapeSpec("y", seen, own)])


@pytest.mark.parametrize(
    ("seen", "own", "given", "inside"),
    [
        ((3, 4), (1, 3, 4), (3, 4), (1, 3, 4)),
        ((-1, 3, 4), (-1, 1, 12), (5, 3, 4), (5, 1, 12)),
        ((-1, 1), (-1,), (7, 1), (7,)),
        ((-1, 2, -1), (-1, -1, 2), (3, 2, 5), (3, 5, 2)),
    ],
)
def test_the_model_has_its_own_shape_and_clients_see_theirs(seen, own, given, inside):
    inner, outer = reshaped(seen, own)
    assert [spec.shape for spec in (*outer.signature.inputs, *outer.signature.outputs)] == [seen, seen]
    x = np.arange(np.prod(given), dtype=np.float32).reshape(given)
    y = outer.execute({"x": x}, [])["y"]
    assert inner.seen == inside
    np.testing.assert_array_equal(y, x * 2)


def test_answers_of_single_requests_are_reshaped_too():
    _, outer = reshaped((-1, 2), (-1, 1, 2), max_batch_size=4, apart=True)
    x = np.array([[1, 2], [3, 4]], dtype=np.float32)
    answers = outer.execute({"x": x}, [RequestInfo(1, "", {}), RequestInfo(1, "", {})])
    assert [answer.outputs["y"].tolist() for answer in answers] == [[[2, 4]], [[6, 8]]]


@pytest.mark.parametrize(("seen", "own"), [((3, 4), (3, 5)), ((-1, 4), (4,)), ((-1, -1), (-1, 4))])
def test_shapes_that_cannot_stand_for_each_other_are_refused(seen, own):
    with pytest.raises(LoadError, match=r"'x' cannot be reshaped from"):
        reshaped(seen, own)


def test_a_tensor_that_is_not_there_is_refused():
    with pytest.raises(LoadError, match="no tensor 'z'"):
        Reshaped(Doubling((1,), 0, apart=False), [ReshapeSpec("z", (1,), (1, 1))])


def test_an_output_of_another_rank_is_the_models_fault():
    inner, outer = reshaped((2,), (1, 2))
    inner.execute = lambda inputs, requests: {"y": np.zeros((1, 1, 2), dtype=np.float32)}
    with pytest.raises(RuntimeError, match=r"shape \[1, 1, 2\], expected \[1, 2\]"):
        outer.execute({"x": np.zeros(2, dtype=np.float32)}, [])


def test_a_decoupled_model_is_refused_when_it_is_loaded():
    class Decoupled(Doubling):
        @property
        def signature(self):
            return Signature(self.specs[:1], self.specs[1:], 0, decoupled=True)

    with pytest.raises(LoadError, match="decoupled"):
        Reshaped(Decoupled((1, 2), 0, apart=False), [ReshapeSpec("x", (2,), (1, 2))])
