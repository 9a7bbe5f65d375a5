"""The module that models import as ``triton_python_backend_utils``, made anew for each model."""

import logging
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

from headrace.core.errors import HeadraceError
from headrace_backends.triton_python import datatypes
from headrace_backends.triton_python.errors import TritonError, TritonModelException
from headrace_backends.triton_python.metrics import Metric, MetricKind, ModelMetrics, family_class
from headrace_backends.triton_python.model_config import ModelConfig, is_decoupled, tensor_config
from headrace_backends.triton_python.requests import (
    RELEASE_ALL,
    RELEASE_RESCHEDULE,
    SEQUENCE_END,
    SEQUENCE_START,
    Calls,
    InferenceRequest,
    InferenceTrace,
    MemoryType,
    PreferredMemory,
    ResponseIterator,
    request_class,
)
from headrace_backends.triton_python.responses import InferenceResponse
from headrace_backends.triton_python.senders import FINAL, InferenceResponseSender
from headrace_backends.triton_python.tensor import Tensor, tensor_named

NAME = "triton_python_backend_utils"

log = logging.getLogger("headrace.model")


class LogLevel(IntEnum):
    """How much a log record matters."""

    INFO = 0
    WARNING = 1
    ERROR = 2
    VERBOSE = 3


_LEVELS = {
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
    LogLevel.VERBOSE: logging.DEBUG,
}


class Logger:
    """Where a model logs. VERBOSE is for records that are shown when the server shows debug records."""

    INFO = LogLevel.INFO
    WARNING = LogLevel.WARNING
    ERROR = LogLevel.ERROR
    VERBOSE = LogLevel.VERBOSE

    def __init__(self, model: str) -> None:
        self._model = model
        self.LogLevel = LogLevel

    def log(self, message: str, level: LogLevel = LogLevel.INFO) -> None:
        """Write a record."""
        log.log(_LEVELS[level], "model %s: %s", self._model, message)

    def log_info(self, message: str) -> None:
        """Write a record of what is as it should be."""
        self.log(message, LogLevel.INFO)

    def log_warn(self, message: str) -> None:
        """Write a record of what somebody should look at."""
        self.log(message, LogLevel.WARNING)

    def log_error(self, message: str) -> None:
        """Write a record of what has failed."""
        self.log(message, LogLevel.ERROR)

    def log_verbose(self, message: str) -> None:
        """Write a record for finding out what happens."""
        self.log(message, LogLevel.VERBOSE)


class _Repository:
    """The server's other models, as a model's code asks for them."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def is_model_ready(self, model_name: str, model_version: str = "") -> bool:
        """Whether a request for it would be run now."""
        server = self._calls.required("is_model_ready")
        try:
            return server.is_ready(model_name, str(model_version))
        except HeadraceError as error:
            raise TritonModelException(str(error)) from error

    def load_model(self, model_name: str, config: str = "", files: Mapping[str, bytes] | None = None) -> None:
        """Have the server load it, where given from ``config`` and ``files``, whose names are as file:1/model.onnx."""
        server = self._calls.required("load_model")
        try:
            server.load(model_name, config, {name.removeprefix("file:"): file for name, file in (files or {}).items()})
        except HeadraceError as error:
            raise TritonModelException(str(error)) from error

    def unload_model(self, model_name: str, unload_dependents: bool = False) -> None:
        """Have the server let go of it."""
        server = self._calls.required("unload_model")
        try:
            server.unload(model_name, dependents=unload_dependents)
        except HeadraceError as error:
            raise TritonModelException(str(error)) from error


def get_input_tensor_by_name(inference_request: InferenceRequest, name: str) -> Tensor | None:
    """The request's input of that name, None where it has none."""
    return tensor_named(inference_request.inputs(), name)


def get_output_tensor_by_name(inference_response: InferenceResponse, name: str) -> Tensor | None:
    """The response's output of that name, None where it has none."""
    return tensor_named(inference_response.output_tensors(), name)


def get_input_config_by_name(model_config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """What a configuration says of the input of that name, None where it says nothing."""
    return tensor_config(model_config.get("input", ()), name)


def get_output_config_by_name(model_config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """What a configuration says of the output of that name, None where it says nothing."""
    return tensor_config(model_config.get("output", ()), name)


def using_decoupled_model_transaction_policy(model_config: Mapping[str, Any]) -> bool:
    """Whether a configuration makes its model decoupled."""
    return is_decoupled(model_config)


def utilities(model: str, folder: Path, calls: Calls, metrics: ModelMetrics) -> ModuleType:
    """The module for one model. It is not put where imports find it.

    Each model has its own, because what is in it knows whose it is: whom a request is from, whose metrics these are.
    """
    module = ModuleType(NAME, "Triton's API for models in Python.")
    repository = _Repository(calls)
    module.__dict__.update(
        {one.__name__: one for one in _SHARED},
        **{one.name: one for kind in (MetricKind, MemoryType) for one in kind},
        InferenceRequest=request_class(calls),
        MetricFamily=family_class(metrics),
        Logger=Logger(model),
        TRITON_STRING_TO_NUMPY=dict(datatypes.TRITON_STRING_TO_NUMPY),
        TRITONSERVER_REQUEST_FLAG_SEQUENCE_START=SEQUENCE_START,
        TRITONSERVER_REQUEST_FLAG_SEQUENCE_END=SEQUENCE_END,
        TRITONSERVER_REQUEST_RELEASE_ALL=RELEASE_ALL,
        TRITONSERVER_REQUEST_RELEASE_RESCHEDULE=RELEASE_RESCHEDULE,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
        get_model_dir=lambda: str(folder),
        is_model_ready=repository.is_model_ready,
        load_model=repository.load_model,
        unload_model=repository.unload_model,
    )
    return module


_SHARED: tuple[Any, ...] = (
    InferenceResponse,
    InferenceResponseSender,
    InferenceTrace,
    LogLevel,
    MemoryType,
    Metric,
    MetricKind,
    ModelConfig,
    PreferredMemory,
    ResponseIterator,
    Tensor,
    TritonError,
    TritonModelException,
    datatypes.deserialize_bytes_tensor,
    datatypes.numpy_to_triton_type,
    datatypes.serialize_byte_tensor,
    datatypes.triton_string_to_numpy,
    datatypes.triton_to_numpy_type,
    get_input_config_by_name,
    get_input_tensor_by_name,
    get_output_config_by_name,
    get_output_tensor_by_name,
    using_decoupled_model_transaction_policy,
)
