"""Models written for Triton's Python backend, on the real server: the whole of its API, end to end."""

import json
import queue
import textwrap
import time
import urllib.request

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from running_server import RunningServer
from system.load import all_at_once, onnx_model, put, wait_for
from system.streams import Conversation, generate_stream, stream_method
from tritonclient.utils import InferenceServerException

from headrace.wire import pb

# A batch of rows. A request with a negative row is refused alone; the batch's size is told.
BATCHED = """
    import json

    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def initialize(self, args):
            self.config = json.loads(args["model_config"])
            self.args = args

        def execute(self, requests):
            responses = []
            for request in requests:
                x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
                said = json.loads(request.parameters())
                if said.get("explode"):
                    raise RuntimeError("the whole batch")
                if (x < 0).any():
                    error = pb_utils.TritonError("no negative rows", pb_utils.TritonError.INVALID_ARG)
                    responses.append(pb_utils.InferenceResponse(error=error))
                    continue
                y = x if not said.get("lose_a_row") else x[1:]
                responses.append(
                    pb_utils.InferenceResponse([pb_utils.Tensor("y", y)], parameters={"batch": len(requests)})
                )
            return responses
"""
ROWS = """
backend: "python"
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] } ]
"""
DELAYED = "dynamic_batching { preferred_batch_size: [ 4 ] max_queue_delay_microseconds: 2000000 }\n"

# Tells everything that it is told about the request.
TELLTALE = """
    import json

    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def initialize(self, args):
            self.args = args
            pb_utils.Logger.log_info("telltale was initialized")

        def execute(self, requests):
            return [self.answer(request) for request in requests]

        def answer(self, request):
            said = json.loads(request.parameters())
            logger = pb_utils.Logger
            for level in ("info", "warn", "error", "verbose"):
                if level in said:
                    getattr(logger, f"log_{level}")(said[level])
            told = {
                "id": request.request_id(),
                "correlation_id": request.correlation_id(),
                "flags": request.flags(),
                "priority": request.priority(),
                "timeout": request.timeout(),
                "outputs": request.requested_output_names(),
                "parameters": said,
                "args": sorted(self.args),
                "name": self.args["model_name"],
                "model_dir": pb_utils.get_model_dir(),
            }
            tensors = [
                pb_utils.Tensor("told", np.array([json.dumps(told)], np.object_)),
                pb_utils.Tensor("other", np.array([1.5], np.float32)),
            ]
            parameters = {"text": "\\u00e4", "whole": -7, "yes": True, "part": 0.5, "large": 2**62}
            return pb_utils.InferenceResponse(tensors, parameters=parameters)

        def finalize(self):
            pb_utils.Logger.log_info("telltale was finalized")
"""
TELLTALE_CONFIG = """
backend: "python"
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "told" data_type: TYPE_STRING dims: [ 1 ] }, { name: "other" data_type: TYPE_FP32 dims: [ 1 ] } ]
"""

# async execute: the requests of a batch are answered side by side, by calls of another model.
ASYNC = """
    import asyncio

    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        async def execute(self, requests):
            return await asyncio.gather(*(self.answer(request) for request in requests))

        async def answer(self, request):
            x = pb_utils.get_input_tensor_by_name(request, "x")
            calls = [
                pb_utils.InferenceRequest(
                    model_name="slow",
                    inputs=[pb_utils.Tensor("x", x.as_numpy() + number)],
                    requested_output_names=["y"],
                ).async_exec()
                for number in range(4)
            ]
            responses = await asyncio.gather(*calls)
            for response in responses:
                if response.has_error():
                    return pb_utils.InferenceResponse(error=response.error())
            total = sum(pb_utils.get_output_tensor_by_name(one, "y").as_numpy() for one in responses)
            return pb_utils.InferenceResponse([pb_utils.Tensor("y", total)])
"""
SLOW = """
    import time

    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            time.sleep(0.5)
            return [
                pb_utils.InferenceResponse([pb_utils.Tensor("y", request.inputs()[0].as_numpy())])
                for request in requests
            ]
"""

# Decoupled: counts up from a thread, and keeps metrics of what it does.
COUNTING = """
    import json
    import threading

    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def initialize(self, args):
            family = pb_utils.MetricFamily(
                name="counting_responses_total", description="Responses sent", kind=pb_utils.MetricFamily.COUNTER
            )
            self.sent = family.Metric(labels={"model": args["model_name"]})
            gauges = pb_utils.MetricFamily(
                name="counting_last", description="The last number", kind=pb_utils.MetricFamily.GAUGE
            )
            self.last = gauges.Metric(labels={"place": "here \\\\ \\" there", "model": args["model_name"]})
            histograms = pb_utils.MetricFamily(
                name="counting_lengths", description="Lengths", kind=pb_utils.MetricFamily.HISTOGRAM
            )
            self.lengths = histograms.Metric(labels={"model": args["model_name"]}, buckets=[1, 5, 25])

        def execute(self, requests):
            for request in requests:
                (count,) = request.inputs()[0].as_numpy()
                said = json.loads(request.parameters())
                names = request.requested_output_names()
                self.lengths.observe(int(count))
                sender = request.get_response_sender()
                threads = [
                    threading.Thread(target=self.tell, args=(sender, range(start, count, 4)), daemon=True)
                    for start in range(4)
                ]
                threading.Thread(target=self.end, args=(sender, threads, said), daemon=True).start()

        def tell(self, sender, numbers):
            for number in numbers:
                tensor = pb_utils.Tensor("index", np.array([number], np.int32))
                sender.send(pb_utils.InferenceResponse([tensor], parameters={"double": int(2 * number)}))
                self.sent.increment(1)
                self.last.set(number)

        def end(self, sender, threads, said):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
COUNTING_CONFIG = """
backend: "python"
model_transaction_policy { decoupled: true }
input [ { name: "count" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "index" data_type: TYPE_INT32 dims: [ 1 ] } ]
"""

# Sums up what the decoupled model gives, in the three ways that there are.
SUMS = """
    import asyncio
    import json

    import numpy as np
    import triton_python_backend_utils as pb_utils


    def number(response):
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        tensor = pb_utils.get_output_tensor_by_name(response, "index")
        return 0 if tensor is None else int(tensor.as_numpy()[0])


    class TritonPythonModel:
        async def execute(self, requests):
            return [await self.answer(request) for request in requests]

        async def answer(self, request):
            way = json.loads(request.parameters())["way"]
            call = pb_utils.InferenceRequest(
                model_name="counting", inputs=request.inputs(), requested_output_names=["index"]
            )
            if way == "exec":
                total = sum(map(number, await asyncio.to_thread(lambda: list(call.exec(decoupled=True)))))
            elif way == "for":
                total = sum(map(number, await call.async_exec(decoupled=True)))
            elif way == "cancel":
                responses = await call.async_exec(decoupled=True)
                total = sum(number(next(responses)) for _ in range(3))
                responses.cancel()
            else:
                total = 0
                async for response in await call.async_exec(decoupled=True):
                    total += number(response)
            return pb_utils.InferenceResponse([pb_utils.Tensor("sum", np.array([total], np.int32))])
"""
SUMS_CONFIG = """
backend: "python"
input [ { name: "count" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "sum" data_type: TYPE_INT32 dims: [ 1 ] } ]
"""

# A decoupled model whose execute is a coroutine: several requests are under way at a time.
ASYNC_STREAM = """
    import asyncio
    import json

    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        async def execute(self, requests):
            for request in requests:
                (count,) = request.inputs()[0].as_numpy()
                said = json.loads(request.parameters())
                sender = request.get_response_sender()
                for index in range(count):
                    await asyncio.sleep(said.get("delay_ms", 0) / 1000)
                    if sender.is_cancelled():
                        pb_utils.Logger.log_warn("nobody listens any more")
                        break
                    if index == said.get("raise_at"):
                        raise ValueError(f"{index} is too much")
                    sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("index", np.array([index], np.int32))]))
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def triton_model(repository, name, code, config, version=1):
    (repository / name).mkdir(parents=True, exist_ok=True)
    (repository / name / "config.pbtxt").write_text(config)
    put(repository / name / str(version), "model.py", textwrap.dedent(code).encode())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("triton python")
    onnx_model(repository, "adder")
    triton_model(repository, "rows", BATCHED, ROWS + DELAYED)
    triton_model(repository, "telltale", TELLTALE, TELLTALE_CONFIG)
    triton_model(repository, "slow", SLOW, ROWS + "dynamic_batching { }\n")
    triton_model(repository, "async", ASYNC, ROWS)
    triton_model(repository, "counting", COUNTING, COUNTING_CONFIG)
    triton_model(repository, "counted", COUNTING, COUNTING_CONFIG)
    triton_model(repository, "sums", SUMS, SUMS_CONFIG)
    triton_model(repository, "async_stream", ASYNC_STREAM, COUNTING_CONFIG)
    with RunningServer(repository, "--max-own-workers", "16") as running:
        yield running


def scrape(server):
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=60) as response:
        return response.read().decode().splitlines()


# -- batches -----------------------------------------------------------------------------------------------------------


def retries(server):
    return server.metric("headrace_retried_requests_total", model="rows")


def test_one_bad_request_in_a_batch_fails_alone(server):
    before = retries(server)
    *good, bad = all_at_once(server.http, "rows", [([1.0], None), ([2.0], None), ([3.0], None), ([-4.0], None)])
    assert [one.values for one in good] == [[1.0], [2.0], [3.0]]
    assert retries(server) == before, "nothing was run again"
    assert bad.status == 400
    assert "no negative rows" in bad.detail
    assert "rows" in bad.detail


def test_a_request_whose_response_is_wrong_fails_alone(server):
    outcomes = all_at_once(
        server.http, "rows", [([1.0], None), ([2.0], None), ([3.0], None), ([4.0], {"lose_a_row": True})]
    )
    assert [one.values for one in outcomes[:3]] == [[1.0], [2.0], [3.0]]
    assert outcomes[3].status == 500
    assert "expected 1 rows" in outcomes[3].detail


def test_a_request_that_fails_the_whole_batch_fails_alone_in_the_end(server):
    outcomes = all_at_once(
        server.http, "rows", [([1.0], None), ([2.0], None), ([3.0], None), ([4.0], {"explode": True})]
    )
    assert [one.values for one in outcomes[:3]] == [[1.0], [2.0], [3.0]]
    assert outcomes[3].status == 500
    assert "the whole batch" in outcomes[3].detail


def test_requests_are_told_apart_in_a_batch(server):
    """Each has its own parameters, and is told of the batch that it was in."""
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [4, 1], "data": [1, 2, 3, 4]}]}
    status, answer = server.post("/v2/models/rows/infer", body)
    assert status == 200
    assert answer["parameters"] == {"batch": 1}
    assert answer["outputs"][0]["data"] == [1, 2, 3, 4]


# -- what a request tells, what a response may say ---------------------------------------------------------------------


EXPECTED_PARAMETERS = {"text": "ä", "whole": -7, "yes": True, "part": 0.5, "large": 2**62}


def told_over_http(server, **more):
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [0]}], **more}
    status, answer = server.post("/v2/models/telltale/infer", body)
    assert status == 200, answer
    return answer, json.loads(answer["outputs"][0]["data"][0])


def test_what_a_request_tells_its_model(server):
    own = {"text": "ß", "number": 3, "part": 0.25, "no": False}
    reserved = {"sequence_id": 77, "sequence_start": True, "priority": 0, "timeout": 20_000_000}
    answer, told = told_over_http(server, id="mine", parameters={**own, **reserved})
    assert (answer["id"], told["id"]) == ("mine", "mine")
    assert told["correlation_id"] == 77
    assert told["flags"] == 1
    assert told["timeout"] == 20_000_000
    assert told["parameters"] == own
    assert told["outputs"] == ["told", "other"]
    assert told["name"] == "telltale"
    assert told["model_dir"].endswith("telltale/1")
    assert set(told["args"]) == {
        "model_config",
        "model_instance_device_id",
        "model_instance_kind",
        "model_instance_name",
        "model_name",
        "model_repository",
        "model_version",
    }


def test_correlation_ids_may_be_texts(server):
    _, told = told_over_http(server, parameters={"sequence_id": "abc", "sequence_end": True})
    assert (told["correlation_id"], told["flags"]) == ("abc", 2)
    _, told = told_over_http(server)
    assert (told["correlation_id"], told["flags"]) == (0, 0)


def test_only_outputs_that_were_asked_for(server):
    answer, told = told_over_http(server, outputs=[{"name": "told"}])
    assert [output["name"] for output in answer["outputs"]] == ["told"]
    assert told["outputs"] == ["told"]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_parameters_of_a_response_reach_triton_s_clients(server, protocol):
    module, address = (tritonclient.http, server.http) if protocol == "http" else (tritonclient.grpc, server.grpc)
    with module.InferenceServerClient(address) as client:
        tensor = module.InferInput("x", [1], "FP32")
        tensor.set_data_from_numpy(np.zeros(1, np.float32))
        result = client.infer("telltale", [tensor], request_id="mine", parameters={"own": 5})
        response = result.get_response()
        told = json.loads(result.as_numpy("told")[0])
    assert told["parameters"] == {"own": 5}
    if protocol == "http":
        assert response["parameters"] == EXPECTED_PARAMETERS
    else:
        values = {name: getattr(one, one.WhichOneof("parameter_choice")) for name, one in response.parameters.items()}
        assert values == EXPECTED_PARAMETERS


def test_what_a_model_logs_is_in_the_servers_log(server):
    assert "model telltale: telltale was initialized" in server.output
    told_over_http(server, parameters={"info": "a note", "warn": "a warning", "error": "an error", "verbose": "detail"})
    for text in ("a note", "a warning", "an error"):
        server.wait_for(lambda text=text: f"model telltale: {text}" in server.output)
    assert "model telltale: detail" not in server.output
    lines = {line.partition("model telltale: ")[2]: line for line in server.output.splitlines()}
    assert "WARNING" in lines["a warning"].upper()
    assert "ERROR" in lines["an error"].upper()


def test_what_is_verbose_is_logged_where_that_is_wished(tmp_path):
    triton_model(tmp_path, "telltale", TELLTALE, TELLTALE_CONFIG)
    with RunningServer(tmp_path, "--log-level", "debug") as running:
        told_over_http(running, parameters={"verbose": "detail"})
        running.wait_for(lambda: "model telltale: detail" in running.output)
        assert running.stop() == 0
        assert "model telltale: telltale was finalized" in running.output


# -- decoupled ---------------------------------------------------------------------------------------------------------


def test_responses_from_several_threads(server):
    items = list(generate_stream(server, "counting", 400))
    assert sorted(item.index for item in items) == list(range(400))


def test_parameters_of_streamed_responses(server):
    request = pb.ModelInferRequest(model_name="counting", id="mine")
    request.inputs.add(name="count", datatype="INT32", shape=[1]).contents.int_contents.append(8)
    with grpc.insecure_channel(server.grpc) as channel:
        responses = [one.infer_response for one in stream_method(channel)(iter([request]), timeout=60)]
    for response in responses:
        (raw,) = response.raw_output_contents
        assert response.parameters["double"].int64_param == 2 * int.from_bytes(raw, "little")
        assert response.id == "mine"
    body = {"inputs": [{"name": "count", "datatype": "INT32", "shape": [1], "data": [8]}]}
    _, _, answer = server.request("POST", "/v2/models/counting/infer_stream", body)
    for event in answer.decode().split("\n\n")[:-1]:
        given = json.loads(event[len("data: ") :])
        assert given["parameters"]["double"] == 2 * given["outputs"][0]["data"][0]


def test_async_execute_of_a_decoupled_model_takes_turns(server):
    with Conversation(server) as conversation:
        began = time.monotonic()
        for number in range(20):
            conversation.send("async_stream", 5, {"delay_ms": 200}, str(number))
        conversation.done()
        items = list(conversation)
    assert time.monotonic() - began < 15, "one after the other would take twenty seconds"
    assert len(items) == 100
    assert not any(item.error for item in items)


def test_async_execute_that_raises_in_the_middle(server):
    items = list(generate_stream(server, "async_stream", 5, {"raise_at": 2}))
    assert [item.index for item in items] == [0, 1, None]
    assert "2 is too much" in items[2].error


def test_a_sender_is_told_when_its_client_leaves(server):
    events = generate_stream(server, "async_stream", 1_000_000, {"delay_ms": 5})
    assert next(events).index == 0
    events.close()
    server.wait_for(lambda: "nobody listens any more" in server.output)


# -- async and calls ---------------------------------------------------------------------------------------------------


def test_calls_made_at_once_run_at_once(server):
    """Four calls of a model that takes half a second and merges its requests: the first is one batch, others wait."""

    def batches():
        return server.metric("nv_inference_exec_count", model="slow")

    before = batches()
    with tritonclient.http.InferenceServerClient(server.http) as client:
        tensor = tritonclient.http.InferInput("x", [1, 2], "FP32")
        tensor.set_data_from_numpy(np.array([[1, 2]], np.float32))
        result = client.infer("async", [tensor])
    assert batches() - before < 4, "one after the other they would not be merged"
    np.testing.assert_array_equal(result.as_numpy("y"), [[4 * 1 + 6, 4 * 2 + 6]])


@pytest.mark.parametrize("way", ["exec", "for", "async for"])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_calls_of_a_decoupled_model(server, way, count):
    assert sums(server, way, count) == sum(range(count))


def test_a_call_of_a_decoupled_model_that_is_cancelled(server):
    assert isinstance(sums(server, "cancel", 100_000), int)
    wait_for(lambda: server.metric("headrace_executing_batches", model="counting") == 0)


def sums(server, way, count):
    body = {
        "inputs": [{"name": "count", "datatype": "INT32", "shape": [1], "data": [count]}],
        "parameters": {"way": way},
    }
    status, answer = server.post("/v2/models/sums/infer", body)
    assert status == 200, answer
    return answer["outputs"][0]["data"][0]


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_of_a_model_s_own_have_their_type_and_labels(server):
    list(generate_stream(server, "counting", 4))
    lines = wait_for(lambda: [line for line in scrape(server) if "counting_" in line])
    assert "# TYPE counting_responses_total counter" in lines
    assert "# HELP counting_responses_total Responses sent" in lines
    assert "# TYPE counting_last gauge" in lines
    assert "# TYPE counting_lengths histogram" in lines
    assert any(line.startswith("counting_lengths_bucket") and 'le="5.0"' in line for line in lines)
    assert any('place="here \\\\ \\" there"' in line for line in lines if line.startswith("counting_last{"))


def test_metrics_of_what_a_sender_s_thread_did_are_seen(server):
    """The responses are sent, and counted, after execute has returned."""
    before = counted(server)
    assert len(list(generate_stream(server, "counted", 200))) == 200
    assert len(list(generate_stream(server, "counted", 100))) == 100
    list(generate_stream(server, "counted", 0))
    wait_for(lambda: counted(server) == before + 300, what="what the threads counted")


def test_metrics_are_seen_without_another_request(server):
    before = counted(server)
    assert len(list(generate_stream(server, "counted", 200))) == 200
    wait_for(lambda: counted(server) == before + 200, what="what the threads counted")


def counted(server):
    """Of a model that nobody asks but those who wait until all is counted."""
    return server.metric("counting_responses_total", model="counted")


# -- triton's clients --------------------------------------------------------------------------------------------------


def test_errors_have_triton_s_statuses(server):
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        tensor = tritonclient.grpc.InferInput("x", [1, 1], "FP32")
        tensor.set_data_from_numpy(np.array([[-1]], np.float32))
        with pytest.raises(InferenceServerException) as caught:
            client.infer("rows", [tensor])
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        answers = queue.SimpleQueue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("rows", [tensor])
        result, error = answers.get(timeout=60)
        assert result is None
        assert "no negative rows" in error.message()
        client.stop_stream()
