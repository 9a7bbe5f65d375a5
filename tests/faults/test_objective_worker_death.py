"""A model with a latency objective whose worker dies: what cannot be in time is refused, and then all is well."""

import pytest
from running_server import RunningServer
from system.load import infer, python_model

# An echo that cannot be loaded while there is a file.
HELD_UP = """
    import os
    import time


    class Model:
        inputs = [{{"name": "x", "datatype": "FP32", "shape": [-1, -1]}}]
        outputs = [{{"name": "y", "datatype": "FP32", "shape": [-1, -1]}}]
        max_batch_size = 8

        def load(self, context):
            while os.path.exists({file!r}):
                time.sleep(0.01)

        def infer(self, inputs):
            return {{"y": inputs["x"]}}
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / "file"


@pytest.fixture
def server(tmp_path, file):
    code = HELD_UP.format(file=str(file))
    python_model(tmp_path / "models", "kept", code, config="batching: {p99_objective_ms: 500}\n")
    with RunningServer(tmp_path / "models") as running:
        yield running


def test_while_the_worker_is_started_again_requests_are_refused_and_then_answered(server, file):
    assert infer(server.http, "kept", [1.0]).ok
    (worker,) = server.workers()
    file.touch()
    worker.kill()
    server.wait_for(lambda: not server.model_ready("kept"))
    refused = infer(server.http, "kept", [2.0])
    assert refused.status == 503
    assert "no instance is up now, so the objective of 500 ms" in refused.detail
    file.unlink()  # and nobody has waited for that
    server.wait_for(lambda: server.model_ready("kept"))
    for value in (3.0, 4.0, 5.0):
        answered = infer(server.http, "kept", [value])
        assert answered.ok, answered.detail
        assert answered.values == [value]
    assert server.metric("headrace_worker_deaths_total", model="kept") == 1
    assert server.metric("headrace_objective_refusals_total", model="kept") == 1
