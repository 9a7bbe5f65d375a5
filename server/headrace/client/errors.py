"""The errors of the client: one tree, the same over HTTP and gRPC.

    ClientError
    ├── ConnectionFailed            no connection, or it broke before the answer was there
    ├── ProtocolError               the answer is not one of the protocol
    └── InferenceError              the request was refused or failed; ``status`` and ``message`` say why
        ├── InvalidRequestError     it does not fit the model or the protocol
        ├── NotFoundError           no such model, version or path
        ├── ForbiddenError          not with these credentials
        ├── UnsupportedError        understood, but not offered
        ├── UnavailableError        not ready or overloaded: the same request may work later
        └── DeadlineError           not answered in time

What the client can tell by itself, such as an array of a datatype that the protocol has none for, is refused before
anything is sent, with the same classes and no status.
"""

from typing import Final


class ClientError(Exception):
    """What can go wrong between the client and its server."""


class ConnectionFailed(ClientError):
    """There was no connection, or it broke before the answer was there. The server may have run the request."""


class ProtocolError(ClientError):
    """The server's answer is not one of the protocol, or larger than the client takes."""


class InferenceError(ClientError):
    """A request that was refused or failed.

    ``status`` is HTTP's number or gRPC's name; None where the client itself refused it, or gave up, and for an error
    in the midst of a stream that came without one. ``message`` is the server's own.
    """

    def __init__(self, status: int | str | None, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message

    def __str__(self) -> str:
        return self.message


class InvalidRequestError(InferenceError):
    """The request does not fit the model or the protocol."""


class NotFoundError(InferenceError):
    """There is no such model, version or path."""


class ForbiddenError(InferenceError):
    """The server wants other credentials for this."""


class UnsupportedError(InferenceError):
    """The server understands the request, but does not offer what it asks for."""


class UnavailableError(InferenceError):
    """The server or the model is not ready or overloaded: the same request may work later."""


class DeadlineError(InferenceError):
    """The request was not answered in time."""


_OF_HTTP: Final[dict[int, type[InferenceError]]] = {
    400: InvalidRequestError,
    401: ForbiddenError,
    403: ForbiddenError,
    404: NotFoundError,
    405: UnsupportedError,
    408: DeadlineError,
    409: InvalidRequestError,
    413: InvalidRequestError,
    415: InvalidRequestError,
    422: InvalidRequestError,
    429: UnavailableError,
    501: UnsupportedError,
    502: UnavailableError,
    503: UnavailableError,
    504: DeadlineError,
}

_OF_GRPC: Final[dict[str, type[InferenceError]]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "ALREADY_EXISTS": InvalidRequestError,
    "FAILED_PRECONDITION": InvalidRequestError,
    "OUT_OF_RANGE": InvalidRequestError,
    "NOT_FOUND": NotFoundError,
    "PERMISSION_DENIED": ForbiddenError,
    "UNAUTHENTICATED": ForbiddenError,
    "UNIMPLEMENTED": UnsupportedError,
    "RESOURCE_EXHAUSTED": UnavailableError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": DeadlineError,
}

# HTTP has one status for "come again" and "too late"; the protocol's servers begin the message of the latter so.
_EXPIRED = "Request timeout expired"
# gRPC reports a connection that broke as UNAVAILABLE, as servers do when they are overloaded; only the text differs.
_BROKEN = (
    "failed to connect to all addresses",
    "DNS resolution failed",
    "Name resolution failed",
    "Socket closed",
    "Stream removed",
    "Connection reset",
    "Connection refused",
    "connections to all backends failing",
    "recvmsg:",
    "sendmsg:",
    "Broken pipe",
    "GOAWAY received",
    "Endpoint closing",
    "keepalive watchdog timeout",
)


def of_http(status: int, message: str) -> InferenceError:
    """The error that an HTTP status stands for."""
    if status == 503 and message.startswith(_EXPIRED):
        return DeadlineError(status, message)
    return _OF_HTTP.get(status, InferenceError)(status, message)


def of_grpc(code: str, message: str) -> ClientError:
    """The error that a gRPC status code, by its name, stands for."""
    if code == "UNAVAILABLE" and any(sign in message for sign in _BROKEN):
        return ConnectionFailed(message)
    if code == "RESOURCE_EXHAUSTED" and "message larger than max" in message:
        # Both ends have such a bound; gRPC says in front whose it was.
        return ProtocolError(message) if message.startswith("CLIENT") else InvalidRequestError(code, message)
    return _OF_GRPC.get(code, InferenceError)(code, message)
