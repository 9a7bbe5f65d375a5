"""Models on a real GPU: named by its UUID, measured, refused where there is no room, and lost by their own code."""

import pytest
from running_server import RunningServer
from system.load import infer, python_model

from headrace_backends.tensorrt.cuda import CudaDriver

GIB = 1 << 30

# Holds memory of the GPU, and fails on it as it is told.
HOLDER = """
    import torch


    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, 1]}]
        max_batch_size = 4

        def load(self, context):
            self.held = torch.ones(GIB_HELD << 28, device="cuda:0")

        def infer(self, inputs):
            x = torch.from_numpy(inputs["x"].copy()).to("cuda:0")
            if x[0] == -1:
                torch.empty(1 << 50, device="cuda:0")
            if x[0] == -2:
                torch.ones(4, device="cuda:0")[torch.full((1,), 10**6, device="cuda:0")].cpu()
            return {"y": x.cpu().numpy()}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    torch = pytest.importorskip("torch")
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")
    repository = tmp_path_factory.mktemp("repository")
    devices = {"by_uuid": f"gpu:{CudaDriver().gpus()[0].uuid}", "by_number": "gpu:0", "too_large": "gpu:0"}
    for name, device in devices.items():
        held = "6" if name == "too_large" else "1"
        config = f'instances: [{{device: "{device}"}}]\n'
        python_model(repository, name, HOLDER.replace("GIB_HELD", held), config=config)
    flags = ["--gpu-memory-bytes", str(6 * GIB), "--model-control", "explicit"]
    with RunningServer(repository, *flags) as running:
        yield running


def load(server, name):
    status, answer = server.post(f"/v2/repository/models/{name}/load")
    return "" if status == 200 else answer["error"]


def test_what_a_load_takes_is_measured_and_bounded(server):
    assert load(server, "by_uuid") == load(server, "by_number") == ""
    assert infer(server.http, "by_uuid", [1.0]).values == [1.0]
    reason = load(server, "too_large")
    assert "model 'too_large' takes " in reason
    assert "(--gpu-memory-bytes, --gpu-memory-fraction), 'by_" in reason


def test_full_memory_ends_a_request_and_a_failed_kernel_the_worker(server):
    assert load(server, "by_uuid") == ""
    workers = {worker.pid for worker in server.workers()}
    assert "out of memory" in str(infer(server.http, "by_uuid", [-1.0]))
    assert infer(server.http, "by_uuid", [2.0]).values == [2.0]
    assert {worker.pid for worker in server.workers()} == workers
    assert "device-side assert" in str(infer(server.http, "by_uuid", [-2.0]))
    server.wait_for(lambda: infer(server.http, "by_uuid", [3.0]).status == 200, 120)
    assert {worker.pid for worker in server.workers()} != workers
