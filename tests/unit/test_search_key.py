"""What a later search may go on with: nothing of other models, budgets, examples and machines."""

import dataclasses

import numpy as np
import pytest

import headrace
from headrace.optimizing import CannotOptimize, OptimizeArguments, job_of
from headrace_backends.optimize import library, search_key
from headrace_backends.optimize.accuracy import Budget
from headrace_backends.optimize.findings import Hardware
from headrace_backends.optimize.form import Technique
from headrace_backends.optimize.goal import Goal
from headrace_backends.optimize.search import SearchFailed
from headrace_backends.optimize.subject import Subject

onnx = pytest.importorskip("onnx", reason="onnx is not installed")


@pytest.fixture
def subject(tmp_path):
    return Subject("m", "1", tmp_path / "m.onnx", "onnxruntime", tmp_path)


def key(subject, goal=None, cpus=2, model="m", examples=("e",)):
    return search_key.search_key(subject, goal or Goal(), cpus, model, examples)


def test_the_time_limit_changes_nothing(subject):
    assert key(subject) == key(subject, Goal(time_limit_s=1.0))


def test_whatever_else_changes_has_another_key(subject, tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text("accuracy = len")
    own = Goal(Budget("judge.py:accuracy", min=0.9))
    keys = [
        key(subject),
        key(subject, cpus=3),
        key(subject, model="n"),
        key(subject, examples=("f",)),
        key(subject, examples=()),
        key(subject, Goal(Budget("cosine", min=0.9))),
        key(subject, Goal(Budget("cosine", min=0.99))),
        key(subject, Goal(Budget("cosine", min=0.9), frozenset({Technique.BF16}))),
        key(subject, Goal(aim="throughput")),
        key(subject, Goal(aim="throughput", p99_ms=20.0)),
        key(subject, own),
    ]
    (tmp_path / "judge.py").write_text("accuracy = max")
    keys.append(key(subject, own))
    (tmp_path / "train.py").write_text("pass")
    keys.append(key(dataclasses.replace(subject, training=tmp_path / "train.py")))
    monkeypatch.setattr(search_key, "hardware", lambda: Hardware("another", 2, ()))
    keys.append(key(subject))
    assert len(set(keys)) == len(keys)


def net(path, value, *, external=""):
    """y = x * value, for [rows, 4]; the weight in a file of its own where that is named."""
    made, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = made.make_graph(
        [made.make_node("Mul", ["x", "w"], ["y"])],
        "net",
        [made.make_tensor_value_info("x", kind, ["n", 4])],
        [made.make_tensor_value_info("y", kind, ["n", 4])],
        [onnx.numpy_helper.from_array(np.full(4, value, np.float32), "w")],
    )
    model = made.make_model(graph, opset_imports=[made.make_opsetid("", 17)], ir_version=8)
    outside = {"save_as_external_data": True, "location": external, "size_threshold": 0} if external else {}
    onnx.save(model, path, **outside)
    return path


def test_weights_in_files_of_their_own_are_part_of_the_model(tmp_path):
    path = net(tmp_path / "m.onnx", 1.0, external="weights.bin")
    before, written = search_key.file_key(path), path.read_bytes()
    (tmp_path / "weights.bin").unlink()  # it would be added to
    net(path, 2.0, external="weights.bin")
    assert path.read_bytes() == written
    assert search_key.file_key(path) != before
    (tmp_path / "m.xml").write_text("<net/>")
    (tmp_path / "m.bin").write_bytes(b"1")
    before = search_key.file_key(tmp_path / "m.xml")
    (tmp_path / "m.bin").write_bytes(b"2")
    assert search_key.file_key(tmp_path / "m.xml") != before


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x3a\xff\xff\xff\xff\x0f"])
def test_a_broken_file_has_a_key_too(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    assert search_key.file_key(tmp_path / "m.onnx")


def test_a_model_file_that_has_changed_begins_from_nothing(tmp_path):
    """The command for a file once went on with the rows and files of whatever had been in its folder."""
    path = net(tmp_path / "m.onnx", 1.0)
    np.savez(tmp_path / "c.npz", x=np.ones((4, 4), np.float32))

    def work(**changes):
        output, calibration = tmp_path / "out", tmp_path / "c.npz"
        given = {"output": output, "calibration": calibration, "budget": Budget("cosine", min=0.9), **changes}
        return job_of(OptimizeArguments(str(path), tmp_path, tmp_path / "plans", **given)).work

    first = work()
    assert work(time_limit_s=5.0) == first
    assert work(budget=Budget("cosine", min=0.99)) != first
    assert work(allow=(Technique.BF16,)) != first
    np.savez(tmp_path / "c.npz", x=np.zeros((4, 4), np.float32))
    second = work()
    assert second != first
    net(path, 2.0)
    assert work() not in (first, second)


def test_the_folder_of_the_model_itself_is_no_output(tmp_path):
    path = net(tmp_path / "m.onnx", 1.0)
    with pytest.raises(CannotOptimize, match=r"'m\.onnx' lies: it could be written over"):
        job_of(OptimizeArguments(str(path), tmp_path, tmp_path / "plans", output=tmp_path))


def test_a_function_is_not_made_of_the_model_that_was_there_before(tmp_path, monkeypatch):
    folders = []

    class Stopped:
        def __init__(self, *arguments):
            folders.append(arguments[3].folder)

        def run(self):
            raise SearchFailed("stopped")

    monkeypatch.setattr(library, "Search", Stopped)
    rows = np.ones((4, 4), np.float32)
    for value, examples in ((1.0, rows), (1.0, rows), (2.0, rows), (2.0, rows * 2)):
        with pytest.raises(SearchFailed, match="stopped"):
            headrace.optimize(onnx.load(net(tmp_path / "m.onnx", value)), examples, folder=tmp_path / "out")
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3
