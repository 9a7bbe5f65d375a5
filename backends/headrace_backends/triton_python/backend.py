"""Models written for Triton's Python backend: a model.py with a class ``TritonPythonModel``."""

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from headrace.core.custom_metric import CustomMetric
from headrace.core.model import Signature
from headrace.core.request import Parameters
from headrace_backends.base import (
    Answer,
    Array,
    Backend,
    LoadError,
    ModelSource,
    RequestInfo,
    ResponseStream,
)
from headrace_backends.model_code import ModelCode, guarded
from headrace_backends.triton_python.chores import Chores
from headrace_backends.triton_python.errors import TritonError
from headrace_backends.triton_python.loop import LoopThread
from headrace_backends.triton_python.metrics import ModelMetrics
from headrace_backends.triton_python.model_config import Config, ModelConfig, configuration, signature_of
from headrace_backends.triton_python.module import NAME, utilities
from headrace_backends.triton_python.requests import Calls, InferenceRequest, own_parameters, sequence_flags
from headrace_backends.triton_python.responses import InferenceResponse, answer_of
from headrace_backends.triton_python.senders import OneResponse, Responder, StreamedResponses
from headrace_backends.triton_python.tensor import Tensor

log = logging.getLogger("headrace.worker")

_MAX_CALLS = 64  # to other models that a model waits for at the same time in async_exec


class TritonApi:
    """One model's ``triton_python_backend_utils``, offered to its code, and what is behind it."""

    def __init__(self, source: ModelSource, code: ModelCode) -> None:
        self.metrics = ModelMetrics()
        self._pool = ThreadPoolExecutor(_MAX_CALLS, thread_name_prefix="model calls")
        self._code = code
        self._module = utilities(source.name, code.folder, Calls(source.calls, self._pool), self.metrics)
        self.request_class: type[InferenceRequest] = self._module.InferenceRequest
        self.offer()

    def offer(self) -> None:
        """Have the name mean this model's module, for the code's further imports."""
        self._code.offer(NAME, self._module)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class TritonPythonBackend(Backend):
    """One instance of a ``TritonPythonModel``.

    Its code stays open while it lives, because such models may import helpers whenever they like.
    """

    wants_requests = True
    remembers = True

    def __init__(self, source: ModelSource, code: ModelCode, api: TritonApi, model: Any, signature: Signature) -> None:
        self._name = source.name
        self._version = int(source.version) if source.version.isdecimal() else source.version
        self._code = code
        self._api = api
        self._model = model
        self._signature = signature
        self._outputs = {spec.name: spec for spec in signature.outputs}
        self._loop = LoopThread()
        self._chores = Chores()
        self._chores.start()

    @classmethod
    def load(cls, source: ModelSource) -> "TritonPythonBackend":
        """Import model.py, make the model and let it initialize."""
        code = ModelCode.of(source.path)
        api = TritonApi(source, code)
        try:
            return cls.make(source, code, api, getattr(code.open(), "TritonPythonModel", None))
        except BaseException:
            api.close()
            code.forget()
            raise

    @classmethod
    def make(cls, source: ModelSource, code: ModelCode, api: TritonApi, model_class: Any) -> "TritonPythonBackend":
        """A model of code that is open. ``code`` and ``api`` are its own from then on, unless this fails."""
        if not isinstance(model_class, type) or not callable(getattr(model_class, "execute", None)):
            raise LoadError("model.py has no class TritonPythonModel with a method execute(self, requests)")
        config = _completed(configuration(source), model_class, code)
        signature = signature_of(config)
        model = guarded(code.folder, "cannot make its TritonPythonModel", model_class)
        if callable(getattr(model, "initialize", None)):
            arguments = _arguments(source, config, code)
            guarded(code.folder, "fails in TritonPythonModel.initialize", lambda: model.initialize(arguments))
        return cls(source, code, api, model, signature)

    @property
    def signature(self) -> Signature:
        """What the configuration declares, completed by auto_complete_config."""
        return self._signature

    def execute(self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> list[Answer]:
        """Give the model its requests, each with its own rows, and hold its responses against the configuration."""
        self._api.offer()
        responders = [OneResponse() for _ in requests]
        tensors = _split(_kept(inputs), requests)
        given = [self._request(*each) for each in zip(tensors, requests, responders, strict=True)]
        result = self._model.execute(given)
        if inspect.iscoroutine(result):
            result = self._loop.run(result).result()
        taken = [one.sender_taken for one in given]
        sent = [one.done for one in responders]  # asked now: another thread answers for a sender that is let go of
        del given  # so that a response sender that the model has let go of is gone
        responses = _responses(result, responders, taken, sent)
        batches = self._signature.max_batch_size > 0
        return [
            answer_of(response, self._outputs, info.outputs, info.rows if batches else None)
            for response, info in zip(responses, requests, strict=True)
        ]

    def begin(self, inputs: Mapping[str, Array], stream: ResponseStream) -> None:
        """Give the model one request; its responses go to ``stream`` from wherever the model sends them."""
        self._api.offer()
        info = stream.request
        responder = StreamedResponses(
            stream, lambda response: answer_of(response, self._outputs, info.outputs, rows=None)
        )
        try:
            result = self._model.execute([self._request(_tensors(inputs), info, responder)])
            if inspect.iscoroutine(result):
                self._loop.run(result).add_done_callback(lambda future: self._executed(future, responder))
            else:
                _nothing(result)
        except BaseException:
            if responder.close():
                raise
            log.exception("model %s: execute failed after its last response", self._name)

    def metrics(self) -> tuple[CustomMetric, ...]:
        """The present values of the metrics that the model's code keeps."""
        return self._api.metrics.samples()

    def close(self) -> None:
        """Let the model finalize, end its threads and forget its module."""
        self._api.offer()
        finalize = getattr(self._model, "finalize", None)
        try:
            if callable(finalize):
                finalize()
        finally:
            self._loop.close()
            self._chores.close()
            self._api.close()
            self._code.forget()

    def _request(self, tensors: list[Tensor], info: RequestInfo, responder: Responder) -> InferenceRequest:
        parameters = info.parameters
        request = self._api.request_class(
            request_id=info.id,
            correlation_id=_text_or_number(parameters, "sequence_id"),
            inputs=tensors,
            requested_output_names=info.outputs or tuple(self._outputs),
            model_name=self._name,
            model_version=self._version,
            flags=sequence_flags(parameters),
            timeout=_number(parameters, "timeout"),
            parameters=own_parameters(parameters),
            priority=_number(parameters, "priority"),
        )
        request.answered_by(responder, self._chores)
        return request

    def _executed(self, future: "Future[None]", responder: StreamedResponses) -> None:
        """An async ``execute`` has ended. Runs on its loop, which is not to wait for a client."""
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            try:
                _nothing(future.result())
            except TypeError as problem:
                error = problem
        if error is None:
            return
        failed = error if isinstance(error, Exception) else RuntimeError(f"execute ended by {error!r}")
        log.error("model %s: execute failed", self._name, exc_info=failed)
        self._chores.add(lambda: responder.fail(failed))


def _completed(config: Config, model_class: Any, code: ModelCode) -> Config:
    """The configuration after the model's auto_complete_config, where it has one."""
    complete = getattr(model_class, "auto_complete_config", None)
    if not callable(complete):
        return config
    what = "fails in TritonPythonModel.auto_complete_config"
    result = guarded(code.folder, what, lambda: complete(ModelConfig(json.dumps(config))))
    if not isinstance(result, ModelConfig):
        raise LoadError(
            f"TritonPythonModel.auto_complete_config gave {type(result).__name__}, expected the ModelConfig"
        )
    return result.as_dict()


def _arguments(source: ModelSource, config: Config, code: ModelCode) -> dict[str, str]:
    """What ``initialize`` is told."""
    return {
        "model_config": json.dumps(config),
        "model_instance_kind": "CPU" if source.gpu is None else "GPU",
        "model_instance_name": source.instance or f"{source.name}_0",
        "model_instance_device_id": str(source.gpu or 0),
        "model_repository": source.repository or str(code.folder.parent),
        "model_version": source.version,
        "model_name": source.name,
    }


def _kept(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs in memory of their own, for Triton's is: models keep what a sequence has said from call to call."""
    return {name: array.copy() for name, array in inputs.items()}


def _tensors(inputs: Mapping[str, Array]) -> list[Tensor]:
    return [Tensor(name, array) for name, array in inputs.items()]


def _split(inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> list[list[Tensor]]:
    """Each request's tensors: its rows of the batch, as views."""
    if len(requests) == 1:
        return [_tensors(inputs)]
    split = []
    start = 0
    for info in requests:
        stop = start + info.rows
        split.append([Tensor(name, array[start:stop]) for name, array in inputs.items()])
        start = stop
    return split


def _responses(
    result: Any, responders: Sequence[OneResponse], taken: Sequence[bool], sent: Sequence[bool]
) -> list[InferenceResponse]:
    """Each request's response: what ``execute`` returned for it, or else what its sender was given."""
    if result is None:
        result = [None] * len(responders)
    if not isinstance(result, list | tuple):
        raise TypeError(f"execute gave {type(result).__name__}, expected a list of pb_utils.InferenceResponse")
    if len(result) != len(responders):
        raise RuntimeError(f"execute gave {len(result)} responses for {len(responders)} requests")
    return [_response(*each) for each in zip(result, responders, taken, sent, strict=True)]


def _response(returned: Any, responder: OneResponse, taken: bool, sent: bool) -> InferenceResponse:
    if returned is None and taken:
        return responder.wait()
    if returned is None:
        return _failure("execute gave no response to the request, and did not take its response sender either")
    if not isinstance(returned, InferenceResponse):
        return _failure(f"execute gave a {type(returned).__name__}, expected a pb_utils.InferenceResponse")
    if sent:
        return _failure("execute gave a response to a request that its response sender had answered")
    return returned


def _failure(message: str) -> InferenceResponse:
    return InferenceResponse(error=TritonError(message))


def _nothing(result: Any) -> None:
    """Check what ``execute`` of a decoupled model returned."""
    if result is not None:
        raise TypeError(
            f"execute gave {type(result).__name__}, expected None: the model is decoupled, so its responses go "
            "through request.get_response_sender()"
        )


def _number(parameters: Parameters, name: str) -> int:
    value = parameters.get(name, 0)
    return value if isinstance(value, int) else 0


def _text_or_number(parameters: Parameters, name: str) -> int | str:
    value = parameters.get(name, 0)
    return value if isinstance(value, int | str) else 0
