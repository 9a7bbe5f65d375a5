"""Which state a model version goes to next, and which versions a change of the repository loads and retires."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Where a version is, in Triton's words."""

    UNAVAILABLE = "UNAVAILABLE"
    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """A version's state and, where it is not what its owner hoped for, why."""

    state: State = State.UNAVAILABLE
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LoadStarted:
    """A worker has begun to load it. On a version that is ready: to load it anew, beside the one that serves."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """It can serve."""


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """It was refused, before or after a worker tried."""

    reason: str


@dataclass(frozen=True, slots=True)
class WorkersLost:
    """Every worker that had it is dead, and new ones are being started."""

    reason: str


@dataclass(frozen=True, slots=True)
class UnloadStarted:
    """It takes no new requests and answers those that it has."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Unloaded:
    """Its workers are gone, as they should be."""

    reason: str = "unloaded"


Event = LoadStarted | Loaded | LoadFailed | WorkersLost | UnloadStarted | Unloaded


class ImpossibleTransition(Exception):
    """An event that cannot happen in this state: a bug of whoever reported it."""


def step(status: VersionStatus, event: Event) -> VersionStatus:  # noqa: PLR0911 - one return for each row of the table
    """The status after ``event``.

    A version that serves stays READY while it is loaded anew, and when that fails: then with the reason. So does
    one that is UNLOADING, with the reason why nothing comes after it.

    Raises:
        ImpossibleTransition: the event cannot happen in this state.
    """
    match status.state, event:
        case ((State.UNAVAILABLE | State.UNLOADING), LoadStarted()):  # asked for again while the old copy drains
            return VersionStatus(State.LOADING)
        case State.READY, LoadStarted():
            return status
        case ((State.LOADING | State.READY), Loaded()):
            return VersionStatus(State.READY)
        case state, LoadFailed(reason):
            return VersionStatus(State.UNAVAILABLE if state is State.LOADING else state, reason)
        case ((State.LOADING | State.READY), WorkersLost(reason)):
            return VersionStatus(State.LOADING, reason)
        case State.UNLOADING, WorkersLost():  # they died while draining, and are not replaced
            return status
        case ((State.LOADING | State.READY), UnloadStarted(reason)):
            return VersionStatus(State.UNLOADING, reason)
        case State.UNLOADING, Unloaded(reason):
            return VersionStatus(State.UNAVAILABLE, status.reason or reason)
    raise ImpossibleTransition(f"{type(event).__name__} in state {status.state}")


@dataclass(frozen=True, slots=True)
class Change:
    """The way from what serves to what is wanted. Every tuple is sorted.

    ``retire`` has the versions whose serving copy is to go once all loads have ended. A version in both ``load``
    and ``retire`` is replaced: loaded anew beside the copy that serves.
    """

    load: tuple[int, ...]
    keep: tuple[int, ...]
    retire: tuple[int, ...]


def plan_change(serving: Mapping[int, str], wanted: Mapping[int, str]) -> Change:
    """What to load, leave alone and retire, given each version's print: equal prints are the same files."""
    keep = {version for version, print_ in serving.items() if wanted.get(version) == print_}
    return Change(
        load=tuple(sorted(wanted.keys() - keep)),
        keep=tuple(sorted(keep)),
        retire=tuple(sorted(serving.keys() - keep)),
    )


def settle(change: Change, failed: AbstractSet[int], on_disk: AbstractSet[int]) -> set[int]:
    """The versions whose old copy is to be retired, now that every load has ended, those in ``failed`` badly.

    A copy that a new one replaces goes. When a load failed, no other copy goes unless its files are gone, so that
    a bad new version never takes a good old one down with it.
    """
    assert failed <= set(change.load), "only what was loaded can have failed to"
    replaced = set(change.load) - failed
    return {version for version in change.retire if version in replaced or not failed or version not in on_disk}
