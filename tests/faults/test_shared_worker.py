"""A shared worker with heavy models: its death while they wait for each other's turns."""

import concurrent.futures
import json
import urllib.request

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from running_server import RunningServer

SIZE = 1024


@pytest.fixture
def server(tmp_path):
    """Two models whose rows take long enough for turns, in one process."""
    weights = numpy_helper.from_array(np.eye(SIZE, dtype=np.float32), "w")
    nodes = [helper.make_node("MatMul", [f"h{i}", "w"], [f"h{i + 1}"]) for i in range(40)]
    graph = helper.make_graph(
        nodes,
        "heavy",
        [helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["batch", SIZE])],
        [helper.make_tensor_value_info("h40", TensorProto.FLOAT, ["batch", SIZE])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    for name in ("one", "two"):
        folder = tmp_path / name / "1"
        folder.mkdir(parents=True)
        onnx.save(model, folder / "model.onnx")
    with RunningServer(tmp_path, "--max-own-workers", "0", "--max-shared-workers", "1") as running:
        yield running


def ask(server: RunningServer, name: str) -> int:
    tensor = {"name": "h0", "shape": [8, SIZE], "datatype": "FP32", "data": [1.0] * (8 * SIZE)}
    request = urllib.request.Request(
        f"http://{server.http}/v2/models/{name}/infer", json.dumps({"inputs": [tensor]}).encode()
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.status


def test_its_death_fails_no_request_of_either_model(server):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            asked = [pool.submit(ask, server, name) for name in ("one", "two") * 12]
            concurrent.futures.wait(asked[:4])
            server.kill_workers()
            assert [one.result(60) for one in asked] == [200] * 24
    assert server.wait_for(lambda: server.model_ready("one") and server.model_ready("two"))
