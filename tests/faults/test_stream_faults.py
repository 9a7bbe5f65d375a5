"""Streams when things go wrong: workers that die or hang, deadlines, clients that read nothing."""

import http.client
import json
import queue
import threading
import time

import grpc
import pytest
from held_work import connections
from running_server import RunningServer
from system.load import python_model, wait_for
from system.streams import (
    ENABLE_FINAL,
    HTTP_WAYS,
    MIB,
    MODELS,
    SENDER,
    SENDER_CONFIG,
    TELLER,
    WINDOW,
    Conversation,
    generate_stream,
    infer_body,
    lines,
    slow_reader,
    steady,
    streaming_models,
)

SYNC_SENDER = """
    import json

    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            for request in requests:
                self.tell(request)

        def tell(self, request):
            (count,) = pb_utils.get_input_tensor_by_name(request, "count").as_numpy()
            said = json.loads(request.parameters())
            sender = request.get_response_sender()
            for index in range(count):
                tensors = [
                    pb_utils.Tensor("index", np.array([index], np.int32)),
                    pb_utils.Tensor("data", np.array([b"x" * said.get("nbytes", 1)], np.object_)),
                ]
                sender.send(pb_utils.InferenceResponse(tensors))
            if not said.get("forget"):
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
SENDER_YAML = """
decoupled: true
max_batch_size: 0
inputs: [{name: count, datatype: INT32, shape: [1]}]
outputs: [{name: index, datatype: INT32, shape: [1]}, {name: data, datatype: BYTES, shape: [1]}]
"""


@pytest.fixture(params=MODELS)
def model(request):
    """One model after the other."""
    return request.param


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RunningServer(streaming_models(tmp_path_factory.mktemp("faulty"))) as running:
        yield running


@pytest.fixture
def gate(tmp_path):
    """What held models wait for; they go on at the end of the test at the latest."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


def strict_model(repository, name, timeout_s, code=TELLER, config=""):
    """A model whose worker is killed when it is silent for so long."""
    python_model(repository, name, code, config=f"execution_timeout_s: {timeout_s}\n{config}")


def worker(server):
    """The only worker."""
    (one,) = server.workers()
    return one


# -- workers that die --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_open_stream_is_told_when_the_worker_dies(tmp_path, name):
    streaming_models(tmp_path)
    with RunningServer(tmp_path, "--model-control", "explicit", "--load-model", name) as running:
        said = {"delay_ms": 2}
        events = [way(running, name, 100_000, said) for way in HTTP_WAYS for _ in range(5)]
        with Conversation(running) as one, Conversation(running, metadata=[("triton_grpc_error", "true")]) as other:
            for number in range(10):
                one.send(name, 100_000, said, str(number))
            other.send(name, 100_000, said)
            answers = iter(one)
            begun = set()
            while len(begun) < 10:
                begun.add(next(answers).id)
            assert [next(event).index for event in events] == [0] * 10
            assert next(iter(other)).index == 0
            worker(running).kill()
            killed_at = time.monotonic()
            for event in events:
                *_, last = event
                assert "the worker died (signal SIGKILL)" in last.error
                assert name in last.error
            failed = {}
            while len(failed) < 10:
                item = next(answers)
                if item.error:
                    failed[item.id] = item.error
            assert set(failed) == begun
            assert all("the worker died" in error for error in failed.values())
            with pytest.raises(grpc.RpcError) as caught:
                list(other)
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert time.monotonic() - killed_at < 20
            one.send(name, 3, None, "again")
            assert [next(answers).index for _ in range(3)] == [0, 1, 2]
        assert [item.index for item in generate_stream(running, name, 3)] == [0, 1, 2]
        assert running.metric("headrace_worker_deaths_total", model=name) == 1
        wait_for(lambda: running.metric("headrace_executing_batches", model=name) == 0)


def test_requests_that_wait_are_served_by_the_next_worker(tmp_path):
    """A generator that computes does not let its worker take others: these have lost nothing when it dies."""
    python_model(tmp_path, "teller", TELLER)
    with RunningServer(tmp_path) as running:
        hanging = generate_stream(running, "teller", 2, {"hang": True})
        assert [next(hanging).index for _ in range(2)] == [0, 1]
        waiting = [generate_stream(running, "teller", 4) for _ in range(8)]
        running.wait_for(lambda: running.metric("headrace_queue_requests", model="teller") >= 4)
        worker(running).kill()
        assert "the worker died" in next(hanging).error
        hanging.close()
        for events in waiting:
            assert [item.index for item in events] == [0, 1, 2, 3]


def test_workers_that_are_killed_again_and_again_hang_nobody(tmp_path):
    """Every request ends, whole or with an error, while the worker is killed twenty times."""
    streaming_models(tmp_path)
    ends, wrong = queue.SimpleQueue(), queue.SimpleQueue()
    stop = threading.Event()

    def over_http(name):
        while not stop.is_set():
            items = list(generate_stream(running, name, 60, {"delay_ms": 1}))
            note(items, ends.put, wrong.put)

    def over_grpc(name):
        with Conversation(running, timeout_s=None) as conversation:
            answers = iter(conversation)
            while not stop.is_set():
                conversation.send(name, 60, {"delay_ms": 1, ENABLE_FINAL: True})
                items = []
                while not items or not items[-1].final:
                    items.append(next(answers))
                note(items[:-1], ends.put, wrong.put)

    with RunningServer(tmp_path) as running:
        clients = [
            threading.Thread(target=way, args=(name,), daemon=True)
            for way in (over_http, over_grpc)
            for name in MODELS
            for _ in range(3)
        ]
        for client in clients:
            client.start()
        for number in range(20):
            if number % 5:
                time.sleep(0.25)  # anywhere: in a start, in a load, in the middle of responses
            else:
                for name in MODELS:
                    running.wait_for(lambda name=name: running.metric("headrace_executing_batches", model=name) > 1)
            running.kill_workers()
        enough = ends.qsize() + 3 * len(clients)  # the first of each may have been under way at the last stroke
        running.wait_for(lambda: ends.qsize() >= enough or not wrong.empty())
        stop.set()
        for client in clients:
            client.join(60)
            assert not client.is_alive(), "a client still waits"
        for name in MODELS:
            assert [item.index for item in generate_stream(running, name, 3)] == [0, 1, 2]
            wait_for(lambda name=name: running.metric("headrace_executing_batches", model=name) == 0)
    assert wrong.empty(), wrong.get()
    outcomes = [ends.get() for _ in range(ends.qsize())]
    assert outcomes.count("whole") >= 6
    assert outcomes.count("died") >= 6


def note(items, ended, wrong):
    """Say how a stream of sixty has ended."""
    *most, last = items
    if [item.index for item in most] != list(range(len(most))):
        wrong(items)
    elif last.index == 59:
        ended("whole")
    elif "the worker died" in last.error:
        ended("died")
    else:
        wrong(items)


# -- models that hang --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 2, 40])
def test_a_generator_that_hangs_is_killed(tmp_path, count):
    strict_model(tmp_path, "teller", 1)
    with RunningServer(tmp_path) as running:
        began = time.monotonic()
        events = generate_stream(running, "teller", count, {"hang": True})
        *items, last = events
        assert [item.index for item in items] == list(range(count))
        assert "gave no response for 1 s" in last.error
        assert 0.9 < time.monotonic() - began < 20
        assert [item.index for item in generate_stream(running, "teller", 3)] == [0, 1, 2]


def test_a_sender_that_never_sends_is_killed(tmp_path):
    strict_model(tmp_path, "sender", 1, SENDER.replace("def tell(", "def keep("), SENDER_YAML)
    with RunningServer(tmp_path) as running:
        (item,) = generate_stream(running, "sender", 3)
        assert item.error
        running.wait_for(lambda: running.model_ready("sender"))
    code = SENDER.replace("for index in range(count):", "for index in iter(threading.Event().wait, True):")
    strict_model(tmp_path, "silent", 1, code, SENDER_YAML)
    with RunningServer(tmp_path) as running:
        began = time.monotonic()
        (item,) = generate_stream(running, "silent", 3)
        assert "gave no response for 1 s" in item.error
        assert time.monotonic() - began < 20
        assert running.metric("headrace_worker_deaths_total", model="silent") == 1


@pytest.mark.parametrize("way", ["generate_stream", "grpc"])
def test_a_slow_reader_is_no_reason_to_kill_the_worker(tmp_path, way):
    """The model takes a moment for each response, and its client pauses for longer than a timeout."""
    strict_model(tmp_path, "teller", 3)
    journal = tmp_path.with_name(f"{tmp_path.name}.journal")
    said = {"delay_ms": 10, "nbytes": 512 * 1024, "journal": str(journal)}
    with RunningServer(tmp_path) as running, slow_reader(running, way, "teller", 120, said) as read:
        assert read().index == 0
        steady(lambda: len(lines(journal)), for_s=4)  # the worker has nothing to do meanwhile
        assert len(lines(journal)) < 120
        for index in range(1, 120):
            item = read()
            assert (item.index, item.error) == (index, "")
        assert running.metric("headrace_worker_deaths_total", model="teller") == 0


@pytest.mark.parametrize("way", ["generate_stream", "grpc"])
def test_the_time_that_a_client_took_is_not_the_model_s(tmp_path, way):
    """As above, with a model that takes so long for a response that the pause and that are more than its timeout."""
    strict_model(tmp_path, "teller", 4)
    journal = tmp_path.with_name(f"{tmp_path.name}.journal")
    said = {"delay_ms": 1500, "quick": WINDOW, "nbytes": 4 * MIB, "journal": str(journal)}
    with RunningServer(tmp_path) as running, slow_reader(running, way, "teller", 60, said) as read:
        assert read().index == 0
        steady(lambda: len(lines(journal)), for_s=4)
        ahead = len(lines(journal))
        assert ahead < 60
        for index in range(1, ahead + 1):
            item = read()
            assert (item.index, item.error) == (index, "")
        assert running.metric("headrace_worker_deaths_total", model="teller") == 0


# -- one client's slowness and the others ------------------------------------------------------------------------------


def sync_sender(repository, more=""):
    python_model(repository, "sender", more + SYNC_SENDER)
    (repository / "sender" / "config.pbtxt").write_text(SENDER_CONFIG)


@pytest.mark.parametrize(("count", "nbytes"), [(5000, 1), (2000, 64 * 1024)])
@pytest.mark.parametrize("way", ["generate_stream", "grpc"])
def test_a_model_that_sends_inside_execute_may_be_quicker_than_its_client(tmp_path, way, count, nbytes):
    """Whoever reads what it is given is given all of it, however far the model is ahead."""
    # How soon a client has read half of that depends on the machine.
    sync_sender(tmp_path, "\n    from headrace.workers import streams\n\n    streams.PATIENCE_S = 30.0\n")
    with RunningServer(tmp_path) as running:
        if way == "grpc":
            with Conversation(running) as conversation:
                conversation.send("sender", count, {"nbytes": nbytes})
                conversation.done()
                items = list(conversation)
        else:
            items = list(generate_stream(running, "sender", count, {"nbytes": nbytes}))
    assert [item.error for item in items if item.error] == []
    assert [item.index for item in items] == list(range(count))


def test_a_slow_reader_does_not_hold_up_a_model_that_sends_inside_execute(tmp_path):
    sync_sender(tmp_path)
    count = 20_000  # far more than all buffers between a model and its client can have
    with RunningServer(tmp_path) as running, slow_reader(running, "grpc", "sender", count, {"nbytes": 65536}) as read:
        assert read().index == 0
        time.sleep(1)
        done = queue.SimpleQueue()
        other = threading.Thread(target=lambda: done.put(list(generate_stream(running, "sender", 3))), daemon=True)
        other.start()
        other.join(20)
        answered = not other.is_alive()
        if answered:
            while not (item := read()).error:
                pass
            assert "the client has not read" in item.error
        worker(running).kill()  # so that nobody waits for ever
        other.join(20)
    assert answered
    assert [item.index for item in done.get()] == [0, 1, 2]


def test_a_slow_reader_does_not_keep_others_from_their_errors(tmp_path):
    """A model that lets go of its sender fails the request: of one client too, while another does not read."""
    sync_sender(tmp_path)
    with RunningServer(tmp_path) as running:
        filled = {"nbytes": 4 * MIB, "forget": True}
        with slow_reader(running, "grpc", "sender", WINDOW, filled) as read:
            assert read().index == 0
            time.sleep(3)
            done = queue.SimpleQueue()
            other = threading.Thread(
                target=lambda: done.put(list(generate_stream(running, "sender", 0, {"forget": True}))), daemon=True
            )
            other.start()
            other.join(20)
            answered = not other.is_alive()
            worker(running).kill()
            other.join(20)
    assert answered


# -- deadlines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["generate", "generate_stream", "infer_stream"])
def test_a_deadline_before_the_first_response(server, model, route, tmp_path, gate):
    journal = tmp_path / "journal"
    said = {"timeout": 500_000, "gate": str(gate), "delay_ms": 300, "journal": str(journal)}
    body = infer_body(1000, said) if route == "infer_stream" else {"count": 1000, **said}
    before = server.metric("nv_inference_request_failure", model=model, reason="REJECTED")
    began = time.monotonic()
    status, headers, answer = server.request("POST", f"/v2/models/{model}/{route}", body)
    assert time.monotonic() - began > 0.4
    assert status == 503
    assert headers["retry-after"]
    assert "Request timeout expired" in str(answer)
    assert server.metric("nv_inference_request_failure", model=model, reason="REJECTED") == before + 1
    gate.touch()  # only now there is a response, which nobody waits for
    wait_for(lambda: lines(journal)[-1:] == ["finally"])
    assert lines(journal)[0] == "0"
    assert len(lines(journal)) < 20, "it was told at once"


def test_a_deadline_over_grpc(server, model):
    with Conversation(server) as conversation:
        conversation.send(model, 3, {"timeout": 200_000, "delay_ms": 700}, "late")
        conversation.send(model, 2, {"timeout": 20_000_000}, "in time")
        conversation.done()
        items = list(conversation)
    assert [item.index for item in items if item.id == "in time"] == [0, 1]
    (late,) = [item for item in items if item.id == "late"]
    assert "Request timeout expired" in late.error


def test_a_deadline_does_not_cut_responses_that_have_begun(server, model):
    items = list(generate_stream(server, model, 5, {"timeout": 2_000_000, "quick": 1, "delay_ms": 600}))
    assert [item.index for item in items] == [0, 1, 2, 3, 4]


def test_a_grpc_deadline_ends_the_stream_and_its_requests(server, model, tmp_path):
    before = server.metric("nv_inference_request_failure", model=model, reason="CANCELED")
    tries = 0
    for timeout_s in (0.7, 7, 28):  # the model is to have begun by then
        tries += 1
        journal = tmp_path / f"journal-{timeout_s}"
        began = time.monotonic()
        with Conversation(server, timeout_s=timeout_s) as conversation:
            conversation.send(model, 100_000, {"delay_ms": 10, "journal": str(journal)})
            with pytest.raises(grpc.RpcError) as caught:
                list(conversation)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - began > 0.8 * timeout_s
        if lines(journal):
            break
    wait_for(lambda: lines(journal)[-1:] == ["finally"])
    assert len(lines(journal)) < 10_000
    wait_for(lambda: server.metric("nv_inference_request_failure", model=model, reason="CANCELED") > before)
    assert server.metric("nv_inference_request_failure", model=model, reason="CANCELED") <= before + tries


def busy_teller(server, gate):
    """A stream of the model that computes until there is the gate, and then gives its one response; it has begun."""
    wait_for(lambda: server.metric("headrace_executing_batches", model="teller") == 0)
    events = generate_stream(server, "teller", 1, {"gate": str(gate)})
    wait_for(lambda: server.metric("headrace_executing_batches", model="teller") == 1)
    return events


def test_a_request_that_waits_behind_a_busy_generator_meets_its_deadline(server, gate):
    """The generator computes, so nothing is taken meanwhile; who waits is told in time and not run."""
    busy = busy_teller(server, gate)
    late = generate_stream(server, "teller", 1, {"timeout": 200_000})
    assert late.status == 503
    late.close()
    gate.touch()  # the generator was not done yet
    assert [item.index for item in busy] == [0]


# -- clients that leave in numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["generate", "generate_stream", "grpc"])
def test_what_a_client_left_in_the_queue_is_dropped(server, way, tmp_path, gate):
    journal = tmp_path / "journal"
    before = server.metric("nv_inference_request_failure", model="teller", reason="CANCELED")
    busy = busy_teller(server, gate)
    others = connections(server)
    leave = _ten_grpc_requests(server, journal) if way == "grpc" else _ten_http_clients(server, way, journal)
    server.wait_for(lambda: server.metric("headrace_queue_requests", model="teller") >= 8)
    theirs = connections(server) - others
    leave()
    server.wait_for(lambda: not theirs & connections(server))
    gate.touch()
    assert [item.index for item in busy] == [0]
    assert [item.index for item in generate_stream(server, "teller", 1)] == [0]  # it is behind them all
    assert len([line for line in lines(journal) if line == "0"]) <= 2, "at most those that the worker had already"
    wait_for(lambda: server.metric("nv_inference_request_failure", model="teller", reason="CANCELED") == before + 10)


def _ten_http_clients(server, route, journal):
    body = json.dumps({"count": 1, "journal": str(journal)})
    connections = [http.client.HTTPConnection(server.http, timeout=30) for _ in range(10)]
    for connection in connections:
        connection.request("POST", f"/v2/models/teller/{route}", body)
    return lambda: [connection.close() for connection in connections]


def _ten_grpc_requests(server, journal):
    conversation = Conversation(server)
    for _ in range(10):
        conversation.send("teller", 1, {"journal": str(journal)})
    return conversation.__exit__


def test_two_hundred_clients_that_leave_at_once(server, model):
    """The worker is free again, and nothing is held for those who left."""
    streams = [generate_stream(server, model, 100_000, {"delay_ms": 1}) for _ in range(200)]
    for events in streams:
        assert next(events).index == 0
    for events in streams:
        events.close()
    wait_for(lambda: server.metric("headrace_executing_batches", model=model) == 0, 60)
    assert [item.index for item in generate_stream(server, model, 3)] == [0, 1, 2]
