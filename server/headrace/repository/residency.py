"""Which models make room for another: sizes, last uses and a limit in, a decision out."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Resident(Generic[Key]):
    """A model that is in memory, or on its way in. ``pinned`` ones stay, and ``busy`` ones do for now."""

    key: Key
    nbytes: int
    used_at_ns: int
    busy: bool = False
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Evict(Generic[Key]):
    """There is room once these have gone: those that were used longest ago, none where there is room already."""

    keys: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class AwaitIdle:
    """Some that are busy must become idle first."""


@dataclass(frozen=True, slots=True)
class TooLarge:
    """There will never be room beside what is pinned."""

    pinned_bytes: int


def make_room(
    needed_bytes: int, residents: Iterable[Resident[Key]], limit_bytes: int
) -> Evict[Key] | AwaitIdle | TooLarge:
    """How ``needed_bytes`` more can be had within the limit."""
    everything = list(residents)
    pinned_bytes = sum(one.nbytes for one in everything if one.pinned)
    if pinned_bytes + needed_bytes > limit_bytes:
        return TooLarge(pinned_bytes)
    excess = sum(one.nbytes for one in everything) + needed_bytes - limit_bytes
    chosen: list[Resident[Key]] = []
    for one in sorted((one for one in everything if not one.busy and not one.pinned), key=lambda one: one.used_at_ns):
        if excess <= 0:
            break
        chosen.append(one)
        excess -= one.nbytes
    if excess > 0:
        return AwaitIdle()
    # A large one at the end may have made small ones before it needless: the last used of them stay.
    for one in reversed(chosen[:-1]):
        if excess + one.nbytes <= 0:
            chosen.remove(one)
            excess += one.nbytes
    return Evict(tuple(one.key for one in chosen))
