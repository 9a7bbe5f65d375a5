"""Ensembles with a decoupled step, over HTTP and gRPC."""

import queue

import numpy as np
import pytest
import tritonclient.grpc as tritongrpc
from running_server import RunningServer

COUNT = """
import numpy as np

class Model:
    inputs = [{"name": "n", "datatype": "INT32", "shape": [1]}]
    outputs = [{"name": "i", "datatype": "INT32", "shape": [1]}]

    def infer(self, inputs):
        for i in range(int(inputs["n"][0])):
            if i == 13:
                raise ValueError("thirteen")
            yield {"i": np.array([i], dtype=np.int32)}
"""

SQUARE = """
class Model:
    inputs = [{"name": "x", "datatype": "INT32", "shape": [1]}]
    outputs = [{"name": "y", "datatype": "INT32", "shape": [1]}]

    def infer(self, inputs):
        if inputs["x"][0] == 7 * 7 * 7:
            raise ValueError("seven")
        return {"y": inputs["x"] * inputs["x"]}
"""

STEPS = """
ensemble:
- {model: count, inputs: {n: n}, outputs: {i: i}}
- {model: square, inputs: {x: i}, outputs: {y: square}}
- {model: count, inputs: {n: i}, outputs: {i: below}}
outputs:
- {name: square, datatype: INT32, shape: [1]}
- {name: below, datatype: INT32, shape: [1]}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("streamed_ensembles")
    for name, code in (("count", COUNT), ("square", SQUARE)):
        (repository / name / "1").mkdir(parents=True)
        (repository / name / "1" / "model.py").write_text(code)
    (repository / "pairs").mkdir()
    (repository / "pairs" / "config.yaml").write_text(STEPS)
    with RunningServer(repository) as running:
        yield running


def answers(server, count, wanted=()):
    """What ModelStreamInfer gives up to the final response: pairs of outputs, or an error's text."""
    came = queue.Queue()
    with tritongrpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: came.put((result, error)))
        n = tritongrpc.InferInput("n", [1], "INT32")
        n.set_data_from_numpy(np.array([count], dtype=np.int32))
        outputs = [tritongrpc.InferRequestedOutput(name) for name in wanted] or None
        client.async_stream_infer("pairs", [n], outputs=outputs, enable_empty_final_response=True)
        found = []
        while True:
            result, error = came.get(timeout=60)
            if error is not None:
                found.append(error.message())
            elif result.get_response().parameters["triton_final_response"].bool_param:
                return found
            else:
                names = [output.name for output in result.get_response().outputs]
                found.append({name: int(result.as_numpy(name)[0]) for name in names})


def test_each_response_of_a_step_runs_through_the_steps_behind_it(server):
    expected = [{"square": i * i, "below": below} for i in range(4) for below in range(i)]
    assert answers(server, 4) == expected
    assert answers(server, 0) == []
    assert answers(server, 3, ["below"]) == [{"below": 0}, {"below": 0}, {"below": 1}]


def test_http_streams_the_same(server):
    status, body = server.post("/v2/models/pairs/generate_stream", {"n": 3})
    assert status == 200, body
    events = [line for line in body.decode().splitlines() if line.startswith("data: ")]
    assert len(events) == 3
    assert '"square":4' in events[-1]
    assert '"below":1' in events[-1]


def test_an_error_of_a_step_is_the_last_response(server):
    found = answers(server, 20)
    assert found[-1].endswith("ValueError: thirteen")
    assert found[:-1] == [{"square": i * i, "below": below} for i in range(13) for below in range(i)]


def test_it_is_refused_where_there_is_one_answer(server):
    body = {"inputs": [{"name": "n", "datatype": "INT32", "shape": [1], "data": [1]}]}
    status, answer = server.post("/v2/models/pairs/infer", body)
    assert status == 501
    assert "decoupled" in answer["error"]


def test_its_configuration_and_statistics_tell(server):
    status, config = server.get("/v2/models/pairs/config")
    assert status == 200
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert len(config["ensemble_scheduling"]["step"]) == 3
    before = server.get("/v2/models/pairs/stats")[1]["model_stats"][0]["inference_stats"]["success"]["count"]
    answers(server, 2)
    after = server.get("/v2/models/pairs/stats")[1]["model_stats"][0]["inference_stats"]["success"]["count"]
    assert after == before + 1
