"""What each kind of error is called in HTTP and in gRPC."""

from enum import IntEnum

from headrace.core.errors import HeadraceError, Kind
from headrace.wire.compression import ACCEPTED, UnknownCoding


class StatusCode(IntEnum):
    """gRPC's status codes."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


HTTP_STATUS: dict[Kind, int] = {
    Kind.INVALID: 400,
    Kind.TOO_LARGE: 413,
    Kind.NOT_FOUND: 404,
    Kind.NOT_READY: 503,
    Kind.OVERLOADED: 503,
    Kind.DEADLINE: 503,
    Kind.CANCELLED: 499,
    Kind.UNSUPPORTED: 501,
    Kind.FORBIDDEN: 503,  # Triton's status for model control that is switched off
    Kind.RESTRICTED: 403,
    Kind.INTERNAL: 500,
}

GRPC_STATUS: dict[Kind, StatusCode] = {
    Kind.INVALID: StatusCode.INVALID_ARGUMENT,
    Kind.TOO_LARGE: StatusCode.INVALID_ARGUMENT,
    Kind.NOT_FOUND: StatusCode.NOT_FOUND,
    Kind.NOT_READY: StatusCode.UNAVAILABLE,
    Kind.OVERLOADED: StatusCode.UNAVAILABLE,
    Kind.DEADLINE: StatusCode.DEADLINE_EXCEEDED,
    Kind.CANCELLED: StatusCode.CANCELLED,
    Kind.UNSUPPORTED: StatusCode.UNIMPLEMENTED,
    Kind.FORBIDDEN: StatusCode.UNAVAILABLE,
    Kind.RESTRICTED: StatusCode.PERMISSION_DENIED,  # Triton's UNAVAILABLE would have clients try again
    Kind.INTERNAL: StatusCode.INTERNAL,
}

# Kinds for which the same request may succeed in a moment, so that HTTP says when to come back.
RETRY_AFTER_S = 1
_RETRY = {Kind.NOT_READY, Kind.OVERLOADED, Kind.DEADLINE}


def http_status(error: HeadraceError) -> tuple[int, dict[str, str]]:
    """An error's HTTP status, and the headers that go with it."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.kind in _RETRY else {}
    if isinstance(error, UnknownCoding):
        headers["Accept-Encoding"] = ACCEPTED
    return HTTP_STATUS[error.kind], headers
