"""Requests that models written for Triton's Python backend make to other models."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from headrace.core.errors import (
    DeadlineExceeded,
    Forbidden,
    InternalError,
    InvalidRequest,
    NotFound,
    NotReady,
    Overloaded,
    Unsupported,
)
from headrace_backends.base import Answer, ModelCall
from headrace_backends.triton_python.errors import TritonModelException
from headrace_backends.triton_python.metrics import ModelMetrics
from headrace_backends.triton_python.module import utilities
from headrace_backends.triton_python.requests import Calls

ONE = np.ones(1, np.float32)
WAIT_S = 60


class Server:
    """What a worker offers to a model's code: answers as told, remembers what it was asked."""

    def __init__(self):
        self.asked = []
        self.answers = [Answer({"z": ONE}, {"k": 1})]
        self.error = None
        self.meet = None  # a barrier that concurrent calls wait at
        self.closed = False

    def infer(self, call):
        self._ask(call)
        return self.answers[0]

    def stream(self, call):
        self._ask(call)
        try:
            yield from self.answers
        finally:
            self.closed = True

    def is_ready(self, model, version):
        self._ask(("is_ready", model, version))
        return True

    def load(self, model, config, files):
        self._ask(("load", model, config, files))

    def unload(self, model, *, dependents):
        self._ask(("unload", model, dependents))

    def _ask(self, what):
        self.asked.append(what)
        if self.meet is not None:
            self.meet.wait(WAIT_S)
        if self.error is not None:
            raise self.error


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def pb_utils(server):
    with ThreadPoolExecutor(4) as pool:
        yield utilities("m", Path("/models/m/1"), Calls(server, pool), ModelMetrics())


def request_of(pb_utils, **more):
    inputs = [pb_utils.Tensor("x", ONE)]
    return pb_utils.InferenceRequest(model_name="other", requested_output_names=["z"], inputs=inputs, **more)


def test_exec(pb_utils, server):
    response = request_of(pb_utils).exec()
    assert not response.has_error()
    assert pb_utils.get_output_tensor_by_name(response, "z").as_numpy() is ONE
    assert json.loads(response.parameters()) == {"k": 1}
    assert server.asked == [ModelCall("other", {"x": ONE}, "", ("z",))]


def test_all_that_a_call_can_say(pb_utils, server):
    memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_GPU, 0)
    said = {"request_id": "r", "correlation_id": 4, "model_version": 2, "timeout": 5, "parameters": {"p": "v"}}
    request = request_of(
        pb_utils, flags=1, preferred_memory=memory, trace=pb_utils.InferenceTrace(), priority=2, **said
    )
    request.set_flags(request.flags() | pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END)
    request.exec()
    parameters = {"p": "v", "sequence_id": 4, "sequence_start": True, "sequence_end": True, "priority": 2}
    assert server.asked == [ModelCall("other", {"x": ONE}, "2", ("z",), "r", parameters, 5)]
    assert (request.model_name(), request.model_version(), request.timeout()) == ("other", 2, 5)
    assert (request.request_id(), request.correlation_id(), request.priority()) == ("r", 4, 2)
    assert request.preferred_memory() is memory
    assert not request.is_cancelled()


def test_text_is_sent_as_triton_does(pb_utils, server):
    words = np.array([b"a", "é", 5, None], np.object_)
    inputs = [pb_utils.Tensor("x", words)]
    pb_utils.InferenceRequest(model_name="other", requested_output_names=["z"], inputs=inputs).exec()
    assert server.asked[0].inputs["x"].tolist() == [b"a", "é".encode(), b"5", b"None"]


def test_sequences_may_have_names(pb_utils, server):
    request_of(pb_utils, correlation_id="s").exec()
    assert server.asked[0].parameters == {"sequence_id": "s", "sequence_start": False, "sequence_end": False}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest, "INVALID_ARG"),
        (NotFound, "NOT_FOUND"),
        (NotReady, "UNAVAILABLE"),
        (Overloaded, "UNAVAILABLE"),
        (DeadlineExceeded, "UNAVAILABLE"),
        (Unsupported, "UNSUPPORTED"),
        (Forbidden, "UNSUPPORTED"),
        (InternalError, "INTERNAL"),
    ],
)
@pytest.mark.parametrize("raised", [True, False])
@pytest.mark.parametrize("decoupled", [True, False])
def test_what_the_other_model_could_not_is_no_exception(pb_utils, server, decoupled, raised, error, code):
    if raised:
        server.error = error("no")
    else:
        server.answers = [Answer(error=error("no"))]
    response = request_of(pb_utils).exec(decoupled)
    if decoupled:
        (response,) = response
    assert response.has_error()
    assert (response.error().message(), response.error().code()) == ("no", getattr(pb_utils.TritonError, code))


def test_decoupled(pb_utils, server):
    server.answers = [Answer({"z": np.full(1, n)}) for n in range(3)] + [Answer()]
    responses = request_of(pb_utils).exec(decoupled=True)
    assert len(server.asked) == 1  # it runs before anybody iterates
    outputs = [response.output_tensors() for response in responses]
    assert [int(tensors[0].as_numpy()[0]) for tensors in outputs[:3]] == [0, 1, 2]
    assert outputs[3] == []
    assert list(responses) == []


def test_decoupled_without_responses(pb_utils, server):
    server.answers = []
    assert list(request_of(pb_utils).exec(decoupled=True)) == []


def test_decoupled_that_nobody_wants_more_of(pb_utils, server):
    server.answers = [Answer()] * 3
    responses = request_of(pb_utils).exec(decoupled=True)
    next(responses)
    assert not server.closed
    responses.cancel()
    assert server.closed
    assert list(responses) == []


@pytest.mark.parametrize("decoupled", [True, False])
async def test_async_exec_runs_calls_together(pb_utils, server, decoupled):
    server.meet = threading.Barrier(3)
    calls = [request_of(pb_utils, request_id=str(n)).async_exec(decoupled) for n in range(3)]
    responses = await asyncio.gather(*calls)
    if decoupled:
        responses = [next(one) for one in responses]
    assert not any(response.has_error() for response in responses)
    assert sorted(call.id for call in server.asked) == ["0", "1", "2"]


async def test_async_exec_decoupled_both_ways(pb_utils, server):
    server.answers = [Answer({"z": ONE})] * 3
    assert len([one async for one in await request_of(pb_utils).async_exec(decoupled=True)]) == 3
    assert len(list(await request_of(pb_utils).async_exec(decoupled=True))) == 3


def test_a_call_names_its_model(pb_utils, server):
    with pytest.raises(TritonModelException, match="needs its model_name"):
        pb_utils.InferenceRequest(requested_output_names=[], inputs=[]).exec()
    assert server.asked == []


def test_inputs_are_tensors(pb_utils):
    with pytest.raises(TypeError, match=r"inputs has a ndarray, expected pb_utils\.Tensor only"):
        pb_utils.InferenceRequest(model_name="o", requested_output_names=[], inputs=[ONE])


def test_model_control(pb_utils, server):
    assert pb_utils.is_model_ready(model_name="o", model_version="1")
    pb_utils.load_model("o")
    pb_utils.load_model(model_name="o", config="{}", files={"file:1/model.onnx": b"x"})
    pb_utils.unload_model("o", unload_dependents=True)
    assert server.asked == [
        ("is_ready", "o", "1"),
        ("load", "o", "", {}),
        ("load", "o", "{}", {"1/model.onnx": b"x"}),
        ("unload", "o", True),
    ]


@pytest.mark.parametrize("verb", ["is_model_ready", "load_model", "unload_model"])
def test_model_control_that_fails(pb_utils, server, verb):
    server.error = Forbidden("not explicit")
    with pytest.raises(TritonModelException, match="not explicit"):
        getattr(pb_utils, verb)("o")


def test_calls_need_a_server():
    with ThreadPoolExecutor(1) as pool:
        alone = utilities("m", Path("/models/m/1"), Calls(None, pool), ModelMetrics())
        with pytest.raises(TritonModelException, match="a request to the model 'other' needs a running server"):
            request_of(alone).exec()
        with pytest.raises(TritonModelException, match="load_model needs a running server"):
            alone.load_model("o")


def test_names_out_of_a_tensor(pb_utils, server):
    text = np.array([b"other", b"z"], object)
    request = pb_utils.InferenceRequest(
        model_name=text[0], requested_output_names=[text[1]], inputs=[], request_id=b"r"
    )
    assert not request.exec().has_error()
    assert server.asked == [ModelCall("other", {}, "", ("z",), "r")]


def test_numbers_out_of_a_tensor(pb_utils, server):
    numbers = {"correlation_id": np.int64(3), "timeout": np.uint32(5), "parameters": {"a": np.float32(0.5)}}
    request_of(pb_utils, **numbers).exec()
    (call,) = server.asked
    assert type(call.timeout_us) is type(call.parameters["sequence_id"]) is int
    assert call.parameters["a"] == 0.5
    assert type(call.parameters["a"]) is float
