"""What a server tells about itself and its models: the same structs over HTTP and gRPC."""

import msgspec


class TensorMetadata(msgspec.Struct, frozen=True):
    """An input or output; -1 in ``shape`` is a dimension of any size, and the batch dimension is included."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(msgspec.Struct, frozen=True):
    """A model and its tensors; ``versions`` are those that can be asked."""

    name: str
    versions: tuple[str, ...] = ()
    platform: str = ""
    inputs: tuple[TensorMetadata, ...] = ()
    outputs: tuple[TensorMetadata, ...] = ()


class ServerMetadata(msgspec.Struct, frozen=True):
    """The server and the extensions of the protocol that it offers."""

    name: str
    version: str
    extensions: tuple[str, ...] = ()


class IndexEntry(msgspec.Struct, frozen=True):
    """A version in the server's repository; one that was never loaded has neither version nor state."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


class Duration(msgspec.Struct, frozen=True):
    """How often something happened, and the nanoseconds that it took in all."""

    count: int = 0
    ns: int = 0


class InferStatistics(msgspec.Struct, frozen=True):
    """Where the time of a model's requests went."""

    success: Duration = Duration()
    fail: Duration = Duration()
    queue: Duration = Duration()
    compute_input: Duration = Duration()
    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()
    cache_hit: Duration = Duration()
    cache_miss: Duration = Duration()


class ResponseStatistics(msgspec.Struct, frozen=True):
    """The same for the responses that had one index within their requests."""

    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()
    success: Duration = Duration()
    fail: Duration = Duration()
    empty_response: Duration = Duration()
    cancel: Duration = Duration()


class BatchStatistics(msgspec.Struct, frozen=True):
    """The batches of one size."""

    batch_size: int
    compute_input: Duration = Duration()
    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()


class MemoryUsage(msgspec.Struct, frozen=True):
    """Memory that a model holds on one device."""

    type: str = ""
    id: int = 0
    byte_size: int = 0


class ModelStatistics(msgspec.Struct, frozen=True):
    """What happened to one version since it was loaded.

    ``last_inference`` is in milliseconds since the epoch, ``inference_count`` in rows, ``execution_count`` in batches.
    """

    name: str
    version: str = ""
    last_inference: int = 0
    inference_count: int = 0
    execution_count: int = 0
    inference_stats: InferStatistics = InferStatistics()
    response_stats: dict[str, ResponseStatistics] = {}
    batch_stats: tuple[BatchStatistics, ...] = ()
    memory_usage: tuple[MemoryUsage, ...] = ()


class Health(msgspec.Struct, frozen=True):
    """The answer to a health request; over HTTP the status alone says it, and success means yes."""

    live: bool = True
    ready: bool = True
