"""The errors a client can be told about, each of a neutral kind.

    HeadraceError
    ├── InvalidRequest      INVALID       the request does not fit the model or the protocol
    ├── TooLarge            TOO_LARGE     the request is over a size bound
    ├── NotFound            NOT_FOUND     no such model, version or path
    ├── NotReady            NOT_READY     it exists, but cannot serve now
    ├── Overloaded          OVERLOADED    a bound was reached; later may work
    ├── DeadlineExceeded    DEADLINE      the request's time was up before it was answered
    ├── Cancelled           CANCELLED     the client left
    ├── Unsupported         UNSUPPORTED   understood, but not offered
    ├── Forbidden           FORBIDDEN     offered, but not under these settings
    ├── Restricted          RESTRICTED    offered to those who show that they may
    └── InternalError       INTERNAL      our fault or the model's

What a kind is called in HTTP and in gRPC is the front ends' business (frontends/status.py).
"""

from enum import Enum


class Kind(Enum):
    """What went wrong, in terms no protocol owns."""

    INVALID = "invalid"
    TOO_LARGE = "too_large"
    NOT_FOUND = "not_found"
    NOT_READY = "not_ready"
    OVERLOADED = "overloaded"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    UNSUPPORTED = "unsupported"
    FORBIDDEN = "forbidden"
    RESTRICTED = "restricted"
    INTERNAL = "internal"


class HeadraceError(Exception):
    """Expected trouble: ``str(error)`` is the message for the client."""

    kind = Kind.INTERNAL


class InvalidRequest(HeadraceError):
    """The request does not fit the model or the protocol."""

    kind = Kind.INVALID


class TooLarge(HeadraceError):
    """The request is over a size bound."""

    kind = Kind.TOO_LARGE


class NotFound(HeadraceError):
    """There is no such model, version or path."""

    kind = Kind.NOT_FOUND


class NotReady(HeadraceError):
    """The thing exists, but cannot serve now."""

    kind = Kind.NOT_READY


class Overloaded(HeadraceError):
    """A bound was reached; the same request may work later. ``reason`` is the bound's name in metrics."""

    kind = Kind.OVERLOADED

    def __init__(self, message: str, reason: str = "other") -> None:
        super().__init__(message)
        self.reason = reason


class DeadlineExceeded(HeadraceError):
    """The request's time was up before it was answered."""

    kind = Kind.DEADLINE


class Cancelled(HeadraceError):
    """The client left before it was answered."""

    kind = Kind.CANCELLED


class Unsupported(HeadraceError):
    """Understood, but not offered."""

    kind = Kind.UNSUPPORTED


class Forbidden(HeadraceError):
    """Offered, but not under the server's present settings."""

    kind = Kind.FORBIDDEN


class Restricted(HeadraceError):
    """Offered only to requests that carry what the server's owner has agreed with its clients."""

    kind = Kind.RESTRICTED


class InternalError(HeadraceError):
    """Our fault, or the model's."""

    kind = Kind.INTERNAL


_CLASSES = {
    error.kind: error
    for error in (
        InvalidRequest,
        TooLarge,
        NotFound,
        NotReady,
        Overloaded,
        DeadlineExceeded,
        Cancelled,
        Unsupported,
        Forbidden,
        Restricted,
        InternalError,
    )
}


def of_kind(kind: Kind, message: str) -> HeadraceError:
    """The error of ``kind``: how one that crossed a process boundary is made again."""
    return _CLASSES[kind](message)


def at(where: str, error: HeadraceError) -> HeadraceError:
    """The same error, whose message says first where it is: which model, which tensor."""
    return type(error)(f"{where}: {error}")


def released(error: HeadraceError) -> HeadraceError:
    """The same error, which refers no more to where it was raised, and so to the tensors that were at hand there.

    For one that is kept: where it is, or in an object that was at hand as well, both would keep each other until the
    collector comes. Under overload that was thousands of tensors.
    """
    error.__context__ = None
    return error.with_traceback(None)
