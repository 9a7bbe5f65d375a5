"""Ten times the load that a model can bear: what is too much is refused at once, and the server stays itself."""

import statistics
import threading
import time

import psutil
import pytest
from held_work import HELD
from running_server import RunningServer
from system.load import Load, all_at_once, fake_model, infer, python_model

DELAY_MS = 100
CAPACITY = 1000 / DELAY_MS  # requests a second
QUEUE = 8
BURST_S = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("overload")
    fake_model(
        repository,
        "narrow",
        f"max_batch_size: 1\nbatching: {{max_queue_size: {QUEUE}}}\nparameters: {{fake_delay_ms: {DELAY_MS}}}\n",
    )
    fake_model(repository, "neighbour")
    python_model(repository, "held", HELD)
    with RunningServer(repository, "--max-inflight-bytes", "4194304") as running:
        yield running


class Probe:
    """How long health takes to answer, all the while."""

    def __init__(self, server):
        self.seconds = []
        self.statuses = set()
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _run(self):
        while not self._stop.wait(0.05):
            for path in ("/v2/health/live", "/v2/health/ready"):
                began = time.monotonic()
                self.statuses.add(self._server.get(path)[0])
                self.seconds.append(time.monotonic() - began)


def test_ten_times_too_much_is_shed(server):
    front = psutil.Process(server.process.pid)
    with Load(server, "narrow", http=24, grpc=8, interval_s=0.03) as load, Probe(server) as health:
        load.wait_answers(200)
        memory, began, before = front.memory_info().rss, time.monotonic(), len(load.outcomes)
        with Load(server, "neighbour", http=1, interval_s=0.02) as neighbour:
            time.sleep(BURST_S)  # the length of the burst
        seconds = time.monotonic() - began
        burst = load.outcomes[before:]
        growth = front.memory_info().rss - memory
        waiting = server.metric("headrace_queue_requests", model="narrow")
        load.stop()
    after = infer(server.http, "narrow", [7.0])

    assert len(burst) / seconds > 5 * CAPACITY, "the test's clients are too slow to overload it"
    assert load.summary.keys() <= {("http", 200), ("http", 503), ("grpc", "OK"), ("grpc", "UNAVAILABLE")}
    shed = [one for one in burst if not one.ok]
    assert all("Exceeds maximum queue size" in one.detail for one in shed)
    assert all(int(one.headers["retry-after"]) >= 1 for one in shed if one.protocol == "http")
    assert {one.protocol for one in shed} == {"http", "grpc"}
    served = [one for one in burst if one.ok]
    assert len(served) / seconds > CAPACITY / 2, "it goes on working while it refuses"
    assert waiting <= QUEUE
    assert statistics.median(one.seconds for one in served) < 3 * (QUEUE + 2) * DELAY_MS / 1000
    assert statistics.median(one.seconds for one in shed) < statistics.median(one.seconds for one in served) / 2
    assert growth < 16 * 1024 * 1024
    assert health.statuses == {200}
    assert statistics.median(health.seconds) < 0.5
    assert statistics.quantiles(health.seconds, n=20)[-1] < 3
    assert not neighbour.failed, "another model is not concerned"
    assert after.values == [7.0]
    assert after.seconds < 10, "the first request after the burst is served at once"
    assert server.metric("nv_inference_request_failure", model="narrow", reason="REJECTED") >= len(shed)


def test_a_burst_larger_than_the_queue_is_served_as_far_as_it_fits(server):
    outcomes = all_at_once(server.http, "narrow", [([float(number)], None) for number in range(40)])
    served = [one for one in outcomes if one.ok]
    assert {one.status for one in outcomes} == {200, 503}
    assert len(served) >= QUEUE
    assert all(one.values == [float(number)] for number, one in enumerate(outcomes) if one.ok)


def test_large_requests_are_bounded_by_their_bytes(server, tmp_path):
    values = [float(number) for number in range(400_000)]  # 1.6 MB each as tensors; 4 MiB are allowed
    gate, outcomes = tmp_path / "gate", []
    held = {"gate": str(gate)}
    clients = [
        threading.Thread(target=lambda: outcomes.append(infer(server.http, "held", values, held))) for _ in range(2)
    ]
    try:
        for number, client in enumerate(clients, 1):
            client.start()
            server.wait_for(lambda number=number: server.metric("headrace_inflight_bytes") >= number * 1_600_000)
        refused = infer(server.http, "neighbour", values)
        assert infer(server.http, "neighbour", [1.0]).ok
    finally:
        gate.touch()
        for client in clients:
            client.join()
    assert refused.status == 503, refused
    assert "--max-inflight-bytes" in refused.detail
    assert [one.values for one in outcomes] == [values] * 2
    server.wait_for(lambda: server.metric("headrace_inflight_bytes") == 0)
    assert infer(server.http, "neighbour", values).values == values
