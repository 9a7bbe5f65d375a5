"""When to close a batch: pure, from what waits and what time it is."""

from dataclasses import dataclass
from typing import Protocol

from headrace.batching.curve import LatencyCurve
from headrace.core.validation import BatchKey


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What the owner of a model allows its batches to be. Sizes are in rows."""

    max_rows: int = 1
    preferred_rows: tuple[int, ...] = ()
    max_delay_ns: int = 0


@dataclass(frozen=True, slots=True)
class Take:
    """Close a batch now, with at most so many rows."""

    rows: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing yet; ask again at this time, or when something arrives."""

    until_ns: int


def decide(limits: BatchLimits, rows: int, oldest_ns: int, now_ns: int) -> Take | Wait:
    """What an idle instance should do, given ``rows`` waiting of which the oldest came at ``oldest_ns``.

    A full batch always goes. Without a delay, whatever is there goes: simulated at 30, 60 and 85 % load, an
    instance that waits for company costs more latency than its larger batches win back. With a delay, a
    preferred size goes at once and anything else when the oldest row's patience is over.
    """
    if rows >= limits.max_rows:
        return Take(limits.max_rows)
    preferred = max((size for size in limits.preferred_rows if size <= rows), default=0)
    if preferred:
        return Take(preferred)
    due_ns = oldest_ns + limits.max_delay_ns
    return Take(rows) if now_ns >= due_ns else Wait(due_ns)


class Policy(Protocol):
    """Decides for a backlog when the requests of one key go, and how many. Pure: no clock of its own."""

    @property
    def waits(self) -> bool:
        """Whether it may ever answer with ``Wait``: a backlog need not ask one that never does."""

    def decide(self, key: BatchKey, rows: int, oldest_ns: int, now_ns: int) -> Take | Wait:
        """What an idle instance should do, given ``rows`` waiting of which the oldest came at ``oldest_ns``."""


class FixedPolicy:
    """The owner's settings, or the defaults: a delay and sizes that are the same whatever the load."""

    __slots__ = ("delay_ns", "limits", "waits")

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self.delay_ns = limits.max_delay_ns
        self.waits = limits.max_delay_ns > 0

    def size(self, curve: LatencyCurve) -> int:  # noqa: ARG002 - the same for all
        """The rows that its batches have when enough are waiting."""
        return self.limits.max_rows

    def decide(self, key: BatchKey, rows: int, oldest_ns: int, now_ns: int) -> Take | Wait:  # noqa: ARG002 - see Policy
        """As ``decide``, whatever the shapes."""
        return decide(self.limits, rows, oldest_ns, now_ns)
