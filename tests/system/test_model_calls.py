"""Models that call other models, on the real server: what comes back, what goes wrong, and who must not wait."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import psutil
import pytest
from running_server import RunningServer
from system.load import Load, fake_model, gated_model, infer, onnx_model, python_model, wait_for
from system.streams import (
    Conversation,
    assert_falls_to,
    generate_stream,
    lines,
    resident_bytes,
    steady,
    streaming_models,
)

MIB = 1024 * 1024

# Calls the model "target" with its own input. Parameters of the request say more.
CALLER = """
    import numpy as np


    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]
        max_batch_size = 0

        def load(self, context):
            self.context = context

        def infer(self, inputs, requests):
            said = dict(requests[0].parameters)
            target = said.pop("target", self.context.parameters.get("target", "adder"))
            timeout_s = said.pop("timeout_s", None)
            version = said.pop("version", "")
            return self.context.infer(target, inputs, version=version, timeout_s=timeout_s, parameters=said)
"""

# Calls each model of the parameter "chain" in turn; what is left of the chain goes along.
CHAIN = """
    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]
        max_batch_size = 0

        def load(self, context):
            self.context = context

        def infer(self, inputs, requests):
            chain = requests[0].parameters.get("chain", "")
            if not chain:
                return {"y": inputs["x"] + 1}
            first, _, rest = chain.partition(",")
            outputs = self.context.infer(first, inputs, parameters={"chain": rest})
            return {"y": outputs["y"] + 1}
"""

# Streams what the streaming model "teller" gives, doubled; or gives the sum of it.
RELAY = """
    import numpy as np


    class Model:
        inputs = [{"name": "count", "datatype": "INT32", "shape": [1]}]
        outputs = [
            {"name": "index", "datatype": "INT32", "shape": [1]},
            {"name": "data", "datatype": "BYTES", "shape": [1]},
        ]
        max_batch_size = 0

        def load(self, context):
            self.context = context

        def infer(self, inputs, request):
            said = dict(request.parameters)
            target = said.pop("target", "teller")
            for outputs in self.context.stream(target, inputs, parameters=said):
                yield {"index": outputs["index"] * 2, "data": outputs["data"]}
"""
SUM = """
    import numpy as np


    class Model:
        inputs = [{"name": "count", "datatype": "INT32", "shape": [1]}]
        outputs = [{"name": "sum", "datatype": "INT32", "shape": [1]}]
        max_batch_size = 0

        def load(self, context):
            self.context = context

        def infer(self, inputs, requests):
            said = dict(requests[0].parameters)
            take, drop = said.pop("take", 1 << 30), said.pop("drop", False)
            total = 0
            answers = self.context.stream(said.pop("target", "teller"), inputs, parameters=said)
            if drop:
                return {"sum": np.array([-1], np.int32)}
            for outputs in answers:
                total += int(outputs["index"][0])
                take -= 1
                if not take:
                    break
            return {"sum": np.array([total], np.int32)}
"""
MIRROR = """
    import numpy as np


    class Model:
        inputs = [
            {"name": "x", "datatype": "FP32", "shape": [-1, -1], "optional": True},
            {"name": "text", "datatype": "BYTES", "shape": [-1], "optional": True},
        ]
        outputs = [
            {"name": "y", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "text", "datatype": "BYTES", "shape": [-1]},
        ]
        max_batch_size = 0

        def infer(self, inputs):
            return {
                "y": inputs.get("x", np.zeros((0, 3), np.float32)),
                "text": inputs.get("text", np.zeros(0, np.object_)),
            }
"""
MIRROR_CALLER = MIRROR.replace(
    "def infer(self, inputs):",
    """def load(self, context):
            self.context = context

        def infer(self, inputs):
            return self.context.infer("mirror", inputs)

        def unused(self, inputs):""",
)
THREADED = """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np


    class Model:
        inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}]
        outputs = [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]
        max_batch_size = 0

        def load(self, context):
            self.context = context
            self.pool = ThreadPoolExecutor(16)

        def infer(self, inputs):
            calls = [self.pool.submit(self.context.infer, "adder", {"x": inputs["x"] + n}) for n in range(32)]
            return {"y": sum(call.result()["y"] for call in calls)}
"""


def call(server, model, values=(1.0, 2.0), **parameters):
    return infer(server.http, model, list(values), parameters or None)


MODELS = ["adder", "fake", "gated", "caller", "one", "two", "three", "relay", "sum", "teller", "sender"]


def calling_models(repository):
    onnx_model(repository, "adder")
    fake_model(repository, "fake", "max_batch_size: 1\n")
    for name in ("caller", "one", "two", "three"):
        python_model(repository, name, CALLER if name == "caller" else CHAIN)
    python_model(repository, "relay", RELAY)
    python_model(repository, "sum", SUM)
    return streaming_models(repository)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    flags = ["--model-control", "explicit", "--max-own-workers", "16"]
    repository = calling_models(tmp_path_factory.mktemp("calls"))
    gate = gated_model(repository, "gated")
    with RunningServer(repository, *flags) as running:
        running.gate = gate
        running.homes = {}
        for name in MODELS:
            before = set(homes(running))
            assert running.post(f"/v2/repository/models/{name}/load")[0] == 200
            (running.homes[name],) = set(homes(running)) - before
        yield running


def homes(server):
    """The workers by the name that each keeps over its lives."""
    found = {}
    for worker in server.workers():
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            found[worker.cmdline()[-2]] = worker
    return found


def kill_worker_of(server, name):
    """Kill the worker of a model, and wait until that was noticed."""
    before = server.metric("headrace_worker_deaths_total", model=name)
    homes(server)[server.homes[name]].kill()
    server.wait_for(lambda: server.metric("headrace_worker_deaths_total", model=name) == before + 1)


def sum_of(server, count, **said):
    tensor = {"name": "count", "datatype": "INT32", "shape": [1], "data": [count]}
    return server.post("/v2/models/sum/infer", {"inputs": [tensor], "parameters": said})


# -- what comes back ---------------------------------------------------------------------------------------------------


def test_a_python_model_calls_an_onnx_model(server):
    assert call(server, "caller").values == [2.0, 3.0]


def test_a_chain_of_three(server):
    assert call(server, "one", chain="two,three,adder").values == [5.0, 6.0]


def test_a_call_is_counted_as_a_request_of_the_called_model(server):
    before = server.metric("nv_inference_request_success", model="adder")
    assert call(server, "caller").ok
    assert server.metric("nv_inference_request_success", model="adder") == before + 1


def test_calls_from_many_threads_of_a_model(server, tmp_path):
    onnx_model(tmp_path, "adder")
    python_model(tmp_path, "threaded", THREADED)
    with RunningServer(tmp_path) as running:
        outcomes = [call(running, "threaded", [0.0]) for _ in range(20)]
        assert {outcome.values[0] for outcome in outcomes} == {float(sum(n + 1 for n in range(32)))}


@pytest.mark.parametrize("target", ["teller", "sender"])
def test_responses_are_passed_on_as_they_come(server, target, tmp_path):
    done = tmp_path / "done"
    events = generate_stream(server, "relay", 1_000_000, {"target": target, "delay_ms": 10, "until": str(done)})
    assert next(events).index == 0
    done.touch()  # without which there is no end
    indexes = [item.index for item in events]
    assert indexes == [2 * index for index in range(1, 1 + len(indexes))]


@pytest.mark.parametrize("target", ["teller", "sender"])
def test_a_model_that_answers_once_sums_up_a_stream(server, target):
    for count in (0, 1, 5, 500):
        status, body = sum_of(server, count, target=target)
        assert status == 200, body
        assert body["outputs"][0]["data"] == [sum(range(count))]


def test_a_stream_of_a_model_that_answers_once(server):
    outputs = generate_stream(server, "relay", 3, {"target": "adder"})
    (item,) = outputs
    assert "adder" in item.error
    assert "input" in item.error


@pytest.mark.parametrize("size", [0, 1, 5 * MIB])
def test_big_and_empty_tensors_both_ways(tmp_path, size):
    python_model(tmp_path, "mirror", MIRROR)
    python_model(tmp_path, "caller", MIRROR_CALLER)
    values = np.arange(size, dtype=np.float32).reshape(-1, 1) if size else np.zeros((0, 7), np.float32)
    texts = [b"", b"\0\xff", "\u00e4".encode(), b"x" * 100_000]
    packed = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    head = json.dumps(
        {
            "inputs": [
                _binary("x", "FP32", values.shape, values.nbytes),
                _binary("text", "BYTES", [len(texts)], len(packed)),
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    with RunningServer(tmp_path) as running:
        for _ in range(3):
            status, answered, body = running.request(
                "POST", "/v2/models/caller/infer", head + values.tobytes() + packed, headers
            )
            assert status == 200, body
            if answered["content-type"] == "application/json":
                body = json.dumps(body).encode()
                pytest.fail(str(body[:300]))
            length = int(answered["Inference-Header-Content-Length"])
            outputs = {output["name"]: output for output in json.loads(body[:length])["outputs"]}
            assert outputs["y"]["shape"] == list(values.shape)
            assert body[length:] == values.tobytes() + packed


def _binary(name, datatype, shape, nbytes):
    return {"name": name, "datatype": datatype, "shape": list(shape), "parameters": {"binary_data_size": nbytes}}


def test_big_calls_leave_no_memory_behind(tmp_path):
    python_model(tmp_path, "mirror", MIRROR)
    python_model(tmp_path, "caller", MIRROR_CALLER)
    values = np.arange(5 * MIB, dtype=np.float32)
    head = json.dumps(
        {"inputs": [_binary("x", "FP32", (5 * MIB, 1), values.nbytes)], "parameters": {"binary_data_output": True}}
    ).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    with RunningServer(tmp_path) as running:

        def round_of(times):
            for _ in range(times):
                assert running.request("POST", "/v2/models/caller/infer", head + values.tobytes(), headers)[0] == 200
            return resident_bytes(running)

        before = round_of(8)
        round_of(20)
        assert_falls_to(running, before + 32 * MIB)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_the_called_models_error_is_the_callers_client_s(server):
    outcome = call(server, "caller", target="fake", fake_fail="the file is on the moon")
    assert outcome.status == 500
    assert "the file is on the moon" in outcome.detail
    assert call(server, "caller").ok


@pytest.mark.parametrize(
    ("said", "status", "says"),
    [
        ({"target": "nobody"}, 404, "Request for unknown model"),
        ({"target": "adder", "version": "7"}, 404, "version 7"),
        ({"target": "teller"}, 501, "decoupled"),
        ({"target": "sum"}, 400, "input"),
        ({"target": "adder", "timeout": -5}, 400, "timeout"),
    ],
)
def test_a_call_that_is_refused(server, said, status, says):
    outcome = call(server, "caller", **said)
    assert outcome.status == status, outcome.detail
    assert says in outcome.detail


def test_a_call_of_a_model_that_was_unloaded(server):
    assert server.post("/v2/repository/models/adder/unload")[0] == 200
    try:
        outcome = call(server, "caller")
        assert outcome.status == 404
        assert "adder" in outcome.detail
    finally:
        assert server.post("/v2/repository/models/adder/load")[0] == 200
    assert call(server, "caller").ok


def test_a_call_with_a_timeout(server):
    with server.gate.shut():  # so that the model has not answered before
        outcome = call(server, "caller", target="gated", timeout_s=0.2)
    assert outcome.status == 503
    assert "Request timeout expired" in outcome.detail
    assert call(server, "caller", target="gated").ok


def test_errors_in_the_middle_of_a_streamed_call(server):
    items = list(generate_stream(server, "relay", 5, {"refuse_at": 2}))
    assert [item.index for item in items] == [0, 2, None]
    assert "no 2 here" in items[2].error
    status, body = sum_of(server, 5, refuse_at=2)
    assert (status, "no 2 here" in body["error"]) == (400, True)


@pytest.mark.parametrize("chain", ["one", "two,one", "two,three,one", "two,two"])
def test_a_model_that_calls_itself_is_refused(server, chain):
    outcome = call(server, "one", chain=chain)
    assert outcome.status == 400
    assert "on behalf of itself" in outcome.detail
    assert "->" in outcome.detail
    assert outcome.seconds < 15


def test_a_streaming_model_that_calls_itself_is_refused(server):
    (item,) = generate_stream(server, "relay", 3, {"target": "relay"})
    assert "on behalf of itself (relay -> relay)" in item.error


def test_two_models_that_call_each_other_at_once_do_not_wait_for_ever(tmp_path):
    """Each client's chain is short and ends by itself; only the two models' workers wait for each other."""
    code = CHAIN.replace("first, _, rest", "time.sleep(0.5); first, _, rest").replace(
        "class Model", "import time\n\n\n    class Model", 1
    )
    for name in ("one", "two"):
        python_model(tmp_path, name, code, config="execution_timeout_s: 60\n")
    with RunningServer(tmp_path) as running, ThreadPoolExecutor(2) as pool:
        began = time.monotonic()
        there, back = pool.submit(call, running, "one", chain="two"), pool.submit(call, running, "two", chain="one")
        outcomes = [there.result(), back.result()]
        assert time.monotonic() - began < 50
        assert {outcome.status for outcome in outcomes} <= {200, 400}


def test_a_loop_through_a_sender_s_thread_is_refused(tmp_path):
    """sum -> sender -> sum, the second call being made by a thread that outlives execute."""
    python_model(tmp_path, "sum", SUM, config="execution_timeout_s: 60\n")
    python_model(
        tmp_path,
        "sender",
        """
        import threading
        import time

        import triton_python_backend_utils as pb_utils


        class TritonPythonModel:
            def execute(self, requests):
                for request in requests:
                    sender = request.get_response_sender()
                    threading.Thread(target=self.tell, args=(sender, request.inputs())).start()

            def tell(self, sender, inputs):
                time.sleep(0.3)
                call = pb_utils.InferenceRequest(model_name="sum", requested_output_names=["sum"], inputs=inputs)
                sender.send(pb_utils.InferenceResponse(error=call.exec().error()), 1)
        """,
    )
    (tmp_path / "sender" / "config.pbtxt").write_text(
        """
        backend: "python"
        model_transaction_policy { decoupled: true }
        input [ { name: "count" data_type: TYPE_INT32 dims: [ 1 ] } ]
        output [ { name: "index" data_type: TYPE_INT32 dims: [ 1 ] } ]
        """
    )
    with RunningServer(tmp_path) as running:
        began = time.monotonic()
        status, body = sum_of(running, 3, target="sender")
        assert time.monotonic() - began < 50
        assert (status, "on behalf of itself" in body["error"]) == (400, True)


def test_a_call_whose_model_dies_is_tried_again(server):
    with ThreadPoolExecutor(1) as pool:
        with server.gate.shut():
            outcome = pool.submit(call, server, "caller", target="gated")
            server.wait_for(lambda: server.metric("headrace_executing_batches", model="gated") == 1)
            kill_worker_of(server, "gated")
        assert outcome.result().values == [1.0, 2.0]
    assert server.metric("headrace_worker_deaths_total", model="caller") == 0


def test_a_call_that_kills_its_model_is_refused(server):
    outcome = call(server, "caller", target="fake", fake_crash="segfault")
    assert outcome.status == 500
    assert "the worker died" in outcome.detail
    assert call(server, "caller", target="fake").ok


def test_a_streamed_call_whose_model_dies(server):
    events = generate_stream(server, "relay", 100_000, {"delay_ms": 5})
    assert next(events).index == 0
    kill_worker_of(server, "teller")
    *_, last = events
    assert "the worker died" in last.error
    server.wait_for(lambda: server.model_ready("teller"))
    assert [item.index for item in generate_stream(server, "relay", 3)] == [0, 2, 4]


def test_a_caller_that_dies_takes_its_call_back(server, tmp_path):
    """The called model goes on for others, and what nobody waits for is ended."""
    journal = tmp_path / "journal"
    said = {"delay_ms": 10, "journal": str(journal)}
    events = generate_stream(server, "relay", 100_000, said)
    assert next(events).index == 0
    deaths = server.metric("headrace_worker_deaths_total", model="teller")
    kill_worker_of(server, "relay")
    *_, last = events
    assert "the worker died" in last.error
    wait_for(lambda: lines(journal)[-1:] == ["finally"])
    assert server.metric("headrace_worker_deaths_total", model="teller") == deaths
    assert [item.index for item in generate_stream(server, "teller", 3)] == [0, 1, 2]
    server.wait_for(lambda: server.model_ready("relay"))
    assert [item.index for item in generate_stream(server, "relay", 2)] == [0, 2]


def test_a_client_that_leaves_takes_the_streamed_call_back(server, tmp_path):
    journal = tmp_path / "journal"
    events = generate_stream(server, "relay", 100_000, {"delay_ms": 10, "journal": str(journal)})
    assert next(events).index == 0
    events.close()
    wait_for(lambda: lines(journal)[-1:] == ["finally"])


def test_a_streamed_call_that_is_left_in_the_middle_is_taken_back(server, tmp_path):
    journal = tmp_path / "journal"
    status, body = sum_of(server, 100_000, take=3, delay_ms=2, journal=str(journal))
    assert (status, body["outputs"][0]["data"]) == (200, [0 + 1 + 2])
    wait_for(lambda: lines(journal)[-1:] == ["finally"])


def test_a_streamed_call_that_is_never_read_is_taken_back(server):
    assert sum_of(server, 100_000, drop=True, delay_ms=2)[0] == 200
    try:
        wait_for(lambda: server.metric("headrace_executing_batches", model="teller") == 0)
    finally:
        if server.metric("headrace_executing_batches", model="teller"):
            kill_worker_of(server, "teller")
            server.wait_for(lambda: server.model_ready("teller"))


def test_a_slow_client_pauses_the_called_model_too(server, tmp_path):
    journal = tmp_path / "journal"
    said = {"nbytes": 64 * 1024, "journal": str(journal)}
    events = generate_stream(server, "relay", 3000, said, receive_bytes=64 * 1024)
    assert next(events).index == 0
    steady(lambda: len(lines(journal)), for_s=2)
    assert len(lines(journal)) < 500
    assert [item.index for item in events] == [2 * index for index in range(1, 3000)]


# -- many --------------------------------------------------------------------------------------------------------------


def test_two_hundred_clients_of_a_calling_model(server):
    with ThreadPoolExecutor(200) as pool:
        outcomes = list(pool.map(lambda number: call(server, "caller", [float(number)]), range(400)))
    assert [outcome.detail for outcome in outcomes if not outcome.ok] == []
    assert [outcome.values for outcome in outcomes] == [[number + 1.0] for number in range(400)]


def test_two_hundred_streams_of_a_calling_model(server):
    with Conversation(server) as conversation:
        for number in range(200):
            conversation.send("relay", 10, None, str(number))
        conversation.done()
        items = list(conversation)
    assert [item.error for item in items if item.error] == []
    by_id = {}
    for item in items:
        by_id.setdefault(item.id, []).append(item.index)
    assert by_id == {str(number): [2 * index for index in range(10)] for number in range(200)}


def test_calls_while_workers_are_killed(tmp_path):
    onnx_model(tmp_path, "adder")
    python_model(tmp_path, "caller", CALLER)
    with RunningServer(tmp_path) as running:
        load = Load(running, "caller", http=4, grpc=2, expected=lambda values, _: [value + 1 for value in values])
        with load:
            for _ in range(8):
                load.wait_answers(20)
                running.kill_workers()
                for name in ("adder", "caller"):
                    running.wait_for(lambda name=name: running.model_ready(name))
            load.wait_answers(20)
        assert not load.failed, load.failed[:3]


# -- the repository ----------------------------------------------------------------------------------------------------

KEEPER = """
    import json

    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            return [self.answer(request) for request in requests]

        def answer(self, request):
            said = json.loads(request.parameters())
            model = said["model"]
            try:
                if said["do"] == "load":
                    pb_utils.load_model(model, **({"config": said["config"]} if "config" in said else {}))
                elif said["do"] == "unload":
                    pb_utils.unload_model(model)
                ready = pb_utils.is_model_ready(model)
            except pb_utils.TritonModelException as error:
                return pb_utils.InferenceResponse(error=pb_utils.TritonError(error.message(), 3))
            return pb_utils.InferenceResponse([pb_utils.Tensor("ready", np.array([ready]))])
"""


@pytest.fixture(scope="module")
def keeper(tmp_path_factory):
    repository = tmp_path_factory.mktemp("keeper")
    onnx_model(repository, "adder")
    python_model(repository, "broken", "raise RuntimeError('no weights here')")
    for name in ("keeper", "self"):
        python_model(repository, name, KEEPER)
        (repository / name / "config.pbtxt").write_text(
            'backend: "python"\n'
            'input [ { name: "x" data_type: TYPE_INT32 dims: [ 1 ] } ]\n'
            'output [ { name: "ready" data_type: TYPE_BOOL dims: [ 1 ] } ]\n'
        )
    flags = ["--model-control", "explicit", "--load-model", "keeper", "--load-model", "self"]
    with RunningServer(repository, *flags) as running:
        yield running


def have(server, by="keeper", **said):
    tensor = {"name": "x", "datatype": "INT32", "shape": [1], "data": [0]}
    status, body = server.post(f"/v2/models/{by}/infer", {"inputs": [tensor], "parameters": said})
    return body["outputs"][0]["data"][0] if status == 200 else (status, body["error"])


def test_a_model_loads_and_unloads_others(keeper):
    assert have(keeper, do="ask", model="adder") is False
    assert have(keeper, do="load", model="adder") is True
    assert infer(keeper.http, "adder", [1.0]).values == [2.0]
    assert have(keeper, do="ask", model="adder") is True
    assert have(keeper, do="unload", model="adder") is False
    assert infer(keeper.http, "adder", [1.0]).status == 404


def test_what_cannot_be_loaded(keeper):
    status, error = have(keeper, do="load", model="broken")
    assert (status, "no weights here" in error) == (400, True)
    status, error = have(keeper, do="load", model="nobody")
    assert (status, "failed to load" in error) == (400, True)
    status, error = have(keeper, do="load", model="adder", config="{")
    assert (status, "JSON" in error) == (400, True)
    assert have(keeper, do="ask", model="nobody") is False
    assert have(keeper, do="ask", model="keeper") is True


@pytest.mark.parametrize("do", ["unload", "load"])
def test_a_model_that_replaces_or_unloads_itself_does_not_wait_for_itself(keeper, do):
    began = time.monotonic()
    if do == "load":
        model = keeper.repository / "self" / "1" / "model.py"
        model.write_text(model.read_text() + f"\n# {began}\n")
    if not keeper.model_ready("self"):
        assert keeper.post("/v2/repository/models/self/load")[0] == 200
    ready = have(keeper, by="self", do=do, model="self")
    assert time.monotonic() - began < 25
    assert ready is (do == "load")
    if do == "unload":
        keeper.wait_for(lambda: not keeper.model_ready("self"))


def test_repository_calls_where_the_server_does_not_offer_them(tmp_path):
    onnx_model(tmp_path, "adder")
    python_model(tmp_path, "keeper", KEEPER)
    (tmp_path / "keeper" / "config.pbtxt").write_text(
        'backend: "python"\n'
        'input [ { name: "x" data_type: TYPE_INT32 dims: [ 1 ] } ]\n'
        'output [ { name: "ready" data_type: TYPE_BOOL dims: [ 1 ] } ]\n'
    )
    with RunningServer(tmp_path) as running:
        assert have(running, do="ask", model="adder") is True
        status, error = have(running, do="unload", model="adder")
        assert status == 400
        assert "explicit" in error


def test_a_new_version_of_the_called_model_is_called_at_once(tmp_path):
    onnx_model(tmp_path, "adder")
    python_model(tmp_path, "caller", CALLER)
    with RunningServer(tmp_path) as running:
        assert call(running, "caller", [0.0]).values == [1.0]
        stop = threading.Event()
        outcomes = []

        def ask():
            while not stop.is_set():
                outcomes.append(call(running, "caller", [0.0]))

        client = threading.Thread(target=ask)
        client.start()
        onnx_model(tmp_path, "adder", 2)
        running.wait_for(lambda: outcomes and outcomes[-1].values == [2.0])
        stop.set()
        client.join()
        assert [one.detail for one in outcomes if not one.ok] == []
        assert [one.values for one in outcomes] == sorted(one.values for one in outcomes)
