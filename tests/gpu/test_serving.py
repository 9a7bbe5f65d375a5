"""A real server with a model on a real GPU: served, killed, back again, and seen in the metrics."""

import time

import pytest
from running_server import RunningServer
from system.load import Load, infer, onnx_model

from headrace_backends.base import BackendUnavailable
from headrace_backends.tensorrt.library import find_library


@pytest.fixture
def server(tmp_path):
    try:
        find_library()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    config = "backend: tensorrt\nparameters: {cuda_graphs: true, engine_cache: '%s'}\n" % (tmp_path / "cache")
    (tmp_path / "repository").mkdir()
    onnx_model(tmp_path / "repository", "adder", config=config)
    with RunningServer(tmp_path / "repository") as running:
        yield running


def test_killed_workers_lose_nothing(server):
    assert infer(server.http, "adder", [1.0]).values == [2.0]
    with Load(server, "adder", http=2, grpc=1, expected=lambda values, _: [value + 1 for value in values]) as load:
        for _ in range(3):
            load.wait_answers(20)
            for worker in server.workers():
                worker.kill()
            server.wait_for(lambda: server.model_ready("adder"), 120)
        load.wait_answers(20)
    assert not load.failed


def test_the_gpu_is_in_the_metrics(server):
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    ends = time.monotonic() + 60
    while "nv_gpu_memory_used_bytes{" not in server.request("GET", "/metrics")[2].decode():
        assert time.monotonic() < ends
        time.sleep(0.2)
