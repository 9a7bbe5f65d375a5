"""A client for Headrace and every server of the Open Inference Protocol, over HTTP and gRPC.

    from headrace.client import Client

    with Client("http://127.0.0.1:8000") as client:
        result = client.infer("digits", {"image": pixels})
        result["probabilities"]

``AsyncClient`` has the same calls for asyncio. Of the server's own code, this imports tensors and wire formats only.
"""

from headrace.client.answers import (
    BatchStatistics,
    Duration,
    IndexEntry,
    InferStatistics,
    MemoryUsage,
    ModelMetadata,
    ModelStatistics,
    ResponseStatistics,
    ServerMetadata,
    TensorMetadata,
)
from headrace.client.async_client import AsyncClient
from headrace.client.client import Client
from headrace.client.errors import (
    ClientError,
    ConnectionFailed,
    DeadlineError,
    ForbiddenError,
    InferenceError,
    InvalidRequestError,
    NotFoundError,
    ProtocolError,
    UnavailableError,
    UnsupportedError,
)
from headrace.client.request import Sequence
from headrace.client.result import InferResult

__all__ = [
    "AsyncClient",
    "BatchStatistics",
    "Client",
    "ClientError",
    "ConnectionFailed",
    "DeadlineError",
    "Duration",
    "ForbiddenError",
    "IndexEntry",
    "InferResult",
    "InferStatistics",
    "InferenceError",
    "InvalidRequestError",
    "MemoryUsage",
    "ModelMetadata",
    "ModelStatistics",
    "NotFoundError",
    "ProtocolError",
    "ResponseStatistics",
    "Sequence",
    "ServerMetadata",
    "TensorMetadata",
    "UnavailableError",
    "UnsupportedError",
]
