"""Errors as Triton's Python API has them, and what they are among ours."""

from headrace.core.errors import HeadraceError, Kind, of_kind


class TritonModelException(Exception):
    """What a model raises when something is wrong, and what the API raises at a model that misuses it."""

    def message(self) -> str:
        """What was wrong."""
        return str(self)


class TritonError:
    """Why one request failed: what an ``InferenceResponse`` has in place of outputs."""

    UNKNOWN = 0
    INTERNAL = 1
    NOT_FOUND = 2
    INVALID_ARG = 3
    UNAVAILABLE = 4
    UNSUPPORTED = 5
    ALREADY_EXISTS = 6
    CANCELLED = 7

    __slots__ = ("_code", "_message")

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        if code not in _KINDS:
            raise TritonModelException(f"a TritonError has one of the codes 0 to {max(_KINDS)}, got {code!r}")
        self._message = str(message)
        self._code = code

    def message(self) -> str:
        """What was wrong."""
        return self._message

    def code(self) -> int:
        """Of which sort it is: one of the constants of this class."""
        return self._code

    def __str__(self) -> str:
        return self._message


_KINDS = {
    TritonError.UNKNOWN: Kind.INTERNAL,
    TritonError.INTERNAL: Kind.INTERNAL,
    TritonError.NOT_FOUND: Kind.NOT_FOUND,
    TritonError.INVALID_ARG: Kind.INVALID,
    TritonError.UNAVAILABLE: Kind.NOT_READY,
    TritonError.UNSUPPORTED: Kind.UNSUPPORTED,
    TritonError.ALREADY_EXISTS: Kind.INVALID,
    TritonError.CANCELLED: Kind.CANCELLED,
}
_CODES = {
    Kind.INVALID: TritonError.INVALID_ARG,
    Kind.TOO_LARGE: TritonError.INVALID_ARG,
    Kind.NOT_FOUND: TritonError.NOT_FOUND,
    Kind.NOT_READY: TritonError.UNAVAILABLE,
    Kind.OVERLOADED: TritonError.UNAVAILABLE,
    Kind.DEADLINE: TritonError.UNAVAILABLE,
    Kind.CANCELLED: TritonError.CANCELLED,
    Kind.UNSUPPORTED: TritonError.UNSUPPORTED,
    Kind.FORBIDDEN: TritonError.UNSUPPORTED,
    Kind.INTERNAL: TritonError.INTERNAL,
}


def ours(error: TritonError) -> HeadraceError:
    """The error that a client is told of."""
    return of_kind(_KINDS[error.code()], error.message())


def theirs(error: Exception) -> TritonError:
    """The error that a model is told of, when a model that it called failed."""
    kind = error.kind if isinstance(error, HeadraceError) else Kind.INTERNAL
    return TritonError(str(error), _CODES[kind])
