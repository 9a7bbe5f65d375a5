"""What each kind of error is called in HTTP and in gRPC."""

import grpc

from headrace.core.errors import HeadraceError, Kind

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

GRPC_STATUS: dict[Kind, grpc.StatusCode] = {
    Kind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Kind.TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    Kind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Kind.NOT_READY: grpc.StatusCode.UNAVAILABLE,
    Kind.OVERLOADED: grpc.StatusCode.UNAVAILABLE,
    Kind.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Kind.CANCELLED: grpc.StatusCode.CANCELLED,
    Kind.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    Kind.FORBIDDEN: grpc.StatusCode.UNAVAILABLE,
    Kind.RESTRICTED: grpc.StatusCode.PERMISSION_DENIED,  # Triton's UNAVAILABLE would have clients try again
    Kind.INTERNAL: grpc.StatusCode.INTERNAL,
}

# Kinds for which the same request may succeed in a moment, so that HTTP says when to come back.
RETRY_AFTER_S = 1
_RETRY = {Kind.NOT_READY, Kind.OVERLOADED, Kind.DEADLINE}


def http_status(error: HeadraceError) -> tuple[int, dict[str, str]]:
    """An error's HTTP status, and the headers that go with it."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.kind in _RETRY else {}
    return HTTP_STATUS[error.kind], headers
