"""CUDA graphs for batches of a few sizes, with a capture that only looks like one: the batches are what is tested."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from headrace.core.model import TensorSpec
from headrace.core.tensor import DataType
from headrace_backends.base import InputError, LoadError
from headrace_backends.specs import FoundTensor

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'headrace[torch]'")
from headrace_backends import torch_graphs, torch_rows  # noqa: E402 only where torch is
from headrace_backends.torch import TorchBackend  # noqa: E402
from headrace_backends.torch_graphs import asked_sizes, captured, sizes_for  # noqa: E402
from headrace_backends.torch_model import TorchModel  # noqa: E402
from headrace_backends.torch_running import Running  # noqa: E402

FP32 = DataType.FP32
FIXED = [FoundTensor(TensorSpec("x", FP32, (-1, 3)))]


class Capture:
    """What a GPU does, as far as it can be seen: a replay reads the memory of the capture and writes to it."""

    def __init__(self, spoil=0.0):
        self.rows = []
        self.replayed = []
        self.spoil = spoil

    def __call__(self, run):
        outputs = run()
        size = len(outputs[0])
        self.rows.append(size)

        def replay():
            self.replayed.append(size)
            for held, value in zip(outputs, run(), strict=True):
                held.copy_(value + self.spoil if value.is_floating_point() else value)

        return replay, outputs


def double(tensors):
    return [tensors[0] * 2, tensors[0].sum(1) > 0, tensors[0].to(torch.int64)]


def test_a_batch_runs_in_the_smallest_graph_that_it_fits_into():
    capture = Capture()
    graphs = captured(double, [torch.ones(8, 3)], (1, 4, 8), capture)
    assert capture.rows == [8, 4, 1]  # the largest first
    capture.replayed.clear()
    for rows in (1, 3, 4, 5, 8, 2):
        batch = torch.randn(rows, 3)
        for answer, right in zip(graphs([batch]), double([batch]), strict=True):
            assert torch.equal(answer, right)
    assert capture.replayed == [1, 4, 4, 8, 8, 4]
    with pytest.raises(ValueError, match="a batch has 9 rows, and the largest that was captured has 8"):
        graphs([torch.ones(9, 3)])


def test_the_layout_of_images_is_kept():
    images = torch.ones(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    seen = []

    def run(tensors):
        seen.append(tensors[0].is_contiguous(memory_format=torch.channels_last))
        return [tensors[0] + 1]

    captured(run, [images], (2, 4), Capture())
    assert all(seen)


def test_a_graph_that_answers_otherwise_is_refused():
    with pytest.raises(LoadError, match="the CUDA graph for 8 rows answers otherwise than the module"):
        captured(double, [torch.ones(8, 3)], (1, 8), Capture(spoil=0.5))


def test_answers_that_are_no_numbers():
    def logarithm(tensors):
        return [tensors[0].log(), tensors[0].double() / 0]

    inputs = [torch.linspace(-1, 1, 24).reshape(8, 3)]
    answers = captured(logarithm, inputs, (8,), Capture())(inputs)
    assert answers[0].isnan().any()
    with pytest.raises(LoadError, match="answers otherwise than the module"):
        captured(logarithm, inputs, (8,), Capture(spoil=0.5))


def test_captures_share_a_stream_and_with_it_the_memory_of_their_pool(monkeypatch):
    streams = []

    class Stream:
        def __init__(self, _):
            streams.append(self)

        def wait_stream(self, _):
            pass

    recorded = []

    def graph(_, *, pool, stream, capture_error_mode):
        recorded.append((pool, stream, capture_error_mode))
        return nullcontext()

    for name, stand_in in (
        ("graph_pool_handle", lambda: "pool"),
        ("Stream", Stream),
        ("current_stream", lambda _: Stream("current")),
        ("device", lambda _: nullcontext()),
        ("stream", lambda _: nullcontext()),
        ("CUDAGraph", lambda: SimpleNamespace(replay=lambda: None)),
        ("graph", graph),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    captured(double, [torch.ones(8, 3)], (1, 4, 8), torch_graphs.cuda_capture(torch.device("cuda", 1)))
    assert recorded == [("pool", streams[0], "thread_local")] * 3


def test_what_cannot_be_captured():
    def fails(_):
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(LoadError, match="it cannot be captured as a CUDA graph: operation not permitted"):
        captured(double, [torch.ones(8, 3)], (8,), fails)

    class Recording:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def broken_off(_):
        with Recording():
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with pytest.raises(LoadError, match="as a CUDA graph: CUDA error: operation not permitted"):
        captured(double, [torch.ones(8, 3)], (8,), broken_off)
    with pytest.raises(LoadError, match=r"result 0 has the shape \[3\] for 8 rows"):
        captured(lambda tensors: [tensors[0].sum(0)], [torch.ones(8, 3)], (8,), Capture())


@pytest.mark.parametrize(
    ("asked", "most", "sizes"),
    [
        ((), 32, [1, 2, 4, 8, 16, 32]),
        ((), 24, [1, 2, 4, 8, 16, 24]),
        ((), 1, [1]),
        ((4,), 32, [4, 32]),
        ((2, 8), 8, [2, 8]),
    ],
)
def test_sizes(asked, most, sizes):
    assert sizes_for(asked, most, FIXED) == sizes


@pytest.mark.parametrize(
    ("asked", "most", "shape", "wrong"),
    [
        ((), 0, (-1, 3), "needs batches"),
        ((), 8, (-1, -1), r"sizes that are fixed but for the rows of batches: 'x' has \[-1, -1\]"),
        ((4, 16), 8, (-1, 3), "goes to 16 rows, and batches have at most 8"),
        (tuple(range(1, 70)), 100, (-1, 3), "has 70 sizes with max_batch_size, expected 64"),
    ],
)
def test_sizes_that_cannot_be(asked, most, shape, wrong):
    with pytest.raises(LoadError, match=wrong):
        sizes_for(asked, most, [FoundTensor(TensorSpec("x", FP32, shape))])


def test_parameters():
    assert asked_sizes({}, "cpu") is None
    assert asked_sizes({"cuda_graphs": "false"}, "cpu") is None
    assert asked_sizes({"cuda_graphs": True}, "cuda") == ()
    assert asked_sizes({"cuda_graphs": "true", "graph_batch_sizes": "1, 8,32"}, "cuda") == (1, 8, 32)
    assert asked_sizes({"cuda_graphs": True, "graph_batch_sizes": 8}, "cuda") == (8,)
    for given, wrong in (
        ({"graph_batch_sizes": "8"}, "graph_batch_sizes is set and parameters.cuda_graphs is not"),
        ({"cuda_graphs": True, "compile": True}, "compile_mode: reduce-overhead"),
        ({"cuda_graphs": True, "graph_batch_sizes": "8, 1"}, "expected rising batch sizes"),
        ({"cuda_graphs": True, "graph_batch_sizes": "0, 1"}, "expected rising batch sizes"),
        ({"cuda_graphs": True, "graph_batch_sizes": "a few"}, "expected rising batch sizes"),
    ):
        with pytest.raises(LoadError, match=wrong):
            asked_sizes(given, "cuda")
    with pytest.raises(LoadError, match="cuda_graphs is for GPUs, and the device is cpu"):
        asked_sizes({"cuda_graphs": True}, "cpu")


def backend_of(module, running=None, most=8):
    outputs = [FoundTensor(TensorSpec("y", FP32, (-1, 3)))]
    model = TorchModel(module, lambda module, tensors: [module(tensors[0])], FIXED, outputs)
    return model, TorchBackend(torch.device("cpu"), model, most, running or Running())


@pytest.mark.parametrize("running", [None, Running(autocast=torch.bfloat16)], ids=["plain", "autocast"])
def test_a_backend_answers_with_graphs_as_without(running):
    torch.manual_seed(0)
    model, backend = backend_of(torch.nn.Linear(3, 3), running)
    batches = [np.random.default_rng(rows).standard_normal((rows, 3), dtype=np.float32) for rows in (1, 3, 8, 2)]
    right = [backend.execute({"x": batch}, ())["y"].copy() for batch in batches]
    backend._capture(model, (2,), Capture())
    assert backend.notes() == ["CUDA graphs for batches of 2, 8 rows"]
    for batch, wanted in zip(batches, right, strict=True):
        np.testing.assert_allclose(backend.execute({"x": batch}, ())["y"], wanted, rtol=1e-2, atol=1e-2)
    with pytest.raises(InputError, match="the largest that was captured has 8"):
        backend.execute({"x": np.zeros((9, 3), np.float32)}, ())
    backend.close()


def test_filling_up_and_cutting():
    given = [torch.tensor([[1.0], [2.0]]), torch.tensor([3, 4])]
    first, second = torch_rows.filled(given, 4)
    assert first.tolist() == [[1], [2], [2], [2]]
    assert second.tolist() == [3, 4, 4, 4]
    assert torch_rows.filled(given, 2)[0] is given[0]
    assert torch_rows.cut([first, "no tensor", torch.tensor(5)], 2)[0].tolist() == [[1], [2]]
    seen = []

    def call(_, tensors):
        seen.append(len(tensors[0]))
        return [tensors[0] * 2]

    assert torch_rows.at_least(1, call) is call
    filling = torch_rows.at_least(3, call)
    assert [filling(None, [torch.ones(rows, 1)])[0].shape for rows in (0, 1, 3, 5)] == [(0, 1), (1, 1), (3, 1), (5, 1)]
    assert seen == [0, 3, 3, 5]


def test_the_names_are_parameters_of_the_backend():
    from headrace_backends import torch as backend

    assert set(torch_graphs.NAMES) <= set(backend._PARAMETERS)
