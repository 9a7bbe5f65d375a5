"""The driver's calls on a real GPU: memory there and back, streams, graphs, and what is free afterwards."""

import numpy as np
import pytest

from headrace_backends.base import LoadError
from headrace_backends.tensorrt.cuda import CudaDriver


@pytest.fixture
def device():
    opened = CudaDriver().open(0)
    yield opened
    opened.close()


def test_gpus_are_told():
    gpus = CudaDriver().gpus()
    assert all(gpu.name and gpu.capability >= (5, 0) and gpu.total_bytes > 1 << 28 for gpu in gpus)
    with pytest.raises(LoadError, match="is not here; the driver sees gpu:0"):
        CudaDriver().open(len(gpus))


def test_memory_goes_there_and_back(device):
    nbytes = 1 << 20
    stream = device.make_stream()
    there, pinned, back = device.allocate(nbytes), device.allocate_pinned(nbytes), device.allocate_pinned(nbytes)
    pinned.data[:] = np.arange(nbytes) % 251
    device.copy_in(there, pinned, nbytes, stream)
    device.copy_out(back, there, nbytes, stream)
    device.wait(stream)
    np.testing.assert_array_equal(back.data, pinned.data)
    device.free(there)
    for one in (pinned, back):
        device.free_pinned(one)
    device.end_stream(stream)


def test_a_graph_repeats_copies(device):
    stream = device.make_stream()
    there, pinned, back = device.allocate(512), device.allocate_pinned(512), device.allocate_pinned(512)
    device.begin_capture(stream)
    device.copy_in(there, pinned, 512, stream)
    device.copy_out(back, there, 512, stream)
    graph = device.end_capture(stream)
    for value in (1, 2, 3):
        pinned.data[:] = value
        device.launch(graph, stream)
        device.wait(stream)
        assert (back.data == value).all()
    device.end_graph(graph)
    device.free(there)
    for one in (pinned, back):
        device.free_pinned(one)
    device.end_stream(stream)


def test_too_much_memory_is_a_memory_error_and_nothing_is_kept(device):
    free, total = device.memory()
    with pytest.raises(MemoryError, match="the GPU is out of memory"):
        device.allocate(total * 2)
    address = device.allocate(free // 4)
    assert device.memory()[0] < free
    device.free(address)
