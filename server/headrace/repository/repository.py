"""The door to the models: what is served, what is being loaded, and every change of that."""

import asyncio
import logging
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from headrace.core.errors import Forbidden, InvalidRequest, NotFound, NotReady
from headrace.repository.layout import ModelFolder, has_model, list_models, read_folder, selected_versions
from headrace.repository.lifecycle import (
    Event,
    Loaded,
    LoadFailed,
    LoadStarted,
    State,
    Unloaded,
    UnloadStarted,
    VersionStatus,
    plan_change,
    settle,
    step,
)
from headrace.repository.served import ServedVersion, version_print
from headrace.workers.process import LoadRefused
from headrace.workers.supervisor import Supervisor

log = logging.getLogger(__name__)

ModelControl = Literal["poll", "explicit", "none"]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A line of the repository index. A model that was never loaded has only its name."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


@dataclass(slots=True)
class _Model:
    """All that is known of one model."""

    serving: dict[int, ServedVersion] = field(default_factory=dict)
    statuses: dict[int, VersionStatus] = field(default_factory=dict)
    wanted: frozenset[int] = frozenset()  # versions that the folder and its policy ask for
    problems: tuple[str, ...] = ()  # of the folder as a whole, when it could not be read
    change: asyncio.Lock = field(default_factory=asyncio.Lock)


class Repository:
    """Serves the models of one folder. Changes of one model happen one after the other, of several at once."""

    def __init__(self, path: Path, supervisor: Supervisor, control: ModelControl) -> None:
        self.path = path.resolve()
        self.control = control
        self.settled = False  # whether every model found at start has been loaded or refused
        self._supervisor = supervisor
        self._models: dict[str, _Model] = {}
        # What lookup reads: ("digits", "") for the newest version and ("digits", "1") for each.
        self._routes: dict[tuple[str, str], ServedVersion] = {}
        self._changes: set[asyncio.Task[None]] = set()
        self._retiring: set[asyncio.Task[None]] = set()

    # -- what requests ask --------------------------------------------------------------------------------

    def lookup(self, name: str, version: str) -> ServedVersion:
        """The version that serves a request; an empty ``version`` means the newest that is ready.

        Raises:
            NotFound: there is no such model or version.
            NotReady: there is, and it cannot serve now.
        """
        served = self._routes.get((name, version))
        if served is None:
            raise self._why_not(name, version)
        return served

    def find(self, name: str, version: str) -> ServedVersion | None:
        """As ``lookup``; None where that raises."""
        return self._routes.get((name, version))

    def served(self) -> Iterator[ServedVersion]:
        """Every version that serves, in no particular order."""
        for model in self._models.values():
            yield from model.serving.values()

    def versions(self, name: str) -> list[str]:
        """The versions of a model that serve, oldest first."""
        model = self._models.get(name)
        return [str(version) for version in sorted(model.serving)] if model is not None else []

    def is_ready(self, name: str, version: str) -> bool:
        """Whether a request for this would be run now."""
        served = self._routes.get((name, version))
        return served is not None and served.ready

    def names(self) -> list[str]:
        """Every model that is on disk or serves, sorted."""
        return sorted({*self._on_disk(), *(name for name, model in self._models.items() if model.serving)})

    def index(self, only_ready: bool = False) -> list[IndexEntry]:
        """The repository index, sorted by name and version."""
        entries: list[IndexEntry] = []
        for name in sorted({*self._on_disk(), *self._models}):
            model = self._models.get(name)
            if model is None or not (model.statuses or model.problems):
                entries.append(IndexEntry(name))
                continue
            if model.problems:
                entries.append(IndexEntry(name, "", State.UNAVAILABLE, "; ".join(model.problems)))
            for version, status in sorted(model.statuses.items()):
                state, reason = status.state, status.reason
                served = model.serving.get(version)
                if state is State.READY and served is not None and not served.ready:
                    state = State.UNAVAILABLE
                    reason = next((one.broken for one in served.instances if one.broken), "its worker is restarting")
                entries.append(IndexEntry(name, str(version), state, reason))
        return [entry for entry in entries if entry.state == State.READY] if only_ready else entries

    def unready(self) -> list[str]:
        """The models of which something that is wanted does not serve, sorted."""
        return sorted(
            name
            for name, model in self._models.items()
            if model.problems
            or any(version not in model.serving or not model.serving[version].ready for version in model.wanted)
        )

    def _on_disk(self) -> list[str]:
        try:
            return list_models(self.path)
        except OSError:  # away for a while; what serves is known all the same
            return []

    def _why_not(self, name: str, version: str) -> NotFound | NotReady:
        model = self._models.get(name)
        if model is None or not (model.statuses or model.problems):
            return NotFound(f"Request for unknown model: '{name}' is not found")
        if not version:
            if any(status.state is State.LOADING for status in model.statuses.values()):
                return NotReady(f"Request for model '{name}' that is not at ready state: it is being loaded")
            reasons = [*model.problems, *(status.reason or status.state for status in model.statuses.values())]
            return NotFound(f"Request for unknown model: '{name}' has no available versions: {'; '.join(reasons)}")
        known = {str(number): status for number, status in model.statuses.items()}
        status = known.get(version)
        if status is None and model.serving:
            return NotFound(
                f"Request for unknown model: '{name}' version {version} is not found; {self.versions(name)} are served"
            )
        if status is None or (status.state is State.UNAVAILABLE and not status.reason):
            return NotFound(f"Request for unknown model: '{name}' version {version} is not found")
        detail = status.reason or f"it is {status.state}"
        return NotReady(f"Request for model '{name}' version {version} that is not at ready state: {detail}")

    # -- changes ------------------------------------------------------------------------------------------

    async def load_all(self, names: list[str]) -> None:
        """Load these models, each on its own: one that fails stops nobody."""
        results = await asyncio.gather(*(self.refresh(name) for name in names), return_exceptions=True)
        for name, result in zip(names, results, strict=True):
            if isinstance(result, Exception):
                log.error("model %s could not be looked at", name, exc_info=result)

    async def load(self, name: str) -> None:
        """Load a model at a client's request, or anew what has changed of it.

        Raises:
            Forbidden: model control is not explicit.
            NotFound: there is no such model on disk.
            InvalidRequest: it could not be loaded; what served before goes on.
        """
        self._check_control()
        if not has_model(self.path, name):
            raise NotFound(f"failed to load '{name}', failed to poll from model repository: no such model")
        # In a task of its own: a client that leaves must not leave a version half loaded.
        change = asyncio.get_running_loop().create_task(self.refresh(name))
        self._changes.add(change)
        change.add_done_callback(self._changes.discard)
        await asyncio.shield(change)
        model = self._models.get(name)
        if model is None:
            raise NotFound(f"failed to load '{name}': it was removed meanwhile")
        failed = [*model.problems]
        failed += [
            f"version {version} is at UNAVAILABLE state: {status.reason};"
            for version, status in sorted(model.statuses.items())
            if status.reason and (status.state is State.UNAVAILABLE) and status.reason != Unloaded().reason
        ]
        failed += [
            f"version {version} could not be loaded anew: {status.reason};"
            for version, status in sorted(model.statuses.items())
            if status.reason and status.state is State.READY
        ]
        if failed:
            raise InvalidRequest(f"load failed for model '{name}': {' '.join(failed)}")

    async def unload(self, name: str) -> None:
        """Stop serving a model at a client's request. What was accepted is answered.

        Raises:
            Forbidden: model control is not explicit.
            NotFound: there is no such model.
        """
        self._check_control()
        model = self._models.get(name)
        if model is None:
            if has_model(self.path, name):
                return
            raise NotFound(f"failed to unload '{name}': no such model")
        async with model.change:
            model.wanted = frozenset()
            self._retire(name, model, set(model.serving))

    async def refresh(self, name: str) -> None:
        """Make what is served of one model agree with its folder. Never raises for what the folder holds."""
        model = self._models.setdefault(name, _Model())
        async with model.change:
            if not self.path.is_dir():
                return  # the whole repository is away, as a network file system may be for a while
            if has_model(self.path, name):
                await self._follow(name, model)
            else:
                await self._remove(name, model)

    async def _remove(self, name: str, model: _Model) -> None:
        model.wanted, model.problems = frozenset(), ()
        self._retire(name, model, set(model.serving))
        await self._wait_retired(name)
        if not model.serving:
            self._models.pop(name, None)

    async def _follow(self, name: str, model: _Model) -> None:
        folder = await asyncio.to_thread(read_folder, self.path / name)
        model.problems = folder.model_problems
        for problem in folder.problems:
            log.error("model %s: %s", name, problem)
        if folder.model_problems:
            return  # what serves goes on until the folder makes sense again
        if folder.config.optimize is not None:
            log.warning("model %s: optimize is configured, and this version does not act on it", name)
        wanted = {version: version_print(folder, version) for version in selected_versions(folder)}
        unusable = {**folder.broken_versions, **folder.missing_versions}
        model.wanted = frozenset({*wanted, *unusable})
        # One that cannot come back by itself is loaded anew even though its files are the same.
        serving = {number: "" if served.broken else served.print for number, served in model.serving.items()}
        change = plan_change(serving, wanted)
        self._forget(model, wanted)
        for version in change.keep:
            model.statuses[version] = VersionStatus(State.READY)
        for version, reason in unusable.items():
            if version not in model.serving:
                self._note(model, version, LoadFailed(reason))
        results = await asyncio.gather(*(self._load_version(name, model, folder, v) for v in change.load))
        failed = {version for version, loaded in zip(change.load, results, strict=True) if not loaded}
        self._retire(name, model, settle(change, failed, folder.on_disk) - set(change.load))

    @staticmethod
    def _forget(model: _Model, wanted: Container[int]) -> None:
        for version in [old for old in model.statuses if old not in wanted and old not in model.serving]:
            del model.statuses[version]

    async def close(self) -> None:
        """Drain every version and stop it."""
        for name, model in list(self._models.items()):
            async with model.change:
                self._retire(name, model, set(model.serving))
        while self._retiring:
            await asyncio.wait(self._retiring)

    def _check_control(self) -> None:
        if self.control != "explicit":
            how = "polling is enabled" if self.control == "poll" else "model control is none"
            raise Forbidden(
                f"explicit model load / unload is not allowed if {how}; start with --model-control explicit"
            )

    async def _load_version(self, name: str, model: _Model, folder: ModelFolder, version: int) -> bool:
        self._note(model, version, LoadStarted())
        served = ServedVersion(folder, folder.versions[version], self._supervisor)
        try:
            await served.start()
        except LoadRefused as error:
            self._note(model, version, LoadFailed(str(error)))
            log.error("model %s version %d is not served: %s", name, version, error)  # noqa: TRY400
            return False
        except Exception as error:
            self._note(model, version, LoadFailed(f"{type(error).__name__}: {error}"))
            log.exception("model %s version %d is not served", name, version)
            return False
        replaced = model.serving.get(version)
        model.serving[version] = served
        self._note(model, version, Loaded())
        self._publish(name, model)
        if replaced is not None:
            self._start_retiring(replaced)
        signature = served.info.signature
        log.info(
            "model %s version %d is ready: %s, max_batch_size %d, %d instance(s), loaded in %.2f s",
            name,
            version,
            served.info.backend,
            signature.max_batch_size,
            len(served.instances),
            served.statistics.load_seconds,
        )
        for note in served.notes:
            log.debug("model %s version %d: %s", name, version, note)
        return True

    def _retire(self, name: str, model: _Model, versions: set[int]) -> None:
        for version in versions:
            served = model.serving.pop(version)
            self._note(model, version, UnloadStarted())
            task = self._start_retiring(served)
            task.add_done_callback(partial(self._note_unloaded, model, version))
            log.info("model %s version %d is retired", name, version)
        self._publish(name, model)

    def _note_unloaded(self, model: _Model, version: int, _: asyncio.Task[None]) -> None:
        status = model.statuses.get(version)
        if status is not None and status.state is State.UNLOADING:
            self._note(model, version, Unloaded())

    def _start_retiring(self, served: ServedVersion) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(served.drain(), name=f"retire {served.folder.name}")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    async def _wait_retired(self, name: str) -> None:
        mine = [task for task in self._retiring if task.get_name() == f"retire {name}"]
        if mine:
            await asyncio.wait(mine)

    @staticmethod
    def _note(model: _Model, version: int, event: Event) -> None:
        model.statuses[version] = step(model.statuses.get(version, VersionStatus()), event)

    def _publish(self, name: str, model: _Model) -> None:
        """Let requests see the versions that serve now; the next lookup uses them, none is in between."""
        for key in [key for key in self._routes if key[0] == name]:
            del self._routes[key]
        for version, served in model.serving.items():
            self._routes[name, str(version)] = served
        if model.serving:
            self._routes[name, ""] = model.serving[max(model.serving)]
