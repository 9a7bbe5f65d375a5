"""What a search must see through: a model that answers anew each time, a form that is right in small batches only."""

import numpy as np
import pytest

from headrace_backends.optimize import probes
from headrace_backends.optimize.contest import Contest
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.findings import Fate, Hardware, Row
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.listener import SilentListener
from headrace_backends.optimize.search import Search
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.trial import TrialFailed
from headrace_backends.optimize.workshop import Artifact, Workshop

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
EXAMPLES = Examples(
    tuple({"x": np.full((1, 4), place + 1, np.float32)} for place in range(12)), tuple({} for _ in range(12)), "test"
)


def net(path, *nodes, weights=(), opset=17):
    """A file with x and y, FP32 [rows, 4] each."""
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in weights]
    graph = onnx.helper.make_graph(
        list(nodes), "net", [value("x", kind, ["n", 4])], [value("y", kind, ["n", 4])], tensors
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def plain(path):
    return net(path, onnx.helper.make_node("Identity", ["x"], ["y"]))


def wrong_above(path, rows):
    """Right, but that something is added in batches of more rows."""
    node = onnx.helper.make_node
    nodes = [
        node("Shape", ["x"], ["count"], start=0, end=1),
        node("Greater", ["count", "rows"], ["large"]),
        node("Cast", ["large"], ["one"], to=onnx.TensorProto.FLOAT),
        node("Add", ["x", "one"], ["y"]),
    ]
    return net(path, *nodes, weights=[("rows", np.array([rows]))])


def loud_rows_matter_to_all(path):
    """Right, but that something is added to every row where one has a value beyond those of the examples."""
    node = onnx.helper.make_node
    nodes = [
        node("ReduceMax", ["x"], ["most"], keepdims=1),
        node("Greater", ["most", "limit"], ["loud"]),
        node("Cast", ["loud"], ["one"], to=onnx.TensorProto.FLOAT),
        node("Add", ["x", "one"], ["y"]),
    ]
    return net(path, *nodes, weights=[("limit", np.float32(20))])


def shown(path, *before):
    """x [rows, 4] where the mask k is 1; what comes ``before`` makes a mask of k that is as good for most."""
    node, kinds, value = onnx.helper.make_node, onnx.TensorProto, onnx.helper.make_tensor_value_info
    nodes = [
        *before,
        node("Cast", ["mask" if before else "k"], ["shares"], to=kinds.FLOAT),
        node("Mul", ["x", "shares"], ["y"]),
    ]
    inputs = [value("x", kinds.FLOAT, ["n", 4]), value("k", kinds.INT64, ["n", 4])]
    weights = [
        onnx.numpy_helper.from_array(np.array(array), name)
        for name, array in {"places": [1, 2, 3, 4], "axes": [1]}.items()
    ]
    graph = onnx.helper.make_graph(nodes, "net", inputs, [value("y", kinds.FLOAT, ["n", 4])], weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def search_of(path, tmp_path, examples):
    subject = Subject("net", "1", path, "onnxruntime", tmp_path)
    workshop = Workshop(tmp_path / "work", subject, 1)
    return Search(subject, Goal(), lambda _: examples, workshop, SilentListener(), 1, Hardware("cpu", 1, ()), {})


def contest_of(path, tmp_path):
    subject = Subject("net", "1", path, "onnxruntime", tmp_path)
    return Contest(subject, Goal(), Workshop(tmp_path / "work", subject, 1), 1, None)


def test_a_model_that_answers_anew_each_time_is_told_as_that(tmp_path):
    node = onnx.helper.make_node
    path = net(tmp_path / "m.onnx", node("RandomNormalLike", ["x"], ["noise"]), node("Add", ["x", "noise"], ["y"]))
    with contest_of(path, tmp_path) as contest:
        contest.load_reference()
        with pytest.raises(TrialFailed, match=r"answers the same inputs differently .* dropout"):
            contest.measure_reference(*EXAMPLES.halves(), [], 0.0)


@pytest.mark.parametrize(("rows", "fate"), [(31, Fate.REFUSED), (8, Fate.REFUSED), (32, Fate.KEPT)])
def test_a_form_that_is_wrong_in_large_batches_is_refused(tmp_path, monkeypatch, rows, fate):
    form = Form("onnxruntime", parameters={"graph_optimization_level": "basic"})
    bad = wrong_above(tmp_path / "bad.onnx", rows)
    with contest_of(plain(tmp_path / "m.onnx"), tmp_path) as contest:
        contest.load_reference()
        contest.measure_reference(*EXAMPLES.halves(), [], 0.0)
        monkeypatch.setattr(contest.workshop, "make", lambda *_: Artifact(bad, (), 0.0))
        assert contest.try_form(form, 60.0).errors.faithful  # in the small batches of the first look
        row = contest.decide(Row(form, Fate.KEPT))
    assert row.fate is fate, row.reason
    assert row.held_back.examples == 6


def test_a_form_that_cannot_merge_rows_answers_each_alone_and_is_still_one_that_has_rows(tmp_path, monkeypatch):
    form = Form("onnxruntime", parameters={"graph_optimization_level": "basic"})
    mixing = loud_rows_matter_to_all(tmp_path / "mixing.onnx")
    with contest_of(plain(tmp_path / "m.onnx"), tmp_path) as contest:
        contest.load_reference()
        contest.measure_reference(*EXAMPLES.halves(), [], 0.0)
        monkeypatch.setattr(contest.workshop, "make", lambda *_: Artifact(mixing, (), 0.0))
        row = contest.try_form(form, 60.0)
    assert (row.form.max_batch_size, row.form.name) == (1, form.name)
    assert row.errors.faithful
    assert any("not merged into batches" in note for note in row.notes)


def test_forms_that_take_masks_for_lengths_or_keep_32_bits_are_refused(tmp_path, monkeypatch):
    node, whole = onnx.helper.make_node, onnx.TensorProto
    length = [node("ReduceSum", ["k", "axes"], ["length"]), node("LessOrEqual", ["places", "length"], ["mask"])]
    narrow = [node("Cast", ["k"], ["short"], to=whole.INT32), node("Cast", ["short"], ["mask"], to=whole.INT64)]
    unhidden = tuple({"x": np.full((1, 4), place + 1, np.float32), "k": np.ones((1, 4), int)} for place in range(4))
    monkeypatch.setattr(probes, "NARROW", ("onnxruntime",))
    with contest_of(shown(tmp_path / "m.onnx"), tmp_path) as contest:
        contest.load_reference()
        contest.measure_reference(*Examples(unhidden, ({},) * 4, "test").halves(), [], 0.0)
        for before, what in ((length, "gaps in masks"), (narrow, "numbers beyond 32 bits")):
            made = Artifact(shown(tmp_path / f"{what}.onnx", *before), (), 0.0)
            monkeypatch.setattr(contest.workshop, "make", lambda *_, made=made: made)
            row = contest.try_form(Form("onnxruntime", parameters={"graph_optimization_level": "basic"}), 60.0)
            assert row.errors.faithful, row.reason
            assert row.fate is Fate.REFUSED
            assert f"requests with {what}, which no example has" in row.reason


def test_answers_that_tell_nothing_are_no_proof(tmp_path):
    node = onnx.helper.make_node
    path = net(tmp_path / "m.onnx", node("Neg", ["x"], ["below"]), node("Sqrt", ["below"], ["y"]))
    with contest_of(path, tmp_path) as contest:
        contest.load_reference()
        with pytest.raises(TrialFailed, match=r"output 'y' is empty, or has no finite number, .* \(test\)"):
            contest.measure_reference(*EXAMPLES.halves(), [], 0.0)


def test_examples_that_the_model_refuses_are_left_out(tmp_path):
    node = onnx.helper.make_node
    table = np.arange(40, dtype=np.float32).reshape(10, 4)
    nodes = [
        node("ReduceMax", ["x", "axes"], ["most"], keepdims=0),
        node("Cast", ["most"], ["place"], to=onnx.TensorProto.INT64),
        node("Gather", ["table", "place"], ["row"]),
        node("Add", ["x", "row"], ["y"]),
    ]
    path = net(tmp_path / "m.onnx", *nodes, weights=[("table", table), ("axes", np.array([1]))], opset=18)
    with contest_of(path, tmp_path) as contest:
        row, told = search_of(path, tmp_path, EXAMPLES)._prepare(contest)
    assert row.held_back.examples == 5
    assert told == "9 (test, without 3 that it refuses); 4 to choose with, 5 held back to decide"
