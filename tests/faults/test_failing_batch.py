"""One bad request in a batch: it fails by itself, and those that shared its batch are answered."""

import signal

import pytest
from running_server import RunningServer
from system.load import GrpcClient, Load, all_at_once, fake_model, infer, python_model

PICKY = """
    import numpy as np

    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]
        max_batch_size = 4

        def infer(self, inputs):
            if (inputs["x"] < 0).any():
                raise ValueError("there is no root of a negative number")
            return {"y": np.sqrt(inputs["x"])}
"""
# What is no Exception: asyncio's CancelledError, and the panics of libraries in Rust, are as little as this.
QUITTER = """
    import sys

    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]
        max_batch_size = 4

        def infer(self, inputs):
            if (inputs["x"] < 0).any():
                sys.exit("usage: no negative numbers")
            return {"y": inputs["x"] * 2}
"""
FORKING = """
    import multiprocessing
    import time

    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
        outputs = [{"name": "y", "datatype": "INT64", "shape": [1, 1]}]

        def infer(self, inputs):
            process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
            process.start()
            process.terminate()
            process.join(60)
            return {"y": [[process.exitcode or 0]]}
"""
TOGETHER = "batching: {max_queue_delay_us: 20000000}\n"  # four make a batch, at once


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("failing")
    fake_model(repository, "batched", "max_batch_size: 4\n" + TOGETHER)
    fake_model(repository, "hurried", "max_batch_size: 16\nparameters: {fake_delay_ms: 5}\n")
    python_model(repository, "picky", PICKY, config=TOGETHER)
    python_model(repository, "quitter", QUITTER, config=TOGETHER)
    python_model(repository, "forking", FORKING)
    with RunningServer(repository) as running:
        yield running


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ({"fake_fail": "the model is broken"}, 500, "the model is broken"),
        ({"fake_input_error": "not an image"}, 400, "not an image"),
        ({"fake_bad_rows": True}, 500, "rows|shape"),
        ({"fake_no_such_fault": 1}, 400, "fake_no_such_fault"),
    ],
)
def test_only_the_bad_one_of_a_batch_fails(server, fault, status, message):
    retried = server.metric("headrace_retried_requests_total", model="batched")
    died = server.metric("headrace_worker_deaths_total", model="batched")
    first, second, bad, fourth = all_at_once(
        server.http, "batched", [([1.0], None), ([2.0], None), ([3.0], fault), ([4.0], None)]
    )
    assert [one.values for one in (first, second, fourth)] == [[1.0], [2.0], [4.0]], (first, second, fourth)
    assert bad.status == status
    assert any(part in bad.detail for part in message.split("|"))
    assert "batched" in bad.detail
    assert server.metric("headrace_retried_requests_total", model="batched") - retried >= 4, "they were one batch"
    assert server.metric("headrace_worker_deaths_total", model="batched") == died


def test_a_python_model_that_raises_for_one_row(server):
    *good, bad = all_at_once(server.http, "picky", [([4.0], None), ([9.0], None), ([16.0], None), ([-1.0], None)])
    assert [one.values for one in good] == [[2.0], [3.0], [4.0]], good
    assert bad.status == 500
    assert "no root of a negative number" in bad.detail
    assert "Traceback" not in bad.detail


def test_a_python_model_that_wants_to_exit_for_one_row(server):
    *good, bad = all_at_once(server.http, "quitter", [([4.0], None), ([9.0], None), ([16.0], None), ([-1.0], None)])
    assert [one.values for one in good] == [[8.0], [18.0], [32.0]], good
    assert bad.status == 500
    assert "SystemExit: usage: no negative numbers" in bad.detail
    assert server.metric("headrace_worker_deaths_total", model="quitter") == 0


def test_what_a_python_model_forks_can_be_ended(server):
    assert infer(server.http, "forking", [1.0]).values == [-signal.SIGTERM]


def test_grpc_tells_a_bad_input_from_a_bad_model(server):
    client = GrpcClient(server.grpc, "hurried")
    try:
        refused = client.infer([1.0], {"fake_input_error": "not an image"})
        failed = client.infer([1.0], {"fake_fail": "out of cheese"})
        assert client.infer([2.0]).values == [2.0]
    finally:
        client.close()
    assert (refused.status, failed.status) == ("INVALID_ARGUMENT", "INTERNAL")
    assert "not an image" in refused.detail
    assert "out of cheese" in failed.detail


def test_bad_requests_under_load_fail_alone(server):
    with Load(server, "hurried", http=6, grpc=2) as load:
        load.wait_answers(20)
        outcomes = [infer(server.http, "hurried", [1.0], {"fake_fail": "again"}) for _ in range(20)]
    assert {one.status for one in outcomes} == {500}
    assert not load.failed
