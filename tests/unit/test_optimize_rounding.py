"""Rounding that knows what a layer is given, and what the means and covariances of inputs are."""

import numpy as np
import onnx
import pytest
from unit.onnx_nets import convolutions, two_layers

from headrace_backends.optimize.layer_inputs import layers_of, moments_of
from headrace_backends.optimize.rounding import rounded


@pytest.mark.parametrize("groups", [1, 6])
def test_answers_change_less_than_with_the_nearest(groups):
    random = np.random.default_rng(1)
    mixing = random.standard_normal((groups, 40, 40)) * np.linspace(0.05, 1, 40)
    given = (random.standard_normal((groups, 2000, 40)) @ mixing).astype(np.float32)
    weights = random.standard_normal((groups, 8, 40)).astype(np.float32)
    scales = np.abs(weights).max(-1, keepdims=True) / 7
    covariance = given.transpose(0, 2, 1) @ given / 2000
    whole = rounded(weights, scales, covariance, 7)
    assert whole.dtype == np.int8
    assert np.abs(whole).max() <= 7

    def error(chosen):
        return float(np.square(given @ (weights - chosen * scales).transpose(0, 2, 1)).mean())

    assert error(whole) < 0.7 * error(np.rint(weights / scales))


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_the_nearest():
    weights = np.random.default_rng(2).standard_normal((1, 5, 100)).astype(np.float32)
    scales = np.full((1, 1, 1), 0.05, np.float32)
    whole = rounded(weights, scales, np.eye(100, dtype=np.float32)[None])
    np.testing.assert_array_equal(whole, np.rint(weights / scales))


def test_inputs_that_are_always_zero_do_no_harm():
    weights = np.ones((2, 3, 4), np.float32)
    whole = rounded(weights, np.full((1, 1, 1), 0.5, np.float32), np.zeros((2, 4, 4), np.float32))
    assert (whole == 2).all()


def test_layers_and_their_weights_as_matrices(tmp_path):
    model = onnx.load(convolutions(tmp_path))
    weights = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    layers = {one.name: one for one in layers_of(model)}
    shapes = {name: one.matrices(weights[one.weight]).shape for name, one in layers.items()}
    assert shapes == {"first": (1, 16, 27), "depthwise": (16, 1, 9), "last": (1, 16, 16), "gemm": (1, 5, 16)}
    for layer in layers.values():
        weight = weights[layer.weight]
        np.testing.assert_array_equal(layer.stored(layer.matrices(weight), weight.shape), weight)
    (product, _) = layers_of(_named(onnx.load(two_layers(tmp_path))))
    weight = np.arange(6.0).reshape(2, 3)
    assert product.matrices(weight)[0].tolist() == [[0, 3], [1, 4], [2, 5]]
    np.testing.assert_array_equal(product.stored(product.matrices(weight), weight.shape), weight)


def test_moments_are_those_of_what_the_convolution_multiplies(tmp_path):
    """A layer's answers have the mean and variance that its inputs' moments foretell."""
    model = onnx.load(convolutions(tmp_path))
    weights = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    (layer,) = (one for one in layers_of(model) if one.name == "first")
    random = np.random.default_rng(4)
    x = (random.standard_normal((400, 3, 12, 12)) + 1).astype(np.float32)
    x[:, :, :, 1:] += x[:, :, :, :-1]
    found = moments_of([layer], [{"x": x[start : start + 8]} for start in range(0, 400, 8)])["first"]
    matrix = layer.matrices(weights["w0"])[0]
    single = onnx.helper.make_graph(
        [model.graph.node[0]], "g", list(model.graph.input), [onnx.ValueInfoProto(name="c0")], model.graph.initializer
    )
    answers = _run(onnx.helper.make_model(single, opset_imports=model.opset_import, ir_version=8), x)
    answers -= weights["b0"][:, None, None]
    np.testing.assert_allclose(matrix @ found.mean[0], answers.mean((0, 2, 3)), atol=0.05)
    variances = np.einsum("oi,ij,oj->o", matrix, found.covariance[0], matrix)
    np.testing.assert_allclose(variances, answers.var((0, 2, 3)), rtol=0.1)


def _named(model):
    for place, node in enumerate(model.graph.node):
        node.name = f"node_{place}"
    return model


def _run(model, x):
    import onnxruntime

    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]
