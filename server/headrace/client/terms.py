"""How one call is made: until when it may take, and with which headers."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic

from headrace.client.errors import InvalidRequestError

_SHORTEST_S = 0.001  # a wait of 0 would mean "do not wait" to sockets, and "no limit" to some libraries
_HEADER_NAME = re.compile(r"[A-Za-z0-9._-]+")
_HEADER_VALUE = re.compile(r"([\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?)?")


@dataclass(frozen=True, slots=True)
class Terms:
    """One absolute deadline for all that a call does (of ``time.monotonic``, None for none), and its headers.

    ``timeout_us`` is what the server is told of a limit that the caller set for this very call, 0 where it set none.
    """

    ends_at: float | None = None
    timeout_s: float | None = None
    timeout_us: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def remaining_s(self) -> float | None:
        """How long the call may still take: never 0, and None for any time."""
        return None if self.ends_at is None else max(self.ends_at - monotonic(), _SHORTEST_S)

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.ends_at is not None and monotonic() >= self.ends_at


def make_terms(timeout_s: float | None, default_s: float | None, headers: Mapping[str, str]) -> Terms:
    """The terms of a call that begins now; ``timeout_s`` is the caller's own, infinity for no limit.

    Raises:
        InvalidRequestError: the time is not a positive number, or a header cannot be sent.
    """
    limit_s = default_s if timeout_s is None else timeout_s
    if limit_s is not None and not limit_s > 0:
        raise InvalidRequestError(None, f"timeout_s is {limit_s!r}, expected a positive number of seconds")
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise InvalidRequestError(None, f"the header '{name}' has a name or value that is not printable ASCII")
    if limit_s is None or math.isinf(limit_s):
        return Terms(headers=headers)
    told_us = 0 if timeout_s is None else max(1, int(limit_s * 1e6))
    return Terms(monotonic() + limit_s, limit_s, told_us, headers)
