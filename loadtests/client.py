"""What a load loop needs of a client, whichever protocol it speaks."""

from collections.abc import Callable
from typing import Protocol

# Called once for each send, never from within it: the slot, and the problem or None.
Done = Callable[[int, str | None], None]


class Client(Protocol):
    """A number of slots, each with at most one request under way. Belongs to one event loop."""

    async def open(self, done: Done) -> None:
        """Connect, and prove with one decoded answer that there is something to measure.

        Raises:
            BadResponse: the first answer is an error or makes no sense.
            OSError: nobody listens there.
        """

    def send(self, slot: int) -> None:
        """Send the request on a slot that has none under way; ``done`` tells when it is answered."""

    async def close(self) -> None:
        """Drop every connection; requests under way are not reported any more."""


class LengthCheck:
    """Whether later answers look like the first, which was decoded.

    The request is always the same, so a binary answer has always the same length. A JSON answer may not:
    the last bits of a float differ between batch sizes, and with them the digits it is printed with.
    """

    __slots__ = ("_longest", "_shortest")

    def __init__(self, first_bytes: int, *, exact: bool) -> None:
        slack_bytes = 0 if exact else first_bytes // 4
        self._shortest = first_bytes - slack_bytes
        self._longest = first_bytes + slack_bytes

    def problem(self, body_bytes: int) -> str | None:
        """What is wrong with an answer of this length; None when nothing is."""
        if self._shortest <= body_bytes <= self._longest:
            return None
        return f"an answer of {body_bytes} bytes, expected {self._shortest} to {self._longest}"
