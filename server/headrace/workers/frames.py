"""The control messages between the front process and a worker: what travels over their socket."""

from typing import Any

import msgspec

from headrace.core.model import Signature
from headrace.core.request import Parameters


class TensorFrame(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where one tensor lies in a segment. ``datatype`` is empty where the signature tells it."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    datatype: str = ""


class RequestFrame(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request of a batch, for backends that want to know."""

    rows: int
    id: str
    parameters: Parameters


class Load(msgspec.Struct, frozen=True, tag=1, array_like=True):
    """To the worker: load this model. Answered by Loaded or LoadFailed."""

    instance: int
    backend: str
    name: str
    version: str
    path: str
    device: str
    threads: int
    signature: Signature  # what the configuration declares; empty tuples where the file is to tell
    max_batch_size: int | None
    parameters: dict[str, Any]
    warmup: bool


class Unload(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """To the worker: forget this model. Not answered."""

    instance: int


class Run(msgspec.Struct, frozen=True, tag=3, array_like=True):
    """To the worker: run one batch. A memory descriptor comes along when ``segment_bytes`` is not 0."""

    instance: int
    sequence: int
    slot: int
    segment_bytes: int
    inputs: tuple[TensorFrame | None, ...]
    requests: tuple[RequestFrame, ...]


class Stop(msgspec.Struct, frozen=True, tag=4, array_like=True):
    """To the worker: close every model and end."""


class Loaded(msgspec.Struct, frozen=True, tag=5, array_like=True):
    """From the worker: the model is ready."""

    instance: int
    signature: Signature
    wants_requests: bool
    cpu_threads: int  # that a batch keeps busy; 0 where it takes no turns
    notes: tuple[str, ...]
    seconds: float


class LoadFailed(msgspec.Struct, frozen=True, tag=6, array_like=True):
    """From the worker: the model cannot be served, and why."""

    instance: int
    reason: str


class Done(msgspec.Struct, frozen=True, tag=7, array_like=True):
    """From the worker: the batch's outputs, in the signature's order, in the slot's output segment.

    A memory descriptor comes along when ``segment_bytes`` is not 0: the slot's outputs are in there now.
    """

    sequence: int
    outputs: tuple[TensorFrame, ...]
    segment_bytes: int
    input_ns: int
    infer_ns: int
    output_ns: int


class Failed(msgspec.Struct, frozen=True, tag=8, array_like=True):
    """From the worker: the model refused the batch (``kind`` is a core.errors.Kind value)."""

    sequence: int
    kind: str
    message: str


ToWorker = Load | Unload | Run | Stop
FromWorker = Loaded | LoadFailed | Done | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
