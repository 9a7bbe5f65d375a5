"""Models under a limit of memory, on the real server: they come when they are asked, and others go."""

import shutil
import threading
import urllib.request

import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper
from running_server import RunningServer
from system.load import (
    Load,
    all_at_once,
    fake_model,
    gated_model,
    infer,
    onnx_model,
    put,
    python_model,
    wait_for,
)

MB = 1 << 20
WEIGHTS = 2048  # squared, in floats: 16 MB a model


def heavy_model(repository, name, add, config="", version=1):
    """y = x + add, and 16 MB of weights of which one decides nothing."""
    folder = repository / name
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        (folder / "config.yaml").write_text(config)
    value = helper.make_tensor_value_info
    weights = np.random.default_rng(add).random((WEIGHTS, WEIGHTS)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["x"], ["shape"]),
            helper.make_node("Gather", ["shape", "zero"], ["rows"]),
            helper.make_node("Min", ["rows", "none"], ["nothing"]),  # 0: no row of the weights is taken
            helper.make_node("Gather", ["weights", "nothing"], ["row"]),
            helper.make_node("ReduceSum", ["row"], ["sum"], keepdims=0),
            helper.make_node("Mul", ["sum", "nil"], ["nothing_more"]),
            helper.make_node("Add", ["x", "constant"], ["added"]),
            helper.make_node("Add", ["added", "nothing_more"], ["y"]),
        ],
        "heavy",
        [value("x", TensorProto.FLOAT, ["n", "m"])],
        [value("y", TensorProto.FLOAT, ["n", "m"])],
        [
            numpy_helper.from_array(np.array(0, np.int64), "zero"),
            numpy_helper.from_array(np.array(0, np.int64), "none"),
            numpy_helper.from_array(np.array(0, np.float32), "nil"),
            numpy_helper.from_array(np.array([add], np.float32), "constant"),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    put(folder / str(version), "model.onnx", model.SerializeToString())
    return folder


def resident(server):
    """The models that are in memory."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return {line.split('"')[1] for line in lines if line.startswith("headrace_model_resident{") and line.endswith(" 1")}


def own_bytes(server):
    return sum(one.memory_info().rss - one.memory_info().shared for one in server.workers())


def answer(server, name, value=1.0):
    outcome = infer(server.http, name, [value])
    assert outcome.ok, outcome
    return outcome.values


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    repository = tmp_path_factory.mktemp("resident")
    for number in range(12):
        heavy_model(repository, f"heavy_{number:02}", number)
    flags = ("--resident-bytes", str(80 * MB), "--max-shared-workers", "3", "--model-control", "explicit")
    with RunningServer(repository, *flags, "--load-model", "*") as server:
        yield server


def test_all_are_ready_and_few_are_in_memory(many):
    status, index = many.post("/v2/repository/index", {"ready": True})
    assert status == 200
    assert len(index) == 12
    assert 2 <= len(resident(many)) <= 5
    assert many.metric("headrace_resident_bytes") <= 80 * MB
    for number in range(12):
        status, metadata = many.get(f"/v2/models/heavy_{number:02}")
        assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
        assert many.model_ready(f"heavy_{number:02}")
    assert many.get("/v2/health/ready")[0] == 200


def test_each_answers_right_whether_it_is_there_or_not(many):
    before = many.metric("headrace_page_ins_total")
    for number in (*range(12), *range(12)):
        assert answer(many, f"heavy_{number:02}") == [1.0 + number]
        assert f"heavy_{number:02}" in resident(many)
        assert many.metric("headrace_resident_bytes") <= 80 * MB
    came = many.metric("headrace_page_ins_total") - before
    assert came >= 19
    assert many.metric("headrace_page_in_duration_seconds_count") >= came
    # What left the memory is really gone: the weights that ever came in were 300 MB and more.
    assert own_bytes(many) < 80 * MB + 3 * 60 * MB


def test_a_cold_one_asked_by_many_at_once_is_loaded_once(many):
    for number in range(11):
        answer(many, f"heavy_{number:02}")
    assert "heavy_11" not in resident(many)
    before = many.metric("headrace_page_ins_total")
    outcomes = all_at_once(many.http, "heavy_11", [([float(n)], None) for n in range(16)])
    assert [one.values for one in outcomes] == [[11.0 + n] for n in range(16)]
    assert many.metric("headrace_page_ins_total") == before + 1


def test_a_hot_one_does_not_fail_nor_leave_while_others_come_and_go(many):
    with Load(many, "heavy_00", http=2, grpc=1, expected=lambda values, _: values, interval_s=0.01) as load:
        load.wait_answers(1)  # by then it has come itself
        for number in [*range(1, 12)] * 2:
            assert answer(many, f"heavy_{number:02}") == [1.0 + number]
            assert "heavy_00" in resident(many)
        load.wait_answers(20)
    assert load.failed == []


def test_all_clients_of_all_models_at_once(many):
    """Far more than fit are wanted all the time: each has its turn, and no answer is wrong."""
    wrong = []

    def client(first):
        for step in range(15):
            number = (first * 5 + step * 7) % 12
            outcome = infer(many.http, f"heavy_{number:02}", [2.0])
            if outcome.values != [2.0 + number]:
                wrong.append(outcome)

    threads = [threading.Thread(target=client, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
        assert not thread.is_alive()
    assert wrong == []
    wait_for(lambda: many.metric("headrace_resident_bytes") <= 80 * MB)


def test_unload_and_load_of_one_that_is_away(many):
    for number in range(1, 9):
        answer(many, f"heavy_{number:02}")
    assert "heavy_00" not in resident(many)
    assert many.post("/v2/repository/models/heavy_00/unload")[0] == 200
    wait_for(lambda: not many.model_ready("heavy_00"))
    assert infer(many.http, "heavy_00", [1.0]).status == 404
    assert many.post("/v2/repository/models/heavy_00/load")[0] == 200
    assert answer(many, "heavy_00") == [1.0]


def test_a_new_version_of_one_that_is_away(many):
    for number in range(1, 9):
        answer(many, f"heavy_{number:02}")
    assert "heavy_00" not in resident(many)
    heavy_model(many.repository, "heavy_00", 50, version=2)
    assert many.post("/v2/repository/models/heavy_00/load")[0] == 200
    outcome = infer(many.http, "heavy_00", [1.0])
    assert (outcome.version, outcome.values) == ("2", [51.0])
    for number in range(1, 9):
        answer(many, f"heavy_{number:02}")
    assert answer(many, "heavy_00") == [51.0]
    shutil.rmtree(many.repository / "heavy_00" / "2")
    assert many.post("/v2/repository/models/heavy_00/load")[0] == 200
    assert answer(many, "heavy_00") == [1.0]


def test_deadlines_hold_while_it_comes(tmp_path):
    repository = tmp_path / "models"
    gate = gated_model(repository, "slow", ballast_mb=100)
    fake_model(repository, "other", "parameters: {fake_memory_mb: 100}")
    with RunningServer(repository, "--resident-bytes", str(180 * MB)) as server:
        answer(server, "other")
        assert resident(server) == {"other"}
        with gate.shut():  # it comes no further
            outcome = infer(server.http, "slow", [1.0], {"timeout": 300_000})
            assert "Request timeout expired" in outcome.detail
            assert resident(server) != {"slow"}
        wait_for(lambda: resident(server) == {"slow"})
        before = server.metric("headrace_page_ins_total")
        assert answer(server, "slow") == [1.0]
        assert server.metric("headrace_page_ins_total") == before


def test_pinned_ones_stay_and_one_that_never_fits_is_refused_with_the_reason(tmp_path):
    heavy_model(tmp_path, "kept", 1, "residency: {pinned: true}\n")
    for number in range(2, 5):
        heavy_model(tmp_path, f"paged_{number}", number)
    fake_model(tmp_path, "large", "parameters: {fake_memory_mb: 200}")
    with RunningServer(tmp_path, "--resident-bytes", str(100 * MB), "--max-shared-workers", "2") as server:
        for number in (2, 3, 4) * 2:
            assert answer(server, f"paged_{number}") == [1.0 + number]
            assert "kept" in resident(server)
        _, index = server.post("/v2/repository/index")
        (large,) = [one for one in index if one["name"] == "large"]
        assert large["state"] == "UNAVAILABLE"
        assert "bytes, more than --resident-bytes 104857600 has room for beside the" in large["reason"]
        assert answer(server, "kept") == [2.0]
        assert server.stop() == 0


def test_one_whose_file_is_gone_says_so_and_comes_back_with_it(tmp_path):
    for name, number in (("away", 1), ("other", 2), ("third", 3), ("fourth", 4)):
        heavy_model(tmp_path, name, number)
    # Two fit and three do not, whatever is measured of each (16 or 17 MB): so the one used longest ago always goes.
    flags = ("--resident-bytes", str(44 * MB), "--model-control", "none", "--max-shared-workers", "1")
    with RunningServer(tmp_path, *flags) as server:
        for name in ("other", "third", "fourth"):
            answer(server, name)
        assert "away" not in resident(server)
        file = tmp_path / "away/1/model.onnx"
        file.rename(tmp_path / "elsewhere")
        outcome = infer(server.http, "away", [1.0])
        assert outcome.status == 503
        assert "is not at ready state: it cannot be brought into memory" in outcome.detail
        assert not server.model_ready("away")
        assert answer(server, "other") == [3.0]
        (tmp_path / "elsewhere").rename(file)
        wait_for(lambda: infer(server.http, "away", [1.0]).values == [2.0])
        assert server.model_ready("away")


def test_a_worker_that_dies_while_models_are_away(tmp_path):
    for number in range(5):
        heavy_model(tmp_path, f"heavy_{number}", number)
    with RunningServer(tmp_path, "--resident-bytes", str(60 * MB), "--max-shared-workers", "1") as server:
        for _ in range(3):
            for number in range(5):
                (worker,) = server.workers()
                worker.kill()
                psutil.wait_procs([worker], 10)
                assert answer(server, f"heavy_{number}") == [1.0 + number]


def test_small_models_share_and_python_models_have_their_own(tmp_path):
    onnx_model(tmp_path, "small")
    python_model(tmp_path, "echo")
    python_model(tmp_path, "echo_too")
    with RunningServer(tmp_path, "--resident-bytes", str(2000 * MB)) as server:
        names = sorted(any("shared-" in part for part in one.cmdline()) for one in server.workers())
        assert names == [False, False, True]
        assert resident(server) == {"small", "echo", "echo_too"}
        assert server.metric("headrace_model_memory_bytes", model="echo") > 10 * MB
