"""What requests can reach: the versions that serve, and those that are on their way out."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial

from headrace.repository.lifecycle import State, Unloaded, UnloadStarted
from headrace.repository.model_record import ModelRecord, Served
from headrace.repository.served import ServedVersion

log = logging.getLogger(__name__)


class Shelf:
    """Lookups see a change of a model as a whole; what is taken away answers what it has accepted.

    ``on_retired`` is called with a version that has ended.
    """

    def __init__(self, on_retired: Callable[[Served], None]) -> None:
        # What lookup reads: ("digits", "") for the newest version and ("digits", "1") for each.
        self.routes: dict[tuple[str, str], Served] = {}
        self._retiring: dict[asyncio.Task[None], Served] = {}
        self._on_retired = on_retired

    def find(self, name: str, version: str) -> Served | None:
        """The version that serves; an empty ``version`` means the newest."""
        return self.routes.get((name, version))

    def put(self, name: str, record: ModelRecord, version: int, served: Served) -> None:
        """Let requests see a new version; one that it replaces is retired."""
        replaced = record.serving.get(version)
        record.serving[version] = served
        self._publish(name, record)
        if replaced is not None:
            if isinstance(replaced, ServedVersion) and isinstance(served, ServedVersion):
                replaced.hand_over(served)
            self._drain(replaced)

    def retire(self, name: str, record: ModelRecord, versions: Iterable[int], reason: str = "") -> None:
        """Take versions away, because of ``reason`` if that is not what their owner asked for."""
        for version in list(versions):
            served = record.serving.pop(version)
            record.note(version, UnloadStarted(reason))
            task = self._drain(served)
            task.add_done_callback(partial(_note_unloaded, record, version))
            if reason:
                log.warning("model %s version %d is retired: %s", name, version, reason)
            else:
                log.info("model %s version %d is retired", name, version)
        self._publish(name, record)

    def retiring(self, name: str) -> list[Served]:
        """The versions of a model that still have something to answer."""
        return [served for served in self._retiring.values() if served.folder.name == name]

    async def wait_retired(self, name: str = "") -> None:
        """Wait until every version that is retired by now has ended: those of one model, or all."""
        tasks = [task for task, served in self._retiring.items() if not name or served.folder.name == name]
        if tasks:
            await asyncio.wait(tasks)

    def _publish(self, name: str, record: ModelRecord) -> None:
        """Let requests see the versions that serve now; the next lookup uses them, none is in between."""
        for key in [key for key in self.routes if key[0] == name]:
            del self.routes[key]
        for version, served in record.serving.items():
            self.routes[name, str(version)] = served
        if record.serving:
            self.routes[name, ""] = record.serving[max(record.serving)]

    def _drain(self, served: Served) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(served.drain(), name=f"retire {served.folder.name}")
        self._retiring[task] = served
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        served = self._retiring.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("model %s version %s did not end in order", served.folder.name, served.version, exc_info=error)
        self._on_retired(served)


def _note_unloaded(record: ModelRecord, version: int, _: asyncio.Task[None]) -> None:
    status = record.statuses.get(version)
    if status is not None and status.state is State.UNLOADING:
        record.note(version, Unloaded())
