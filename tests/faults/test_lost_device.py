"""A GPU is lost to a worker: the request fails with the reason, the worker ends and comes back, nobody else notices."""

import pytest
from fake_libcuda import make_libcuda
from running_server import RunningServer
from system.load import Load, fake_model, infer, onnx_model, python_model

LOST = "the GPU is lost to this process: CUDA_ERROR_LAUNCH_FAILED (719)"
ILLEGAL = "CUDA error: an illegal memory access was encountered"
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"

# Models' own code, which knows nothing of what becomes of its process.
STREAMING = """
    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [1]}]
        max_batch_size = 0

        def infer(self, inputs):
            yield {"y": inputs["x"]}
            if inputs["x"][0] < 0:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""
ANSWERING = """
    from headrace_backends.python import Answer


    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, 1]}]
        max_batch_size = 4

        def infer(self, inputs, requests):
            bad = RuntimeError("CUDA error: device-side assert triggered")
            return [Answer(error=bad) if row[0] < 0 else Answer({"y": row[None]}) for row in inputs["x"]]
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The environment of a machine with a driver, which says that its caller has no GPU in use: it cannot tell."""
    folder = make_libcuda(tmp_path_factory.mktemp("driver")).parent
    return {"LD_LIBRARY_PATH": str(folder), "FAKE_CUDA": "cuCtxSynchronize=201"}


@pytest.fixture(scope="module")
def server(tmp_path_factory, driver):
    repository = tmp_path_factory.mktemp("lost")
    fake_model(repository, "on_gpu", "")
    python_model(repository, "streaming", STREAMING)
    python_model(repository, "answering", ANSWERING)
    onnx_model(repository, "adder")
    with RunningServer(repository, env=driver) as running:
        yield running


def ends(server):
    return server.output.count("this worker ends, to be started again")


@pytest.mark.parametrize("faults", [{"fake_device_lost": LOST}, {"fake_fail": ILLEGAL}])
def test_a_worker_that_lost_its_gpu_is_replaced(server, faults):
    before = ends(server)
    with Load(server, "adder", http=1, grpc=1, expected=lambda values, _: [value + 1 for value in values]) as load:
        for _ in range(2):
            failed = infer(server.http, "on_gpu", [1.0], faults)
            assert failed.status == 500
            assert next(iter(faults.values())) in str(failed)
            server.wait_for(lambda: infer(server.http, "on_gpu", [2.0]).status == 200)
        load.wait_answers(5)
    assert not load.failed
    assert ends(server) == before + 2


def test_a_gpu_whose_memory_is_full_is_the_request_s_trouble_only(server):
    before, workers = ends(server), {worker.pid for worker in server.workers()}
    failed = infer(server.http, "on_gpu", [1.0], {"fake_fail": FULL})
    assert (failed.status, FULL in str(failed)) == (500, True)
    assert infer(server.http, "on_gpu", [2.0]).status == 200
    assert ends(server) == before
    assert {worker.pid for worker in server.workers()} == workers


def test_a_client_that_speaks_of_cuda_ends_nothing(server):
    before = ends(server)
    assert infer(server.http, "on_gpu", [1.0], {"fake_input_error": ILLEGAL}).status == 400
    assert infer(server.http, "on_gpu", [2.0]).status == 200
    assert ends(server) == before


def test_a_stream_that_lost_its_gpu_ends_with_the_reason(server):
    before = ends(server)
    status, _, body = server.request("POST", "/v2/models/streaming/generate_stream", {"x": -1.0})
    assert status == 200
    assert ILLEGAL in str(body)
    server.wait_for(lambda: server.post("/v2/models/streaming/generate", {"x": 1.0})[0] == 200)
    assert ends(server) == before + 1


def test_one_of_several_answers_that_lost_the_gpu(server):
    before = ends(server)
    failed = infer(server.http, "answering", [-1.0])
    assert failed.status == 500
    assert "device-side assert" in str(failed)
    server.wait_for(lambda: infer(server.http, "answering", [2.0]).values == [2.0])
    assert ends(server) == before + 1


def test_a_load_that_lost_its_gpu_is_refused_and_its_worker_ends(tmp_path, driver):
    fake_model(tmp_path, "never", f"parameters: {{fake_load_fail: '{ILLEGAL}'}}")
    onnx_model(tmp_path, "adder")
    with RunningServer(tmp_path, env=driver) as running:
        running.wait_for(lambda: ends(running))
        running.wait_for(lambda: ILLEGAL in str(running.post("/v2/repository/index")[1]))
        assert not running.model_ready("never")
        assert infer(running.http, "adder", [1.0]).values == [2.0]
