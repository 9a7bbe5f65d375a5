"""The contract between a worker process and whatever runs the model.

A backend is loaded by name from registry.py, in a worker process and nowhere else. It may see
``headrace.core`` and its own framework. One worker runs one call at a time, always on the same thread.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from headrace.core.custom_metric import CustomMetric
from headrace.core.device import gpu_number
from headrace.core.errors import InvalidRequest
from headrace.core.model import Signature, TensorSpec
from headrace.core.request import Parameters

Array = npt.NDArray[np.generic]
InputError = InvalidRequest  # what a model raises to refuse an input: the client gets it as a 400
DEFAULT_MAX_BATCH_SIZE = 32  # rows, where a backend finds by itself that they may be merged


class BackendUnavailable(Exception):
    """The backend cannot run here; the message says what to install or change."""


class LoadError(Exception):
    """The model cannot be served; the message says what is wrong with which file.

    Like every message of a backend, it does not name the model: the server puts that in front.
    """


class DeviceLost(Exception):
    """The device that the model runs on cannot be used by this process any more; the message says what happened.

    The worker fails the batch and ends: the next process may find the device well.
    """


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """One request of a batch: how many of the batch's rows are its own, and what its client said.

    ``outputs`` are the names that were asked for, empty for all. ``slot`` is the place of its sequence in this
    instance, -1 where it has none; with the direct strategy that is its row.
    """

    rows: int
    id: str
    parameters: Parameters
    outputs: tuple[str, ...] = ()
    slot: int = -1


@dataclass(frozen=True, slots=True)
class Answer:
    """One response to one request: arrays by output name, or an error.

    An ``InputError`` is the client's fault, everything else the model's.
    """

    outputs: Mapping[str, Array] = field(default_factory=dict)
    parameters: Parameters = field(default_factory=dict)
    error: Exception | None = None


class ResponseStream(Protocol):
    """Where a decoupled model's responses to one request go. Any thread may use it."""

    @property
    def request(self) -> RequestInfo:
        """What is being answered."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for responses any more."""

    def send(self, answer: Answer) -> None:
        """Give one response. Waits while the client is far behind; nothing happens where it has left."""

    def end(self, error: Exception | None = None) -> None:
        """There will be no more responses, because of ``error`` if there is one. Never waits."""


class ModelCalls(Protocol):
    """How a model's code uses other models of the same server. Any thread may call; every call blocks.

    Raises:
        HeadraceError: from each, what a client would be told.
    """

    def infer(self, call: "ModelCall") -> Answer:
        """Run another model and return its one response."""

    def stream(self, call: "ModelCall") -> Iterator[Answer]:
        """Run another model and yield its responses as they come; closing the iterator takes the request back."""

    def is_ready(self, model: str, version: str) -> bool:
        """Whether a request for it would be run now."""

    def load(self, model: str, config: str, files: Mapping[str, bytes]) -> None:
        """Have the server load a model; ``config`` and ``files`` as a client's load request has them."""

    def unload(self, model: str, *, dependents: bool) -> None:
        """Have the server let go of a model."""


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A request of one model to another. ``outputs`` empty asks for all, ``timeout_us`` 0 is none."""

    model: str
    inputs: Mapping[str, Array]
    version: str = ""
    outputs: tuple[str, ...] = ()
    id: str = ""
    parameters: Parameters = field(default_factory=dict)
    timeout_us: int = 0


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What a backend is given to load."""

    name: str
    version: str
    path: Path  # the model file, or the version's folder where a backend takes folders
    device: str = "cpu"  # cpu | gpu:N | gpu:UUID
    threads: int = 1  # how many the backend may keep busy, the calling one included
    inputs: tuple[TensorSpec, ...] = ()  # as configured; empty where the file is to tell
    outputs: tuple[TensorSpec, ...] = ()
    max_batch_size: int | None = None  # as configured; None where the backend is to infer it
    parameters: Mapping[str, Any] = field(default_factory=dict)
    decoupled: bool = False  # as configured
    config_json: str = ""  # the whole configuration in Triton's JSON form; empty where nobody has one
    repository: str = ""  # the model's folder
    instance: str = ""  # a name for this copy, unique in the server
    calls: ModelCalls | None = None  # None where there is no server, as in a trial

    @property
    def gpu(self) -> int | None:
        """The number of the GPU that ``device`` means in this process, None for the CPU.

        Raises:
            LoadError: it means neither.
        """
        try:
            return gpu_number(self.device)
        except ValueError as error:
            raise LoadError(str(error)) from None


class Backend(ABC):
    """One model, loaded. Made by ``load``, used for any number of ``execute`` calls, ended by ``close``."""

    #: Whether ``execute`` is to be told of the single requests. Costs a little for each batch.
    wants_requests = False
    #: CPU threads that one ``execute`` keeps busy, for taking turns with other models: 0 where that is over so
    #: soon that turns would cost more than they bring, or where the backend cannot know.
    cpu_threads = 0
    #: Whether the model's own code may keep what it was given: then no request of a sequence is run twice.
    remembers = False
    #: Whether ``execute`` never writes to its inputs: then they may be memory that others read too.
    reads_only = False
    #: Whether it is harmless to run the model on made-up inputs before the first real ones.
    warms_up = False

    @classmethod
    @abstractmethod
    def load(cls, source: ModelSource) -> "Backend":
        """Read the model.

        Raises:
            BackendUnavailable: the framework is missing or too old.
            LoadError: the file is broken, or is something that the protocol cannot express.
        """

    @property
    @abstractmethod
    def signature(self) -> Signature:
        """What the file and the configuration together say. Its ``max_batch_size`` is 0 where rows cannot mix."""

    @abstractmethod
    def execute(
        self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]
    ) -> Mapping[str, Array] | Sequence[Answer]:
        """Run one batch.

        ``inputs`` has an array for each input that was given, BYTES as objects of type bytes, BF16 as
        ml_dtypes.bfloat16. They are views of memory that is used again after the call: copy what is to be
        kept. Returns an array for each output of the signature, or an answer for each of ``requests`` (then
        ``wants_requests`` must be set); the caller copies the arrays before the next call.

        Raises:
            InputError: the input is at fault; its client gets the message.
            DeviceLost: this process cannot run the model any more.
            Exception: anything else is the model's fault.
        """

    def begin(self, inputs: Mapping[str, Array], stream: ResponseStream) -> Iterator[Answer] | None:
        """Begin to answer one request of a decoupled model; ``inputs`` are the callee's to keep.

        Returns the responses as an iterator, which the worker advances whenever the client has room for one more,
        in turn with those of other requests; or None where the model uses ``stream`` by itself, then or later.
        Errors are raised as by ``execute``, here and by the iterator.
        """
        raise NotImplementedError("only decoupled models stream")

    def metrics(self) -> Sequence[CustomMetric]:
        """The present values of the metrics that the model's own code keeps; asked for after each batch."""
        return ()

    def notes(self) -> list[str]:
        """Decisions worth telling the model's owner: ``headrace explain`` prints them."""
        return []

    def close(self) -> None:  # noqa: B027 - most backends have nothing to give back
        """Give back what the garbage collector would not."""
