"""Workers die: under load, by one request's fault, while they load, again and again. Nobody else notices."""

import random
import time

import psutil
import pytest
from running_server import RunningServer
from system.load import (
    ECHO,
    GrpcClient,
    Load,
    all_at_once,
    fake_model,
    infer,
    onnx_model,
    python_model,
    wait_for,
)

KINDS = {"segfault": "signal SIGSEGV", "exit": "exit status 70", "kill": "signal SIGKILL", "abort": "signal SIGABRT"}
BATCHED = """
    max_batch_size: 4
    batching: {max_queue_delay_us: 20000000}  # four requests of one row make a batch, at once
"""


def reason(server, name):
    status, entries = server.post("/v2/repository/index")
    assert status == 200
    (entry,) = [one for one in entries if one["name"] == name]
    return entry["state"], entry["reason"]


# -- from outside ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mortal(tmp_path_factory):
    repository = tmp_path_factory.mktemp("mortal")
    onnx_model(repository, "adder")
    python_model(repository, "mirror")
    fake_model(repository, "twins", "instances: [{device: cpu, count: 2}]\nparameters: {fake_delay_ms: 5}\n")
    with RunningServer(repository) as server:
        yield server


def loads(server):
    return [
        Load(server, "adder", http=2, grpc=1, expected=lambda values, _: [value + 1 for value in values]),
        Load(server, "mirror", http=2, grpc=1),
        Load(server, "twins", http=1, grpc=1),
    ]


def test_killing_every_worker_again_and_again_fails_no_request(mortal):
    restarts_before = deaths(mortal)
    adder, mirror, twins = loads(mortal)
    rounds = 0
    with adder, mirror, twins:
        ends_at = time.monotonic() + 10
        while rounds < 3 or time.monotonic() < ends_at:
            for load in (adder, mirror, twins):
                load.wait_answers(20)
            for name in ("adder", "mirror", "twins"):
                mortal.wait_for(lambda name=name: mortal.model_ready(name))
            time.sleep(random.uniform(0, 0.3))  # anywhere in a batch
            mortal.kill_workers()
            rounds += 1
        for load in (adder, mirror, twins):
            load.wait_answers(20)
    for load in (adder, mirror, twins):
        assert not load.failed
    assert deaths(mortal) - restarts_before >= 3 * rounds


def test_killing_one_worker_after_the_other_fails_no_request(mortal):
    adder, mirror, twins = loads(mortal)
    with adder, mirror, twins:
        ends_at = time.monotonic() + 5
        while time.monotonic() < ends_at:
            workers = mortal.workers()
            if workers:
                random.choice(workers).kill()
            time.sleep(0.25)  # a restarting worker is killed as well as one that serves
        for load in (adder, mirror, twins):
            load.wait_answers(20)
    for load in (adder, mirror, twins):
        # One that has just come back may be hit while it runs what the one before it died of: that is not tried again.
        assert all("2 times in a row" in one.detail for one in load.failed), load.failed
        assert len(load.failed) <= 1


def deaths(server):
    return sum(server.metric("headrace_worker_deaths_total", model=name) for name in ("adder", "mirror", "twins"))


def test_the_other_instance_serves_while_one_is_restarted(mortal):
    mortal.wait_for(lambda: all_serve(mortal))
    with Load(mortal, "twins", http=4, grpc=2) as load:
        load.wait_answers(50)
        twin = next(worker for worker in mortal.workers() if worker_of(mortal, "twins", worker))
        twin.kill()
        psutil.wait_procs([twin], timeout=30)
        assert mortal.model_ready("twins")
        load.wait_answers(50)
        mortal.wait_for(lambda: mortal.metric("headrace_instances_up", model="twins") == 2)
        load.stop()
    assert not load.failed
    assert max(one.seconds for one in load.outcomes) < 15


def all_serve(server):
    """Whether all four workers are up, with all that they have."""
    ready = all(server.model_ready(name) for name in ("adder", "mirror", "twins"))
    return len(server.workers()) == 4 and ready and server.metric("headrace_instances_up", model="twins") == 2


def worker_of(server, name, worker):
    """Whether this worker's death would leave the model with an instance less: the twins have two of four workers."""
    up = server.metric("headrace_instances_up", model=name)
    assert up == 2
    numbers = sorted(int(one.cmdline()[-2].rpartition("-")[2]) for one in server.workers())
    return int(worker.cmdline()[-2].rpartition("-")[2]) in numbers[-2:]


def test_a_dead_worker_leaves_nothing_behind(mortal):
    """Neither descriptors nor memory of the front process grow with the deaths."""
    front = psutil.Process(mortal.process.pid)

    def one_round():
        for name in ("adder", "mirror", "twins"):
            assert infer(mortal.http, name, [0.0]).ok
        before = mortal.workers()
        for worker in before:
            worker.kill()
        psutil.wait_procs(before, timeout=30)
        mortal.wait_for(lambda: all_serve(mortal) and not set(before) & set(mortal.workers()))

    mortal.wait_for(lambda: all_serve(mortal))
    one_round()
    descriptors = front.num_fds()
    one_round()
    one_round()
    wait_for(lambda: front.num_fds() <= descriptors + 2, what="descriptors to be closed")


# -- by a request's fault ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fragile(tmp_path_factory):
    repository = tmp_path_factory.mktemp("fragile")
    fake_model(repository, "batched", BATCHED)
    fake_model(repository, "single", "max_batch_size: 1\n")
    fake_model(repository, "bystander")
    with RunningServer(repository) as server:
        yield server


@pytest.mark.parametrize("kind", KINDS)
def test_a_poison_request_is_refused_alone(fragile, kind):
    died = fragile.metric("headrace_worker_deaths_total", model="batched")
    again = fragile.metric("headrace_retried_requests_total", model="batched")
    with Load(fragile, "bystander", http=2) as bystander:
        *mates, poison = all_at_once(
            fragile.http,
            "batched",
            [([1.0], None), ([2.0], None), ([3.0], None), ([4.0], {"fake_crash": kind})],
        )
    assert poison.status == 500
    assert "the worker died" in poison.detail
    assert KINDS[kind] in poison.detail
    assert "not tried again" in poison.detail
    assert "batched" in poison.detail
    assert [one.values for one in mates] == [[1.0], [2.0], [3.0]], mates
    assert fragile.metric("headrace_worker_deaths_total", model="batched") - died == 2
    assert fragile.metric("headrace_retried_requests_total", model="batched") - again >= 4, "they were one batch"
    assert not bystander.failed
    assert max(one.seconds for one in bystander.outcomes) < 15, "another model's worker is not concerned"
    fragile.wait_for(lambda: fragile.model_ready("batched"))


def test_poison_over_grpc_is_internal(fragile):
    client = GrpcClient(fragile.grpc, "single")
    try:
        outcome = client.infer([1.0], {"fake_crash": "exit"})
        assert outcome.status == "INTERNAL"
        assert "the worker died" in outcome.detail
        assert client.infer([2.0]).values == [2.0]
    finally:
        client.close()


def test_many_poison_requests_take_nobody_with_them(fragile):
    requests = [([float(number)], {"fake_crash": "exit"} if number % 4 == 0 else None) for number in range(8)]
    outcomes = all_at_once(fragile.http, "single", requests)
    assert [one.status for one in outcomes] == [500 if parameters else 200 for _, parameters in requests], outcomes


# -- while loading -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unloadable(tmp_path_factory):
    repository = tmp_path_factory.mktemp("unloadable")
    for kind in KINDS:
        fake_model(repository, f"dies_by_{kind}", f"parameters: {{fake_load_crash: {kind}}}\n")
    fake_model(repository, "good")
    with RunningServer(repository) as server:
        yield server


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_dies_while_it_loads(unloadable, kind):
    state, why = reason(unloadable, f"dies_by_{kind}")
    assert state == "UNAVAILABLE"
    assert "the worker died while it loaded the model" in why
    assert KINDS[kind] in why
    assert infer(unloadable.http, f"dies_by_{kind}", [1.0]).status == 404


def test_a_load_that_never_ends_is_given_up(tmp_path):
    fake_model(tmp_path, "endless", "parameters: {fake_load_delay_ms: 600000}\n")
    with RunningServer(tmp_path, "--load-timeout", "1") as server:
        state, why = reason(server, "endless")
        assert state == "UNAVAILABLE"
        assert "longer than 1 s" in why
        server.wait_for(lambda: not server.workers())


def test_others_serve_beside_models_that_cannot_load(unloadable):
    assert unloadable.get("/v2/health/ready")[0] == 200
    assert infer(unloadable.http, "good", [1.0]).values == [1.0]
    unloadable.wait_for(lambda: len(unloadable.workers()) == 1)  # none is left of those that failed


# -- again and again ---------------------------------------------------------------------------------------------------


def test_a_model_that_crashes_at_each_restart_is_not_ready_and_comes_back(tmp_path):
    repository, cursed = tmp_path / "repository", tmp_path / "cursed"
    code = f"import os\nfrom pathlib import Path\nif Path({str(cursed)!r}).exists():\n    os._exit(3)\nif True:"
    python_model(repository, "looping", code + ECHO)
    fake_model(repository, "steady")
    with RunningServer(repository) as server, Load(server, "steady", http=2, grpc=1) as steady:
        assert infer(server.http, "looping", [1.0]).ok
        cursed.touch()
        server.kill_workers()
        waiting = infer(server.http, "looping", [1.0])  # accepted while there was hope
        assert waiting.status == 503, waiting
        assert "exit status 3" in waiting.detail
        state, why = reason(server, "looping")
        assert state == "UNAVAILABLE"
        assert "exit status 3" in why
        assert not server.model_ready("looping")
        again = infer(server.http, "looping", [1.0])
        assert again.status == 503
        assert "exit status 3" in again.detail
        assert again.seconds < 10, "it is refused at once"
        assert again.headers["retry-after"]
        assert server.get("/v2/health/ready")[0] == 200
        steady.wait_answers(20)
        cursed.unlink()
        server.wait_for(lambda: server.model_ready("looping"))
        assert infer(server.http, "looping", [1.0]).values == [1.0]
    assert not steady.failed
