"""All that is known of one model, and what can be said of it."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from headrace.core.errors import InvalidRequest, NotFound, NotReady
from headrace.repository.layout import ModelFolder, version_number
from headrace.repository.lifecycle import Event, State, Unloaded, VersionStatus, step
from headrace.repository.served import ServedVersion
from headrace.repository.served_ensemble import ServedEnsemble

Served = ServedVersion | ServedEnsemble


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A line of the repository index. A model that was never loaded has only its name."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


@dataclass(slots=True)
class ModelRecord:
    """One model: what serves, what is wanted, and what became of either. Changed under ``change`` only."""

    serving: dict[int, Served] = field(default_factory=dict)
    statuses: dict[int, VersionStatus] = field(default_factory=dict)
    wanted: frozenset[int] = frozenset()  # versions that the folder and its policy ask for
    problems: tuple[str, ...] = ()  # of the folder as a whole, when it could not be read
    folder: ModelFolder | None = None  # what ``wanted`` came from; None where nothing is wanted
    gone: bool = False  # from the repository when it was looked for last: forgotten once it has answered what it had
    asked_for: bool = False  # by somebody, and not only because an ensemble is made of it
    private_folders: set[Path] = field(default_factory=set)  # made for load requests that brought files
    pinned_folders: set[Path] = field(default_factory=set)  # those of them that are being loaded
    change: asyncio.Lock = field(default_factory=asyncio.Lock)
    replan_due: bool = False

    @property
    def known(self) -> bool:
        """Whether it was ever tried to load it."""
        return bool(self.serving or self.statuses or self.problems)

    @property
    def serving_parts(self) -> set[str]:
        """The models that it is made of as it serves, if it is an ensemble."""
        return {part for served in self.serving.values() for part in parts_of(served.folder)}

    @property
    def parts(self) -> set[str]:
        """The models that it is made of, as it serves or is to serve."""
        return self.serving_parts if self.folder is None else {*self.serving_parts, *parts_of(self.folder)}

    @property
    def ready(self) -> bool:
        """Whether everything that is wanted of it serves."""
        return not self.problems and all(
            version in self.serving and self.serving[version].ready for version in self.wanted
        )

    def note(self, version: int, event: Event) -> None:
        """Something has happened to a version."""
        self.statuses[version] = step(self.statuses.get(version, VersionStatus()), event)

    def outlook(self) -> object:
        """What others may have to act on when it changes."""
        return dict(self.serving), dict(self.statuses), self.problems


def parts_of(folder: ModelFolder) -> tuple[str, ...]:
    """The models that an ensemble is made of, each once; none for any other model."""
    return tuple(dict.fromkeys(one.model for one in folder.config.ensemble))


def index_entries(name: str, record: ModelRecord | None) -> list[IndexEntry]:
    """The model's lines of the index, by version."""
    if record is None or not (record.statuses or record.problems):
        return [IndexEntry(name)]
    entries: list[IndexEntry] = []
    if record.problems:
        entries.append(IndexEntry(name, "", State.UNAVAILABLE, "; ".join(record.problems)))
    for version, status in sorted(record.statuses.items()):
        state, reason = status.state, status.reason
        served = record.serving.get(version)
        if state is State.READY and served is not None and not served.ready:
            state, reason = State.UNAVAILABLE, _why_unready(served)
        entries.append(IndexEntry(name, str(version), state, reason))
    return entries


def _why_unready(served: Served) -> str:
    if isinstance(served, ServedEnsemble):
        return f"of its models these are not ready: {', '.join(served.unready_parts)}"
    return served.why_unready


def why_not(  # noqa: PLR0911 - one return for each reason
    name: str, version: str, record: ModelRecord | None
) -> NotFound | NotReady | InvalidRequest:
    """Why a request for this is not run; an empty ``version`` asks for the newest."""
    if record is None or not (record.statuses or record.problems):
        return NotFound(f"Request for unknown model: '{name}' is not found")
    if not version:
        if any(status.state is State.LOADING for status in record.statuses.values()):
            return NotReady(f"Request for model '{name}' that is not at ready state: it is being loaded")
        reasons = [*record.problems, *(status.reason or status.state for status in record.statuses.values())]
        return NotFound(f"Request for unknown model: '{name}' has no available versions: {'; '.join(reasons)}")
    if version_number(version) is None:
        return InvalidRequest(
            f"failed to get model version from specified version string '{version[:100]}' of model '{name}': "
            "expected a whole number from 1"
        )
    known = {str(number): status for number, status in record.statuses.items()}
    status = known.get(version)
    if status is None and record.serving:
        return NotFound(
            f"Request for unknown model: '{name}' version {version} is not found; "
            f"these are served: {', '.join(served_versions(record))}"
        )
    if status is None or (status.state is State.UNAVAILABLE and not status.reason):
        return NotFound(f"Request for unknown model: '{name}' version {version} is not found")
    detail = status.reason or f"it is {status.state}"
    return NotReady(f"Request for model '{name}' version {version} that is not at ready state: {detail}")


def served_versions(record: ModelRecord | None) -> list[str]:
    """The versions that serve, oldest first."""
    return [str(version) for version in sorted(record.serving)] if record is not None else []


def failures(record: ModelRecord) -> list[str]:
    """What a load has not achieved, in the words of an answer to the load request."""
    found = [*record.problems]
    for version, status in sorted(record.statuses.items()):
        if not status.reason or status.reason == Unloaded().reason:
            continue
        if status.state is State.READY:
            found.append(f"version {version} could not be loaded anew: {status.reason};")
        elif status.state is State.UNAVAILABLE or version in record.wanted:
            found.append(f"version {version} is at UNAVAILABLE state: {status.reason};")
    return found
