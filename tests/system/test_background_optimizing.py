"""The optimiser beside a running server: what is run when, and what is said of it. The program is a small fake."""

import json
import shutil
import threading
from pathlib import Path

import psutil
import pytest
from running_server import RunningServer
from system.load import infer, infer_body, onnx_model, python_model, replace, wait_for

from headrace.applying import CannotApply, apply_plan

made = pytest.importorskip("hand_made_plans", reason="without plans there is nothing to be optimised for")

PROGRAM = (str(Path(__file__).parents[1] / "optimizing_server.py"),)
ASKS = "optimize: {objective: latency}\n"
PATIENCE_S = 300  # a run has only what nobody else wants of the CPUs


class Beside:
    """A server with the fake beside it, and the fake's orders and notes."""

    def __init__(self, tmp_path, *flags):
        self.repository = tmp_path / "models"
        self.plans = tmp_path / "plans"
        self.orders = tmp_path / "orders"
        for folder in (self.repository, self.plans, self.orders):
            folder.mkdir()
        self.flags = flags

    def order(self, model, behaviour):
        (self.orders / model).write_text(behaviour)

    def serve(self):
        return RunningServer(
            self.repository,
            "--plan-cache",
            str(self.plans),
            *self.flags,
            env={"OPTIMIZER_ORDERS": str(self.orders)},
            program=PROGRAM,
        )

    def notes(self):
        file = self.orders / "notes"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def models(self):
        return [note["model"] for note in self.notes()]


@pytest.fixture
def beside(tmp_path):
    return Beside(tmp_path)


def runs(server, result):
    return server.metric("headrace_optimizer_runs_total", result=result)


def running(server, model):
    try:
        return server.metric("headrace_optimizer_running", model=model) == 1
    except AssertionError:
        return False


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def optimizers(server):
    """Runs that the server has started, and that live."""
    return [worker for worker in server.workers() if any("fake_optimizer.py" in part for part in worker.cmdline())]


def soon(server, condition):
    return server.wait_for(condition, PATIENCE_S)


def test_models_that_ask_for_it_are_optimised_one_after_the_other(beside):
    for name in ("a", "b", "c"):
        onnx_model(beside.repository, name, config=ASKS if name != "b" else "")
    python_model(beside.repository, "own_code", config=ASKS)
    beside.order("c", "crash")
    with beside.serve() as server:
        soon(server, lambda: runs(server, "failed") >= 2)
        assert beside.models() == ["a", "c"]  # each once: what failed waits for a minute, and has others go first
        # "a" said that it had made a plan, and there is none.
        assert "model a version 1 could not be optimised: the plan that was made is not used" in server.output
        assert "exit status 1: headrace: the moon is full; it goes on in 60 s" in server.output
        assert infer(server.http, "a", [1.0]).ok


def test_nothing_runs_unless_it_is_to(tmp_path):
    beside = Beside(tmp_path, "--optimize", "plans")
    onnx_model(beside.repository, "a", config=ASKS)
    with beside.serve() as server, pytest.raises(AssertionError, match="no series"):
        runs(server, "failed")
    assert beside.notes() == []


def test_a_run_ends_with_the_server(beside):
    onnx_model(beside.repository, "a", config=ASKS)
    beside.order("a", "hang")
    with beside.serve() as server:
        soon(server, beside.notes)
        soon(server, lambda: running(server, "a"))
        assert infer(server.http, "a", [1.0]).ok
        assert server.stop() == 0
    [note] = beside.notes()
    assert gone(note["pid"])
    wait_for(lambda: gone(note["child"]))


def test_a_run_ends_when_its_model_goes_and_begins_anew_when_it_has_changed(beside):
    folder = onnx_model(beside.repository, "a", config=ASKS)
    beside.order("a", "hang")
    with beside.serve() as server:
        soon(server, lambda: len(beside.notes()) == 1)
        replace(folder, "config.yaml", ASKS + "max_batch_size: 4\n")
        soon(server, lambda: len(beside.notes()) == 2)
        assert gone(beside.notes()[0]["pid"])
        assert "optimising model a version 1 is interrupted: it has changed" in server.output
        shutil.rmtree(folder)
        soon(server, lambda: gone(beside.notes()[1]["pid"]))
        soon(server, lambda: runs(server, "stopped") == 2)
        assert "is interrupted: it is not served any more" in server.output


def test_one_that_takes_too_long_is_stopped(tmp_path):
    beside = Beside(tmp_path, "--optimize-time-limit", "1")
    onnx_model(beside.repository, "a", config=ASKS)
    beside.order("a", "hang")
    with beside.serve() as server:
        soon(server, lambda: runs(server, "timed_out") == 1)
        assert "it took longer than 1 s; it goes on in 60 s" in server.output
        started = [pid for note in beside.notes() for pid in (note["pid"], note["child"])]  # none where it was too slow
        soon(server, lambda: all(map(gone, started)) and not optimizers(server))


# -- plans that are taken -------------------------------------------------------------------------------------------


def made_plan(beside, model):
    """A plan for a model that adds 1, in a cache beside the server's, and the order that puts it there."""
    elsewhere = beside.orders / "made"
    made.put_plan(made.PlanCache(elsewhere), beside.repository / model, made.other_onnx(1))
    return f"copy {elsewhere} {beside.plans}"


def test_a_plan_is_served_when_it_is_made_and_no_request_fails(beside):
    onnx_model(beside.repository, "a", config=ASKS)
    order = made_plan(beside, "a")
    beside.order("a", order)
    failed, stop = [], threading.Event()
    with beside.serve() as server:

        def ask():
            while not stop.is_set():
                outcome = infer(server.http, "a", [1.0])
                if not outcome.ok:
                    failed.append(outcome)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            soon(server, lambda: runs(server, "planned") == 1)
        finally:
            stop.set()
            thread.join()
        assert failed == []
        assert beside.models() == ["a"]
        assert "model a version 1 is optimised: a plan was made" in server.output


def test_a_plan_is_taken_by_request_under_every_model_control(tmp_path):
    beside = Beside(tmp_path, "--optimize", "plans", "--model-control", "none")
    onnx_model(beside.repository, "a")
    order = made_plan(beside, "a")
    with beside.serve() as server:
        url = f"http://{server.http}"
        with pytest.raises(CannotApply, match="as it was dropped in"):
            apply_plan(url, "a")
        shutil.copytree(*order.split()[1:], dirs_exist_ok=True)
        [line] = apply_plan(url, "a", beside.plans)
        assert line.startswith("served now: a version 1: onnxruntime")
        assert "x as fast" in line


# -- applying ----------------------------------------------------------------------------------------------------------


def test_applying_says_what_is_in_the_way(tmp_path):
    beside = Beside(tmp_path, "--optimize", "off")
    onnx_model(beside.repository, "a")
    with beside.serve() as server:
        with pytest.raises(CannotApply, match=r"refuses: this server uses no plans \(--optimize off\)"):
            apply_plan(f"http://{server.http}", "a")
        with pytest.raises(CannotApply, match="is it a Headrace server"):
            apply_plan(f"http://{server.http}/elsewhere", "a")
    with pytest.raises(CannotApply, match=r"no server answers at .*used when the server loads the model next"):
        apply_plan("http://127.0.0.1:1", "a")


def test_applying_with_other_plans_or_an_unknown_model_is_refused(tmp_path):
    beside = Beside(tmp_path, "--optimize", "plans")
    onnx_model(beside.repository, "a")
    with beside.serve() as server:
        url = f"http://{server.http}"
        with pytest.raises(CannotApply, match=f"this server's plans are in '{beside.plans}'"):
            apply_plan(url, "a", tmp_path / "other")
        with pytest.raises(CannotApply, match="'nobody' is not found"):
            apply_plan(url, "nobody")
        status, answer = server.post("/v2/repository/models/a/plan", {"plan": "mine"})
        assert status == 400
        assert "plan" in answer["error"]
        status, answer = server.post("/v2/repository/models/a/plan", {"plan_cache": str(beside.plans)})
        assert status == 200
        assert answer["versions"][0]["form"] == "onnxruntime, as it was dropped in"
        assert server.post("/v2/models/a/infer", infer_body([1.0]))[0] == 200
        assert list(beside.plans.iterdir()) == []
