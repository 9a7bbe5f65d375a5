"""What the scheduler promises, over the real server: who goes first, who is refused, and who shares what with whom."""

import statistics
import threading
import time

import grpc
import pytest
from running_server import RunningServer
from system.load import (
    GATED,
    INFER,
    GrpcClient,
    HttpClient,
    Load,
    all_at_once,
    fake_model,
    gated_model,
    infer,
    infer_body,
    infer_message,
    wait_for,
)

from headrace.wire import pb

BATCH_MS = 50
HEAVY = "fake_cpu_threads: 1024"  # all there are
MANY = 10
AT_WORKER = 2  # requests that nobody overtakes: one runs, and one may lie behind it
ATTEMPTS = 5  # where an order is to be seen within less than a second, which a busy machine may not give

# Each answer is a number: how many were answered before it.
NUMBERING = GATED.replace('{"y": inputs["x"]}', '{"y": 0 * inputs["x"] + self.number()}').replace(
    "def wait(self)",
    """def number(self):
            self.answered = getattr(self, "answered", -1) + 1
            return self.answered

        def wait(self)""",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("scheduling")
    one_by_one = f"max_batch_size: 1\nparameters: {{fake_delay_ms: {BATCH_MS}}}\n"
    gates = {}
    for name, batching in (
        ("levels", "{priority_levels: 2, priorities: {2: {max_queue_size: 12}}}"),
        ("plain", "{}"),
        ("delaying", "{default_timeout_us: 400000, timeout_action: delay}"),
    ):
        gates[name] = gated_model(repository, name, f"batching: {batching}", NUMBERING)
    gates["slow"] = gated_model(repository, "slow", code=GATED.replace("[-1, -1]", "[-1, 1]"))
    fake_model(repository, "promised", one_by_one)
    fake_model(repository, "rejecting", one_by_one + "batching: {default_timeout_us: 120000, refuse_late: false}\n")
    for name, more in (("first", ""), ("second", ", priority: 2"), ("greedy", "")):
        count = 2 if name == "greedy" else 1
        fake_model(
            repository, name, one_by_one + f"instances: [{{rate_limit: {{resources: {{seat: {count}}}{more}}}}}]\n"
        )
    hot = f"max_batch_size: 1\nparameters: {{fake_delay_ms: {BATCH_MS}, {HEAVY}}}\n"
    fake_model(repository, "hot", hot + "instances: [{count: 4}]\n")
    fake_model(repository, "quiet", f"max_batch_size: 1\nparameters: {{fake_delay_ms: 5, {HEAVY}}}\n")
    with RunningServer(
        repository, "--max-own-workers", "64", "--rate-limit", "execution_count", "--rate-limit-resource", "seat:1"
    ) as running:
        running.gates = gates
        yield running


class Sent:
    """Requests to a model that numbers its answers, under way on a connection of its own each."""

    def __init__(self, server, model):
        self.outcomes = {}
        self._server = server
        self._model = model
        self._threads = []

    def send(self, name, parameters=None):
        thread = threading.Thread(target=self._run, args=(name, parameters))
        self._threads.append(thread)
        thread.start()

    def wait_accepted(self):
        """Until all that were sent wait or run."""
        names = ("headrace_queue_requests", "headrace_executing_batches")
        count = len(self._threads)
        wait_for(lambda: sum(self._server.metric(name, model=self._model) for name in names) == count)

    def join(self):
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    @property
    def all_ok(self):
        return all(one.ok for one in self.outcomes.values())

    @property
    def order(self):
        """The names of those that were answered, in the order in which they were run."""
        answered = {name: one.values[0] for name, one in self.outcomes.items() if one.ok}
        return sorted(answered, key=answered.get)

    def _run(self, name, parameters):
        self.outcomes[name] = infer(self._server.http, self._model, [1.0], parameters)


def occupied(server, model, parameters=None):
    """Requests to a model whose gate is shut, of which all but a few wait."""
    sent = Sent(server, model)
    for number in range(MANY):
        sent.send(f"{number}", parameters)
    sent.wait_accepted()
    return sent


def test_a_higher_priority_overtakes(server):
    with server.gates["levels"].shut():
        sent = occupied(server, "levels", {"priority": 2})
        sent.send("important", {"priority": 1})
        sent.wait_accepted()
        shown = server.metric("headrace_queue_requests_by_priority", model="levels", priority="2")
    sent.join()
    assert sent.all_ok
    assert MANY - AT_WORKER <= shown < MANY
    assert sent.order.index("important") <= AT_WORKER, sent.order


def test_a_full_level_leaves_room_in_another(server):
    before = server.metric("headrace_refused_requests_total", model="levels", reason="queue_full")
    sent = Sent(server, "levels")
    with server.gates["levels"].shut():
        for number in range(30):
            sent.send(f"low {number}", {"priority": 2})
        wait_for(lambda: len(sent.outcomes) >= 30 - 12 - AT_WORKER)
        sent.send("important", {"priority": 1})
        wait_for(lambda: server.metric("headrace_queue_requests_by_priority", model="levels", priority="1") == 1)
    sent.join()
    refused = [one for one in sent.outcomes.values() if not one.ok]
    assert 30 - 12 - AT_WORKER <= len(refused) < 30 - 12
    assert sent.outcomes["important"].ok
    assert all("has 12 requests of priority 2 waiting" in one.detail for one in refused)
    after = server.metric("headrace_refused_requests_total", model="levels", reason="queue_full")
    assert after - before == len(refused)


def test_the_nearest_deadline_goes_first(server):
    """A request without a deadline ranks as due a second after it came."""
    for _ in range(ATTEMPTS):
        began = time.monotonic()
        with server.gates["plain"].shut():
            sent = occupied(server, "plain")
            sent.send("pressed", {"timeout": 700_000})
            sent.wait_accepted()
            sent.send("more pressed", {"timeout": 600_000})
            sent.wait_accepted()
            seconds = time.monotonic() - began
        sent.join()
        if seconds < 0.3 and sent.all_ok:
            break
    assert sent.all_ok
    first_ones = sent.order[: AT_WORKER + 2]
    assert "more pressed" in first_ones, sent.order
    assert "pressed" in first_ones, sent.order
    assert sent.order.index("more pressed") < sent.order.index("pressed"), sent.order


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_who_cannot_be_answered_in_time_is_told_at_once(server, protocol):
    for _ in range(12):
        assert infer(server.http, "promised", [1.0], {"timeout": 5_000_000}).ok  # so that its speed is known
    before = server.metric("headrace_refused_requests_total", model="promised", reason="too_late")
    for _ in range(ATTEMPTS):  # a machine that stands still for a while answers nobody in time
        outcomes = all_at_once(server.http, "promised", [([1.0], {"timeout": 320_000})] * 30)
        served, refused = [one for one in outcomes if one.ok], [one for one in outcomes if not one.ok]
        foretold = [one for one in refused if "Refused at arrival: model 'promised' would answer in" in one.detail]
        assert {(one.status, one.headers["retry-after"]) for one in refused} == {(503, "1")}
        after = server.metric("headrace_refused_requests_total", model="promised", reason="too_late")
        assert after - before == len(foretold)
        before = after
        if served and len(foretold) > len(refused) / 2:  # but for those that had a chance when they came
            break
    assert 1 <= len(served) <= 15, "about as many as there is time for, which is six"
    assert len(foretold) > len(refused) / 2
    assert statistics.median(one.seconds for one in foretold) < max(one.seconds for one in served)
    if protocol == "grpc":
        with Load(server, "promised", http=8) as load:
            load.wait_answers(8)
            outcome = _infer_by_grpc(server, 0.04)  # it alone takes 0.05
        assert outcome.status == "UNAVAILABLE"
        assert "Refused at arrival" in outcome.detail


def _infer_by_grpc(server, timeout_s):
    client = GrpcClient(server.grpc, "promised")
    try:
        assert client.infer([1.0]).ok  # the channel stands
        for _ in range(20):
            outcome = client.infer([1.0], timeout_s=timeout_s)
            if outcome.status != "DEADLINE_EXCEEDED":  # on a busy machine the client itself may give up first
                break
        return outcome
    finally:
        client.close()


def test_who_is_late_goes_behind_or_is_refused_as_the_policy_says(server):
    outcomes = all_at_once(server.http, "rejecting", [([1.0], None)] * 8)
    refused = [one for one in outcomes if not one.ok]
    assert refused
    assert all("Request timeout expired" in one.detail for one in refused)

    for _ in range(ATTEMPTS):
        with server.gates["delaying"].shut():
            sent = occupied(server, "delaying")
            time.sleep(0.45)  # those that wait are late now
            began = time.monotonic()
            for name in ("in time", "in time too"):
                sent.send(name)
            sent.wait_accepted()
        sent.join()
        assert sent.all_ok, "late ones are answered as well"
        if max(sent.outcomes[name].ended_at for name in ("in time", "in time too")) - began < 0.4:
            break  # else they were late themselves
    first_ones = sent.order[: AT_WORKER + 2]
    assert "in time" in first_ones, sent.order
    assert "in time too" in first_ones, sent.order


@pytest.mark.parametrize("path", ["infer", "%69nfer", "generate"], ids=["fast lane", "ordinary route", "generate"])
def test_a_header_says_how_long_the_client_waits(server, path):
    body = {"x": [1.0]} if path == "generate" else infer_body([1.0])
    infer(server.http, "slow", [1.0])

    def ask(value):
        return server.request("POST", f"/v2/models/slow/{path}", body, {"grpc-timeout": value})

    with server.gates["slow"].shut():  # so that the answer is none of the model's
        status, headers, answer = ask("100m")
    assert (status, headers["retry-after"]) == (503, "1")
    assert "Request timeout expired" in answer["error"] or "Refused at arrival" in answer["error"]
    status, _, answer = ask("soon")
    assert status == 400
    assert "header grpc-timeout is 'soon', expected" in answer["error"]
    assert ask("20S")[0] == 200


def test_two_models_that_need_the_same_never_run_at_once(server):
    """And of two that always have work, one of priority 1 runs twice as often as one of priority 2."""
    began = time.monotonic()
    with Load(server, "first", http=4) as first, Load(server, "second", http=4) as second:
        first.wait_answers(8)
        start = len(first.outcomes), len(second.outcomes)
        assert server.metric("headrace_rate_limit_count", resource="seat", device="cpu") == 1
        server.wait_for(lambda: server.metric("headrace_rate_limit_held", resource="seat", device="cpu") == 1)
        first.wait_answers(30)
        ran = len(first.outcomes) - start[0], len(second.outcomes) - start[1]
        in_all = len(first.outcomes) + len(second.outcomes)
        seconds = time.monotonic() - began
    assert not first.failed
    assert not second.failed
    assert 1.3 < ran[0] / ran[1] < 3, ran
    assert in_all - 2 <= seconds * 1000 / BATCH_MS, "they ran one at a time"
    server.wait_for(lambda: server.metric("headrace_rate_limit_held", resource="seat", device="cpu") == 0)


def test_a_model_that_could_never_run_is_refused_when_it_is_loaded(server):
    status, index = server.post("/v2/repository/index")
    assert status == 200
    (greedy,) = [one for one in index if one["name"] == "greedy"]
    assert greedy["state"] == "UNAVAILABLE"
    assert "an instance needs 2 of resource 'seat' and could never run: expected at most 1" in greedy["reason"]


def test_a_model_under_flood_costs_a_quiet_one_a_batch_and_no_more(server):
    """Heavy models take turns on the CPUs: four instances of the hot one always stand in line.

    First come first served, the quiet one would wait for all four of their batches.
    """
    for _ in range(ATTEMPTS):  # one that is unfair is so each time
        alone = statistics.median(quiet_latencies(server, 10))
        with Load(server, "hot", http=12) as hot:
            hot.wait_answers(12)
            beside = quiet_latencies(server, 25)
        assert not hot.failed
        # At the worst it comes just when a batch has begun: that one, and its own; the rest is for a busy machine.
        fair = statistics.quantiles(beside, n=10)[-1] < alone + 3.5 * BATCH_MS / 1000
        if fair and statistics.median(beside) < alone + 2.5 * BATCH_MS / 1000:
            return
    pytest.fail(f"alone {alone} s, beside the flood {sorted(beside)} s")


def test_two_models_that_always_have_work_get_as_much_time_each_whatever_their_batches(server):
    with Load(server, "hot", http=8) as hot, Load(server, "quiet", http=4) as quiet:
        hot.wait_answers(8)
        start = len(hot.outcomes), len(quiet.outcomes)
        hot.wait_answers(25)
        ran = len(hot.outcomes) - start[0], len(quiet.outcomes) - start[1]
    assert not hot.failed
    assert not quiet.failed
    assert ran[1] / ran[0] > 2, f"a batch of the one is as long as ten of the other: {ran}"


def quiet_latencies(server, count):
    client = HttpClient(server.http, "quiet")
    try:
        seconds = []
        for _ in range(count):
            outcome = client.infer([1.0])
            assert outcome.ok
            seconds.append(outcome.seconds)
            time.sleep(0.03)
        return seconds
    finally:
        client.close()


@pytest.mark.parametrize("streams", [False, True], ids=["ModelInfer", "ModelStreamInfer"])
def test_a_refused_request_is_counted_once(server, streams):
    def failures():
        return sum(
            server.metric("nv_inference_request_failure", model="levels", reason=reason)
            for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER")
        )

    before = failures()
    message = infer_message("levels", [1.0], {"priority": 9})
    with grpc.insecure_channel(server.grpc) as channel:
        if streams:
            call = channel.stream_stream(
                f"/{pb.SERVICE}/ModelStreamInfer",
                pb.ModelInferRequest.SerializeToString,
                pb.ModelStreamInferResponse.FromString,
            )
            (answer,) = call(iter([message]), timeout=30)
            said = answer.error_message
        else:
            call = channel.unary_unary(INFER, pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString)
            with pytest.raises(grpc.RpcError) as caught:
                call(message, timeout=30)
            said = caught.value.details()
    assert "parameter 'priority' is 9, expected 1 (served first) to 2" in said
    assert failures() - before == 1


def test_the_configuration_is_shown_as_it_was_given(server):
    status, shown = server.get("/v2/models/levels/config")
    assert status == 200
    batching = shown["dynamic_batching"]
    assert (batching["priority_levels"], batching["default_priority_level"]) == (2, 1)
    assert batching["priority_queue_policy"]["2"] == {
        "timeout_action": "REJECT",
        "default_timeout_microseconds": 0,
        "allow_timeout_override": True,
        "max_queue_size": 12,
    }
    limiter = server.get("/v2/models/second/config")[1]["instance_group"][0]["rate_limiter"]
    assert limiter == {"resources": [{"name": "seat", "global": False, "count": 1}], "priority": 2}
    delaying = server.get("/v2/models/delaying/config")[1]["dynamic_batching"]["default_queue_policy"]
    assert (delaying["timeout_action"], delaying["default_timeout_microseconds"]) == ("DELAY", 400000)
