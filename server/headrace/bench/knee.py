"""How many clients to try next, and where more of them stop paying: pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

# Two runs of a few seconds differ by a few per cent; a gain below that is none.
WORTH = 0.05
# A server that merges requests may gain little from the second client and much from the sixteenth.
_FLAT_STEPS = 3
_REFINEMENTS = 2


@dataclass(frozen=True, slots=True)
class Point:
    """What so many clients, each waiting for its answer before it asks again, got out of the server."""

    clients: int
    requests_per_s: float


def knee(points: Sequence[Point]) -> Point | None:
    """The fewest clients that reach 95 % of the best throughput; None where nothing was answered.

    Up to there more clients bring more answers. Beyond it they only wait longer: by Little's law, clients are
    throughput times latency. Finders of the largest curvature, as Kneedle (Satopaa et al., 2011), answer a like
    question, but theirs moves with how far to the right one has measured; this one does not.
    """
    answered = [point for point in points if point.requests_per_s > 0]
    if not answered:
        return None
    enough = (1 - WORTH) * max(point.requests_per_s for point in answered)
    return min((point for point in answered if point.requests_per_s >= enough), key=lambda point: point.clients)


def next_clients(points: Sequence[Point], most: int) -> int | None:
    """How many clients to try after these, up to ``most``; None when the knee is known.

    Doubling, until three times in a row throughput gained less than 5 % over the best before; then up to two steps
    between the knee and the next fewer clients, since a doubling may have jumped over it.
    """
    if not points:
        return 1
    ordered = sorted(points, key=lambda point: point.clients)
    last = ordered[-1].clients
    if not _is_flat(ordered) and last < most:
        return min(last * 2, most)
    return _between(points, ordered)


def most_steps(most: int) -> int:
    """How many steps a sweep up to ``most`` clients can take."""
    return (most - 1).bit_length() + 1 + _REFINEMENTS


def _is_flat(ordered: Sequence[Point]) -> bool:
    if len(ordered) <= _FLAT_STEPS:
        return False
    before, lately = ordered[:-_FLAT_STEPS], ordered[-_FLAT_STEPS:]
    best = max(point.requests_per_s for point in before)
    return max(point.requests_per_s for point in lately) <= best * (1 + WORTH)


def _between(points: Sequence[Point], ordered: Sequence[Point]) -> int | None:
    most_so_far = accumulate((point.clients for point in points), max)
    refined = sum(point.clients < most for point, most in zip(points, most_so_far, strict=True))
    found = knee(points)
    if found is None or refined >= _REFINEMENTS:
        return None
    below = max((point.clients for point in ordered if point.clients < found.clients), default=0)
    gap = found.clients - below
    # A quarter more or fewer clients at the knee is nothing to tell apart.
    return below + gap // 2 if below and gap > max(1, found.clients // 4) else None
