"""Headers of a request that are handed to the model as request parameters."""

import re
from collections.abc import Iterable

import msgspec

from headrace.core.request import InferRequest
from headrace.wire.binary_v2 import RESERVED_PREFIX

# Parameters that mean something to the server. Browsers send a header "priority" on their own.
_MEANINGFUL = frozenset(("binary_data_output", "priority", "sequence_end", "sequence_id", "sequence_start", "timeout"))


class HeaderForwarding:
    """Picks the headers whose names, in lower case, match all of ``--forward-headers``.

    Never picked are names that start with "triton_" and those of parameters that the server itself reads.
    ``active`` is false when there is nothing to look for: look at it before asking.
    """

    __slots__ = ("_pattern", "active")

    def __init__(self, pattern: str) -> None:
        """Compile the pattern.

        Raises:
            ValueError: it is no regular expression.
        """
        try:
            self._pattern = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"--forward-headers '{pattern}' is no regular expression: {error}") from None
        self.active = bool(pattern)

    def parameters(self, headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
        """The parameters that an HTTP request's headers make. Several of one name are joined by commas."""
        return self._pick((_text(name), value) for name, value in headers)

    def metadata_parameters(self, metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
        """The parameters that a gRPC call's metadata make."""
        return self._pick(metadata)

    def _pick(self, headers: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
        picked: dict[str, str] = {}
        if not self.active:
            return picked
        for given, value in headers:
            name = given.lower()
            if name.startswith(RESERVED_PREFIX) or name in _MEANINGFUL or not self._pattern.fullmatch(name):
                continue
            text = value if isinstance(value, str) else _text(value)
            picked[name] = f"{picked[name]}, {text}" if name in picked else text
        return picked


def with_forwarded(request: InferRequest, forwarded: dict[str, str]) -> InferRequest:
    """The request with forwarded headers among its parameters.

    A header stands before a parameter of the same name: headers are what a gateway in front of the server checks
    and sets, and a client must not be able to say something else in the body, which no gateway reads.
    """
    if not forwarded:
        return request
    return msgspec.structs.replace(request, parameters={**request.parameters, **forwarded})


def _text(raw: bytes) -> str:
    """Header bytes as text: UTF-8 where they are, else Latin-1, which everything is."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
