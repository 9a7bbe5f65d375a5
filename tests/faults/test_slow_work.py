"""Work that takes too long: hanging workers, deadlines that pass, clients that leave."""

import threading

import pytest
from held_work import HELD, Busy, connections
from running_server import RunningServer
from system.load import GrpcClient, HttpClient, Load, all_at_once, fake_model, infer, infer_message, python_model

OWN_TIMEOUT_S = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("slow")
    fake_model(
        repository,
        "guarded",
        "max_batch_size: 4\nbatching: {max_queue_delay_us: 2000000}\nexecution_timeout_s: 1\n",
    )
    fake_model(repository, "pair", "execution_timeout_s: 1\ninstances: [{count: 2}]\nmax_batch_size: 1\n")
    python_model(repository, "patient", HELD, config="batching: {refuse_late: false}\n")
    python_model(repository, "impatient", HELD, config=f"batching: {{default_timeout_us: {OWN_TIMEOUT_S}000000}}\n")
    with RunningServer(repository) as running:
        yield running


@pytest.fixture(autouse=True)
def idle(server):
    """No test begins while an earlier one's work still runs."""
    for model in ("guarded", "pair", "patient", "impatient"):
        server.wait_for(
            lambda model=model: (
                count(server, "headrace_executing_batches", model=model) == 0
                and count(server, "headrace_queue_requests", model=model) == 0
            )
        )


@pytest.fixture
def gate(tmp_path):
    """What held work waits for; it goes on at the end of the test at the latest."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


def count(server, name, **labels):
    return server.metric(name, **labels)


# -- hanging workers ---------------------------------------------------------------------------------------------------


def test_a_hanging_worker_is_killed_and_only_its_cause_refused(server):
    died = count(server, "headrace_worker_deaths_total", model="guarded")
    *mates, hanging = all_at_once(
        server.http, "guarded", [([1.0], None), ([2.0], None), ([3.0], None), ([4.0], {"fake_hang": True})]
    )
    assert hanging.status == 500
    assert "longer than 1 s" in hanging.detail
    assert [one.values for one in mates] == [[1.0], [2.0], [3.0]], mates
    assert hanging.seconds < 20
    assert count(server, "headrace_worker_deaths_total", model="guarded") - died == 2


def test_the_other_instance_serves_while_one_hangs(server):
    server.wait_for(lambda: count(server, "headrace_instances_up", model="pair") == 2)
    outcomes = []
    hanging = threading.Thread(target=lambda: outcomes.append(infer(server.http, "pair", [1.0], {"fake_hang": True})))
    hanging.start()
    with Load(server, "pair", http=3, grpc=1) as load:
        hanging.join()
        load.wait_answers(20)
    assert outcomes[0].status == 500
    assert not load.failed


# -- deadlines ---------------------------------------------------------------------------------------------------------


def test_a_request_that_waited_too_long_is_answered_in_time_and_not_run(server, gate):
    executed = count(server, "nv_inference_exec_count", model="patient")
    rejected = count(server, "nv_inference_request_failure", model="patient", reason="REJECTED")
    with Busy(server, "patient", gate) as busy:
        outcomes = all_at_once(server.http, "patient", [([float(n)], {"timeout": 150_000}) for n in range(8)])
        assert [one.status for one in outcomes] == [503] * 8, outcomes
        assert all("Request timeout expired" in one.detail for one in outcomes)
        assert all(one.seconds > 0.1 for one in outcomes)
        assert busy.outcomes == [], "they were told before it was their turn"
        assert all(one.headers["retry-after"] for one in outcomes)
    assert busy.outcomes[0].ok
    assert infer(server.http, "patient", [5.0]).values == [5.0]
    # The one that was under way, at most one that the worker had been given already, and the last.
    assert count(server, "nv_inference_exec_count", model="patient") - executed <= 3
    assert count(server, "nv_inference_request_failure", model="patient", reason="REJECTED") - rejected == 8


def test_a_request_under_way_is_answered_at_its_deadline(server, gate):
    outcome = infer(server.http, "patient", [1.0], {"timeout": 200_000, "gate": str(gate)})
    assert outcome.status == 503
    assert outcome.seconds > 0.15
    gate.touch()  # and not before
    assert infer(server.http, "patient", [2.0]).values == [2.0]


def test_the_models_own_timeout_holds_unless_a_request_has_a_shorter_one(server, gate):
    assert infer(server.http, "impatient", [1.0]).ok
    held = {"gate": str(gate)}
    own, longer = all_at_once(server.http, "impatient", [([1.0], held), ([1.0], {"timeout": 60_000_000, **held})])
    assert own.status == 503
    assert longer.status == 503, "a request may ask for less, not for more"
    shorter = infer(server.http, "impatient", [1.0], {"timeout": 20_000})
    assert (shorter.status, shorter.seconds < OWN_TIMEOUT_S) == (503, True)


def test_a_grpc_deadline_takes_the_request_back(server, gate):
    executed = count(server, "nv_inference_exec_count", model="patient")
    clients = [GrpcClient(server.grpc, "patient") for _ in range(5)]
    try:
        for client in clients:
            assert client.infer([1.0]).ok
        with Busy(server, "patient", gate) as busy:
            threads = []
            outcomes = []
            for client in clients:
                call = threading.Thread(
                    target=lambda client=client: outcomes.append(client.infer([1.0], timeout_s=0.15))
                )
                call.start()
                threads.append(call)
            for thread in threads:
                thread.join()
            assert busy.outcomes == []
            for client in clients:
                hear_from(client)
        assert [one.status for one in outcomes] == ["DEADLINE_EXCEEDED"] * 5
        assert clients[0].infer([2.0]).values == [2.0]
    finally:
        for client in clients:
            client.close()
    assert count(server, "nv_inference_exec_count", model="patient") - executed <= 5 + 3


def hear_from(client):
    """An answer on the same connection: all that the client has sent before has arrived."""
    assert len(client._call(infer_message("pair", [1.0])).outputs) == 1


def test_the_timeout_parameter_holds_over_grpc(server, gate):
    client = GrpcClient(server.grpc, "patient")
    try:
        outcome = client.infer([1.0], {"timeout": 150_000, "gate": str(gate)})
    finally:
        client.close()
    assert outcome.status == "DEADLINE_EXCEEDED"
    assert "Request timeout expired" in outcome.detail


# -- clients that leave ------------------------------------------------------------------------------------------------


def cancelled(server):
    return count(server, "nv_inference_request_failure", model="patient", reason="CANCELED")


def test_what_http_clients_left_behind_is_dropped(server, gate):
    executed, dropped = count(server, "nv_inference_exec_count", model="patient"), cancelled(server)
    with Busy(server, "patient", gate):
        others = connections(server)
        clients = [HttpClient(server.http, "patient") for _ in range(6)]
        for client in clients:
            client.send([1.0])
        server.wait_for(lambda: count(server, "headrace_queue_requests", model="patient") >= 5)
        theirs = connections(server) - others
        for client in clients:
            client.close()
        server.wait_for(lambda: not theirs & connections(server))
    assert infer(server.http, "patient", [2.0]).values == [2.0]
    assert count(server, "nv_inference_exec_count", model="patient") - executed <= 3
    server.wait_for(lambda: cancelled(server) - dropped == 6)


def test_what_grpc_clients_cancelled_is_dropped(server, gate):
    executed, dropped = count(server, "nv_inference_exec_count", model="patient"), cancelled(server)
    client = GrpcClient(server.grpc, "patient")
    try:
        with Busy(server, "patient", gate):
            calls = [client.start([1.0]) for _ in range(6)]
            server.wait_for(lambda: count(server, "headrace_queue_requests", model="patient") >= 5)
            assert all(call.cancel() for call in calls)
            hear_from(client)
        assert client.infer([2.0]).values == [2.0]
    finally:
        client.close()
    assert count(server, "nv_inference_exec_count", model="patient") - executed <= 3
    server.wait_for(lambda: cancelled(server) - dropped == 6)


def test_clients_that_leave_free_their_places_in_the_queue(tmp_path, gate):
    """A full queue of requests that nobody waits for takes new ones."""
    python_model(tmp_path / "models", "short", HELD, config="batching: {max_queue_size: 3}\n")
    with RunningServer(tmp_path / "models") as small, Busy(small, "short", gate) as busy:
        others = connections(small)
        clients = [HttpClient(small.http, "short") for _ in range(4)]  # one is given to the worker, three wait
        for client in clients:
            client.send([1.0])
        small.wait_for(lambda: count(small, "headrace_queue_requests", model="short") == 3)
        assert infer(small.http, "short", [1.0]).status == 503
        theirs = connections(small) - others
        for client in clients:
            client.close()
        small.wait_for(lambda: not theirs & connections(small))
        outcomes = []
        new = threading.Thread(target=lambda: outcomes.append(infer(small.http, "short", [2.0])))
        new.start()
        small.wait_for(lambda: outcomes or count(small, "headrace_queue_requests", model="short") == 1)
        busy.end()
        new.join()
        assert outcomes[0].values == [2.0], outcomes
