"""A model with a latency objective whose worker dies: what cannot be in time is refused, and then all is well."""

import time

import pytest
from running_server import RunningServer
from system.load import fake_model, infer

LOAD_S = 2.0


@pytest.fixture
def server(tmp_path):
    fake_model(
        tmp_path,
        "kept",
        "max_batch_size: 8\nbatching: {p99_objective_ms: 500}\n"
        f"parameters: {{fake_delay_ms: 5, fake_load_delay_ms: {int(LOAD_S * 1000)}}}\n",
    )
    with RunningServer(tmp_path) as running:
        yield running


def test_while_the_worker_is_started_again_requests_are_refused_and_then_answered(server):
    assert infer(server.http, "kept", [1.0]).ok
    (worker,) = server.workers()
    worker.kill()
    server.wait_for(lambda: not server.model_ready("kept"))
    began = time.monotonic()
    refused = infer(server.http, "kept", [2.0])
    assert time.monotonic() - began < LOAD_S / 2, "nobody waits for a worker that cannot be in time"
    assert refused.status == 503
    assert "no instance is up now, so the objective of 500 ms" in refused.detail
    server.wait_for(lambda: server.model_ready("kept"))
    for value in (3.0, 4.0, 5.0):
        answered = infer(server.http, "kept", [value])
        assert answered.ok, answered.detail
        assert answered.values == [value]
    assert server.metric("headrace_worker_deaths_total", model="kept") == 1
    assert server.metric("headrace_objective_refusals_total", model="kept") == 1
