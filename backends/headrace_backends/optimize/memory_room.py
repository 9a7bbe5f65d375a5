"""What may be in memory at the same time: pure decisions over what processes take and what is free."""

from collections.abc import Sequence

RESERVE_BYTES = 512 * 1024 * 1024  # stays free: batches, and what others on the machine want meanwhile


def fits(needed_bytes: int, free_bytes: int) -> bool:
    """Whether so much more may be taken."""
    return needed_bytes <= free_bytes - RESERVE_BYTES


def groups(needed_bytes: Sequence[int], free_bytes: int) -> list[list[int]]:
    """The places of what is loaded together, group after group. What does not even fit alone is in one of its own."""
    found: list[list[int]] = []
    taken = 0
    for place, needed in enumerate(needed_bytes):
        if found and fits(taken + needed, free_bytes):
            found[-1].append(place)
            taken += needed
        else:
            found.append([place])
            taken = needed
    return found
