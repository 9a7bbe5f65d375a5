"""CUDA shared memory on a real GPU: this process lends its memory, the server computes from it and into it."""

from contextlib import closing
from http.client import HTTPConnection

import numpy as np
import pytest
from loadtests.gpu.lent import Lent, place, register
from running_server import RunningServer
from system.load import python_model

X = np.arange(1 << 20, dtype=np.float32).reshape(1, -1)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("repository")
    python_model(repository, "echo")
    with RunningServer(repository, "--allow-client-shm") as running:
        yield running


@pytest.fixture
def lent():
    with Lent(2 * X.nbytes) as memory:
        yield memory


@pytest.fixture
def connection(server):
    with closing(HTTPConnection(server.http)) as made:
        yield made


def infer(server, region, byte_size, offset):
    """The model's answer to what lies at the region's beginning goes to ``offset``."""
    x = {"name": "x", "shape": list(X.shape), "datatype": "FP32", "parameters": place(region, X.nbytes)}
    request = {"inputs": [x], "outputs": [{"name": "y", "parameters": place(region, byte_size, offset)}]}
    return server.post("/v2/models/echo/infer", request)


def test_tensors_go_through_the_memory_of_a_gpu(server, connection, lent):
    assert "cuda_shared_memory" in server.get("/v2")[1]["extensions"]
    assert register(connection, "r", lent.handle, lent.nbytes) == (200, None)
    assert server.get("/v2/cudasharedmemory/status")[1] == [{"name": "r", "device_id": 0, "byte_size": lent.nbytes}]
    for factor in (1, 2, 3):
        lent.write((X * factor).tobytes())
        status, answer = infer(server, "r", X.nbytes, X.nbytes)
        assert status == 200, answer
        received = np.frombuffer(lent.read(), np.float32).reshape(2, -1)
        np.testing.assert_array_equal(received[1:], X * factor)
    assert infer(server, "r", X.nbytes, X.nbytes + 4)[0] == 400
    assert server.post("/v2/cudasharedmemory/unregister")[0] == 200
    assert infer(server, "r", X.nbytes, X.nbytes)[0] == 404


def test_what_is_no_memory_is_refused_and_the_server_goes_on(server, connection, lent):
    for handle, device in ((bytes(64), 0), (lent.handle, 63)):
        status, answer = register(connection, "r", handle, lent.nbytes, device)
        assert status == 400, answer
        assert "cannot register shared memory region 'r': " in answer["error"]
    far_bytes = lent.nbytes * 64
    status, answer = register(connection, "r", lent.handle, far_bytes)
    if status == 200:  # this driver does not tell how much is lent: then it refuses the copy
        status, answer = infer(server, "r", X.nbytes, far_bytes - X.nbytes)
        assert server.post("/v2/cudasharedmemory/unregister")[0] == 200
    assert status == 400, answer
    assert register(connection, "r", lent.handle, lent.nbytes)[0] == 200
    lent.write(X.tobytes())
    assert infer(server, "r", X.nbytes, X.nbytes)[0] == 200
    assert server.post("/v2/cudasharedmemory/unregister")[0] == 200


def test_memory_that_is_freed_while_it_is_registered_does_not_touch_the_server(server, connection, lent):
    with Lent(2 * X.nbytes) as freed:
        assert register(connection, "freed", freed.handle, freed.nbytes)[0] == 200
    infer(server, "freed", X.nbytes, X.nbytes)  # what comes of it is the driver's to say
    server.post("/v2/cudasharedmemory/unregister")
    assert server.model_ready("echo")
    assert register(connection, "r", lent.handle, lent.nbytes)[0] == 200
    lent.write(X.tobytes())
    assert infer(server, "r", X.nbytes, X.nbytes)[0] == 200
    np.testing.assert_array_equal(np.frombuffer(lent.read(), np.float32).reshape(2, -1)[1:], X)
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
