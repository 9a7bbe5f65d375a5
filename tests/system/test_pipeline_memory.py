"""Large tensors between the steps of an ensemble: right under load, whoever dies, and given back."""

import asyncio

import numpy as np
import psutil
import pytest
import tritonclient.http.aio as tritonhttp
from onnx import TensorProto, helper
from running_server import RunningServer

WIDTH = 60_000  # 240 kB a row

MAKE = f"""
import numpy as np

class Model:
    inputs = [{{"name": "seed", "datatype": "FP32", "shape": [-1, 1]}}]
    outputs = [{{"name": "wide", "datatype": "FP32", "shape": [-1, {WIDTH}]}}]
    max_batch_size = 4

    def infer(self, inputs):
        return {{"wide": inputs["seed"] + np.arange({WIDTH}, dtype=np.float32) % 7}}
"""

# Writes to its input: that must be nobody else's.
SPOIL = f"""
class Model:
    inputs = [{{"name": "x", "datatype": "FP32", "shape": [-1, {WIDTH}]}}]
    outputs = [{{"name": "y", "datatype": "FP32", "shape": [-1, 1]}}]
    max_batch_size = 4

    def infer(self, inputs):
        x = inputs["x"]
        first = x[:, :1].copy()
        x[:] = -1e9
        return {{"y": first}}
"""

STEPS = """
ensemble:
- {model: make, inputs: {seed: seed}, outputs: {wide: wide}}
- {model: spoil, inputs: {x: wide}, outputs: {y: first}}
- {model: relu, inputs: {x: wide}, outputs: {y: same}}
- {model: mean, inputs: {x: same}, outputs: {y: mean}}
outputs:
- {name: first, datatype: FP32, shape: [-1, 1]}
- {name: mean, datatype: FP32, shape: [-1, 1]}
"""


def onnx_model(node, width, *initializers):
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", width])],
        list(initializers),
    )
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("pipeline_memory")
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
    files = {
        "make/1/model.py": MAKE.encode(),
        "spoil/1/model.py": SPOIL.encode(),
        "relu/1/model.onnx": onnx_model(helper.make_node("Relu", ["x"], ["y"]), WIDTH),
        "mean/1/model.onnx": onnx_model(helper.make_node("ReduceMean", ["x", "axis"], ["y"], keepdims=1), 1, axis),
        "whole/config.yaml": STEPS.encode(),
    }
    for place, content in files.items():
        (repository / place).parent.mkdir(parents=True, exist_ok=True)
        (repository / place).write_bytes(content)
    with RunningServer(repository) as running:
        yield running


async def ask(client, seed):
    tensor = tritonhttp.InferInput("seed", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.array([[seed]], dtype=np.float32))
    result = await client.infer("whole", [tensor])
    assert result.as_numpy("first")[0, 0] == seed
    expected = np.mean(seed + np.arange(WIDTH, dtype=np.float32) % 7)
    assert result.as_numpy("mean")[0, 0] == pytest.approx(expected, rel=1e-4)


async def load(server, clients, each):
    async with tritonhttp.InferenceServerClient(server.http, conn_limit=clients) as client:

        async def one(number):
            for turn in range(each):
                await ask(client, float(number * 100 + turn))

        await asyncio.gather(*(one(number) for number in range(clients)))


async def test_every_request_has_its_own_values_under_load(server):
    await load(server, 1, 5)
    await load(server, 12, 15)


async def test_memory_and_descriptors_are_given_back(server):
    processes = [psutil.Process(server.process.pid), *server.workers()]

    async def held():
        for _ in range(3):
            await load(server, 12, 10)
        await asyncio.sleep(0.5)
        return [(one.num_fds(), one.memory_info().rss) for one in processes]

    # Pools grow until they have met the worst that the machine makes of 12 clients; a leak grows with every round.
    before = await held()
    for _ in range(6):
        after = await held()
        if all(
            fds_after <= fds + 8 and rss_after <= rss + 40e6
            for (fds, rss), (fds_after, rss_after) in zip(before, after, strict=True)
        ):
            return
        before = after
    pytest.fail(f"it grew with every round, at last to {after}")


@pytest.mark.parametrize("victim", range(4))
async def test_a_killed_worker_costs_no_answer(server, victim):
    """Whoever lends or borrows when it dies: the requests are run again on what comes back."""
    workers = sorted(server.workers(), key=lambda worker: worker.pid)
    assert len(workers) == 4, "one for each model"
    loading = asyncio.create_task(load(server, 8, 25))
    await asyncio.sleep(0.3)
    workers[victim].kill()
    await asyncio.wait_for(loading, 120)
    await load(server, 4, 5)
