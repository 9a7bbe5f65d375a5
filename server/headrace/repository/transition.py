"""The way from what serves of a model to what its folder asks for."""

import asyncio
import logging
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Protocol

from headrace.core.ensemble import EnsembleProblem
from headrace.repository.layout import ModelFolder, VersionFiles, selected_versions
from headrace.repository.lifecycle import (
    Loaded,
    LoadFailed,
    LoadStarted,
    State,
    VersionStatus,
    plan_change,
    settle,
)
from headrace.repository.model_record import ModelRecord, Served, failures
from headrace.repository.planned import Planned
from headrace.repository.planning import plan_folder, still_holds
from headrace.repository.plans import Plans
from headrace.repository.served import ServedVersion
from headrace.repository.served_ensemble import ServedEnsemble
from headrace.repository.shelf import Shelf
from headrace.workers.loads import LoadRefused
from headrace.workers.replayed import UNPROVED

log = logging.getLogger(__name__)


class Serve(Protocol):
    """Makes what serves a version: as it was dropped in, or by a plan."""

    def __call__(self, folder: ModelFolder, files: VersionFiles, *, planned: Planned | None = None) -> ServedVersion:
        """It is not started yet."""


class Transition:
    """Loads what is wanted and retires what is not; the caller holds the record's ``change``."""

    def __init__(
        self,
        records: Mapping[str, ModelRecord],
        shelf: Shelf,
        serve: Serve,
        is_ready: Callable[[str, str], bool],
        plans: Plans | None = None,
    ) -> None:
        self._records = records
        self._shelf = shelf
        self._serve = serve
        self._is_ready = is_ready
        self._plans = plans
        self.on_distrust: Callable[[ServedVersion], None] = lambda _: None  # told of those whose plan went wrong

    async def follow(self, record: ModelRecord, folder: ModelFolder) -> None:
        """Serve what ``folder`` asks for, each version as soon as it is loaded. Never raises for what it holds."""
        await self._follow(record, folder, whole=False)

    async def follow_whole(self, record: ModelRecord, folder: ModelFolder) -> list[str]:
        """As ``follow``, but all or nothing: when something fails, everything is as it was. Returns what failed."""
        wanted, problems, earlier, statuses = record.wanted, record.problems, record.folder, dict(record.statuses)
        await self._follow(record, folder, whole=True)
        failed = failures(record)
        if failed:
            record.wanted, record.problems, record.folder = wanted, problems, earlier
            record.statuses = _restored(record, statuses)
        return failed

    async def _follow(self, record: ModelRecord, folder: ModelFolder, *, whole: bool) -> None:
        record.problems = folder.model_problems
        if folder.model_problems:
            return  # what serves goes on until the folder makes sense again
        record.folder = folder
        selected = selected_versions(folder)
        unusable = {**folder.broken_versions, **folder.missing_versions}
        record.wanted = frozenset({*selected, *unusable})
        _forget(record, selected)
        kept = folder.out_of_reach & record.serving.keys()  # a disk that fails for a while takes nothing down
        for version, reason in unusable.items():
            if whole or version not in record.serving or version in kept:
                record.note(version, LoadFailed(reason))
        if whole and unusable:
            return
        planned = await self._plans.choose(folder, selected) if self._plans is not None else {}
        try:
            made = self._make(folder, selected, planned)
        except EnsembleProblem as problem:
            self._refuse(record, folder.name, selected, str(problem))
            return
        wanted = {version: served.print for version, served in made.items()}
        # One that cannot come back by itself is loaded anew even though its files are the same.
        serving = {number: "" if served.broken else served.print for number, served in record.serving.items()}
        change = plan_change(serving, wanted)
        for version in change.keep:
            record.statuses[version] = VersionStatus(State.READY)
        load = self._load_whole if whole else self._load_each
        failed = await load(folder.name, record, {version: made[version] for version in change.load})
        if whole and failed:
            return
        retired = settle(change, failed, folder.on_disk) - set(change.load) - kept
        self._shelf.retire(folder.name, record, retired)

    def _make(self, folder: ModelFolder, versions: Iterable[int], planned: Mapping[int, Planned]) -> dict[int, Served]:
        """What would serve these versions, not started yet.

        Raises:
            EnsembleProblem: the folder has an ensemble that cannot be planned.
        """
        if not folder.config.ensemble:
            return {number: self._served(folder, folder.versions[number], planned.get(number)) for number in versions}
        plan = plan_folder(folder, self._records, self._shelf.find)
        return {number: ServedEnsemble(folder, number, plan, self._is_ready) for number in versions}

    def _served(self, folder: ModelFolder, files: VersionFiles, planned: Planned | None) -> ServedVersion:
        if planned is None:
            return self._serve(folder, files)
        served = self._serve(folder, files, planned=planned)
        served.on_distrust = self.on_distrust
        return served

    async def finish_elsewhere(self, served: ServedVersion) -> None:
        """Have what waits for a distrusted form answered that is not served any more, and has no successor."""
        if not len(served.queue) and not served.queue.executing:
            return
        reference = self._serve(served.folder, served.files)
        reason = await _why_not_started(served.folder.name, served.files.version, reference)
        if reason:
            served.give_up(f"{served.distrusted}; and as it was dropped in: {reason}")
        else:
            served.hand_over(reference)
            await served.queue.drained()  # what it is running may come back
            await reference.drain()

    def _refuse(self, record: ModelRecord, name: str, versions: Iterable[int], reason: str) -> None:
        """An ensemble cannot be planned. One that was planned before goes on only while its models allow it."""
        for version in versions:
            if record.statuses.get(version) != VersionStatus(State.UNAVAILABLE, reason):
                _log_failure(name, record, version, reason)
            record.note(version, LoadFailed(reason))
        serving = record.serving.items()
        gone = [version for version, served in serving if not still_holds(served, self._records, self._shelf.find)]
        if gone:
            self._shelf.retire(name, record, gone, reason)

    async def _load_each(self, name: str, record: ModelRecord, made: Mapping[int, Served]) -> set[int]:
        """Load versions, each by itself; those that failed are returned."""
        loaded = await asyncio.gather(*(self._load(name, record, *one) for one in made.items()))
        return {version for version, done in zip(made, loaded, strict=True) if not done}

    async def _load(self, name: str, record: ModelRecord, version: int, served: Served) -> bool:
        started = await self._start(name, record, version, served)
        if started is None:
            return False
        self._put(name, record, version, started)
        return True

    async def _load_whole(self, name: str, record: ModelRecord, made: Mapping[int, Served]) -> set[int]:
        """Load versions and let requests see them only when all are there; else every one has failed."""
        started = await asyncio.gather(*(self._start(name, record, *one) for one in made.items()))
        good = {version: served for version, served in zip(made, started, strict=True) if served is not None}
        if len(good) == len(made):
            for version, served in good.items():
                self._put(name, record, version, served)
            return set()
        for version in good:
            record.note(version, LoadFailed("another version of the same load failed"))
        fresh = [served for version, served in good.items() if record.serving.get(version) is not served]
        await asyncio.gather(*(served.drain() for served in fresh))
        return set(made)

    async def _start(self, name: str, record: ModelRecord, version: int, served: Served) -> Served | None:
        """Load a version; None where that failed.

        Where it was to be served by a plan, and that turns out to be wrong, what comes back serves the model as it was
        dropped in; it may be what does so already.
        """
        record.note(version, LoadStarted())
        started, reason = served, await _why_not_started(name, version, served)
        planned = served.planned if isinstance(served, ServedVersion) else None
        if planned is not None and self._plans is not None:
            if not reason or reason.startswith(UNPROVED):
                self._plans.note_replay(planned, good=not reason)
            if reason:
                started = self._serve(served.folder, served.files)
                current = record.serving.get(version)
                if current is not None and current.print == started.print and not current.broken:
                    started, unplanned = current, ""
                else:
                    unplanned = await _why_not_started(name, version, started)
                if not unplanned:  # else it is not the plan's fault
                    await self._plans.refuse(planned, reason)
                reason = unplanned
        if reason:
            record.note(version, LoadFailed(reason))
            _log_failure(name, record, version, reason)
            return None
        return started

    def _put(self, name: str, record: ModelRecord, version: int, served: Served) -> None:
        record.note(version, Loaded())
        if record.serving.get(version) is served:
            return  # it was to be replaced, and stays
        self._shelf.put(name, record, version, served)
        signature = served.info.signature
        log.info(
            "model %s version %d is ready: %s, max_batch_size %d, %d instance(s), loaded in %.2f s",
            name,
            version,
            _form(served),
            signature.max_batch_size,
            len(served.instances) or sum(group.count for group in served.folder.config.instances),
            served.statistics.load_seconds,
        )
        for note in served.notes:
            log.debug("model %s version %d: %s", name, version, note)


async def _why_not_started(name: str, version: int, served: Served) -> str:
    """Load it; why that failed, empty where it did not."""
    try:
        await served.start()
    except LoadRefused as error:
        return str(error)
    except Exception as error:
        log.exception("model %s version %d could not be loaded", name, version)
        return f"{type(error).__name__}: {error}"
    return ""


def _log_failure(name: str, record: ModelRecord, version: int, reason: str) -> None:
    what = "could not be loaded anew and goes on as it was" if version in record.serving else "is not served"
    log.error("model %s version %d %s: %s", name, version, what, reason)


def _form(served: Served) -> str:
    """What it is run as, for the log."""
    planned = served.planned if isinstance(served, ServedVersion) else None
    return served.info.backend if planned is None else f"as planned, {planned.name} ({planned.plan.speedup:.3g} x)"


def _forget(record: ModelRecord, wanted: Container[int]) -> None:
    for version in [old for old in record.statuses if old not in wanted and old not in record.serving]:
        del record.statuses[version]


def _restored(record: ModelRecord, before: Mapping[int, VersionStatus]) -> dict[int, VersionStatus]:
    """The statuses as they were before a change that has failed, but for versions that have begun or ended to go."""
    restored = {}
    for version in {*before, *record.statuses}:
        was, now = before.get(version), record.statuses.get(version)
        going = State.UNLOADING in (was and was.state, now and now.state)
        gone = was is not None and was.state is State.READY and version not in record.serving
        status = now if going or gone else was
        if status is not None:
            restored[version] = status
    return restored
