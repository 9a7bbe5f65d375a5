"""Plans served by the real server: found, swapped in and out under traffic, and never trusted without proof."""

import json
import subprocess
import sys

import pytest
from hand_made_plans import SIGNATURE, obedient, other_onnx, put_plan
from running_server import RunningServer
from system.load import Load, infer, onnx_model, replace

from headrace.core.model import Signature
from headrace_backends.optimize.accuracy import Budget
from headrace_backends.optimize.form import Form
from headrace_backends.optimize.plan_cache import PlanCache

OPTIMIZE = "optimize: {budget: {metric: cosine, min: 0.99}, allow: [int8_dynamic]}"
PLUS_ONE = {"expected": lambda values, _: [value + 1 for value in values]}


@pytest.fixture
def cache(tmp_path):
    return PlanCache(tmp_path / "plans")


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    return folder


def serve(repository, cache, *flags):
    return RunningServer(
        repository, "--plan-cache", str(cache.root), "--model-control", "explicit", "--load-model", "*", *flags
    )


def planned(server, model):
    try:
        return server.metric("headrace_plan_info", model=model) == 1
    except AssertionError:
        return False


def load_again(server, model):
    status, answer = server.post(f"/v2/repository/models/{model}/load")
    assert status == 200, answer


def answer(server, model):
    outcome = infer(server.http, model, [1.0, 2.0])
    assert outcome.ok, outcome
    return outcome.values


def test_each_version_is_served_by_the_plan_that_fits_or_as_it_was_dropped_in(repository, cache):
    for name in ("plain", "corrupted", "lying", "strange", "stale", "wishes", "granted", "unloadable"):
        onnx_model(repository, name, config={"wishes": OPTIMIZE, "granted": OPTIMIZE}.get(name))
    form = other_onnx(1)
    put_plan(cache, repository / "plain", form)
    (put_plan(cache, repository / "corrupted", form) / "model.onnx").write_bytes(other_onnx(5))
    lying = put_plan(cache, repository / "lying", other_onnx(5), add=5, recorded=1)
    put_plan(cache, repository / "strange", form, signature=Signature(SIGNATURE.inputs, SIGNATURE.inputs, 32))
    put_plan(cache, repository / "stale", form)
    replace(repository / "stale" / "1", "more.txt", "x")
    put_plan(cache, repository / "wishes", form)
    budget = Budget("cosine", min=0.99)
    put_plan(cache, repository / "granted", form, budget=budget, allow=("int8_dynamic",))
    put_plan(cache, repository / "unloadable", b"no model")
    with serve(repository, cache) as server:
        for name in ("plain", "corrupted", "lying", "strange", "stale", "wishes", "granted", "unloadable"):
            assert answer(server, name) == [2.0, 3.0], name
        assert [name for name in ("plain", "granted") if not planned(server, name)] == []
        refused = ("corrupted", "lying", "strange", "unloadable")
        assert not any(planned(server, name) for name in (*refused, "stale", "wishes"))
        for name in refused:
            assert server.metric("headrace_plan_refusals_total", model=name) == 1
        assert server.metric("headrace_plan_replays_total", model="plain", result="right") == 1
        assert server.metric("headrace_plan_replays_total", model="lying", result="wrong") == 1
        assert server.metric("headrace_plan_speedup", model="plain") == 2.5
        said = server.output
        assert "plan of model corrupted version 1 is refused: its file 'model.onnx' is not what was put there" in said
        assert "plan of model lying version 1 is refused: its recorded requests: output 'y' is off by" in said
        assert "plan of model strange version 1 is refused: its outputs are ['y'], the reference has ['x']" in said
        assert "plan of model unloadable version 1 is refused" in said
        assert not lying.exists()  # set aside
        assert [one.name.partition("-")[0] for one in lying.parent.iterdir()] == ["refused"]
        # Clients are told of what was dropped in.
        status, config = server.get("/v2/models/plain/config")
        assert (status, config["backend"], config["platform"]) == (200, "onnxruntime", "onnxruntime_onnx")
        load_again(server, "lying")  # and it is not tried again
        assert server.metric("headrace_plan_refusals_total", model="lying") == 1


def test_a_plan_is_swapped_in_and_out_without_a_failed_request(repository, cache):
    onnx_model(repository, "adder")
    with serve(repository, cache) as server, Load(server, "adder", http=4, grpc=2, **PLUS_ONE) as load:
        load.wait_answers(50)
        assert not planned(server, "adder")
        folder = put_plan(cache, repository / "adder", other_onnx(1))
        load_again(server, "adder")
        assert planned(server, "adder")
        load.wait_answers(50)
        put_plan(cache, repository / "adder", other_onnx(1), form=Form("onnxruntime", threads=1))  # another one
        load_again(server, "adder")
        assert server.metric("headrace_plan_info", model="adder", form="onnxruntime") == 1
        load.wait_answers(50)
        cache.remove(folder)
        load_again(server, "adder")
        assert not planned(server, "adder")
        load.wait_answers(50)
        # A plan whose form cannot be trusted never gets to see a request.
        put_plan(cache, repository / "adder", other_onnx(5), add=5, recorded=1)
        load_again(server, "adder")
        assert not planned(server, "adder")
        load.wait_answers(50)
        load.stop()
        assert load.failed == []


def test_off_means_that_no_plan_is_used(repository, cache):
    onnx_model(repository, "adder")
    put_plan(cache, repository / "adder", other_onnx(1))
    with serve(repository, cache, "--optimize", "off") as server:
        assert answer(server, "adder") == [2.0, 3.0]
        assert not planned(server, "adder")


def test_a_form_whose_answers_drift_is_replaced_before_it_answers_anybody_wrong(repository, cache, tmp_path):
    onnx_model(repository, "adder")
    marker = tmp_path / "order"
    put_plan(cache, repository / "adder", obedient(marker))
    with serve(repository, cache, "--drift-interval", "0.5") as server:
        assert planned(server, "adder")
        inferences = server.metric("nv_inference_count", model="adder")
        server.wait_for(lambda: server.metric("headrace_plan_replays_total", model="adder", result="right") >= 3)
        assert server.metric("nv_inference_count", model="adder") == inferences  # replays are nobody's requests
        marker.write_text("wrong")
        server.wait_for(lambda: not planned(server, "adder"))
        assert answer(server, "adder") == [2.0, 3.0]
        assert server.metric("headrace_plan_replays_total", model="adder", result="wrong") == 1
        assert server.metric("headrace_plan_refusals_total", model="adder") == 1
        assert "its answers have changed while it served: output 'y' is off by" in server.output
        assert server.model_ready("adder")


def test_a_busy_form_is_not_disturbed_by_checks(repository, cache, tmp_path):
    onnx_model(repository, "adder")
    put_plan(cache, repository / "adder", obedient(tmp_path / "order"))
    with serve(repository, cache, "--drift-interval", "0.3") as server:
        with Load(server, "adder", http=2, **PLUS_ONE) as load:
            load.wait_answers(200)
        assert load.failed == []


def test_models_that_leave_the_memory_come_back_by_their_plan_or_without(repository, cache, tmp_path):
    marker = tmp_path / "order"
    for name in ("first", "second", "third"):
        onnx_model(repository, name)
        put_plan(cache, repository / name, obedient(marker))
    with serve(repository, cache, "--resident-bytes", str(60 * 1024 * 1024)) as server:
        for name in ("first", "second", "third", "first"):
            assert answer(server, name) == [2.0, 3.0]
        away = [
            name for name in ("first", "second", "third") if server.metric("headrace_model_resident", model=name) == 0
        ]
        assert away, server.output
        marker.write_text("wrong")
        assert answer(server, away[0]) == [2.0, 3.0]  # its replay failed, and the model itself has answered
        assert server.metric("headrace_plan_refusals_total", model=away[0]) == 1


def test_the_index_and_the_start_tell_of_the_plan(repository, cache):
    onnx_model(repository, "adder")
    put_plan(cache, repository / "adder", other_onnx(1))
    with serve(repository, cache) as server:
        assert "adder 1: READY: onnxruntime (as planned: onnxruntime + simplify)" in server.output
        status, entries = server.post("/v2/repository/index")
        assert status == 200, json.dumps(entries)
        assert [one["state"] for one in entries] == ["READY"]


def explain(cache, *arguments):
    """What the command prints."""
    return subprocess.run(
        [sys.executable, "-m", "headrace", "explain", *arguments, "--plan-cache", str(cache.root)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout


def test_explain_tells_the_story(repository, cache):
    for name in ("fast", "none", "lying"):
        onnx_model(repository, name)
    folder = put_plan(cache, repository / "fast", other_onnx(1))
    lying = put_plan(cache, repository / "lying", other_onnx(5), add=5, recorded=1)
    (folder / "report.html").write_text("<html>")
    said = explain(cache, "fast", "-r", str(repository))
    for line in (
        "  backend: onnxruntime (from the file's ending '.onnx')",
        "  note: answered its 4 recorded request(s) as it did when they were recorded",
        "  plan: onnxruntime, 1 x all threads, 2.5 x as fast as it was dropped in",
        "    steps: simplify",
        "    budget: none, so only what changes no answers; objective: latency",
        "    batch of 8: 0.4 ms, as it was dropped in 1 ms (2.5 x)",
        f"    report: {folder}/report.html",
    ):
        assert line in said.splitlines(), said
    none = explain(cache, "none", "-r", str(repository))
    assert "  plan: none (none was made); it is served as it was dropped in" in none
    told = explain(cache, "lying", "-r", str(repository))
    assert "  plan: none (refused: its recorded requests: output 'y' is off by" in told
    assert lying.is_dir()  # who only looks changes nothing
    onnx_model(repository, "fast", version=2)
    with serve(repository, cache) as server:
        assert "plan: onnxruntime + simplify" not in explain(cache, "fast", "-u", f"http://{server.http}")
    (repository / "fast" / "2" / "model.onnx").unlink()
    (repository / "fast" / "2").rmdir()
    with serve(repository, cache) as server:
        assert "plan: onnxruntime + simplify, 2.5 x" in explain(cache, "fast", "-u", f"http://{server.http}")


def test_where_memory_is_short_a_distrusted_form_makes_room_for_the_reference(repository, cache, tmp_path):
    onnx_model(repository, "adder", config="memory_limit_bytes: 2000000000\n")  # so it shares no process
    marker = tmp_path / "order"
    put_plan(cache, repository / "adder", obedient(marker))
    with serve(repository, cache, "--resident-bytes", str(10**10)) as server:
        planned_bytes = server.metric("headrace_model_memory_bytes", model="adder")
    with serve(repository, cache, "--resident-bytes", str(10**10), "--optimize", "off") as server:
        own_bytes = server.metric("headrace_model_memory_bytes", model="adder")
    limit = int(max(planned_bytes, own_bytes) * 1.2)
    assert limit < planned_bytes + own_bytes  # so not both at once
    with serve(repository, cache, "--resident-bytes", str(limit)) as server:
        assert planned(server, "adder")
        marker.write_text("crash")
        outcome = infer(server.http, "adder", [500.0])  # it waits while the one goes and the other comes
        assert outcome.values == [501.0], outcome
        assert not planned(server, "adder")
        assert server.metric("headrace_resident_bytes") <= limit
