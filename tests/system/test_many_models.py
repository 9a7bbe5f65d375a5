"""A repository of hundreds of small models: all served at once, by a handful of processes.

HEADRACE_TEST_MANY says how many there are. What it took to load them goes to the test's properties and, with
``-rP``, to the terminal.
"""

import http.client
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper
from running_server import RunningServer

COUNT = int(os.environ.get("HEADRACE_TEST_MANY", "300"))
LOAD_LIMIT_S = 120
MAX_PROCESSES = 20
MAX_BYTES_A_MODEL = 2 << 20  # of a small model, beside what the processes themselves take
MAX_BYTES_A_PROCESS = 200 << 20
INPUTS, HIDDEN, OUTPUTS = 16, 32, 4
CLIENTS = 4


class Many:
    """The running server and what it took to get there."""

    def __init__(self, server: RunningServer, load_s: float) -> None:
        self.server = server
        self.load_s = load_s

    def shared_workers(self) -> list[psutil.Process]:
        return [worker for worker in self.server.workers() if any("shared-" in part for part in worker.cmdline())]

    def ask_all(self, between=lambda number: None) -> dict[str, object]:
        """Ask each model once, from several clients; what was wrong with the answers."""

        def ask(first: int) -> dict[str, object]:
            host, port = self.server.http.split(":")
            connection = http.client.HTTPConnection(host, int(port), timeout=60)
            try:
                wrong = {}
                for number in range(first, COUNT, CLIENTS):
                    between(number)
                    problem = _problem(connection, number)
                    if problem:
                        wrong[_name(number)] = problem
                return wrong
            finally:
                connection.close()

        with ThreadPoolExecutor(CLIENTS) as clients:
            return {name: problem for found in clients.map(ask, range(CLIENTS)) for name, problem in found.items()}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    repository = tmp_path_factory.mktemp("many")
    for number in range(COUNT):
        _write(repository / _name(number) / "1/model.onnx", number)
    started_at = time.monotonic()
    server = RunningServer(repository, "--model-control", "none")
    try:
        server.wait_ready(timeout_s=4 * LOAD_LIMIT_S)
        yield Many(server, time.monotonic() - started_at)
    finally:
        server.__exit__()


def test_all_load_in_time(many, record_property):
    cpu = [sum(process.cpu_times()[:2]) for process in _family(many.server)]
    record_property("models", COUNT)
    record_property("load_s", round(many.load_s, 1))
    _tell(f"{COUNT} models ready in {many.load_s:.1f} s; CPU seconds: front {cpu[0]:.1f}, workers {sum(cpu[1:]):.1f}")
    _, entries = many.server.post("/v2/repository/index", {"ready": True})
    assert len(entries) == COUNT
    assert many.load_s < LOAD_LIMIT_S


def test_few_processes_hold_them_all(many, record_property):
    """And not one of them holds nearly all: what shares does so evenly."""
    workers = many.server.workers()
    family = _family(many.server)
    rss, uss = (sum(getattr(one.memory_full_info(), kind) for one in family) for kind in ("rss", "uss"))
    record_property("workers", len(workers))
    record_property("rss_mb", rss >> 20)
    _tell(
        f"{len(workers)} workers, {len(many.shared_workers())} of them shared; RSS together {rss >> 20} MB, "
        f"unshared {uss >> 20} MB, front {family[0].memory_info().rss >> 20} MB"
    )
    assert len(workers) <= MAX_PROCESSES
    assert uss < COUNT * MAX_BYTES_A_MODEL + (len(workers) + 1) * MAX_BYTES_A_PROCESS
    threads = sum(one.num_threads() for one in workers)
    assert threads <= len(workers) * (psutil.cpu_count() + 8), "models that share a process do not each bring threads"


def test_every_one_answers_right(many):
    assert many.ask_all() == {}


def test_all_answer_when_a_shared_worker_is_killed(many):
    """Killed in the midst of requests: none of them fails, and its models come back with a new process."""
    victim = many.shared_workers()[0]

    def kill_half_way(number: int) -> None:
        if number == COUNT // 2:
            victim.kill()

    started_at = time.monotonic()
    assert many.ask_all(kill_half_way) == {}
    assert many.ask_all() == {}
    _tell(f"{COUNT} models answered twice in {time.monotonic() - started_at:.1f} s, one of the workers killed")
    assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE
    many.server.wait_for(lambda: all(many.server.model_ready(_name(number)) for number in range(0, COUNT, 7)))
    assert victim.pid not in [worker.pid for worker in many.shared_workers()]
    assert len(many.server.workers()) <= MAX_PROCESSES


def _tell(figures: str) -> None:
    print(figures)  # noqa: T201 - they are wanted: pytest -rP shows them


def _family(server: RunningServer) -> list[psutil.Process]:
    """The front process, and then its workers."""
    return [psutil.Process(server.process.pid), *server.workers()]


def _name(number: int) -> str:
    return f"small_{number:04}"


def _weights(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Each model has its own, so that a mix-up shows. Small integers: sums are exact in any order."""
    generator = np.random.default_rng(number)
    shapes = ((INPUTS, HIDDEN), (HIDDEN, OUTPUTS))
    first, second = (generator.integers(-3, 4, shape).astype(np.float32) for shape in shapes)
    return first, second


def _write(path: Path, number: int) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["summed"]),
            helper.make_node("Relu", ["summed"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "second"], ["y"]),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", OUTPUTS])],
        [
            numpy_helper.from_array(array, name)
            for array, name in zip(_weights(number), ("first", "second"), strict=True)
        ],
    )
    path.parent.mkdir(parents=True)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    path.write_bytes(model.SerializeToString())


def _problem(connection: http.client.HTTPConnection, number: int) -> object:
    """What is wrong with the model's answer, if anything."""
    rows = np.arange(2 * INPUTS, dtype=np.float32).reshape(2, INPUTS) % 5 - 2 + number % 3
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "datatype": "FP32",
                    "shape": rows.shape,
                    "parameters": {"binary_data_size": rows.nbytes},
                }
            ]
        }
    ).encode()
    connection.request(
        "POST",
        f"/v2/models/{_name(number)}/infer",
        header + rows.tobytes(),
        {"Inference-Header-Content-Length": str(len(header))},
    )
    response = connection.getresponse()
    answer = json.loads(response.read())
    if response.status != 200:
        return response.status, answer
    first, second = _weights(number)
    expected = np.maximum(rows @ first, 0) @ second
    (output,) = answer["outputs"]
    if answer["model_name"] != _name(number) or output["data"] != expected.reshape(-1).tolist():
        return output, expected.tolist()
    return None
