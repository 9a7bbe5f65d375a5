"""Forms of a plan that die and hang: what was accepted is answered by the model as it was dropped in."""

import threading

import pytest
from hand_made_plans import obedient, put_plan
from running_server import RunningServer
from system.load import REFUSED, Load, all_at_once, infer, onnx_model

from headrace_backends.optimize.plan_cache import PlanCache


@pytest.fixture
def cache(tmp_path):
    return PlanCache(tmp_path / "plans")


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    return folder


def serve(repository, cache, *flags):
    return RunningServer(repository, "--plan-cache", str(cache.root), "--drift-interval", "0", *flags)


def planned(server, model="adder"):
    try:
        return server.metric("headrace_plan_info", model=model) == 1
    except AssertionError:
        return False


@pytest.mark.parametrize("order", ["crash", "hang"])
def test_a_request_that_a_form_dies_of_is_answered_by_the_reference(repository, cache, tmp_path, order):
    onnx_model(repository, "adder", config="execution_timeout_s: 1.0\n")
    marker = tmp_path / "order"
    put_plan(cache, repository / "adder", obedient(marker))
    with serve(repository, cache) as server:
        assert planned(server)
        marker.write_text(order)
        requests = [([float(number)], None) for number in range(6)] + [([500.0], None)]
        with Load(server, "adder", http=3, expected=lambda values, _: [value + 1 for value in values]) as load:
            outcomes = all_at_once(server.http, "adder", requests)
        assert [one.values for one in outcomes] == [[values[0] + 1] for values, _ in requests]
        assert load.failed == []
        server.wait_for(lambda: not planned(server))
        assert server.metric("headrace_plan_refusals_total", model="adder") == 1
        assert "is refused: its worker died while it ran requests" in server.output
        assert infer(server.http, "adder", [500.0]).values == [501.0]


def test_one_death_from_outside_is_forgiven(repository, cache, tmp_path):
    onnx_model(repository, "adder")
    put_plan(cache, repository / "adder", obedient(tmp_path / "order"))
    with serve(repository, cache) as server:
        with Load(server, "adder", http=3, expected=lambda values, _: [value + 1 for value in values]) as load:
            load.wait_answers(20)
            (worker,) = server.workers()
            worker.kill()
            load.wait_answers(100)
        assert load.failed == []
        assert planned(server)


def test_a_form_that_cannot_come_back_gives_way(repository, cache, tmp_path):
    onnx_model(repository, "adder")
    marker = tmp_path / "order"
    put_plan(cache, repository / "adder", obedient(marker))
    with serve(repository, cache) as server:
        with Load(server, "adder", http=3, expected=lambda values, _: [value + 1 for value in values]) as load:
            load.wait_answers(20)
            marker.write_text("raise")  # of which a batch fails, so the clients would see it
            load.stop()
        (worker,) = server.workers()
        worker.kill()
        server.wait_for(lambda: not planned(server))
        assert infer(server.http, "adder", [1.0]).values == [2.0]
        assert "is refused: its recorded requests: example 0 is refused: RuntimeError: told to" in server.output


def test_requests_wait_while_the_reference_is_loaded_and_a_stop_loses_none(repository, cache, tmp_path):
    onnx_model(repository, "adder")
    marker = tmp_path / "order"
    put_plan(cache, repository / "adder", obedient(marker))
    with serve(repository, cache) as server:
        marker.write_text("crash")
        with Load(
            server, "adder", http=4, expected=lambda values, _: [value + 1 for value in values], until_refused=True
        ) as load:
            load.wait_answers(10)
            outcomes = []
            poison = threading.Thread(target=lambda: outcomes.append(infer(server.http, "adder", [700.0])))
            poison.start()
            server.wait_for(lambda: server.metric("headrace_worker_deaths_total", model="adder") >= 1)
            assert server.stop() == 0
            poison.join(30)
            load.join()
        assert outcomes[0].values == [701.0], outcomes
        assert [one for one in load.failed if one.status != REFUSED] == []


def test_a_model_that_cannot_be_served_either_way_is_told_and_comes_back(repository, cache, tmp_path):
    folder = onnx_model(repository, "adder")
    marker = tmp_path / "order"
    put_plan(cache, repository / "adder", obedient(marker))
    good = (folder / "1" / "model.onnx").read_bytes()
    with serve(repository, cache, "--model-control", "none") as server:
        (folder / "1" / "model.onnx").write_bytes(b"no model any more")
        marker.write_text("crash")
        outcome = infer(server.http, "adder", [900.0])
        assert outcome.status == 503, outcome
        assert "as it was dropped in" in outcome.detail
        assert not server.model_ready("adder")
        (folder / "1" / "model.onnx").write_bytes(good)
        server.wait_for(lambda: server.model_ready("adder"))
        assert infer(server.http, "adder", [900.0]).values == [901.0]


def test_what_a_form_dies_of_is_answered_though_the_model_is_unloaded_meanwhile(repository, cache, tmp_path):
    onnx_model(repository, "adder")
    marker = tmp_path / "order"
    put_plan(cache, repository / "adder", obedient(marker))
    with serve(repository, cache, "--model-control", "explicit", "--load-model", "adder") as server:
        marker.write_text("crash")
        outcomes = []
        poison = threading.Thread(target=lambda: outcomes.append(infer(server.http, "adder", [700.0])))
        poison.start()
        server.wait_for(lambda: server.metric("headrace_worker_deaths_total", model="adder") >= 1)
        assert server.post("/v2/repository/models/adder/unload")[0] == 200
        poison.join(30)
        assert outcomes[0].values == [701.0], outcomes
        assert not server.model_ready("adder")
        server.wait_for(lambda: not server.workers())
