"""The control messages between the front process and a worker: what travels over their socket."""

from typing import Any, Literal

import msgspec

from headrace.core.custom_metric import CustomMetric
from headrace.core.model import ReshapeSpec, Signature
from headrace.core.request import Parameters
from headrace.core.sequence import SequenceSpec
from headrace.log import LogLevels

# Responses of a streamed Call that may wait for the calling model, and their bytes; one response may be larger.
CALL_WINDOW = 16
CALL_WINDOW_BYTES = 16 * 1024 * 1024


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
    outputs: tuple[str, ...] = ()
    slot: int = -1


class AnswerFrame(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The answer to one request of a batch: each output of the signature that it has, or an error.

    ``kind`` is a core.errors.Kind value, empty where there is no error.
    """

    outputs: tuple[TensorFrame | None, ...]
    parameters: Parameters
    kind: str = ""
    message: str = ""


class NamedTensor(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A tensor that travels with its frame, in wire form."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


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
    decoupled: bool = False
    sequence: SequenceSpec | None = None
    reshapes: tuple[ReshapeSpec, ...] = ()
    config_json: str = ""
    repository: str = ""  # the model's folder
    replay: str = ""  # the file of recorded requests that it has to answer as it did; empty where there is none
    tolerance: float = 0.0  # of those answers
    gpu_uuid: str = ""  # of the GPU whose memory is to be measured around the load; empty for none


class Unload(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """To the worker: forget this model. Not answered."""

    instance: int


class Piece(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Input data that lies in another worker's outputs, and belongs at ``offset`` of the batch's own segment."""

    offset: int
    segment: int  # its number among those that the worker was given
    source: int  # where it lies in there
    nbytes: int


class Run(msgspec.Struct, frozen=True, tag=3, array_like=True):
    """To the worker: run one batch. A memory descriptor comes along when ``segment_bytes`` is not 0.

    Behind it come those of ``attached``: segments of other workers, by number and size, that ``pieces`` lie in. The
    worker keeps them until a Detach. ``merged`` is how many requests the batch was made of, be they told or not.
    """

    instance: int
    sequence: int
    slot: int
    segment_bytes: int
    inputs: tuple[TensorFrame | None, ...]
    requests: tuple[RequestFrame, ...]
    pieces: tuple[Piece, ...] = ()
    attached: tuple[tuple[int, int], ...] = ()
    merged: int = 1


class Credit(msgspec.Struct, frozen=True, tag=9, array_like=True):
    """To the worker: the client of this decoupled request has read so many responses. Not answered."""

    sequence: int
    responses: int
    nbytes: int = 0  # of their outputs


class Cancel(msgspec.Struct, frozen=True, tag=10, array_like=True):
    """To the worker: nobody waits for this decoupled request any more. Not answered, but for its Ended."""

    sequence: int


class CallAnswer(msgspec.Struct, frozen=True, tag=11, array_like=True):
    """To the worker: a response to its Call, or its error. ``last``: nothing more will come for it.

    The outputs lie in the memory descriptor that comes along when there are any.
    """

    call: int
    last: bool
    outputs: tuple[tuple[str, TensorFrame], ...] = ()
    parameters: Parameters = {}
    segment_bytes: int = 0
    kind: str = ""
    message: str = ""


class Detach(msgspec.Struct, frozen=True, tag=21, array_like=True):
    """To the worker: it will not be told of this segment of another worker any more. Not answered."""

    segment: int


class Logging(msgspec.Struct, frozen=True, tag=12, array_like=True):
    """To the worker: what to log from now on. Not answered."""

    levels: LogLevels


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
    remembers: bool = False  # whether its own code may keep what it was given
    memory_bytes: int = 0  # that the worker's own memory has grown by
    gpu_bytes: int = 0  # that its memory on the GPU has grown by; 0 where it was not measured
    files_print: str = ""  # of the version's folder, as it was when the load began


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
    answers: tuple[AnswerFrame, ...] = ()  # in place of ``outputs``, where the backend answers each request by itself


class Failed(msgspec.Struct, frozen=True, tag=8, array_like=True):
    """From the worker: the model refused the batch (``kind`` is a core.errors.Kind value)."""

    sequence: int
    kind: str
    message: str


class Begun(msgspec.Struct, frozen=True, tag=13, array_like=True):
    """From the worker: it has taken a decoupled request, and its slot is free. Parts and Ended follow."""

    sequence: int
    input_ns: int


class Part(msgspec.Struct, frozen=True, tag=14, array_like=True):
    """From the worker: one response to a decoupled request; with a ``kind`` it is an error."""

    sequence: int
    outputs: tuple[NamedTensor, ...]
    parameters: Parameters
    infer_ns: int = 0
    kind: str = ""
    message: str = ""


class Ended(msgspec.Struct, frozen=True, tag=15, array_like=True):
    """From the worker: there is no further response to a decoupled request, because of an error if there is one."""

    sequence: int
    kind: str = ""
    message: str = ""


class Call(msgspec.Struct, frozen=True, tag=16, array_like=True):
    """From the worker: a model wants another model run. Inputs lie in the memory descriptor that comes along."""

    call: int
    instance: int  # whose model calls
    sequence: int  # of the batch or stream on whose behalf; 0 where it is nobody's
    model: str
    version: str
    inputs: tuple[tuple[str, TensorFrame], ...]
    outputs: tuple[str, ...]
    id: str
    parameters: Parameters
    timeout_us: int
    streams: bool  # whether any number of responses is expected
    segment_bytes: int


class CallEnd(msgspec.Struct, frozen=True, tag=17, array_like=True):
    """From the worker: it wants no more responses to a Call."""

    call: int


class CallCredit(msgspec.Struct, frozen=True, tag=20, array_like=True):
    """From the worker: the model that streams a Call has taken so many responses."""

    call: int
    responses: int
    nbytes: int = 0  # of their outputs


class Ask(msgspec.Struct, frozen=True, tag=18, array_like=True):
    """From the worker: a model asks the repository for something. Answered by a CallAnswer."""

    call: int
    verb: Literal["is_ready", "load", "unload"]
    model: str
    version: str = ""
    config: str = ""
    files: dict[str, bytes] = {}
    dependents: bool = False


class CustomMetrics(msgspec.Struct, frozen=True, tag=19, array_like=True):
    """From the worker: the present values of the metrics that a model's code keeps."""

    instance: int
    samples: tuple[CustomMetric, ...]


ToWorker = Load | Unload | Run | Credit | Cancel | CallAnswer | Detach | Logging | Stop
FromWorker = (
    Loaded | LoadFailed | Done | Failed | Begun | Part | Ended | Call | CallEnd | CallCredit | Ask | CustomMetrics
)

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
