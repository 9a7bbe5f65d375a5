"""CUDA shared memory on a real GPU: this process lends its memory, the server computes from it and into it."""

import base64
import ctypes

import numpy as np
import pytest
from running_server import RunningServer
from system.load import python_model

from headrace_backends.tensorrt.cuda import CudaDriver, IpcHandle

X = np.arange(1 << 20, dtype=np.float32).reshape(1, -1)


class Lent:
    """Memory of the first GPU that is this process's; closed by ``close``."""

    def __init__(self, nbytes):
        self.driver = CudaDriver()
        self.device = self.driver.open(0)
        self.address = self.device.allocate(nbytes)
        self.stream = self.device.make_stream()
        self.host = self.device.allocate_pinned(nbytes)
        self.nbytes = nbytes

    @property
    def handle(self):
        found = IpcHandle()
        self.driver.call("cuIpcGetMemHandle", ctypes.byref(found), self.address)
        return bytes(memoryview(found).cast("B"))

    def write(self, data):
        self.host.data[: len(data)] = np.frombuffer(data, np.uint8)
        self.device.copy_in(self.address, self.host, self.nbytes, self.stream)
        self.device.wait(self.stream)

    def read(self):
        self.device.copy_out(self.host, self.address, self.nbytes, self.stream)
        self.device.wait(self.stream)
        return self.host.data.tobytes()

    def close(self):
        self.device.end_stream(self.stream)
        self.device.free_pinned(self.host)
        self.device.free(self.address)
        self.device.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("repository")
    python_model(repository, "echo")
    with RunningServer(repository, "--allow-client-shm") as running:
        yield running


@pytest.fixture
def lent():
    made = Lent(2 * X.nbytes)
    yield made
    made.close()


def register(server, name, handle, byte_size, device=0):
    body = {"raw_handle": {"b64": base64.b64encode(handle).decode()}, "device_id": device, "byte_size": byte_size}
    return server.post(f"/v2/cudasharedmemory/region/{name}/register", body)


def infer(server, region, byte_size, offset):
    """The model's answer to what lies at the region's beginning goes to ``offset``."""
    at_start = {"shared_memory_region": region, "shared_memory_byte_size": X.nbytes}
    behind = {"shared_memory_region": region, "shared_memory_byte_size": byte_size, "shared_memory_offset": offset}
    request = {
        "inputs": [{"name": "x", "shape": list(X.shape), "datatype": "FP32", "parameters": at_start}],
        "outputs": [{"name": "y", "parameters": behind}],
    }
    return server.post("/v2/models/echo/infer", request)


def test_tensors_go_through_the_memory_of_a_gpu(server, lent):
    assert "cuda_shared_memory" in server.get("/v2")[1]["extensions"]
    assert register(server, "r", lent.handle, lent.nbytes) == (200, b"")
    assert server.get("/v2/cudasharedmemory/status")[1] == [{"name": "r", "device_id": 0, "byte_size": lent.nbytes}]
    for factor in (1, 2, 3):
        lent.write((X * factor).tobytes() + bytes(X.nbytes))
        status, answer = infer(server, "r", X.nbytes, X.nbytes)
        assert status == 200, answer
        received = np.frombuffer(lent.read(), np.float32).reshape(2, -1)
        np.testing.assert_array_equal(received[1:], X * factor)
    assert infer(server, "r", X.nbytes, X.nbytes + 4)[0] == 400
    assert server.post("/v2/cudasharedmemory/unregister")[0] == 200
    assert infer(server, "r", X.nbytes, X.nbytes)[0] == 404


def test_what_is_no_memory_is_refused_and_the_server_goes_on(server, lent):
    for handle, byte_size, device in (
        (bytes(64), 64, 0),
        (lent.handle, lent.nbytes * 64, 0),
        (lent.handle, lent.nbytes, 63),
    ):
        status, answer = register(server, "r", handle, byte_size, device)
        assert status == 400, answer
        assert "cannot register shared memory region 'r': " in answer["error"]
    assert register(server, "r", lent.handle, lent.nbytes)[0] == 200
    lent.write(X.tobytes() + bytes(X.nbytes))
    assert infer(server, "r", X.nbytes, X.nbytes)[0] == 200
    assert server.post("/v2/cudasharedmemory/unregister")[0] == 200


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tritonclient_shares_its_memory(server, protocol):
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed, which tritonclient needs")
    client_module = pytest.importorskip(f"tritonclient.{protocol}", reason="tritonclient is not installed")
    from tritonclient.utils import cuda_shared_memory as cudashm

    region = cudashm.create_shared_memory_region("triton", 2 * X.nbytes, 0)
    try:
        cudashm.set_shared_memory_region(region, [X, np.zeros_like(X)])
        with client_module.InferenceServerClient(getattr(server, protocol)) as client:
            client.register_cuda_shared_memory("triton", cudashm.get_raw_handle(region), 0, 2 * X.nbytes)
            x = client_module.InferInput("x", list(X.shape), "FP32").set_shared_memory("triton", X.nbytes)
            y = client_module.InferRequestedOutput("y")
            y.set_shared_memory("triton", X.nbytes, offset=X.nbytes)
            client.infer("echo", [x], outputs=[y])
            received = cudashm.get_contents_as_numpy(region, np.float32, [2, X.size])
            client.unregister_cuda_shared_memory("triton")
        np.testing.assert_array_equal(received[1:], X)
    finally:
        cudashm.destroy_shared_memory_region(region)
