"""What ``explain --url`` makes of a server's metrics."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from headrace.core.statistics import Statistics
from headrace.metrics import LatencySample, Metrics, ModelSample, ObjectiveSample, PlanSample, ServerSample
from headrace.running_model import explain_running


def page():
    statistics = Statistics()
    statistics.executed(requests=2, rows=7, input_ns=1, infer_ns=1, output_ns=1)
    statistics.executed(requests=2, rows=9, input_ns=1, infer_ns=1, output_ns=1)
    latencies = (LatencySample(512, 1, 0.0047, 0.0056), LatencySample(512, 16, 0.0152, 0.0193))
    models = [
        ModelSample(
            *("digits", "2", statistics, 3, 1, True, 1, 1),
            latencies=latencies,
            objective=ObjectiveSample(0.05, 0.0472, 1000, 4, 17, 812.5, target_rows=28, waited_s=0.31),
        ),
        ModelSample(*("digits", "10", Statistics(), 0, 0, True, 1, 1)),
        ModelSample(*("other", "1", Statistics(), 0, 0, True, 1, 1)),
        ModelSample(*("fast", "1", Statistics(), 0, 0, True, 1, 1), plan=PlanSample('open"vino + int8', 3.25, 1, 7, 1)),
        ModelSample(*("slow", "1", Statistics(), 0, 0, True, 1, 1), plan=PlanSample("", 0.0, 2, 0, 0)),
        ModelSample(*("mortal", "1", Statistics(worker_deaths=7), 0, 0, True, 2, 1), restart_pause_s=3.21),
        ModelSample(*("mended", "1", Statistics(worker_deaths=1), 0, 0, True, 2, 2)),
    ]
    return Metrics(lambda: models, list, lambda: ServerSample(0, 0, 1.0, True)).render("")[0]


@pytest.fixture
def url():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(page())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_curve_objective_and_decisions_of_each_version_are_told(url):
    said = []
    assert explain_running(f"{url}/", "digits", said.append) == 0
    assert said == [
        f"model digits at {url}/",
        "version 2",
        "  batches: 2 of 8.0 rows on average",
        "  waiting now: 3 request(s)",
        "  objective: 50 ms; requests are accepted up to a predicted 47.2 ms",
        "  answers: 1000 within the objective, 4 after it; 17 request(s) refused",
        "  arriving now: 812.5 rows/s",
        "  decided: up to 28 rows a batch; 0.310 s spent on waiting for batches to fill",
        "  batch latency of rows of up to 512 elements, as learned:",
        "        1 rows      4.700 ms, 99 in 100 within     5.600 ms",
        "       16 rows     15.200 ms, 99 in 100 within    19.300 ms",
        "version 10",
        "  batches: 0 of 0.0 rows on average",
        "  waiting now: 0 request(s)",
        "  objective: none",
        "  batch latency: no batch has run yet",
    ]


def test_a_model_that_is_not_there_and_a_server_that_is_not(url):
    said = []
    assert explain_running(url, "digit", said.append) == 1
    assert said == [f"the server at {url} serves no model 'digit'"]
    for nowhere in ("http://127.0.0.1:9", f"{url}/deeper", "nonsense"):
        said = []
        assert explain_running(nowhere, "digits", said.append) == 1
        assert said[0].startswith(f"no metrics at {nowhere}/metrics: ")


def test_instances_are_told_of_where_workers_have_died(url):
    told = {}
    for name in ("digits", "mortal", "mended"):
        said = []
        assert explain_running(url, name, said.append) == 0
        told[name] = [line.strip() for line in said if "instances" in line]
    assert told == {
        "digits": [],
        "mortal": [
            "instances: 1 of 2 up; their workers have died 7 time(s); one that keeps dying is left alone for 3.2 s now"
        ],
        "mended": ["instances: 2 of 2 up; their workers have died 1 time(s)"],
    }


def test_the_plan_of_a_running_model_is_told(url):
    said = []
    assert explain_running(url, "fast", said.append) == 0
    assert '  plan: open"vino + int8, 3.25 x as fast as it was dropped in when it was made' in said
    assert "  plans so far: recorded requests answered right 7 time(s) and wrong 1; 1 plan(s) refused" in said
    said.clear()
    assert explain_running(url, "slow", said.append) == 0
    assert "  plan: none; it is served as it was dropped in" in said
    said.clear()
    assert explain_running(url, "digits", said.append) == 0
    assert not any("plan" in line for line in said)
