"""Stateful models on the real server: every route, controls and states, places, idling, loads and unloads."""

import http.client
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from operator import ge
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from onnx import TensorProto, helper
from running_server import RunningServer
from system.load import INFER, put, python_model, replace
from system.streams import stream_method

from headrace.wire import pb

TIMEOUT_S = 60
SCALE = int(os.environ.get("HEADRACE_TEST_SEQUENCES", "200"))  # live at once in the scale test; 1,000 is a good number
INT32 = TensorProto.INT32

# -- models: x INT32[1] of a row to y, the sum of a sequence's rows so far ---------------------------------------------

# y is the sum so far, which the server keeps.
TOTAL_STATE = "{input: total_in, output: total_out, datatype: INT32, shape: [1]}"
NO_IDLING = "max_idle_us: 600000000"


def graph(nodes, inputs, outputs) -> bytes:
    """An ONNX model of tensors by name, each a datatype and a shape."""
    given = [helper.make_tensor_value_info(name, *what) for name, what in inputs.items()]
    made = [helper.make_tensor_value_info(name, *what) for name, what in outputs.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "sequence", given, made),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    return model.SerializeToString()


def accumulator_graph(*, batches: bool = True) -> bytes:
    """y and total_out are total_in + x."""
    number = (INT32, ["n", 1] if batches else [1])
    return graph(
        [helper.make_node("Add", ["x", "total_in"], ["y"]), helper.make_node("Identity", ["y"], ["total_out"])],
        dict.fromkeys(("x", "total_in"), number),
        dict.fromkeys(("y", "total_out"), number),
    )


def onnx_sequence(repository: Path, name: str, config: str, content: bytes | None = None) -> Path:
    """An ONNX model with a config.yaml, the accumulator unless told otherwise."""
    put(repository / name / "1", "model.onnx", content or accumulator_graph())
    (repository / name / "config.yaml").write_text(config)
    return repository / name


def accumulator(repository: Path, name: str, sequence: str = "", more: str = "max_batch_size: 4") -> Path:
    """The accumulator, with ``sequence`` added to how its sequences are served."""
    said = ", ".join(filter(None, (sequence, "" if "max_idle_us" in sequence else NO_IDLING)))
    return onnx_sequence(repository, name, f"{more}\nsequence: {{{said}, states: [{TOTAL_STATE}]}}\n")


ACCUMULATOR_PBTXT = """
platform: "onnxruntime_onnx"
max_batch_size: %d
input [ { name: "x" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_INT32 dims: [ 1 ] } ]
sequence_batching {
  max_sequence_idle_microseconds: 600000000
  %s
  state [ {
    input_name: "total_in" output_name: "total_out" data_type: TYPE_INT32 dims: [ 1 ]
    initial_state: { name: "first" data_type: TYPE_INT32 dims: [ 1 ] %s }
  } ]
}
"""

# The same, by the model's own memory. Parameters of the request say more.
OWN_STATE = """
    import os
    import time
    from pathlib import Path

    import numpy as np

    from headrace_backends.python import Answer, InputError


    class Model:
        inputs = [{"name": "x", "datatype": "INT32", "shape": [-1, 1]}]
        outputs = [
            {"name": "y", "datatype": "INT32", "shape": [-1, 1]},
            {"name": "pid", "datatype": "INT32", "shape": [-1, 1]},
        ]
        max_batch_size = 4

        def load(self, context):
            self.sums = {}

        def infer(self, inputs, requests):
            time.sleep(max(one.parameters.get("delay_ms", 0) for one in requests) / 1000)
            while any("gate" in one.parameters and Path(one.parameters["gate"]).exists() for one in requests):
                time.sleep(0.005)
            if any(one.parameters.get("raise") for one in requests):
                raise RuntimeError("as asked")
            return [self.answer(x, one) for x, one in zip(inputs["x"], requests, strict=True)]

        def answer(self, x, request):
            said = request.parameters
            if "sequence_id" not in said:  # a row that nobody has
                return Answer({"y": np.zeros((1, 1), np.int32), "pid": np.zeros((1, 1), np.int32)})
            if "refuse" in said:
                return Answer(error=InputError("as asked"))
            identity = said["sequence_id"]
            total = int(x[0]) + (0 if said.get("sequence_start") else self.sums[identity])
            self.sums[identity] = total
            if said.get("sequence_end"):
                del self.sums[identity]
            if "journal" in said:
                with open(said["journal"], "a") as journal:
                    print(identity, int(x[0]), file=journal)
            return Answer({"y": np.array([[total]], np.int32), "pid": np.array([[os.getpid()]], np.int32)})
"""
OWN_STATE_CONFIG = f"sequence: {{strategy: oldest, max_candidates: 2, {NO_IDLING}}}\n"

TRITON_STATE = """
    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def initialize(self, args):
            self.sums = {}

        def execute(self, requests):
            return [self.answer(request) for request in requests]

        def answer(self, request):
            identity, flags = request.correlation_id(), request.flags()
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            if flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
                self.sums[identity] = 0
            total = self.sums.get(identity, 0) + int(x[0, 0])
            self.sums[identity] = total
            if flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
                del self.sums[identity]
            return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([[total]], np.int32))])
"""
TRITON_STATE_CONFIG = """
backend: "python"
max_batch_size: 4
input [ { name: "x" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "y" data_type: TYPE_INT32 dims: [ 1 ] } ]
sequence_batching { max_sequence_idle_microseconds: 600000000 %s }
"""

ACCUMULATORS = ["direct_yaml", "oldest_yaml", "direct_pbtxt", "oldest_pbtxt", "alone_yaml", "alone_pbtxt"]
OWN = ["own", "own_direct", "triton_direct", "triton_oldest"]


def accumulators(repository: Path) -> None:
    """The accumulator of every strategy and both kinds of configuration, batching and not."""
    accumulator(repository, "direct_yaml", "strategy: direct")
    accumulator(repository, "oldest_yaml", "strategy: oldest, max_candidates: 16")
    onnx_sequence(
        repository,
        "alone_yaml",
        f"max_batch_size: 0\nsequence: {{strategy: oldest, max_candidates: 8, {NO_IDLING}, states: [{TOTAL_STATE}]}}\n",
        accumulator_graph(batches=False),
    )
    for name, rows, strategy in (
        ("direct_pbtxt", 4, "direct { }"),
        ("oldest_pbtxt", 4, "oldest { max_candidate_sequences: 16 }"),
        ("alone_pbtxt", 0, "oldest { max_candidate_sequences: 8 }"),
    ):
        put(repository / name / "1", "model.onnx", accumulator_graph(batches=rows > 0))
        (repository / name / "config.pbtxt").write_text(ACCUMULATOR_PBTXT % (rows, strategy, "zero_data: true"))


def own_models(repository: Path) -> None:
    """Those that keep the sums themselves."""
    python_model(repository, "own", OWN_STATE, config=OWN_STATE_CONFIG)
    python_model(repository, "own_direct", OWN_STATE, config=f"sequence: {{{NO_IDLING}}}\n")
    for name, strategy in (("triton_direct", ""), ("triton_oldest", "oldest { max_candidate_sequences: 4 }")):
        python_model(repository, name, TRITON_STATE)
        (repository / name / "config.pbtxt").write_text(TRITON_STATE_CONFIG % strategy)


# -- clients -----------------------------------------------------------------------------------------------------------


@dataclass
class Reply:
    """How one request ended. ``status`` is HTTP's number, or gRPC's code by name, which a stream does not tell."""

    outputs: dict[str, list]
    error: str = ""
    status: int | str = ""

    @property
    def value(self):
        """The first element of y."""
        assert not self.error, self.error
        return self.outputs["y"][0]

    @property
    def refused(self) -> bool:
        """Whether the client is told that it is at fault."""
        return bool(self.error) and self.status in (400, "INVALID_ARGUMENT", "streamed")


def sequence_parameters(identity, marks: str, more: dict) -> dict:
    """``marks`` are "start", "end", both or none."""
    said = {f"sequence_{mark}": True for mark in marks.split()}
    return ({} if identity is None else {"sequence_id": identity}) | said | more


def message(model, values, parameters, shape, request_id="") -> pb.ModelInferRequest:
    """The request as gRPC has it."""
    request = pb.ModelInferRequest(model_name=model, id=request_id)
    tensor = request.inputs.add(name="x", datatype="INT32", shape=shape)
    tensor.contents.int_contents.extend(values)
    for key, value in parameters.items():
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1 << 63:
            request.parameters[key].uint64_param = value
        else:
            field = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
            setattr(request.parameters[key], field, value)
    return request


DTYPES = {"INT32": np.int32, "UINT32": np.uint32, "INT64": np.int64, "UINT64": np.uint64, "FP32": np.float32}


def _decoded(datatype: str, raw: bytes) -> list:
    if datatype == "BYTES":
        return [raw[4:].decode()]  # one element
    if datatype == "BOOL":
        return [bool(one) for one in raw]
    return np.frombuffer(raw, DTYPES[datatype]).tolist()


def message_reply(answer: pb.ModelInferResponse) -> Reply:
    """What a message says."""
    pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
    return Reply({tensor.name: _decoded(tensor.datatype, raw) for tensor, raw in pairs}, "", "OK")


class Client:
    """Sends requests of sequences on one route. Each ``start`` gives a future, so that many may wait."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._threads = ThreadPoolExecutor(32)

    def step(self, model, value, identity, marks="", *, shape=(), **more) -> Reply:
        """One request and its answer."""
        return self.start(model, value, identity, marks, shape=shape, **more).result(TIMEOUT_S)

    def start(self, model, value, identity, marks="", *, shape=(), **more) -> "Future[Reply]":
        """Send one request; a list is the elements of the whole tensor."""
        values = value if isinstance(value, list) else [value]
        shape = shape or ([1] if model.startswith("alone") else [len(values), 1])
        parameters = sequence_parameters(identity, marks, more)
        return self._threads.submit(self._send, model, values, parameters, list(shape))

    def close(self) -> None:
        """Leave."""
        self._threads.shutdown()

    def _send(self, model, values, parameters, shape) -> Reply:
        raise NotImplementedError


def http_body(values, parameters, shape) -> dict:
    """The request as JSON."""
    tensor = {"name": "x", "datatype": "INT32", "shape": shape, "data": values}
    return {"inputs": [tensor], "parameters": parameters}


class OverHttp(Client):
    """POST .../infer."""

    def _send(self, model, values, parameters, shape) -> Reply:
        status, answer = self._server.post(f"/v2/models/{model}/infer", http_body(values, parameters, shape))
        if status != 200:
            return Reply({}, answer["error"], status)
        return Reply({output["name"]: output["data"] for output in answer["outputs"]}, "", status)


class OverGrpc(Client):
    """ModelInfer."""

    def __init__(self, server: RunningServer) -> None:
        super().__init__(server)
        self._channel = grpc.insecure_channel(server.grpc, options=[("grpc.use_local_subchannel_pool", 1)])
        self._call = self._channel.unary_unary(
            INFER, pb.ModelInferRequest.SerializeToString, pb.ModelInferResponse.FromString
        )

    def _send(self, model, values, parameters, shape) -> Reply:
        try:
            return message_reply(self._call(message(model, values, parameters, shape), timeout=TIMEOUT_S))
        except grpc.RpcError as error:
            return Reply({}, error.details(), error.code().name)

    def close(self) -> None:
        super().close()
        self._channel.close()


class OverStream(Client):
    """One ModelStreamInfer stream for everything."""

    def __init__(self, server: RunningServer) -> None:
        super().__init__(server)
        self._channel = grpc.insecure_channel(server.grpc, options=[("grpc.use_local_subchannel_pool", 1)])
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        self._call = stream_method(self._channel)(iter(self._requests.get, None), timeout=TIMEOUT_S * 2)
        self._waiting: dict[str, Future[Reply]] = {}
        self._reader = self._threads.submit(self._read)

    def start(self, model, value, identity, marks="", *, shape=(), **more) -> "Future[Reply]":
        values = value if isinstance(value, list) else [value]
        shape = shape or ([1] if model.startswith("alone") else [len(values), 1])
        future: Future[Reply] = Future()
        key = str(id(future))
        self._waiting[key] = future
        self._requests.put(message(model, values, sequence_parameters(identity, marks, more), list(shape), key))
        return future

    def _read(self) -> None:
        for answer in self._call:
            future = self._waiting.pop(answer.infer_response.id)
            error = answer.error_message
            future.set_result(Reply({}, error, "streamed") if error else message_reply(answer.infer_response))

    def close(self) -> None:
        self._requests.put(None)
        self._reader.result(TIMEOUT_S)
        super().close()
        self._channel.close()


ROUTES = [OverHttp, OverGrpc, OverStream]


@contextmanager
def opened(route: Callable[[RunningServer], Client], server: RunningServer) -> Iterator[Client]:
    """A client that leaves at the end."""
    client = route(server)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture(params=ROUTES)
def client(request, server):
    with opened(request.param, server) as made:
        yield made


@pytest.fixture
def identity(request):
    """An id of the test's own."""
    return hash(request.node.nodeid) % 2**40 + 1


def active(server, model) -> float:
    """Live sequences."""
    return server.metric("headrace_sequences_active", model=model)


def everything_ended(server, model) -> bool:
    """Whether no sequence is live and no request waits or runs."""
    names = ("headrace_sequences_active", "headrace_queue_requests", "headrace_executing_batches")
    return all(server.metric(name, model=model) == 0 for name in names)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    repository = tmp_path_factory.mktemp("sequences")
    accumulators(repository)
    own_models(repository)
    told_models(repository)
    special_models(repository)
    # One worker has all ONNX models, which would take their time to start one by one.
    with RunningServer(repository, "--max-own-workers", "0", "--max-shared-workers", "1") as running:
        yield running


# -- values and controls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [*ACCUMULATORS, *OWN])
def test_each_sequence_has_its_own_sum(server, client, model, identity):
    one, other = identity, f"{identity:x}"
    assert client.step(model, 1, one, "start").value == 1
    assert client.step(model, 10, other, "start").value == 10
    assert client.step(model, 2, one).value == 3
    assert client.step(model, 20, other).value == 30
    assert client.step(model, 3, one, "end").value == 6
    assert client.step(model, 30, other, "end").value == 60
    assert client.step(model, 7, one, "start end").value == 7
    server.wait_for(lambda: everything_ended(server, model))


@pytest.mark.parametrize("model", ["direct_yaml", "oldest_pbtxt", "own", "triton_direct"])
def test_sequences_side_by_side(client, model, identity):
    """Twelve sequences, more than any of these models has places, of which all requests wait at once."""

    def run(number) -> list[int]:
        return [
            client.step(model, number + step, identity + number, marks).value
            for step, marks in enumerate(["start", "", "", "", "end"])
        ]

    with ThreadPoolExecutor(12) as threads:
        sums = list(threads.map(run, range(12)))
    assert sums == [[sum(range(number, number + count)) for count in (1, 2, 3, 4, 5)] for number in range(12)]


@pytest.mark.parametrize("model", ["direct_yaml", "oldest_yaml", "own"])
def test_the_requests_of_a_stream_run_in_the_order_in_which_they_were_sent(server, model, identity):
    with opened(OverStream, server) as client:
        marks = ["start", *[""] * 18, "end"]
        replies = [client.start(model, step, identity, marks[step]) for step in range(20)]
        assert [one.result(TIMEOUT_S).value for one in replies] == [sum(range(step + 1)) for step in range(20)]


# Kinds of flags, and of ids with the largest of each kind.
FLAGS = {"INT32": [0, 1], "FP32": [-0.5, 0.25], "BOOL": [False, True]}
IDS = {"UINT64": 2**64 - 1, "INT64": 2**63 - 1, "UINT32": 2**32 - 1, "INT32": 2**31 - 1, "BYTES": "an id"}
TOLD = [
    (flag, kind, strategy)
    for flag, kind in zip(["INT32", "FP32", "BOOL", "INT32", "FP32"], IDS, strict=True)
    for strategy in ("direct", "oldest")
]
ONNX_KINDS = {"BYTES": TensorProto.STRING, "FP32": TensorProto.FLOAT}


def told_models(repository: Path) -> None:
    """Models that give their controls back. The direct ones are in Triton's form, the others in ours."""
    for flag, kind, strategy in TOLD:
        name = f"told_{flag}_{kind}_{strategy}".lower()
        controls = dict.fromkeys(("start", "end", "ready"), flag) | {"correlation_id": kind}
        kinds = {one: ONNX_KINDS.get(given) or getattr(TensorProto, given) for one, given in controls.items()}
        given_back = {"x": "y"} | {one.upper(): one for one in controls}
        content = graph(
            [helper.make_node("Identity", [one], [other]) for one, other in given_back.items()],
            {"x": (INT32, ["n", 1])} | {one.upper(): (given, ["n", 1]) for one, given in kinds.items()},
            {"y": (INT32, ["n", 1])} | {one: (given, ["n", 1]) for one, given in kinds.items()},
        )
        put(repository / name / "1", "model.onnx", content)
        if strategy == "direct":
            (repository / name / "config.pbtxt").write_text(_told_pbtxt(controls))
        else:
            (repository / name / "config.yaml").write_text(_told_yaml(controls))


def _told_yaml(controls: dict[str, str]) -> str:
    listed = [
        {"input": one.upper(), "kind": one, "datatype": given}
        | ({} if one == "correlation_id" else {"values": [float(value) for value in FLAGS[given]]})
        for one, given in controls.items()
    ]
    sequence = {"strategy": "oldest", "max_idle_us": 600_000_000, "controls": listed}
    return f"max_batch_size: 4\nsequence: {json.dumps(sequence)}\n"


def _told_pbtxt(controls: dict[str, str]) -> str:
    listed = []
    for one, given in controls.items():
        if one == "correlation_id":
            said = f"kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_{given.replace('BYTES', 'STRING')}"
        else:
            values = str(FLAGS[given]).lower()
            said = f"kind: CONTROL_SEQUENCE_{one.upper()} {given.lower()}_false_true: {values}"
        listed.append(f'{{ name: "{one.upper()}" control [ {{ {said} }} ] }}')
    return (
        'platform: "onnxruntime_onnx" max_batch_size: 4\n'
        f"sequence_batching {{ max_sequence_idle_microseconds: 600000000 control_input [ {', '.join(listed)} ] }}\n"
    )


@pytest.mark.parametrize(("flag", "kind", "strategy"), TOLD)
def test_controls_of_every_datatype(server, client, flag, kind, strategy):
    model = f"told_{flag}_{kind}_{strategy}".lower()
    false, true = FLAGS[flag]

    def said(reply):
        return [reply.outputs[one][0] for one in ("start", "end", "ready", "correlation_id", "y")]

    # Another one has the first row of a direct model meanwhile, so that this one's is not the first.
    other = "beside" if kind == "BYTES" else 5
    assert said(client.step(model, 1, other, "start")) == [true, false, true, other, 1]
    assert said(client.step(model, 2, IDS[kind], "start")) == [true, false, true, IDS[kind], 2]
    assert said(client.step(model, 3, IDS[kind])) == [false, false, true, IDS[kind], 3]
    assert said(client.step(model, 4, IDS[kind], "end")) == [false, true, true, IDS[kind], 4]
    assert said(client.step(model, 5, IDS[kind], "start end")) == [true, true, true, IDS[kind], 5]
    assert said(client.step(model, 6, other, "end")) == [false, true, true, other, 6]


@pytest.mark.parametrize(("flag", "kind", "strategy"), [one for one in TOLD if one[1] != "UINT64"])
def test_an_id_that_the_model_cannot_be_given_is_refused_and_takes_no_place(server, client, flag, kind, strategy):
    model = f"told_{flag}_{kind}_{strategy}".lower()
    wrong = 5 if kind == "BYTES" else IDS[kind] + 1
    reply = client.step(model, 1, wrong, "start")
    assert reply.refused
    assert f"model '{model}'" in reply.error
    assert str(wrong) in reply.error
    assert kind in reply.error
    if kind != "BYTES":
        assert client.step(model, 1, "a string", "start").refused
    server.wait_for(lambda: everything_ended(server, model))


def test_tritonclients_say_sequences_in_their_own_way(server, identity):
    for module, address in ((tritonclient.http, server.http), (tritonclient.grpc, server.grpc)):
        with module.InferenceServerClient(address) as triton:
            for one in (identity, f"a {identity}"):
                answers = []
                for step in range(3):
                    tensor = module.InferInput("x", [1, 1], "INT32")
                    tensor.set_data_from_numpy(np.array([[step + 1]], np.int32))
                    answer = triton.infer(
                        "oldest_yaml", [tensor], sequence_id=one, sequence_start=step == 0, sequence_end=step == 2
                    )
                    answers.append(int(answer.as_numpy("y")[0, 0]))
                assert answers == [1, 3, 6]


def test_clients_neither_see_nor_give_what_the_server_adds(server):
    for model in ACCUMULATORS[:4]:
        metadata = server.get(f"/v2/models/{model}")[1]
        assert [one["name"] for one in metadata["inputs"]] == ["x"]
        assert [one["name"] for one in metadata["outputs"]] == ["y"]
    given = {"name": "total_in", "datatype": "INT32", "shape": [1, 1], "data": [5]}
    body = http_body([1], sequence_parameters(1, "start end", {}), [1, 1])
    body["inputs"].append(given)
    status, answer = server.post("/v2/models/direct_yaml/infer", body)
    assert status == 400
    assert "total_in" in answer["error"]
    asked = http_body([1], sequence_parameters(1, "start end", {}), [1, 1]) | {"outputs": [{"name": "total_out"}]}
    status, answer = server.post("/v2/models/direct_yaml/infer", asked)
    assert status == 400
    assert "total_out" in answer["error"]
    asked["outputs"] = [{"name": "y"}]
    status, answer = server.post("/v2/models/direct_yaml/infer", asked)
    assert status == 200
    assert [one["name"] for one in answer["outputs"]] == ["y"]


# -- states ------------------------------------------------------------------------------------------------------------


def special_models(repository: Path) -> None:
    """Those that one test each is about."""
    first = np.array([1000], np.int32).tobytes()
    # In its own folder and in ours.
    folder = onnx_sequence(
        repository,
        "begun_yaml",
        f"max_batch_size: 4\nsequence: {{{NO_IDLING}, states: [{TOTAL_STATE[:-1]}, initial: first.bin}}]}}\n",
    )
    (folder / "first.bin").write_bytes(first)
    put(repository / "begun_pbtxt" / "1", "model.onnx", accumulator_graph())
    put(repository / "begun_pbtxt" / "initial_state", "first", first)
    (repository / "begun_pbtxt" / "config.pbtxt").write_text(
        ACCUMULATOR_PBTXT % (4, "oldest { max_candidate_sequences: 4 }", 'data_file: "first"')
    )
    number, any_length = (INT32, ["n", 1]), (INT32, ["n", "m"])
    growing = [
        helper.make_node("Concat", ["past", "x"], ["history"], axis=1),
        helper.make_node("Identity", ["history"], ["next"]),
    ]
    tensors = {"x": number, "past": any_length}, {"history": any_length, "next": any_length}
    onnx_sequence(
        repository,
        "history",
        f"max_batch_size: 4\nbatching: {{max_queue_delay_us: 20000}}\nsequence: {{strategy: oldest, {NO_IDLING}, "
        "states: [{input: past, output: next, datatype: INT32, shape: [-1]}]}\n",
        graph(growing, *tensors),
    )
    accumulator(repository, "small", "strategy: direct", "max_batch_size: 2")
    accumulator(repository, "forgetful", "max_idle_us: 800000")
    (repository / "pipeline").mkdir()
    (repository / "pipeline" / "config.yaml").write_text(
        "ensemble:\n"
        "- {model: direct_yaml, inputs: {x: x}, outputs: {y: sum}}\n"
        "- {model: oldest_yaml, inputs: {x: sum}, outputs: {y: y}}\n"
    )
    python_model(repository, "counter", COUNTER, config=COUNTER_CONFIG)
    python_model(repository, "told_counter", TOLD_COUNTER, config=TOLD_COUNTER_CONFIG)
    python_model(repository, "twins", OWN_STATE, config=f"instances: [{{device: cpu, count: 2}}]\n{OWN_STATE_CONFIG}")


# Decoupled: a response for each number from 1 to x, each the sequence's sum so far. The server keeps the sum.
COUNTER = """
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

        def infer(self, inputs):
            total = inputs["total_in"]
            for number in range(1, int(inputs["x"][0]) + 1):
                total = total + number
                yield {"y": total, "total_out": total}
"""
COUNTER_CONFIG = f"sequence: {{strategy: oldest, max_candidates: 4, {NO_IDLING}, states: [{TOTAL_STATE}]}}\n"

# The same, which keeps the sum itself.
TOLD_COUNTER = """
    import numpy as np


    class Model:
        inputs = [{"name": "x", "datatype": "INT32", "shape": [1]}]
        outputs = [{"name": "y", "datatype": "INT32", "shape": [1]}]
        max_batch_size = 0

        def load(self, context):
            self.sums = {}

        def infer(self, inputs, request):
            identity = request.parameters["sequence_id"]
            if request.parameters.get("sequence_start"):
                self.sums[identity] = np.zeros(1, np.int32)
            for number in range(1, int(inputs["x"][0]) + 1):
                self.sums[identity] = self.sums[identity] + np.int32(number)
                yield {"y": self.sums[identity]}
"""
TOLD_COUNTER_CONFIG = f"sequence: {{strategy: oldest, max_candidates: 4, {NO_IDLING}}}\n"


@pytest.mark.parametrize("model", ["begun_yaml", "begun_pbtxt"])
def test_the_first_state_comes_from_a_file(client, model, identity):
    assert client.step(model, 1, identity, "start").value == 1001
    assert client.step(model, 1, identity, "end").value == 1002
    assert client.step(model, 5, identity, "start end").value == 1005


def test_states_may_grow_and_sequences_of_any_length_share_the_model(client, identity):
    def history(reply):
        assert not reply.error, reply.error
        return reply.outputs["history"]

    # The first state has one element where any number is allowed: a zero.
    assert history(client.step("history", 1, identity, "start")) == [0, 1]
    assert history(client.step("history", 2, identity)) == [0, 1, 2]
    others = [identity + number for number in (1, 2, 3)]
    for one in others:
        assert history(client.step("history", 7, one, "start")) == [0, 7]
    together = [client.start("history", 8, one) for one in (identity, *others)]
    assert [history(one.result(TIMEOUT_S)) for one in together] == [[0, 1, 2, 8], *[[0, 7, 8]] * 3]
    for one in (identity, *others):
        assert history(client.step("history", 9, one, "end"))[-2:] == [8, 9]


# -- places ------------------------------------------------------------------------------------------------------------


def test_more_sequences_than_places_wait_and_are_served(server, client, identity):
    ids = [identity + number for number in range(5)]
    assert [client.step("small", 1, one, "start").value for one in ids[:2]] == [1, 1]
    assert active(server, "small") == 2
    waiting = []
    for count, one in enumerate(ids[2:], start=1):
        waiting.append(client.start("small", 2, one, "start"))
        server.wait_for(lambda count=count: server.metric("headrace_queue_requests", model="small") == count)
    assert not any(one.done() for one in waiting)
    assert client.step("small", 1, ids[0]).value == 2  # those that have a place go on
    assert client.step("small", 1, ids[0], "end").value == 3
    assert waiting[0].result(TIMEOUT_S).value == 2  # who came first
    assert not waiting[1].done()
    assert client.step("small", 3, ids[2], "end").value == 5
    assert waiting[1].result(TIMEOUT_S).value == 2
    assert client.step("small", 1, ids[1], "end").value == 2
    assert waiting[2].result(TIMEOUT_S).value == 2
    for one in ids[3:]:
        assert client.step("small", 3, one, "end").value == 5
    server.wait_for(lambda: everything_ended(server, "small"))


def test_each_sequence_stays_with_its_instance_and_both_are_used(server, client, identity):
    ids = [identity + number for number in range(4)]
    begun = [client.step("twins", 1, one, "start") for one in ids]
    pids = [reply.outputs["pid"][0] for reply in begun]
    assert sorted(map(pids.count, set(pids))) == [2, 2]
    for step in range(2, 6):
        for one, pid in zip(ids, pids, strict=True):
            reply = client.step("twins", 1, one, "end" if step == 5 else "")
            assert reply.value == step
            assert reply.outputs["pid"] == [pid]
    server.wait_for(lambda: everything_ended(server, "twins"))


def test_one_that_idles_too_long_has_ended_and_its_client_is_told(server, client, identity):
    assert client.step("forgetful", 1, identity, "start").value == 1
    server.wait_for(lambda: active(server, "forgetful") == 0)
    for _ in range(2):  # for as long as it is not begun anew
        reply = client.step("forgetful", 1, identity)
        assert reply.refused
        assert f"sequence {identity} of model 'forgetful' has ended" in reply.error
        assert "no request of it came for 800000 us" in reply.error
        assert "sequence_start" in reply.error
    assert client.step("forgetful", 5, identity, "start end").value == 5


def test_one_that_is_asked_now_and_then_does_not_idle(server, client, identity):
    for attempt in range(5):
        replies, pauses_s, asked_at = [], [], time.monotonic()
        for marks in ("start", "", "", "", "", "", "end"):
            replies.append(client.step("forgetful", 1, identity + attempt, marks))
            pauses_s.append(time.monotonic() - asked_at)
            asked_at += pauses_s[-1]
            time.sleep(0.2)
        if max(pauses_s) < 0.7:  # else the machine has stood still for longer than the sequence may
            break
    assert max(pauses_s) < 0.7
    assert [reply.value for reply in replies] == [1, 2, 3, 4, 5, 6, 7]


def test_idling_frees_the_place_of_who_never_says_the_end(server, client, identity):
    """Six come and leave where four have a place."""
    replies = [client.start("forgetful", 1, identity + number, "start") for number in range(6)]
    assert [one.result(TIMEOUT_S).value for one in replies] == [1] * 6
    server.wait_for(lambda: everything_ended(server, "forgetful"))


@pytest.mark.parametrize("model", [*ACCUMULATORS, *OWN])
def test_a_start_over_a_live_id_begins_anew(server, client, model, identity):
    assert client.step(model, 1, identity, "start").value == 1
    assert client.step(model, 1, identity).value == 2
    assert client.step(model, 5, identity, "start").value == 5
    assert active(server, model) == 1
    assert client.step(model, 1, identity, "end").value == 6
    server.wait_for(lambda: everything_ended(server, model))


# -- requests of no sequence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["direct_yaml", "oldest_pbtxt", "own", "triton_direct"])
def test_what_is_wrong_with_a_request_is_told(server, client, model, identity):
    def refused(*words, value=1, **said):
        reply = client.step(model, value, said.pop("identity", identity), said.pop("marks", ""), **said)
        assert reply.refused, reply
        for word in (f"model '{model}'", *words):
            assert word in reply.error

    refused("must specify the START flag", str(identity))
    refused("must specify a non-zero or non-empty correlation ID", identity=None, marks="start")
    refused("must specify a non-zero or non-empty correlation ID", identity=0, marks="start")
    refused("must specify a non-zero or non-empty correlation ID", identity="", marks="start")
    refused("sequence_id", "-1", identity=-1, marks="start")
    refused("sequence_id", "128 bytes", identity="x" * 129, marks="start")
    refused("sequence_start", "true or false", sequence_start="yes")
    refused("sequence_end", "true or false", marks="start", sequence_end=1)
    refused("2 rows", "expected 1", value=[1, 2], marks="start")
    refused("5 rows", "expected 1", value=[1, 2, 3, 4, 5], marks="start")  # more than any batch
    assert client.step(model, 4, identity, "start").value == 4
    refused("2 rows", "expected 1", value=[1, 2])  # which leaves the sequence as it is
    assert client.step(model, 4, identity, "end").value == 8
    refused("must specify the START flag")
    server.wait_for(lambda: everything_ended(server, model))


# -- with ensembles, with streams --------------------------------------------------------------------------------------


def test_sequences_in_the_steps_of_an_ensemble(server, client, identity):
    """The sum of the sums so far."""
    other = f"{identity:x}"
    assert client.step("pipeline", 1, identity, "start").value == 1
    assert client.step("pipeline", 10, other, "start").value == 10
    assert active(server, "direct_yaml") == active(server, "oldest_yaml") == 2
    assert client.step("pipeline", 1, identity).value == 3
    assert client.step("pipeline", 10, other).value == 30
    assert client.step("pipeline", 1, identity, "end").value == 6
    assert client.step("pipeline", 10, other, "end").value == 60
    reply = client.step("pipeline", 1, identity)
    assert reply.refused
    assert "must specify the START flag" in reply.error
    server.wait_for(lambda: everything_ended(server, "direct_yaml") and everything_ended(server, "oldest_yaml"))


@pytest.mark.parametrize("model", ["counter", "told_counter"])
def test_sequences_of_a_decoupled_model(server, model, identity):
    with grpc.insecure_channel(server.grpc, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:

        def ask(*requests):
            """All on one stream, in this order."""
            messages = [
                message(model, [value], sequence_parameters(one, marks, {}), [1], str(number))
                for number, (value, one, marks) in enumerate(requests)
            ]
            answers = {str(number): [] for number in range(len(requests))}
            for answer in stream_method(channel)(iter(messages), timeout=TIMEOUT_S):
                reply = message_reply(answer.infer_response)
                answers[answer.infer_response.id].append(answer.error_message or reply.value)
            return list(answers.values())

        other = identity + 1
        assert ask((3, identity, "start"), (2, identity, ""), (2, other, "start"), (1, identity, "")) == [
            [1, 3, 6],
            [7, 9],
            [1, 3],
            [10],
        ]
        assert active(server, model) == 2
        assert ask((1, other, "end"), (1, identity, "end")) == [[4], [11]]
        server.wait_for(lambda: everything_ended(server, model))
        ((error,),) = ask((1, identity, ""))
        assert "must specify the START flag" in error


def test_sequences_over_generate_stream(server, identity):
    def events(count, marks=""):
        connection = http.client.HTTPConnection(server.http, timeout=TIMEOUT_S)
        body = {"x": count, **sequence_parameters(identity, marks, {})}
        connection.request("POST", "/v2/models/counter/generate_stream", json.dumps(body))
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return [json.loads(line.removeprefix("data: "))["y"] for line in lines if line]

    assert events(3, "start") == [1, 3, 6]
    assert events(1) == [7]
    assert events(1, "end") == [8]


# -- many --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 32])
def test_many_live_sequences_on_one_instance(tmp_path, batch):
    """All of them on one stream, the requests of different ones mixed."""
    accumulator(
        tmp_path,
        "many",
        f"strategy: oldest, max_candidates: {SCALE}",
        f"max_batch_size: {batch}\nbatching: {{max_queue_size: {4 * SCALE}, max_queue_delay_us: 10000}}",
    )
    rng = np.random.default_rng(5)
    with RunningServer(tmp_path) as server, opened(OverStream, server) as client:
        first = [client.start("many", number, number + 1, "start") for number in range(SCALE)]
        assert [one.result(TIMEOUT_S).value for one in first] == list(range(SCALE))
        assert active(server, "many") == SCALE
        for step in (2, 3):
            order = rng.permutation(SCALE).tolist()
            replies = {number: client.start("many", number, number + 1) for number in order}
            assert all(replies[number].result(TIMEOUT_S).value == step * number for number in order)
        assert active(server, "many") == SCALE
        one_too_many = client.start("many", 7, "late", "start end")
        order = rng.permutation(SCALE).tolist()
        replies = {number: client.start("many", number, number + 1, "end") for number in order}
        assert all(replies[number].result(TIMEOUT_S).value == 4 * number for number in order)
        assert one_too_many.result(TIMEOUT_S).value == 7
        server.wait_for(lambda: everything_ended(server, "many"))
        (stats,) = server.get("/v2/models/many/stats")[1]["model_stats"]
        assert stats["inference_count"] == 4 * SCALE + 1
        if batch > 1:
            assert stats["execution_count"] < SCALE


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_what_is_counted_of_sequences(server, client, identity):
    def counted():
        (stats,) = server.get("/v2/models/direct_pbtxt/stats")[1]["model_stats"]
        return {
            "inferences": stats["inference_count"],
            "executions": stats["execution_count"],
            "success": stats["inference_stats"]["success"]["count"],
            "fail": stats["inference_stats"]["fail"]["count"],
        }

    before = counted()
    ids = [identity + number for number in range(3)]
    for one in ids:
        assert client.step("direct_pbtxt", 1, one, "start").value == 1
    assert active(server, "direct_pbtxt") == 3
    assert client.step("direct_pbtxt", 1, ids[0], "end").value == 2
    server.wait_for(lambda: active(server, "direct_pbtxt") == 2)
    assert client.step("direct_pbtxt", 1, ids[0]).refused
    for one in ids[1:]:
        assert client.step("direct_pbtxt", 1, one, "end").value == 2
    server.wait_for(lambda: everything_ended(server, "direct_pbtxt"))
    after = counted()
    assert {key: after[key] - before[key] for key in after} == {
        "inferences": 6,  # a direct batch has more rows than that, which are nobody's
        "executions": 6,
        "success": 6,
        "fail": 1,
    }


# -- models that come and go -------------------------------------------------------------------------------------------


@pytest.fixture
def changing(tmp_path):
    """A server whose models come and go as they are told."""
    python_model(tmp_path, "own", OWN_STATE, config=OWN_STATE_CONFIG)
    accumulator(tmp_path, "kept", "strategy: oldest, max_candidates: 2")
    flags = ["--model-control", "explicit", "--load-model", "own", "--load-model", "kept"]
    with RunningServer(tmp_path, *flags) as running:
        yield running


def test_an_unload_answers_what_is_accepted_and_does_not_wait_for_ends(changing, identity, tmp_path_factory):
    ids = [identity + number for number in range(3)]
    gate = tmp_path_factory.mktemp("gate") / "shut"
    gate.touch()
    with opened(OverStream, changing) as client:
        for one in ids[:2]:
            assert client.step("own", 1, one, "start").value == 1
        # One runs, one waits behind it, one waits for a place that only the unload frees.
        accepted = [
            client.start("own", 1, ids[0], gate=str(gate)),
            client.start("own", 1, ids[0]),
            client.start("own", 9, ids[2], "start"),
        ]
        changing.wait_for(lambda: changing.metric("headrace_queue_requests", model="own") == 2)
        assert changing.post("/v2/repository/models/own/unload", {})[0] == 200
        refused = client.step("own", 1, ids[1])
        assert "own" in refused.error
        gate.unlink()
        assert [one.result(TIMEOUT_S).value for one in accepted] == [2, 3, 9]
        assert changing.post("/v2/repository/models/own/load", {})[0] == 200
        reply = client.step("own", 1, ids[0])
        assert reply.refused
        assert "must specify the START flag" in reply.error
        assert client.step("own", 4, ids[0], "start end").value == 4


def test_a_configuration_that_is_replaced_ends_every_sequence(changing, identity):
    ids = [identity + number for number in range(4)]
    with opened(OverHttp, changing) as client:
        for one in ids[:2]:
            assert client.step("kept", 1, one, "start").value == 1
        folder = changing.repository / "kept"
        replace(folder, "config.yaml", (folder / "config.yaml").read_text().replace("candidates: 2", "candidates: 4"))
        assert changing.post("/v2/repository/models/kept/load", {})[0] == 200
        for one in ids[:2]:
            reply = client.step("kept", 1, one)
            assert reply.refused
            assert "must specify the START flag" in reply.error
        assert [client.step("kept", 5, one, "start").value for one in ids] == [5] * 4
        assert active(changing, "kept") == 4
        assert [client.step("kept", 5, one, "end").value for one in ids] == [10] * 4


@pytest.mark.parametrize(
    ("sequence", "words"),
    [
        ("states: [{input: total, output: total_out, datatype: INT32, shape: [1]}]", "no state input 'total'"),
        ("states: [{input: total_in, output: total_out, datatype: FP32, shape: [1]}]", "is configured as FP32"),
        ("states: [{input: total_in, output: total_out, datatype: INT32, shape: [2]}]", "configured with shape [2]"),
        ("controls: [{input: READY, kind: ready, datatype: BOOL}]", "no ready control input 'READY'"),
    ],
)
def test_sequences_that_do_not_fit_the_model_are_told_at_load(changing, sequence, words):
    name = f"unfit_{abs(hash(words))}"
    onnx_sequence(changing.repository, name, f"max_batch_size: 4\nsequence: {{{sequence}}}\n")
    status, answer = changing.post(f"/v2/repository/models/{name}/load", {})
    assert status == 400
    assert words in answer["error"]


def test_clients_that_begin_anew_notice_no_change_of_configuration(changing, identity):
    """Sequences without a pause while the model is loaded anew five times: what is answered is right."""
    ends_at = time.monotonic() + 120
    done = threading.Event()
    steps = [0, 0]

    def run(number) -> tuple[int, set[str]]:
        begun_anew, errors, total, marks = 0, set(), 0, "start"
        with opened(OverGrpc, changing) as client:
            while not done.is_set() and time.monotonic() < ends_at:
                reply = client.step("kept", 1, identity + number, marks)
                steps[number] += 1
                if reply.error:
                    errors.add(reply.error)
                    assert reply.refused, reply
                    total, marks, begun_anew = 0, "start", begun_anew + 1
                    continue
                total = 1 if marks else total + 1
                assert reply.value == total
                marks = ""
        return begun_anew, errors

    folder = changing.repository / "kept"
    with ThreadPoolExecutor(2) as threads:
        clients = [threads.submit(run, number) for number in range(2)]

        def wait_for_steps(more: int) -> None:
            wanted = [count + more for count in steps]
            changing.wait_for(lambda: all(map(ge, steps, wanted)) or any(one.done() for one in clients))

        wait_for_steps(1)
        for idle_us in range(1, 6):
            text = f"max_batch_size: 4\nsequence: {{max_idle_us: {idle_us}00000000, states: [{TOTAL_STATE}]}}\n"
            replace(folder, "config.yaml", text)
            assert changing.post("/v2/repository/models/kept/load", {})[0] == 200
            wait_for_steps(4)  # one may be under way, and the next one is told to begin anew
        done.set()
        for one in clients:
            begun_anew, errors = one.result(TIMEOUT_S)
            assert begun_anew == 5
            assert all("must specify the START flag" in error for error in errors)


def test_a_server_that_stops_does_not_wait_for_the_ends_of_sequences(tmp_path):
    accumulator(tmp_path, "kept", "strategy: oldest, max_candidates: 2")
    with RunningServer(tmp_path) as server:
        with opened(OverGrpc, server) as client:
            assert client.step("kept", 1, 1, "start").value == 1
        stopped_at = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - stopped_at < 20
