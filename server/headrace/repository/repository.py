"""The door to the models: what is served, what is being loaded, and every change of that."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from headrace.core.errors import Forbidden, InvalidRequest, NotFound
from headrace.repository.disk import Absent, Disk
from headrace.repository.fall_back import FallBack
from headrace.repository.layout import ModelFolder
from headrace.repository.lifecycle import State
from headrace.repository.model_record import (
    IndexEntry,
    ModelRecord,
    Served,
    failures,
    index_entries,
    parts_of,
    served_versions,
    why_not,
)
from headrace.repository.overrides import (
    Override,
    overridden_folder,
    read_override,
    remove_files,
    write_files,
)
from headrace.repository.planning import users_of
from headrace.repository.plans import Plans
from headrace.repository.served import ServedVersion
from headrace.repository.shelf import Shelf
from headrace.repository.transition import Serve, Transition
from headrace.workers.supervisor import Supervisor

__all__ = ["IndexEntry", "ModelControl", "Repository", "Served"]

log = logging.getLogger(__name__)

ModelControl = Literal["poll", "explicit", "none"]
Result = TypeVar("Result")
Read = Callable[[], ModelFolder | Absent]


class Repository:
    """Serves the models of one folder. Changes of one model happen one after the other, of several at once.

    ``serve`` makes what serves a version of any model but an ensemble.
    """

    def __init__(
        self,
        path: Path,
        supervisor: Supervisor,
        control: ModelControl,
        serve: Serve | None = None,
        plans: Plans | None = None,
    ) -> None:
        self.path = path.absolute()  # where it is a link, that may lead elsewhere later
        self._disk = Disk(self.path)
        self.control = control
        self.settled = False  # whether every model found at start has been loaded or refused
        self._records: dict[str, ModelRecord] = {}
        self.on_retired: Callable[[Served], None] = lambda _: None  # told of each version that has ended
        self._shelf = Shelf(self._note_retired)
        self._routes = self._shelf.routes  # every request asks them
        self._transition = Transition(
            self._records, self._shelf, serve or partial(ServedVersion, supervisor=supervisor), self.is_ready, plans
        )
        self.plans = plans  # None: every model is served as it was dropped in
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._closed = asyncio.Event()
        if plans is not None:
            self._fall_back = FallBack(plans, self._transition, self._follow_known, self._closed)
            self._transition.on_distrust = self._on_distrust

    # -- what requests ask --------------------------------------------------------------------------------

    def lookup(self, name: str, version: str) -> Served:
        """The version that serves a request; an empty ``version`` means the newest that is ready.

        Raises:
            NotFound: there is no such model or version.
            NotReady: there is, and it cannot serve now.
        """
        served = self._routes.get((name, version))
        if served is None:
            raise why_not(name, version, self._records.get(name))
        return served

    def find(self, name: str, version: str) -> Served | None:
        """As ``lookup``; None where that raises."""
        return self._shelf.find(name, version)

    def served(self) -> Iterator[Served]:
        """Every version that serves, in no particular order."""
        for record in self._records.values():
            yield from record.serving.values()

    def versions(self, name: str) -> list[str]:
        """The versions of a model that serve, oldest first."""
        return served_versions(self._records.get(name))

    def is_ready(self, name: str, version: str) -> bool:
        """Whether a request for this would be run now."""
        served = self._shelf.find(name, version)
        return served is not None and served.ready

    def has(self, name: str) -> bool:
        """Whether there is such a model, on disk or serving."""
        record = self._records.get(name)
        return (record is not None and bool(record.serving)) or self._disk.has(name)

    async def names(self) -> list[str]:
        """Every model that is on disk or serves, sorted."""
        on_disk = await self._on_disk()
        return sorted({*on_disk, *(name for name, record in self._records.items() if record.serving)})

    async def index(self, only_ready: bool = False) -> list[IndexEntry]:
        """The repository index, sorted by name and version."""
        on_disk = await self._on_disk()
        names = sorted({*on_disk, *(name for name, record in self._records.items() if record.known)})
        entries = [entry for name in names for entry in self.entries(name)]
        return [entry for entry in entries if entry.state == State.READY] if only_ready else entries

    def entries(self, name: str) -> list[IndexEntry]:
        """The index's lines of one model that is on disk or known, by version."""
        return index_entries(name, self._records.get(name))

    def unready(self) -> list[str]:
        """The models of which something that is wanted does not serve, sorted."""
        return sorted(name for name, record in self._records.items() if not record.ready)

    # -- changes ------------------------------------------------------------------------------------------

    async def load_all(self, names: list[str]) -> None:
        """Load these models, each on its own: one that fails stops nobody."""
        for name in names:
            self._record(name).asked_for = True
        # An ensemble has its models loaded first, so one may be known already when its own turn comes.
        changes = (self._change(name, partial(self._disk.read, name), again=False) for name in names)
        results = await asyncio.gather(*changes, return_exceptions=True)
        for name, result in zip(names, results, strict=True):
            if isinstance(result, Exception):
                log.error("model %s could not be looked at", name, exc_info=result)

    async def load(self, name: str, config: str = "", files: Mapping[str, bytes] | None = None) -> None:
        """Load a model at a client's request, or anew what has changed of it.

        ``config`` is a configuration in Triton's JSON form that stands in for the model's own, and ``files``, by
        version and path as ``1/model.onnx``, for all of its versions. Both hold until the next load or unload.

        Raises:
            Forbidden: model control is not explicit.
            NotFound: there is no such model on disk.
            InvalidRequest: it could not be loaded; what served before goes on.
        """
        self._check_control()
        override = read_override(name, config, files or {}) if config or files else None
        if (override is None or not override.files) and not self._disk.has(name):
            raise NotFound(f"failed to load '{name}', failed to poll from model repository: no such model")
        failed = await self._undisturbed(self._load(name, override))
        if failed:
            raise InvalidRequest(f"load failed for model '{name}': {' '.join(failed)}")
        if self._records[name].gone or not self._records[name].known:
            raise NotFound(f"failed to load '{name}': it was removed meanwhile")

    async def unload(self, name: str, dependents: bool = False) -> None:
        """Stop serving a model at a client's request. What was accepted is answered.

        With ``dependents`` also the models of an ensemble that were loaded only because of it.

        Raises:
            Forbidden: model control is not explicit.
            NotFound: there is no such model.
        """
        self._check_control()
        record = self._records.get(name)
        if record is None or not record.known:
            if self._disk.has(name):
                return
            raise NotFound(f"failed to unload '{name}': no such model")
        await self._undisturbed(self._unload(name, dependents))

    async def refresh(self, name: str) -> None:
        """Make what is served of one model agree with its folder. Never raises for what the folder holds."""
        await self._change(name, partial(self._disk.read, name))

    async def take_plan(self, name: str) -> None:
        """Look anew for the plans of a model, under every model control, and serve by what is there.

        Nothing else of its folder is looked at. What cannot be loaded leaves what serves as it is.

        Raises:
            NotFound, NotReady: it does not serve.
        """
        record = self._records.get(name)
        if record is None or not record.serving:
            raise why_not(name, "", record)
        await self._undisturbed(self._follow_again(name, record))

    async def close(self) -> None:
        """Drain every version and stop it: ensembles before the models that they are made of."""
        self._closing = True
        self._closed.set()
        if self._tasks:
            await asyncio.wait(self._tasks)  # loads that are under way
        while serving := [name for name, record in self._records.items() if record.serving]:
            outermost = [name for name in serving if not self._is_used(name)] or serving
            for name in outermost:
                record = self._records[name]
                async with record.change:
                    self._let_go(name, record)
            if len(outermost) < len(serving):
                await self._shelf.wait_retired()
        await self._shelf.wait_retired()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _is_used(self, name: str) -> bool:
        """Whether an ensemble that serves has this model in it."""
        return any(self._records[user].serving for user in users_of(name, self._records))

    # -- one change ---------------------------------------------------------------------------------------

    async def _load(self, name: str, override: Override | None) -> list[str]:
        """Returns what failed."""
        record = self._record(name)
        if override is None:
            failed = await self._change(name, partial(self._disk.read, name))
        elif not override.files:
            failed = await self._change(name, partial(overridden_folder, override, self.path / name), whole=True)
        else:
            folder = await asyncio.to_thread(write_files, name, override.files)
            record.private_folders.add(folder)
            record.pinned_folders.add(folder)
            try:
                failed = await self._change(name, partial(overridden_folder, override, folder), whole=True)
            finally:
                record.pinned_folders.discard(folder)
                self._sweep(name)
        record.asked_for |= bool(record.serving)
        return failed

    async def _unload(self, name: str, dependents: bool) -> None:
        record = self._records[name]
        parts = record.parts
        async with record.change:
            record.asked_for = False
            self._let_go(name, record)
        if not dependents:
            return
        await self._shelf.wait_retired(name)  # what it has accepted needs its models
        for part in parts:
            other = self._records.get(part)
            if other is not None and other.serving and not other.asked_for and not users_of(part, self._records):
                await self._unload(part, dependents=True)

    async def _change(
        self, name: str, read: Read, *, again: bool = True, whole: bool = False, users: tuple[str, ...] = ()
    ) -> list[str]:
        """Follow the folder that ``read`` gives, after the models that it is made of. Returns what failed.

        ``again`` is false where it is enough that the model was tried once; ``whole`` asks for all or nothing.
        ``users`` are the ensembles on whose behalf the model is loaded, outermost first. While those wait for it
        none of their locks is held, so circles cannot lock up.
        """
        record = self._record(name)
        async with record.change:
            if self._closing or (not again and record.known):
                return []
            folder = await self._read(name, record, read)
            absent = self._absent_parts(folder, users)
            if not absent:
                return await self._follow(name, record, folder, whole=whole)
        await asyncio.gather(
            *(self._change(part, partial(self._disk.read, part), again=again, users=(*users, name)) for part in absent)
        )
        async with record.change:
            folder = None if self._closing else await self._read(name, record, read)
            return await self._follow(name, record, folder, whole=whole)

    async def _read(self, name: str, record: ModelRecord, read: Read) -> ModelFolder | None:
        """The folder to be followed, or None where there is none any more, in which case nothing is left to do."""
        folder = await asyncio.to_thread(read)
        if folder is Absent.MODEL:
            self._let_go(name, record)
            # Not waited for: what it has accepted may take long, and its folder may come back before that.
            record.gone = True
            self._forget_gone(name, record)
        if isinstance(folder, Absent):
            return None
        record.gone = False
        for problem in folder.problems:
            log.error("model %s: %s", name, problem)
        return folder

    async def _follow(self, name: str, record: ModelRecord, folder: ModelFolder | None, *, whole: bool) -> list[str]:
        if folder is None:
            return []
        before = record.outlook()
        try:
            if whole:
                return await self._transition.follow_whole(record, folder)
            await self._transition.follow(record, folder)
            return failures(record)
        finally:
            if record.outlook() != before:
                self._wake_users(name)

    def _let_go(self, name: str, record: ModelRecord) -> None:
        """Retire everything of a model and want nothing of it any more."""
        before = record.outlook()
        record.wanted, record.problems, record.folder = frozenset(), (), None
        self._shelf.retire(name, record, set(record.serving))
        self._sweep(name)
        if record.outlook() != before:
            self._wake_users(name)

    def _absent_parts(self, folder: ModelFolder | None, users: tuple[str, ...]) -> list[str]:
        """The models of an ensemble that are on disk and do not serve, and are not waiting for it themselves."""
        if folder is None or folder.model_problems or (self.control == "poll" and self.settled):
            return []  # when folders are polled, each is loaded once it holds still, and not before
        return [
            part
            for part in parts_of(folder)
            if part not in (*users, folder.name) and not self._record(part).serving and self._disk.has(part)
        ]

    def _wake_users(self, name: str) -> None:
        """Have the ensembles planned again that this model is in."""
        for user in users_of(name, self._records) if not self._closing else ():
            record = self._records[user]
            if not record.replan_due:
                record.replan_due = True
                self._begin(self._replan(user, record))

    async def _follow_again(self, name: str, record: ModelRecord) -> None:
        async with record.change:
            folder = None if self._closing else record.folder
            await self._follow(name, record, folder, whole=False)

    async def _follow_known(self, name: str, record: ModelRecord) -> None:
        """Follow the folder as it was read last."""
        await self._follow(name, record, record.folder, whole=False)

    async def _replan(self, name: str, record: ModelRecord) -> None:
        async with record.change:
            record.replan_due = False
            if self._closing:
                return
            await self._follow_known(name, record)

    def _on_distrust(self, served: ServedVersion) -> None:
        self._begin(self._fall_back.run(served, self._record(served.folder.name)))

    # -- small things -------------------------------------------------------------------------------------

    async def _on_disk(self) -> list[str]:
        """The models that lie there. Looking takes long where there are many, or a network is in between."""
        return await asyncio.to_thread(self._disk.names)

    def _record(self, name: str) -> ModelRecord:
        return self._records.setdefault(name, ModelRecord())

    def _check_control(self) -> None:
        if self.control != "explicit":
            how = "polling is enabled" if self.control == "poll" else "model control is none"
            raise Forbidden(
                f"explicit model load / unload is not allowed if {how}; start with --model-control explicit"
            )

    def _note_retired(self, served: Served) -> None:
        name = served.folder.name
        self._sweep(name)
        self._forget_gone(name, self._records[name])
        self.on_retired(served)

    def _forget_gone(self, name: str, record: ModelRecord) -> None:
        """Say nothing more of a model whose folder is gone, once nothing of it is left."""
        if record.gone and not record.serving and not self._shelf.retiring(name):
            record.statuses.clear()
            self._wake_users(name)

    def _sweep(self, name: str) -> None:
        """Remove the files of past load requests that nothing is served from any more."""
        record = self._records[name]
        held = {served.folder.path for served in (*record.serving.values(), *self._shelf.retiring(name))}
        if record.folder is not None:
            held.add(record.folder.path)
        for folder in record.private_folders - held - record.pinned_folders:
            record.private_folders.discard(folder)
            self._begin(asyncio.to_thread(remove_files, folder))

    def _begin(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _undisturbed(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do it to the end: a client that leaves must not leave a version half loaded."""
        return await asyncio.shield(self._begin(work))
