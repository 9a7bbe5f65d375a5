"""A GPU is lost to a worker: the request fails with the reason, the worker ends and comes back, nobody else notices."""

import pytest
from running_server import RunningServer
from system.load import Load, fake_model, infer, onnx_model

LOST = "the GPU is lost to this process: CUDA_ERROR_LAUNCH_FAILED (719)"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("lost")
    fake_model(repository, "on_gpu", "")
    onnx_model(repository, "adder")
    with RunningServer(repository) as running:
        yield running


def test_a_worker_that_lost_its_gpu_is_replaced(server):
    with Load(server, "adder", http=1, grpc=1, expected=lambda values, _: [value + 1 for value in values]) as load:
        for _ in range(3):
            failed = infer(server.http, "on_gpu", [1.0], {"fake_device_lost": LOST})
            assert failed.status == 500
            assert LOST in str(failed)
            server.wait_for(lambda: infer(server.http, "on_gpu", [2.0]).status == 200)
        load.wait_answers(5)
    assert not load.failed
    assert server.output.count("this worker ends, to be started again") == 3
