"""The contract between a worker process and whatever runs the model.

A backend is loaded by name from registry.py, in a worker process and nowhere else. It may see
``headrace.core`` and its own framework. One worker runs one call at a time, always on the same thread.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What a backend is given to load."""

    name: str
    version: str
    path: Path  # the model file, or the version's folder where a backend takes folders
    device: str = "cpu"  # cpu | gpu:N
    threads: int = 1  # how many the backend may keep busy, the calling one included
    inputs: tuple[TensorSpec, ...] = ()  # as configured; empty where the file is to tell
    outputs: tuple[TensorSpec, ...] = ()
    max_batch_size: int | None = None  # as configured; None where the backend is to infer it
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gpu(self) -> int | None:
        """The number of the GPU that ``device`` means, None for the CPU.

        Raises:
            LoadError: it means neither.
        """
        if self.device == "cpu":
            return None
        match = re.fullmatch(r"gpu:(\d+)", self.device)
        if match is None:
            raise LoadError(f"device '{self.device}' is unknown, expected cpu or gpu:N")
        return int(match[1])


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """One request of a batch: how many of the batch's rows are its own, and what its client said."""

    rows: int
    id: str
    parameters: Parameters


class Backend(ABC):
    """One model, loaded. Made by ``load``, used for any number of ``execute`` calls, ended by ``close``."""

    #: Whether ``execute`` is to be told of the single requests. Costs a little for each batch.
    wants_requests = False
    #: CPU threads that one ``execute`` keeps busy, for taking turns with other models: 0 where that is over so
    #: soon that turns would cost more than they bring, or where the backend cannot know.
    cpu_threads = 0
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
    def execute(self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> Mapping[str, Array]:
        """Run one batch.

        ``inputs`` has an array for each input that was given, BYTES as objects of type bytes, BF16 as
        ml_dtypes.bfloat16. They are views of memory that is used again after the call: copy what is to be
        kept. Returns an array for each output of the signature; the caller copies them before the next call.

        Raises:
            InputError: the input is at fault; its client gets the message.
            Exception: anything else is the model's fault.
        """

    def notes(self) -> list[str]:
        """Decisions worth telling the model's owner: ``headrace explain`` prints them."""
        return []

    def close(self) -> None:  # noqa: B027 - most backends have nothing to give back
        """Give back what the garbage collector would not."""
