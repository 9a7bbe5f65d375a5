"""Sequences when things go wrong: workers that die or hang, models that raise, clients that leave, deadlines."""

import http.client
import json
import queue
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from held_work import connections
from onnx import TensorProto, helper
from running_server import RunningServer
from system.load import python_model
from system.streams import stream_method
from system.test_sequence_serving import (
    NO_IDLING,
    OWN_STATE,
    ROUTES,
    TIMEOUT_S,
    TOTAL_STATE,
    OverGrpc,
    OverHttp,
    OverStream,
    accumulator,
    active,
    everything_ended,
    graph,
    http_body,
    message,
    message_reply,
    onnx_sequence,
    opened,
    sequence_parameters,
)

KILLED = "its worker died (signal SIGKILL)"
FULL = "batching: {max_queue_delay_us: 20000000, preferred_sizes: [4]}"  # four make a batch, at once

# The sum so far, which the server keeps. Parameters of the request say more.
SERVER_STATE = """
    import os
    import time

    import numpy as np

    from headrace_backends.python import Answer, InputError


    class Model:
        inputs = [
            {"name": "x", "datatype": "INT32", "shape": [-1, 1]},
            {"name": "total_in", "datatype": "INT32", "shape": [-1, 1]},
        ]
        outputs = [
            {"name": "y", "datatype": "INT32", "shape": [-1, 1]},
            {"name": "total_out", "datatype": "INT32", "shape": [-1, 1]},
        ]
        max_batch_size = 4

        def infer(self, inputs, requests):
            for one in requests:
                if "journal" in one.parameters:
                    with open(one.parameters["journal"], "a") as journal:
                        print(one.parameters["sequence_id"], file=journal)
            time.sleep(max(one.parameters.get("delay_ms", 0) for one in requests) / 1000)
            for gate in [one.parameters["gate"] for one in requests if "gate" in one.parameters]:
                while not os.path.exists(gate):  # held until there is that file
                    time.sleep(0.01)
            if any(one.parameters.get("raise") for one in requests):
                raise RuntimeError("as asked")
            totals = inputs["x"] + inputs["total_in"]
            return [
                Answer(error=InputError("as asked"))
                if one.parameters.get("refuse")
                else Answer({"y": total[None], "total_out": total[None]})
                for total, one in zip(totals, requests, strict=True)
            ]
"""


def server_state(repository, name, sequence="strategy: oldest, max_candidates: 8", more=""):
    """A model whose sums the server keeps, and that is as slow or bad as it is told to be."""
    config = f"{more}\nsequence: {{{sequence}, {NO_IDLING}, states: [{TOTAL_STATE}]}}\n"
    return python_model(repository, name, SERVER_STATE, config=config)


def own_state(repository, name, sequence="strategy: oldest, max_candidates: 8", more=""):
    """The like, which keeps its sums itself."""
    return python_model(repository, name, OWN_STATE, config=f"{more}\nsequence: {{{sequence}, {NO_IDLING}}}\n")


def only_worker(server):
    (one,) = server.workers()
    return one


def assert_lost(reply, model, identity, cause=KILLED):
    """Whether a client is told which of its sequences has ended, why, and what to do."""
    assert f"sequence {identity} of model '{model}' has ended: {cause}" in reply.error
    assert "begin it anew with sequence_start" in reply.error


def assert_begins_anew(client, model, identity, values=(5, 6, 7)):
    total = 0
    for index, value in enumerate(values):
        total += value
        marks = "start" if index == 0 else "end" if index == len(values) - 1 else ""
        assert client.step(model, value, identity, marks).value == total


@pytest.fixture(params=ROUTES)
def route(request):
    """One route after the other."""
    return request.param


# -- workers that die --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["strategy: direct", "strategy: oldest, max_candidates: 8"])
def test_sequences_that_were_at_rest_when_the_worker_died_are_refused_until_they_begin_anew(tmp_path, route, strategy):
    accumulator(tmp_path, "sum", strategy, "max_batch_size: 8")
    ids = [*range(1, 7), "seven", "eight"]
    with RunningServer(tmp_path) as server, opened(route, server) as client:
        for one in ids:
            assert client.step("sum", 100, one, "start").value == 100
        only_worker(server).kill()
        server.wait_for(lambda: active(server, "sum") == 0)
        for _ in range(2):  # as often as they try, also before the next worker is up
            for one in ids:
                reply = client.step("sum", 1, one)
                assert reply.refused
                assert_lost(reply, "sum", one)
        for one in ids:
            assert_begins_anew(client, "sum", one)
        # What was told once is not told of the sequences that came after.
        assert "must specify the START flag" in client.step("sum", 1, ids[0]).error
        server.wait_for(lambda: everything_ended(server, "sum"))
        assert server.metric("headrace_worker_deaths_total", model="sum") == 1


@pytest.mark.parametrize("make", [server_state, own_state])
def test_killed_in_the_middle_of_a_batch(tmp_path, route, make):
    """Two are at it, two wait behind them, one is at rest, one waits for a place: each is told, or has lost nothing."""
    journal = tmp_path / "journal"
    repository = tmp_path / "models"
    make(repository, "slow", "strategy: oldest, max_candidates: 3")
    with RunningServer(repository) as server, opened(route, server) as client, opened(OverStream, server) as behind:
        for one in (1, 2, 3):
            assert client.step("slow", 10, one, "start").value == 10
        running = []  # one runs, the other is staged behind it
        for one in (1, 2):
            running.append(client.start("slow", 1, one, delay_ms=3_600_000, journal=str(journal)))
            server.wait_for(lambda one=one: server.metric("headrace_executing_batches", model="slow") == one)
        if make is server_state:  # which says so when it begins
            server.wait_for(lambda: journal.exists() and journal.read_text())
        waiting = [behind.start("slow", 1, one, journal=str(journal)) for one in (1, 2)]
        newcomer = behind.start("slow", 7, 4, "start")
        server.wait_for(lambda: server.metric("headrace_queue_requests", model="slow") >= 3)
        only_worker(server).kill()
        killed_at = time.monotonic()
        for number, replies in ((1, (running[0], waiting[0])), (2, (running[1], waiting[1]))):
            for one in replies:
                reply = one.result(TIMEOUT_S)
                assert_lost(reply, "slow", number)
                assert reply.status in (500, "INTERNAL", "streamed")
        assert time.monotonic() - killed_at < 20
        assert newcomer.result(TIMEOUT_S).value == 7
        assert behind.step("slow", 1, 4, "end").value == 8
        for one in (1, 2, 3):
            reply = client.step("slow", 1, one)
            assert reply.refused
            assert_lost(reply, "slow", one)
        for one in (1, 2, 3):
            assert_begins_anew(client, "slow", one)
        server.wait_for(lambda: everything_ended(server, "slow"))
        if make is server_state:
            assert journal.read_text().split() == ["1"]  # and nothing of a lost sequence ran again


def test_a_start_that_was_running_is_told_too_and_one_that_waited_runs(tmp_path):
    server_state(tmp_path, "slow", "strategy: oldest, max_candidates: 1")
    with RunningServer(tmp_path) as server, opened(OverStream, server) as client:
        running = client.start("slow", 1, "first", "start", delay_ms=3_600_000)
        server.wait_for(lambda: server.metric("headrace_executing_batches", model="slow") == 1)
        again = client.start("slow", 5, "first", "start end")  # begins anew behind it, so it has lost nothing
        other = client.start("slow", 6, "other", "start end")
        server.wait_for(lambda: server.metric("headrace_queue_requests", model="slow") == 2)
        only_worker(server).kill()
        assert_lost(running.result(TIMEOUT_S), "slow", "first")
        assert again.result(TIMEOUT_S).value == 5
        assert other.result(TIMEOUT_S).value == 6


@pytest.mark.parametrize("cause", ["segfault", "kill"])
def test_a_request_that_kills_the_worker_takes_its_batch_along_and_runs_once(tmp_path, cause):
    """The fake model remembers nothing, but the sequences that it was told of cannot go on all the same."""
    (tmp_path / "fake" / "1").mkdir(parents=True)
    (tmp_path / "fake" / "config.yaml").write_text(
        "backend: fake\nmax_batch_size: 4\n"
        "inputs: [{name: x, datatype: INT32, shape: [-1, 1]}]\noutputs: [{name: y, datatype: INT32, shape: [-1, 1]}]\n"
        f"{FULL}\nsequence: {{strategy: oldest, {NO_IDLING}}}\n"
    )
    name = {"segfault": "signal SIGSEGV", "kill": "signal SIGKILL"}[cause]
    with RunningServer(tmp_path) as server, opened(OverStream, server) as client:
        begun = [client.start("fake", one, one, "start") for one in (1, 2, 3, 4)]
        assert [one.result(TIMEOUT_S).value for one in begun] == [1, 2, 3, 4]
        together = [client.start("fake", 1, one, **({"fake_crash": cause} if one == 3 else {})) for one in (1, 2, 3, 4)]
        for identity, one in zip((1, 2, 3, 4), together, strict=True):
            assert_lost(one.result(TIMEOUT_S), "fake", identity, f"its worker died ({name})")
        again = [client.start("fake", one, one, "start end") for one in (1, 2, 3, 4)]
        assert [one.result(TIMEOUT_S).value for one in again] == [1, 2, 3, 4]
        assert server.metric("headrace_worker_deaths_total", model="fake") == 1


def test_the_sequences_of_the_other_instance_go_on(tmp_path):
    own_state(tmp_path, "twins", "strategy: oldest, max_candidates: 2", "instances: [{device: cpu, count: 2}]")
    ids = range(1, 5)
    with RunningServer(tmp_path) as server, opened(OverHttp, server) as client:
        pids = {one: client.step("twins", 1, one, "start").outputs["pid"][0] for one in ids}
        dead = pids[1]
        next(worker for worker in server.workers() if worker.pid == dead).kill()
        server.wait_for(lambda: active(server, "twins") == 2)
        for one in ids:
            reply = client.step("twins", 1, one)
            if pids[one] == dead:
                assert_lost(reply, "twins", one)
            else:
                assert (reply.value, reply.outputs["pid"]) == (2, [pids[one]])
        # The dead one's place is in the next worker; the other's stay where they are.
        lost = [one for one in ids if pids[one] == dead]
        server.wait_for(lambda: server.metric("headrace_instances_up", model="twins") == 2)
        for one in lost:
            reply = client.step("twins", 9, one, "start")
            assert reply.value == 9
            assert reply.outputs["pid"][0] not in (dead, *(pids[other] for other in ids))


def test_a_worker_that_hangs_is_killed_and_its_sequences_are_told_so(tmp_path, route):
    server_state(tmp_path, "slow", more="execution_timeout_s: 3")
    with RunningServer(tmp_path) as server, opened(route, server) as client:
        assert client.step("slow", 1, 1, "start").value == 1
        assert client.step("slow", 1, 2, "start").value == 1
        cause = "its worker died (a batch of model 'slow' took longer than 3 s)"
        assert_lost(client.step("slow", 1, 1, delay_ms=3_600_000), "slow", 1, cause)
        assert_lost(client.step("slow", 1, 2), "slow", 2, cause)
        assert_begins_anew(client, "slow", 1)


# Decoupled: x responses, each the sum of a sequence's responses so far, which the server keeps; then silence.
SLOW_COUNTER = """
    import time


    class Model:
        inputs = [
            {"name": "x", "datatype": "INT32", "shape": [1]},
            {"name": "total_in", "datatype": "INT32", "shape": [1]},
        ]
        outputs = [
            {"name": "y", "datatype": "INT32", "shape": [1]},
            {"name": "total_out", "datatype": "INT32", "shape": [1]},
        ]
        max_batch_size = 0

        def infer(self, inputs, request):
            total = inputs["total_in"]
            for _ in range(int(inputs["x"][0])):
                total = total + 1
                yield {"y": total, "total_out": total}
            time.sleep(request.parameters.get("delay_ms", 0) / 1000)
"""


def test_killed_while_a_sequence_is_answered_part_by_part(tmp_path):
    config = f"sequence: {{strategy: oldest, max_candidates: 4, {NO_IDLING}, states: [{TOTAL_STATE}]}}\n"
    python_model(tmp_path, "counter", SLOW_COUNTER, config=config)
    requests = queue.SimpleQueue()
    with RunningServer(tmp_path) as server, grpc.insecure_channel(server.grpc) as channel:
        answers = stream_method(channel)(iter(requests.get, None), timeout=TIMEOUT_S)

        def send(value, identity, marks="", **more):
            parameters = sequence_parameters(identity, marks, more)
            requests.put(message("counter", [value], parameters, [1], f"{identity}"))

        def values(count):
            replies = [message_reply(next(answers).infer_response) for _ in range(count)]
            return [one.outputs["y"] for one in replies]

        send(2, 1, "start")
        assert values(2) == [[1], [2]]
        send(2, 2, "start")
        assert values(2) == [[1], [2]]
        send(3, 1, delay_ms=3_600_000)
        assert values(3) == [[3], [4], [5]]
        send(1, 1)  # which waits behind it
        server.wait_for(lambda: server.metric("headrace_queue_requests", model="counter") == 1)
        only_worker(server).kill()
        for _ in range(2):
            answer = next(answers)
            assert answer.infer_response.id == "1"
            assert f"sequence 1 of model 'counter' has ended: {KILLED}" in answer.error_message
        for identity in (1, 2):
            send(1, identity)
            assert f"sequence {identity} of model 'counter' has ended: {KILLED}" in next(answers).error_message
        send(2, 1, "start end")
        assert values(2) == [[1], [2]]
        requests.put(None)
        assert list(answers) == []
        server.wait_for(lambda: everything_ended(server, "counter"))


def test_workers_that_are_killed_again_and_again_give_no_wrong_value(tmp_path):
    """Every answer is the sum since the last start, and every error tells its client to begin anew."""
    accumulator(tmp_path, "sum", "strategy: direct", "max_batch_size: 4")
    own_state(tmp_path, "own", more="instances: [{device: cpu, count: 2}]")
    done = threading.Event()
    answers, restarts = [], []

    def run(model, identity, client):
        total, marks = 0, "start"
        while True:
            last = done.is_set()  # and then it says so, because others wait for its place
            if last and "end" not in marks:
                marks += " end"
            value = random.randrange(1000)
            reply = client.step(model, value, identity, marks)
            if reply.error:
                assert_lost(reply, model, identity)
                restarts.append(model)
                marks = "start"
                continue
            total = value if "start" in marks else total + value
            assert reply.value == total, f"{model} {identity}: {reply.value} for {total}"
            answers.append(model)
            if last:
                return
            # Now and then the sequence ends and another begins under its id.
            marks = "start" if "end" in marks else random.choice(["", "", "", "", "", "", "end", "start"])

    with RunningServer(tmp_path) as server, opened(OverHttp, server) as one, opened(OverGrpc, server) as other:
        with ThreadPoolExecutor(12) as threads:
            runs = [
                threads.submit(run, model, number + 1, one if number % 2 else other)
                for number in range(6)
                for model in ("sum", "own")
            ]
            for stroke in range(12):
                wanted = len(answers) + 200
                server.wait_for(lambda wanted=wanted: len(answers) >= wanted or any(run.done() for run in runs))
                if stroke % 4:
                    random.choice(server.workers()).kill()
                else:  # so that each model is hit
                    server.wait_for(lambda: active(server, "sum") and active(server, "own"))
                    server.kill_workers()
            done.set()
            for finished in runs:
                finished.result(TIMEOUT_S)
        assert {"sum", "own"} == set(restarts) == set(answers)
        for model in ("sum", "own"):
            server.wait_for(lambda model=model: everything_ended(server, model))


# -- models that raise -------------------------------------------------------------------------------------------------


def picky_graph():
    """The accumulator of what a table has at x, which is x itself; the model fails where x is past its end."""
    number = (TensorProto.INT32, ["n", 1])
    table = helper.make_tensor("table", TensorProto.INT32, [100], list(range(100)))
    nodes = [
        helper.make_node("Constant", [], ["table"], value=table),
        helper.make_node("Gather", ["table", "x"], ["found"]),
        helper.make_node("Add", ["found", "total_in"], ["y"]),
        helper.make_node("Identity", ["y"], ["total_out"]),
    ]
    return graph(nodes, dict.fromkeys(("x", "total_in"), number), dict.fromkeys(("y", "total_out"), number))


@pytest.mark.parametrize("strategy", ["direct", "oldest"])
def test_where_the_server_keeps_the_states_a_bad_request_harms_nobody_else(tmp_path, route, strategy):
    sequence = f"strategy: {strategy}, {NO_IDLING}, states: [{TOTAL_STATE}]"
    if strategy == "direct":
        sequence += ", minimum_slot_utilization: 1.0"
    onnx_sequence(tmp_path, "picky", f"max_batch_size: 4\n{FULL}\nsequence: {{{sequence}}}\n", picky_graph())
    with RunningServer(tmp_path) as server, opened(route, server) as client:

        def together(values, marks=""):
            return [
                one.result(TIMEOUT_S)
                for one in [client.start("picky", value, number, marks) for number, value in enumerate(values, 1)]
            ]

        assert [one.value for one in together([1, 2, 3, 4], "start")] == [1, 2, 3, 4]
        first, second, bad, last = together([10, 20, 1000, 40])
        assert [first.value, second.value, last.value] == [11, 22, 44]
        assert "model 'picky'" in bad.error
        # The bad one's sequence is as it was before it.
        assert [one.value for one in together([10, 20, 30, 40])] == [21, 42, 33, 84]
        assert together([1, 1, 1000, 1])[2].error
        assert [one.value for one in together([1, 1, 1, 1], "end")] == [23, 44, 34, 86]
        server.wait_for(lambda: everything_ended(server, "picky"))


def test_a_first_request_that_fails_leaves_its_sequence_as_it_begins(tmp_path):
    onnx_sequence(
        tmp_path,
        "picky",
        f"max_batch_size: 4\nsequence: {{{NO_IDLING}, states: [{TOTAL_STATE}]}}\n",
        picky_graph(),
    )
    with RunningServer(tmp_path) as server, opened(OverGrpc, server) as client:
        assert client.step("picky", 50, 1, "start").value == 50
        assert client.step("picky", 1000, 1, "start").error  # what came before it has ended all the same
        assert client.step("picky", 2, 1).value == 2
        assert client.step("picky", 1000, 1, "end").error  # and so has this, though its last request failed
        assert "must specify the START flag" in client.step("picky", 2, 1).error
        server.wait_for(lambda: everything_ended(server, "picky"))


@pytest.mark.parametrize("make", [server_state, own_state])
def test_code_that_raises_for_a_batch_fails_all_of_it_and_none_of_it_runs_again(tmp_path, make):
    """The code may have taken note of some of them, and nobody but the model can tell of which."""
    repository, journal = tmp_path / "models", tmp_path / "journal"
    make(repository, "model", "strategy: oldest", FULL)
    with RunningServer(repository) as server, opened(OverStream, server) as client:

        def together(marks="", **bad):
            said = {"journal": str(journal)}
            return [
                one.result(TIMEOUT_S)
                for one in [
                    client.start("model", 1, one, marks, **said, **(bad if one == 2 else {})) for one in (1, 2, 3, 4)
                ]
            ]

        assert [one.value for one in together("start")] == [1] * 4
        journal.unlink()
        for reply in together(**{"raise": True}):
            assert "as asked" in reply.error
            assert "model 'model'" in reply.error
        if make is server_state:
            assert sorted(journal.read_text().split()) == ["1", "2", "3", "4"]
        else:
            assert not journal.exists()  # this one raises before it takes note
        assert [one.value for one in together()] == [2] * 4  # so their sums are as they were
        assert server.metric("headrace_worker_deaths_total", model="model") == 0


@pytest.mark.parametrize("make", [server_state, own_state])
def test_code_that_answers_each_request_refuses_one_and_harms_nobody_else(tmp_path, make):
    make(tmp_path, "model", "strategy: oldest", FULL)
    with RunningServer(tmp_path) as server, opened(OverStream, server) as client:

        def together(marks="", **bad):
            return [
                one.result(TIMEOUT_S)
                for one in [client.start("model", 1, one, marks, **(bad if one == 2 else {})) for one in (1, 2, 3, 4)]
            ]

        assert [one.value for one in together("start")] == [1] * 4
        first, refused, *others = together(refuse=True)
        assert refused.refused
        assert "as asked" in refused.error
        assert [one.value for one in (first, *others)] == [2] * 3
        assert [one.value for one in together("end")] == [3, 2, 3, 3]


# -- clients that leave, deadlines -------------------------------------------------------------------------------------


@pytest.fixture
def gate(tmp_path):
    """What held requests wait for; they go on at the end of the test at the latest."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


class Leaving:
    """A client with one request, that is there until ``leave``."""

    def __init__(self, server, model, value, identity, marks="", **more):
        self._server = server
        self._connection = http.client.HTTPConnection(server.http, timeout=TIMEOUT_S)
        body = http_body([value], sequence_parameters(identity, marks, more), [1, 1])
        self._connection.request("POST", f"/v2/models/{model}/infer", json.dumps(body))

    def leave(self):
        """Leave; returns when the server has noticed."""
        theirs = self._connection.sock.getsockname()
        self._connection.close()
        self._server.wait_for(lambda: theirs not in connections(self._server))


def test_a_client_that_leaves_while_its_request_runs_finds_the_sequence_where_that_left_it(tmp_path, gate):
    server_state(tmp_path / "models", "slow")
    with RunningServer(tmp_path / "models") as server, opened(OverGrpc, server) as client:
        assert client.step("slow", 1, 1, "start").value == 1
        gone = Leaving(server, "slow", 10, 1, gate=str(gate))
        server.wait_for(lambda: server.metric("headrace_executing_batches", model="slow") == 1)
        gone.leave()
        gate.touch()
        assert client.step("slow", 100, 1).value == 111
        assert client.step("slow", 1, 1, "end").value == 112


def test_what_a_client_leaves_waiting_never_runs(tmp_path, gate):
    server_state(tmp_path / "models", "slow", "strategy: oldest, max_candidates: 1")
    with RunningServer(tmp_path / "models") as server, opened(OverGrpc, server) as client:
        assert client.step("slow", 1, 1, "start").value == 1
        running = client.start("slow", 10, 1, gate=str(gate))
        server.wait_for(lambda: server.metric("headrace_executing_batches", model="slow") == 1)
        # One in the middle of a sequence, and the first of one that has no place.
        gone = [Leaving(server, "slow", 100, 1), Leaving(server, "slow", 5, 2, "start")]
        server.wait_for(lambda: server.metric("headrace_queue_requests", model="slow") == 2)
        for one in gone:
            one.leave()
        gate.touch()
        assert running.result(TIMEOUT_S).value == 11
        assert client.step("slow", 1, 1, "end").value == 12
        assert "must specify the START flag" in client.step("slow", 1, 2).error
        server.wait_for(lambda: everything_ended(server, "slow"))


def test_an_end_whose_client_has_left_frees_the_place(tmp_path):
    server_state(tmp_path / "models", "slow", "strategy: oldest, max_candidates: 1")
    with RunningServer(tmp_path / "models") as server, opened(OverGrpc, server) as client:
        for waits in (True, False):  # left while it waits behind another, and while it runs itself
            gate = tmp_path / f"gate-{waits}"
            held = {"gate": str(gate)}
            running = client.start("slow", 1, 1, "start", **(held if waits else {}))
            if waits:
                server.wait_for(lambda: server.metric("headrace_executing_batches", model="slow") == 1)
            else:
                assert running.result(TIMEOUT_S).value == 1
            gone = Leaving(server, "slow", 1, 1, "end", **({} if waits else held))
            where = "headrace_queue_requests" if waits else "headrace_executing_batches"
            server.wait_for(lambda where=where: server.metric(where, model="slow") == 1)
            gone.leave()
            gate.touch()
            assert running.result(TIMEOUT_S).value == 1
            assert client.step("slow", 3, 2, "start end").value == 3
            server.wait_for(lambda: everything_ended(server, "slow"))


def test_clients_that_leave_in_mid_sequence_give_their_places_back_by_idling(tmp_path):
    accumulator(tmp_path, "sum", "max_idle_us: 500000", "max_batch_size: 2")
    with RunningServer(tmp_path) as server:
        for one in (1, 2):
            with opened(OverStream, server) as leaving:
                assert leaving.step("sum", 1, one, "start").value == 1
        with opened(OverHttp, server) as client:
            assert client.step("sum", 4, 3, "start end").value == 4  # which waits until one of them has idled
            reply = client.step("sum", 1, 1)
            assert "no request of it came for 500000 us" in reply.error


@pytest.mark.parametrize("counted", [False, True])
def test_a_deadline_in_mid_sequence(tmp_path, route, counted, gate):
    """One that ran past its deadline counts, one that has not run does not. The sequence goes on."""
    server_state(tmp_path / "models", "slow", "strategy: oldest, max_candidates: 2")
    with (
        RunningServer(tmp_path / "models") as server,
        opened(route, server) as client,
        opened(OverStream, server) as other,
    ):
        assert client.step("slow", 1, 1, "start").value == 1
        if counted:
            late = client.step("slow", 10, 1, gate=str(gate), timeout=200_000)
            gate.touch()
        else:
            assert other.step("slow", 1, 2, "start").value == 1
            running = other.start("slow", 1, 2, "end", gate=str(gate))
            server.wait_for(lambda: server.metric("headrace_executing_batches", model="slow") == 1)
            staged = other.start("slow", 100, 1)  # so that the next one waits in the queue
            server.wait_for(lambda: server.metric("headrace_executing_batches", model="slow") == 2)
            late = client.step("slow", 10, 1, timeout=200_000)
            gate.touch()
            assert running.result(TIMEOUT_S).value == 2
            assert staged.result(TIMEOUT_S).value == 101
        assert "Request timeout expired" in late.error
        assert "model 'slow'" in late.error
        assert client.step("slow", 1, 1, "end").value == (12 if counted else 102)
        server.wait_for(lambda: everything_ended(server, "slow"))


def test_a_start_whose_time_is_up_before_it_has_a_place_begins_nothing(tmp_path, route):
    accumulator(tmp_path, "sum", more="max_batch_size: 1")
    with RunningServer(tmp_path) as server, opened(route, server) as client:
        assert client.step("sum", 1, 1, "start").value == 1
        late = client.step("sum", 5, 2, "start", timeout=200_000)
        assert "Request timeout expired" in late.error
        assert "must specify the START flag" in client.step("sum", 1, 2, timeout=200_000).error
        assert client.step("sum", 1, 1, "end").value == 2
        assert_begins_anew(client, "sum", 2)
        server.wait_for(lambda: everything_ended(server, "sum"))
