"""The scan of a model's layers, and what is made of it."""

import math

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from unit.onnx_nets import convolutions, examples_of, signature_of

from headrace_backends.optimize.findings import LayerSensitivity
from headrace_backends.optimize.sensitivity import errors_by_layer, neighbours, ranked, relative_error, scan


def task_of(path, folder, count=24):
    return {
        "source": path,
        "folder": folder,
        "signature": signature_of(path),
        "examples": examples_of(path, count),
        "options": {"samples": 24},
    }


def fragile(folder):
    """The convolutions with one weight of the depthwise layer far beyond the others, for a scale of all channels."""
    path = convolutions(folder)
    model = onnx.load(path)
    (weight,) = (one for one in model.graph.initializer if one.name == "w1")
    values = numpy_helper.to_array(weight).copy()
    values[0] *= 300
    weight.CopyFrom(numpy_helper.from_array(values, "w1"))
    onnx.save(model, path)
    return path


def test_the_layer_that_suffers_comes_first(tmp_path, capfd):
    path = fragile(tmp_path)
    task = task_of(path, tmp_path)
    task["options"] |= {"per_channel": False, "rounding": "nearest"}
    found = scan(task)
    assert found[0].layer == "depthwise"
    assert sorted(one.layer for one in found) == ["depthwise", "first", "gemm", "last"]
    assert [one.error for one in found] == sorted((one.error for one in found), reverse=True)
    macs = {one.layer: one.macs for one in found}
    assert macs == {"first": 6 * 6 * 16 * 27, "depthwise": 6 * 6 * 16 * 9, "last": 6 * 6 * 16 * 16, "gemm": 16 * 5}
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["source.onnx"]


def test_more_layers_than_tries_are_told_in_groups(tmp_path):
    found = scan(task_of(convolutions(tmp_path), tmp_path), most=3)
    assert len(found) == 4
    assert len({one.error for one in found}) == 2


@pytest.mark.parametrize("most", [1, 2, 7, 20, 39])
def test_the_worst_groups_are_halved_as_long_as_there_are_tries(most):
    tried = []

    def error_of(group):
        tried.append(group)
        return 0.5 if "27" in group else 0.01 * len(group) ** 0.5

    layers = [str(number) for number in range(40)]
    errors = errors_by_layer(layers, most, error_of)
    assert sorted(errors, key=int) == layers
    assert len(tried) <= most
    assert max(errors, key=errors.get) == "27" or most < 20
    assert errors["0"] == pytest.approx(0.01) or most < 7
    assert most < 20 or errors["27"] == 0.5


def test_time_that_is_over_while_a_group_is_halved_leaves_its_layers_out():
    answers = iter([0.1, 0.2, None, None])
    errors = errors_by_layer([str(number) for number in range(8)], 4, lambda group: next(answers))
    assert list(errors) == ["0", "1", "2", "3"]


def test_a_scan_without_time_tells_nothing(tmp_path):
    assert scan(task_of(convolutions(tmp_path), tmp_path), seconds=0) == []


def test_the_worst_layers_come_first():
    layers = [LayerSensitivity(name, "Conv", error, 10.0) for name, error in (("a", 0.1), ("b", 0.3), ("c", 0.2))]
    assert ranked(layers) == ["b", "c", "a"]
    assert ranked([]) == []


def test_a_cheap_layer_is_kept_before_a_dear_one_that_is_hardly_worse():
    layers = [LayerSensitivity("dear", "Conv", 0.22, 1000.0), LayerSensitivity("cheap", "Conv", 0.2, 10.0)]
    assert ranked([*layers, LayerSensitivity("other", "Conv", 0.01, 10.0)])[0] == "cheap"
    unknown = [LayerSensitivity(one.layer, "Conv", one.error) for one in layers]
    assert ranked(unknown)[0] == "dear"


def test_neighbours_leave_tries_to_take_groups_apart():
    layers = [str(number) for number in range(10)]
    assert neighbours(layers, 10) == [[one] for one in layers]
    groups = neighbours(layers, 8)
    assert [layer for group in groups for layer in group] == layers
    assert [len(group) for group in groups] == [3, 3, 3, 1]


def test_the_error_is_a_share_of_the_spread():
    right = [{"y": np.array([0.0, 2.0]), "k": np.array([1, 2])}, {"y": np.array([0.0, 2.0]), "k": np.array([1, 2])}]
    near = [{"y": one["y"] + 0.5, "k": one["k"]} for one in right]
    assert relative_error(right, right) == 0
    assert math.isclose(relative_error(right, near), 0.5)
    wrong = [{"y": right[0]["y"], "k": np.array([1, 3])}, right[1]]
    assert relative_error(right, wrong) == 0.25
    assert relative_error(right, [{"y": np.zeros(3), "k": right[0]["k"]}] * 2) == math.inf
    assert relative_error(right, [{"y": np.full(2, np.nan), "k": right[0]["k"]}] * 2) == math.inf
