"""The comparison with other servers: how each is asked, what is an answer, whose turn it is, what numbers come of it.

No peer is installed or started here.
"""

import io
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from loadtests import environment
from loadtests.answer import BadResponse, check_outputs
from loadtests.compare import CHECK, FULL, QUICK, Load, Plan, make_plan
from loadtests.compare_goals import PART_LOAD, PYTHON_FRONTS, Goal, goal_table, goals, judge
from loadtests.compare_report import Metric, Ratio, Run, compare, plot, summarize, table
from loadtests.contenders import CONTENDERS, MAX_BATCH, Job, stacked, triton_config
from loadtests.cpu import read_processes, tree_times
from loadtests.dialect import Dialect, Wire, grpc_check, http_check, http_request
from loadtests.inputs import array_of_file
from loadtests.models import MODELS
from loadtests.report import Cell
from loadtests.run import run_module
from loadtests.server import ServerFailure, ServerProcess, free_ports
from rich.console import Console

from headrace.core.tensor import DataType, Tensor
from headrace.repository.pbtxt import parse_pbtxt

ROW = Tensor("x", DataType.FP32, (1, 3), np.array([1, 2, 3], np.float32).tobytes())
IDS = Tensor("ids", DataType.INT64, (1, 2), np.array([4, 5], np.int64).tobytes())
RIGHT = {"y": np.array([[0.5, -2.0]], np.float32)}
HEAD = b"HTTP/1.1 200 OK"


# Dialects


def split(request):
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    return lines[0], dict(line.split(": ") for line in lines[1:]), body


def test_plain_requests_are_bytes_end_to_end_or_lists_by_name():
    line, headers, body = split(http_request(Dialect.PLAIN, Wire.HTTP_BINARY, "h:1", "/raw", "m", [ROW, IDS]))
    assert line == "POST /raw HTTP/1.1"
    assert headers["Content-Type"] == "application/octet-stream"
    assert body == bytes(ROW.data) + bytes(IDS.data)
    assert headers["Content-Length"] == str(len(body))
    line, headers, body = split(http_request(Dialect.PLAIN, Wire.HTTP_JSON, "h:1", "/json", "m", [ROW, IDS]))
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body) == {"x": [[1.0, 2.0, 3.0]], "ids": [[4, 5]]}
    with pytest.raises(ValueError, match="given no path; expected one"):
        http_request(Dialect.PLAIN, Wire.HTTP_JSON, "h:1", None, "m", [ROW])


def test_the_open_protocol_has_a_path_of_its_own():
    for wire in (Wire.HTTP_BINARY, Wire.HTTP_JSON):
        assert split(http_request(Dialect.V2, wire, "h:1", None, "m", [ROW]))[0] == "POST /v2/models/m/infer HTTP/1.1"
        assert split(http_request(Dialect.V2, wire, "h:1", "/else", "m", [ROW]))[0] == "POST /else HTTP/1.1"


V2_JSON = json.dumps({"outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [0.5, -2.0]}]}).encode()
V2_HEADER = json.dumps(
    {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}]}
).encode()
V2_BINARY = V2_HEADER + RIGHT["y"].tobytes()
V2_HEAD = f"{HEAD.decode()}\r\nInference-Header-Content-Length: {len(V2_HEADER)}".encode()


@pytest.mark.parametrize(
    ("dialect", "wire", "head", "body"),
    [
        (Dialect.V2, Wire.HTTP_JSON, HEAD, V2_JSON),
        (Dialect.V2, Wire.HTTP_BINARY, V2_HEAD, V2_BINARY),
        (Dialect.PLAIN, Wire.HTTP_BINARY, HEAD, RIGHT["y"].tobytes()),
        (Dialect.PLAIN, Wire.HTTP_JSON, HEAD, b'{"y": [[0.5, -2.0]]}'),
        (Dialect.PLAIN, Wire.HTTP_JSON, HEAD, b"[0.5, -2.0]"),
    ],
)
def test_right_and_wrong_answers_are_told_apart_in_every_dialect(dialect, wire, head, body):
    http_check(dialect, wire, RIGHT)(head, body)
    http_check(dialect, wire, {})(head, body)  # nothing is expected, so only the form counts
    for wrong in ({"y": RIGHT["y"] + 1}, {"y": np.zeros((1, 3), np.float32)}):
        with pytest.raises(BadResponse, match=r"expected|off by up to 1"):
            http_check(dialect, wire, wrong)(head, body)


@pytest.mark.parametrize("body", [b"", b"{", b"3", b"[]", b'"text"', b'{"y": [[1], [1, 2]]}'])
def test_what_is_no_list_is_no_plain_answer(body):
    with pytest.raises(BadResponse, match="neither an object of lists nor a list"):
        http_check(Dialect.PLAIN, Wire.HTTP_JSON, {})(HEAD, body)


def test_plain_bytes_must_be_there_and_as_many_as_expected():
    check = http_check(Dialect.PLAIN, Wire.HTTP_BINARY, RIGHT)
    with pytest.raises(BadResponse, match="no bytes"):
        check(HEAD, b"")
    with pytest.raises(BadResponse, match="7 bytes, expected 8 for output 'y'"):
        check(HEAD, bytes(7))


def test_grpc_answers_are_compared_too():
    # ModelInferResponse: output y FP32 [1, 2] and its raw data
    output = b"\x0a\x01y\x12\x04FP32\x1a\x02\x01\x02"
    message = b"\x2a" + bytes([len(output)]) + output + b"\x32\x08" + RIGHT["y"].tobytes()
    grpc_check(RIGHT)(message)
    with pytest.raises(BadResponse, match="off by up to 2"):
        grpc_check({"y": RIGHT["y"] * 2})(message)


def test_outputs_may_differ_in_shape_and_in_the_last_digits():
    check_outputs({"y": np.array([0.5001, -2.0]), "z": np.zeros(3)}, RIGHT)
    with pytest.raises(BadResponse, match=r"has the outputs \['z'\], expected 'y'"):
        check_outputs({"z": np.zeros(2)}, RIGHT)
    with pytest.raises(BadResponse, match="3 elements, expected 2"):
        check_outputs({"y": np.zeros(3)}, RIGHT)
    with pytest.raises(BadResponse, match="off by"):
        check_outputs({"y": np.array([np.nan, -2.0])}, RIGHT)


def test_expected_arrays_come_from_files(tmp_path):
    np.save(tmp_path / "y.npy", RIGHT["y"])
    name, array = array_of_file(f"y={tmp_path / 'y.npy'}")
    assert name == "y"
    assert np.array_equal(array, RIGHT["y"])


# The contenders


def test_triton_is_configured_for_every_model_with_batching():
    for model, load in MODELS.items():
        config = parse_pbtxt(triton_config(model), model)
        assert {tensor.name for tensor in config.inputs} == set(load.sample())
        assert config.max_batch_size == MAX_BATCH


def test_inputs_are_stacked_for_a_method_with_one_parameter():
    one = {"x": np.ones((1, 4))}
    assert stacked(one)["x"] is one["x"]
    two = stacked({"a": np.zeros((1, 4)), "b": np.ones((1, 4))})["x"]
    assert two.shape == (1, 2, 4)
    assert two[0, 1].tolist() == [1.0] * 4


def test_large_nets_get_all_cpus_and_small_ones_a_thread():
    job = Job("mlp", Path("model.onnx"), Path())
    assert job.threads == 1
    assert replace(job, model="resnet50").threads == len(os.sched_getaffinity(0))


def test_every_peer_has_pinned_versions_and_the_same_onnx_runtime():
    runtimes = set()
    for peer in CONTENDERS:
        if peer == "headrace":
            continue
        lines = environment.requirements(peer).split()
        assert all("==" in line for line in lines)
        runtimes |= {line for line in lines if line.startswith("onnxruntime==")}
    assert len(runtimes) == 1
    assert {peer for peer, contender in CONTENDERS.items() if contender.python_front} == set(PYTHON_FRONTS)


def test_other_versions_have_another_folder(tmp_path):
    one, two = (environment.folder_of("p", pinned, tmp_path) for pinned in ("a==1\n", "a==2\n"))
    assert one != two
    assert one == environment.folder_of("p", "a==1\n", tmp_path)
    assert one.is_relative_to(tmp_path)


def test_an_install_that_fails_says_why_and_is_tried_again(tmp_path, monkeypatch):
    tried = []

    def run(command, **options):
        tried.append(command)
        folder = environment.folder_of("mosec", environment.requirements("mosec"), tmp_path)
        folder.mkdir(parents=True, exist_ok=True)
        failed = "pip" in command and len(tried) == 2
        error = "WARNING: noise\nERROR: no such version\n" if failed else ""
        return environment.subprocess.CompletedProcess(command, int(failed), "", error)

    monkeypatch.setattr(environment.subprocess, "run", run)
    with pytest.raises(environment.EnvironmentFailure, match="mosec could not be made: ERROR: no such version"):
        environment.environment("mosec", tmp_path)
    folder = environment.environment("mosec", tmp_path)
    assert len(tried) == 4
    assert environment.environment("mosec", tmp_path) == folder
    assert len(tried) == 4  # it is there and not made again


# Whose turn it is


def test_every_repeat_asks_every_server_in_every_cell_and_begins_elsewhere():
    for load in FULL.loads:
        repeats = [FULL.turns(load, repeat) for repeat in range(4)]
        assert len({frozenset(turns) for turns in repeats}) == 1
        assert {server for server, _ in repeats[0]} == set(CONTENDERS)
        assert all(Wire(cell.protocol) in CONTENDERS[server].doors for server, cell in repeats[0])
        cells = [cell for _, cell in repeats[0]]
        assert all(cells.index(cell) + cells.count(cell) == len(cells) - cells[::-1].index(cell) for cell in set(cells))
        firsts = {server for turns in repeats for server, cell in turns[:1]}
        assert len(firsts) > 1
    turns = [turn for load in FULL.loads for turn in (*FULL.turns(load, 0), *FULL.part_turns(load, 0))]
    assert set(turns) == set(FULL.places())
    assert [load.model for load in FULL.models(1)] == [load.model for load in FULL.models(0)][::-1]


def test_plans_are_narrowed_and_mistakes_refused():
    plan = make_plan(FULL, ["mosec"], ["mlp"], [Wire.HTTP_JSON], [8, 2, 8], 1, 0.5)
    load = Load("mlp", (2, 8), 0.5, (PART_LOAD,))
    assert plan == Plan(("headrace", "mosec"), (load,), (Wire.HTTP_JSON,), 1, FULL.warmup_s)
    assert make_plan(QUICK, (), (), (), (), None, None) == QUICK
    assert make_plan(QUICK, (), ["mlp"], (), (), None, None, shares=[0.5]).loads[0].shares == (0.5,)
    assert make_plan(QUICK, (), ["minilm"], (), (), None, None).loads[0].model == "minilm"
    with pytest.raises(ValueError, match="no server torchserve; there are headrace, triton"):
        make_plan(FULL, ["torchserve"], (), (), (), None, None)
    with pytest.raises(ValueError, match="no load model bert; there are identity"):
        make_plan(FULL, (), ["bert"], (), (), None, None)
    assert {load.model for load in CHECK.loads} == set(MODELS)
    assert CHECK.seconds() < QUICK.seconds() * 3 < FULL.seconds()


# Numbers


def result_of(rate, cpu_us=50.0, p50_ms=1.0, errors=0):
    return {
        "requests_per_s": rate,
        "latency": {"p50_ms": p50_ms, "p99_ms": p50_ms * 2},
        "mean_batch_rows": None,
        "server_cpu_us": cpu_us,
        "driver_cpu_share": 0.5,
        "errors": {"x": errors} if errors else {},
    }


CELL = Cell("mlp", "http-json", 32)
RUNS = [
    Run("headrace", CELL, 0, result_of(100.0, cpu_us=10.0), None),
    Run("headrace", CELL, 1, result_of(1000.0, cpu_us=20.0, p50_ms=3.0), None),
    Run("headrace", CELL, 2, result_of(200.0, cpu_us=None), None),
    Run("mlserver", CELL, 0, result_of(10.0, cpu_us=100.0, errors=2), None),
    Run("mlserver", CELL, 1, result_of(500.0, cpu_us=50.0), None),
    Run("mlserver", CELL, 2, result_of(50.0, cpu_us=100.0), None),
    Run("litserve", CELL, 0, None, "broken"),
    Run("litserve", CELL, 1, result_of(50.0, cpu_us=100.0), None),
]


def test_rows_are_medians_and_ratios_are_made_within_a_repeat():
    row = summarize("mlserver", CELL, RUNS)
    assert (row.repeats, row.figures[Metric.THROUGHPUT], row.figures[Metric.CPU], row.errors) == (3, 50.0, 100.0, 2)
    assert row.figures[Metric.P99] == 2.0
    assert summarize("bentoml", CELL, RUNS) is None
    ratio = compare("mlserver", CELL, RUNS)
    assert ratio.of(Metric.THROUGHPUT) == 4.0  # of 10, 2 and 4
    assert ratio.of(Metric.CPU) == pytest.approx(0.25)  # of 0.1 and 0.4; one is unknown
    assert compare("litserve", CELL, RUNS).of(Metric.THROUGHPUT) == 20.0  # of the one repeat that both have
    assert compare("bentoml", CELL, RUNS) is None
    assert compare("mlserver", replace(CELL, concurrency=1), RUNS) is None


def ratio_of(rival, cpu, rate, cell=CELL):
    return Ratio(rival, cell, {Metric.CPU: cpu, Metric.THROUGHPUT: rate, Metric.P50: None, Metric.P99: None})


def test_the_hardest_rival_decides_a_goal():
    ratios = [ratio_of("mlserver", 0.2, 9.0), ratio_of("litserve", 0.1, 4.0), ratio_of("bentoml", None, 20.0)]
    at_most = Goal(Metric.CPU, CELL, PYTHON_FRONTS, 0.3, at_most=True)
    at_least = Goal(Metric.THROUGHPUT, CELL, PYTHON_FRONTS, 5.0, at_most=False)
    cpu, rate = judge(at_most, ratios), judge(at_least, ratios)
    assert (cpu.reached, cpu.rival, cpu.missing, cpu.met) == (0.2, "mlserver", ("bentoml",), True)
    assert (rate.reached, rate.rival, rate.missing, rate.met) == (4.0, "litserve", (), False)
    assert judge(at_most, [ratio_of("mlserver", 0.3, 1.0)]).met is True
    nobody = judge(at_most, [ratio_of("mlserver", 0.1, 1.0, replace(CELL, concurrency=8))])
    assert (nobody.reached, nobody.met, nobody.missing) == (None, None, PYTHON_FRONTS)
    assert judge(at_most, [ratio_of("mosec", 0.1, 1.0)]).met is None


def test_goals_ask_nobody_where_they_have_no_door():
    doors = {name: tuple(contender.doors) for name, contender in CONTENDERS.items()}
    found = goals(doors)
    assert all(Wire(goal.cell.protocol) in doors[rival] for goal in found for rival in goal.rivals)
    assert not any("mosec" in goal.rivals for goal in found if goal.cell.protocol == Wire.GRPC)
    assert {rival for goal in found for rival in goal.rivals} == set(CONTENDERS) - {"headrace"}
    assert goals({"headrace": tuple(Wire)}) == []
    full = {cell for _, cell in FULL.places()}
    assert {goal.cell for goal in found} <= full


def printed(thing):
    console = Console(width=220, file=io.StringIO())
    console.print(thing)
    return console.file.getvalue()


def test_tables_show_what_failed_and_what_is_missing(tmp_path):
    places = [(server, CELL) for server in ("headrace", "mlserver", "bentoml")]
    rows = [row for server, cell in places if (row := summarize(server, cell, RUNS))]
    ratios = [compare("mlserver", CELL, RUNS)]
    lines = printed(table(places, rows, ratios)).splitlines()
    ours, theirs, absent = (next(line for line in lines if f" {name} " in line) for name, _ in places)
    assert "200.0" in ours
    assert "4.00" not in ours
    assert "4.00" in theirs
    assert "failed" in absent
    verdict = judge(Goal(Metric.CPU, CELL, ("mlserver", "litserve"), 0.3, at_most=True), ratios)
    text = printed(goal_table([verdict], {CELL: 0.97}))
    assert "CPU us, mlp, http-json, c=32: <= 0.3 x mlserver / litserve" in text
    assert all(word in text for word in ("0.25", "met", "97%", "litserve"))
    (picture,) = plot(rows, tmp_path / "name.json")
    assert picture == tmp_path / "name-http-json.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


# Processes

FAMILY = """
import http.server, os, signal, sys
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        signal.pause()
http.server.BaseHTTPRequestHandler.do_GET = lambda self: (self.send_response(200), self.end_headers())
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.BaseHTTPRequestHandler).serve_forever()
"""


def test_a_server_can_be_paused_and_leaves_no_orphan(tmp_path):
    (port,) = free_ports(1)
    with ServerProcess([sys.executable, "-c", FAMILY, str(port)], tmp_path / "log", port, "/") as process:
        members = tree_times(process.pid, read_processes()).members
        assert len(members) == 2
        process.pause()
        eventually(lambda: {state(pid) for pid, _ in members} == {"T"})
        process.resume()
        eventually(lambda: "T" not in {state(pid) for pid, _ in members})
        process.pause()  # one that is stopped must end all the same
    eventually(lambda: {state(pid) for pid, _ in members} <= {None, "Z"})


def eventually(condition):
    """A signal takes a moment."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def test_a_server_that_forks_and_dies_leaves_no_orphan_either(tmp_path):
    (port,) = free_ports(1)
    code = FAMILY[: FAMILY.index("http.server.Base")] + "\nprint(os.getpid(), flush=True)\nraise SystemExit(3)"
    with (
        pytest.raises(ServerFailure, match="exited with 3 before it was ready"),
        ServerProcess([sys.executable, "-c", code, str(port)], tmp_path / "log", port, "/"),
    ):
        pass
    group = int((tmp_path / "log").read_text().split()[0])
    eventually(lambda: not in_group(group))


def in_group(group):
    """Those who are, and run: a child that nobody waits for stays as a zombie where no init reaps it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(entry)
    return found


def test_a_module_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "hanging.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_module("hanging", timeout_s=0.2) == "no end after 0.2 s"
