"""Streaming models, clients of their streams over every protocol, and readers that are slow: for tests of streams."""

import http.client
import json
import queue
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import psutil
from system.load import python_model, wait_for

from headrace.wire import pb

TIMEOUT_S = 60
MIB = 1024 * 1024
WINDOW = 32  # responses that a model may make ahead of its client
ENABLE_FINAL = "triton_enable_empty_final_response"
FINAL = "triton_final_response"

TELLER = """
    import os
    import time

    import numpy as np

    from headrace_backends.python import Answer, InputError


    class Model:
        inputs = [{"name": "count", "datatype": "INT32", "shape": [1]}]
        outputs = [
            {"name": "index", "datatype": "INT32", "shape": [1]},
            {"name": "data", "datatype": "BYTES", "shape": [1]},
        ]
        max_batch_size = 0

        def infer(self, inputs, request):
            said = request.parameters
            data = np.array([b"x" * said.get("nbytes", 1)], np.object_)
            try:
                for index in range(int(inputs["count"][0])):
                    if "until" in said and os.path.exists(said["until"]):
                        break
                    if index >= said.get("quick", 0):
                        pause(said)
                    note(said, index)
                    if index == said.get("refuse_at"):
                        raise InputError(f"no {index} here")
                    if index == said.get("raise_at"):
                        raise RuntimeError(f"{index} is too much")
                    if index == said.get("error_at"):
                        yield Answer(error=InputError(f"{index} is left out"))
                        continue
                    yield Answer({"index": np.array([index], np.int32), "data": data}, {"half": index / 2})
                if said.get("hang"):
                    time.sleep(3600)
            finally:
                note(said, "finally")


    def pause(said):
        while "gate" in said and not os.path.exists(said["gate"]):  # held until there is that file
            time.sleep(0.01)
        time.sleep(said.get("delay_ms", 0) / 1000)


    def note(said, what):
        if "journal" in said:
            with open(said["journal"], "a") as journal:
                print(what, file=journal)
"""

SENDER = """
    import json
    import os
    import threading
    import time

    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            for request in requests:
                (count,) = pb_utils.get_input_tensor_by_name(request, "count").as_numpy()
                said = json.loads(request.parameters())
                threading.Thread(target=self.tell, args=(request.get_response_sender(), int(count), said)).start()

        def tell(self, sender, count, said):
            data = np.array([b"x" * said.get("nbytes", 1)], np.object_)
            for index in range(count):
                if sender.is_cancelled() or ("until" in said and os.path.exists(said["until"])):
                    break
                if index >= said.get("quick", 0):
                    pause(said)
                note(said, index)
                if index in (said.get("refuse_at"), said.get("raise_at")):
                    code = pb_utils.TritonError.INVALID_ARG if "refuse_at" in said else pb_utils.TritonError.INTERNAL
                    sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(f"no {index} here", code)), 1)
                    return
                if index == said.get("error_at"):
                    error = pb_utils.TritonError(f"{index} is left out", pb_utils.TritonError.INVALID_ARG)
                    sender.send(pb_utils.InferenceResponse(error=error))
                    continue
                tensors = [
                    pb_utils.Tensor("index", np.array([index], np.int32)),
                    pb_utils.Tensor("data", data),
                ]
                sender.send(pb_utils.InferenceResponse(tensors, parameters={"half": index / 2}))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            note(said, "finally")


    def pause(said):
        while "gate" in said and not os.path.exists(said["gate"]):  # held until there is that file
            time.sleep(0.01)
        time.sleep(said.get("delay_ms", 0) / 1000)


    def note(said, what):
        if "journal" in said:
            with open(said["journal"], "a") as journal:
                print(what, file=journal)
"""
SENDER_CONFIG = """
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input [ { name: "count" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "index" data_type: TYPE_INT32 dims: [ 1 ] }, { name: "data" data_type: TYPE_STRING dims: [ 1 ] } ]
"""
MODELS = ["teller", "sender"]


def streaming_models(repository):
    """The same model twice: as a generator, and as a TritonPythonModel that sends from a thread.

    With the parameter ``until`` it ends when there is a file of that name, if not before.
    """
    python_model(repository, "teller", TELLER)
    python_model(repository, "sender", SENDER)
    (repository / "sender" / "config.pbtxt").write_text(SENDER_CONFIG)
    return repository


# -- clients -----------------------------------------------------------------------------------------------------------


@dataclass
class Item:
    """One message of a stream: a response, or an error in its place."""

    index: int | None = None
    error: str = ""
    nbytes: int = 0
    half: float | None = None
    final: bool | None = None
    id: str = ""


class Events:
    """An HTTP request that is answered by server-sent events, on a connection of its own."""

    def __init__(self, address, path, body, *, receive_bytes=0):
        self._connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
        self._connection.connect()
        if receive_bytes:
            self._connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._connection.request("POST", path, json.dumps(body))
        self._response = None

    @property
    def response(self):
        if self._response is None:
            self._response = self._connection.getresponse()
        return self._response

    @property
    def status(self):
        return self.response.status

    def __iter__(self):
        return self

    def __next__(self):
        while line := self.response.readline():
            if line.startswith(b"data: "):
                return event_item(json.loads(line[len(b"data: ") :]))
            assert line == b"\n", line
        self.close()
        raise StopIteration

    def close(self):
        """Leave."""
        if self._response is not None:
            self._response.close()
        self._connection.close()


def event_item(event):
    if "error" in event:
        return Item(error=event["error"])
    if "outputs" in event:
        values = {output["name"]: output["data"][0] for output in event["outputs"]}
        half = event.get("parameters", {}).get("half")
    else:
        values, half = event, event.get("half")
    return Item(values.get("index"), "", len(values.get("data", "")), half, None, event.get("id", ""))


def infer_body(count, parameters=None):
    tensor = {"name": "count", "datatype": "INT32", "shape": [1], "data": [count]}
    return {"inputs": [tensor], "parameters": parameters or {}}


def generate_stream(server, model, count, parameters=None, **how):
    """The responses of generate_stream."""
    path = f"/v2/models/{model}/generate_stream"
    return Events(server.http, path, {"count": count, **(parameters or {})}, **how)


def infer_stream(server, model, count, parameters=None, **how):
    """The responses of infer_stream."""
    return Events(server.http, f"/v2/models/{model}/infer_stream", infer_body(count, parameters), **how)


def message(model, count, parameters=None, request_id=""):
    """The request as gRPC has it."""
    request = pb.ModelInferRequest(model_name=model, id=request_id)
    tensor = request.inputs.add(name="count", datatype="INT32", shape=[1])
    tensor.contents.int_contents.append(count)
    for key, value in (parameters or {}).items():
        field = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(request.parameters[key], field, value)
    return request


def message_item(answer):
    response = answer.infer_response
    if answer.error_message:
        return Item(error=answer.error_message, id=response.id)
    item = Item(id=response.id)
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if tensor.name == "index":
            item.index = int.from_bytes(raw, "little")
        else:
            item.nbytes = len(raw) - 4
    if "half" in response.parameters:
        item.half = response.parameters["half"].double_param
    if FINAL in response.parameters:
        item.final = response.parameters[FINAL].bool_param
    return item


def stream_method(channel):
    return channel.stream_stream(
        f"/{pb.SERVICE}/ModelStreamInfer",
        pb.ModelInferRequest.SerializeToString,
        pb.ModelStreamInferResponse.FromString,
    )


class Conversation:
    """One ModelStreamInfer stream: send at any time, iterate over what comes."""

    def __init__(self, server, *, metadata=None, timeout_s=TIMEOUT_S, options=()):
        self._channel = grpc.insecure_channel(
            server.grpc,
            options=[("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1), *options],
        )
        self._requests = queue.SimpleQueue()
        self.call = stream_method(self._channel)(iter(self._requests.get, None), timeout=timeout_s, metadata=metadata)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._requests.put(None)
        self.call.cancel()
        self._channel.close()

    def send(self, *request, **named):
        self._requests.put(message(*request, **named))

    def done(self):
        """There will be no more requests."""
        self._requests.put(None)

    def __iter__(self):
        return map(message_item, self.call)


HTTP_WAYS = [generate_stream, infer_stream]


@contextmanager
def slow_reader(server, way, *asked) -> Iterator:
    """A client whose buffers are small, and a function that reads its next response."""
    if way == "grpc":
        with Conversation(server, options=[("grpc.http2.lookahead_bytes", 65536)]) as conversation:
            conversation.send(*asked)
            answers = iter(conversation)
            yield lambda: next(answers)
    else:
        events = {"generate_stream": generate_stream, "infer_stream": infer_stream}[way](
            server, *asked, receive_bytes=64 * 1024
        )
        try:
            yield lambda: next(events)
        finally:
            events.close()


def steady(value, for_s=1.0, timeout_s=TIMEOUT_S):
    """Wait until ``value()`` has stayed the same for a while: at every look, as all may have stood still meanwhile."""
    deadline = time.monotonic() + timeout_s
    last, same = value(), 0
    while same < for_s / 0.05:
        assert time.monotonic() < deadline, f"it still changes: {last}"
        time.sleep(0.05)
        now = value()
        last, same = now, same + 1 if now == last else 0


# -- what they see of the server ---------------------------------------------------------------------------------------


def lines(journal):
    return journal.read_text().split() if journal.exists() else []


def resident_bytes(server):
    """Memory of the front process and its workers, what they share counted once."""
    total = 0
    for process in [psutil.Process(server.process.pid), *server.workers()]:
        total += process.memory_full_info().pss
    return total


def assert_falls_to(server, nbytes):
    """What answers were made of may be given back some time after them."""
    wait_for(lambda: resident_bytes(server) < nbytes, what=f"memory to fall to {nbytes / MIB:.1f} MiB")
