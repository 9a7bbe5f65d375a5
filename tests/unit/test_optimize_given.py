"""What callers of ``headrace.optimize`` give: modules, arrays, tensors, and where their metric lies."""

import threading

import numpy as np
import pytest

import headrace
from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import ModelSource
from headrace_backends.fake import FakeBackend
from headrace_backends.optimize import library
from headrace_backends.optimize.accuracy import MetricFailed
from headrace_backends.optimize.calibration import BadCalibration
from headrace_backends.optimize.given import digest_of, examples_of, file_of

TWO = Signature((TensorSpec("a", DataType.FP32, (-1, 2)), TensorSpec("b", DataType.FP32, (-1, 2))), (), 4)
ROWS = np.arange(6, dtype=np.float32).reshape(3, 2)


def test_inputs_are_named_or_in_the_models_order():
    for given in ((ROWS, ROWS + 1), [ROWS, ROWS + 1], {"b": ROWS + 1, "a": ROWS}):
        examples = examples_of(given, {"label": np.arange(3)}, TWO)
        assert examples.inputs[2]["b"].tolist() == [[5, 6]]
        assert int(examples.labels[2]["label"]) == 2


@pytest.mark.parametrize(
    ("given", "labels", "told"),
    [
        (ROWS, {}, r"got 1 example inputs, expected one for each of \['a', 'b'\]"),
        ([ROWS, ROWS, ROWS], {}, "got 3 example inputs"),
        ({"a": ROWS}, {}, "no examples of input 'b'"),
        ((ROWS, ROWS), {"a": np.arange(3)}, r"labels have the names \['a'\], which are inputs' names"),
    ],
)
def test_what_does_not_suit_the_model_is_told(given, labels, told):
    with pytest.raises(BadCalibration, match=told):
        examples_of(given, labels, TWO)


def test_a_digest_is_that_of_the_content(tmp_path):
    texts = np.array(["a", b"b"], object)
    given = [ROWS, ROWS + 1, (ROWS, ROWS), {"x": ROWS}, {"y": ROWS}, ROWS.reshape(2, 3), ROWS.astype(np.int32), texts]
    digests = [digest_of(one) for one in given]
    assert len(set(digests)) == len(given)
    assert digest_of(ROWS.copy()) == digests[0]
    assert digest_of(texts.copy()) == digests[-1]
    np.save(tmp_path / "c.npy", ROWS)
    assert digest_of(tmp_path / "c.npy") != digest_of(tmp_path / "there is none.npy")


def test_the_fast_form_is_called_as_a_function(tmp_path):
    inputs = (TensorSpec("a", DataType.FP32, ()), TensorSpec("b", DataType.FP32, (-1, 2)))
    source = ModelSource("m", "1", tmp_path, inputs=inputs, outputs=inputs, max_batch_size=0)
    with library.Optimized(FakeBackend.load(source), None, tmp_path, None, library.Place("cpu")) as function:
        one, rows = function(3, b=ROWS.T[:, :2].T)
        assert (one.shape, float(one), rows.tolist()) == ((), 3.0, ROWS[:2].tolist())
        for given, named in (((3, ROWS), {"b": ROWS}), ((3, ROWS, 4), {}), ((3,), {}), ((3, ROWS), {"c": 1})):
            with pytest.raises(TypeError, match=r"expected \['a', 'b'\]"):
                function(*given, **named)


@pytest.mark.parametrize(("device", "threads"), [("cpu", 2), ("gpu:0", 1)])
def test_a_gpu_is_used_by_one_thread_whoever_calls(tmp_path, device, threads):
    used = []

    class Watched(FakeBackend):
        def execute(self, inputs, requests):
            used.append(threading.get_ident())
            return super().execute(inputs, requests)

        def close(self):
            used.append(threading.get_ident())

    place = library.Place(device)
    source = ModelSource("m", "1", tmp_path, inputs=TWO.inputs, outputs=TWO.inputs, max_batch_size=0)
    with library.Optimized(place.run(Watched.load, source), None, tmp_path, None, place) as function:
        caller = threading.Thread(target=function, args=(ROWS, ROWS))
        caller.start()
        function(ROWS, ROWS)
        caller.join()
    assert (len(used), len(set(used))) == (3, threads)


def test_a_form_that_was_proved_for_single_rows_is_given_them_singly(tmp_path, monkeypatch):
    tensor = (TensorSpec("x", DataType.FP32, (-1, 2)),)
    source = ModelSource("m", "1", tmp_path, inputs=tensor, outputs=tensor, max_batch_size=1)
    backend, sizes = FakeBackend.load(source), []
    run = backend.execute
    monkeypatch.setattr(backend, "execute", lambda arrays, _: sizes.append(len(arrays["x"])) or run(arrays, ()))
    with library.Optimized(backend, None, tmp_path, None, library.Place("cpu")) as function:
        assert function(ROWS[:, :2]).tolist() == ROWS[:, :2].tolist()
        assert sizes == [1] * len(ROWS)
        assert function(ROWS[:0, :2]).shape == (0, 2)


def test_the_metric_of_a_model_that_is_no_file_lies_in_the_working_directory(tmp_path, monkeypatch):
    asked = []

    class Search:
        def __init__(self, subject, *_):
            asked.append(subject.folder)

        def run(self):
            raise MetricFailed("stopped")

    monkeypatch.setattr(library, "Search", Search)
    monkeypatch.chdir(tmp_path)

    class Model:  # as an onnx.ModelProto
        def SerializeToString(self):  # noqa: N802 - protobuf's name
            return b"model"

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.onnx").write_bytes(b"model")
    for model in (Model(), tmp_path / "models" / "m.onnx"):
        with pytest.raises(MetricFailed, match="stopped"):
            headrace.optimize(model, ROWS, "judge.py:accuracy>=0.9")
    assert asked == [tmp_path, tmp_path / "models"]


def test_a_module_takes_batches_also_where_there_is_one_example_and_stays_in_its_mode(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from headrace_backends.torch import TorchBackend

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = torch.nn.Linear(2, 3), torch.nn.Dropout(0.5)

        def forward(self, x):
            y = self.drop(self.layer(x))
            return {"y": y, "best": y.argmax(-1)}

    net = Net().train()
    net.layer.eval()
    path = file_of(net, torch.randn(1, 2), tmp_path)
    assert (net.training, net.drop.training, net.layer.training) == (True, True, False)
    backend = TorchBackend.load(ModelSource("m", "1", path))
    assert backend.signature.inputs == (TensorSpec("x", DataType.FP32, (-1, 2)),)
    assert [one.name for one in backend.signature.outputs] == ["y", "best"]
    assert backend.signature.max_batch_size > 1


def test_a_module_is_exported_where_it_is(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    net = torch.nn.Linear(2, 3, device="meta")  # which stands for a GPU: it is another device than the examples'
    program = torch.export.load(file_of(net, torch.ones(4, 2), tmp_path))
    given = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    assert [value.device.type for value in given] == ["meta"] * 3  # two of them are the net's own
