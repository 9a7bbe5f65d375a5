"""Watches the repository's folder and has the repository follow it, model by model."""

import asyncio
import contextlib
import logging
import math
from pathlib import Path

from watchfiles import awatch

from headrace.core.fingerprint import Stamp, digest, fingerprint, stamps
from headrace.repository.layout import has_model, is_model_name, list_models, read_folder
from headrace.repository.repository import Repository

log = logging.getLogger(__name__)

SETTLE_S = 0.6  # a folder that has not changed for so long is taken to be whole
ARRIVAL_S = 5.0  # unless it lacks its model file: then nothing may have come for so long
CALM_LOADS = 4  # that may come one right behind the other; from then on what keeps changing has to wait
FIRST_REST_S = 4.0  # and twice as long each time
LONGEST_REST_S = 600.0
LOOK_S = 2.0  # meanwhile, for other changes
AGAIN_S = 2  # after the repository could not be read
RESCAN_S = 10  # network file systems do not tell of changes, so now and then everything is looked at


class Watcher:
    """Follows one repository until it is stopped.

    A model that is being copied changes all the time; it is loaded once it holds still. Should a copy pause
    longer than that, its load fails or not, and the next change leads to the next attempt. One whose model file is
    not there yet, as while a tool writes to a hidden one that it renames at the end, is waited for. Files that change
    whenever the model is loaded, since it writes them itself, have it loaded again more and more rarely.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._prints: dict[str, str] = {}
        self._settling: dict[str, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()

    async def run(self, prints: dict[str, str]) -> None:
        """Follow changes; ``prints`` are the fingerprints of the folders as they were loaded."""
        self._prints = prints
        root = self._repository.path
        told = ""
        while not self._stop.is_set():
            try:
                await self._watch(root)
            except (OSError, RuntimeError) as error:  # RuntimeError: watchfiles' own
                if str(error) != told:
                    told = str(error)
                    log.warning("cannot watch %s, so it is looked at now and then, and tried again: %s", root, error)
                # The folder is away, or the system tells nobody of more changes (its inotify limits): then all are
                # looked for.
                await asyncio.sleep(RESCAN_S if await asyncio.to_thread(root.is_dir) else AGAIN_S)
                with contextlib.suppress(OSError):
                    await self._look(root)

    async def _watch(self, root: Path) -> None:
        """Follow what the system tells of ``root``, until another folder is there: the system tells of the old one."""
        watched = await asyncio.to_thread(_identity, root)
        async for changes in awatch(
            root,
            stop_event=self._stop,
            yield_on_timeout=True,
            rust_timeout=RESCAN_S * 1000,
            debounce=400,
            step=200,
            ignore_permission_denied=True,  # of a lost+found, for one: all else is followed
        ):
            if changes:
                below = [Path(path).relative_to(root) for _, path in changes if root in Path(path).parents]
                self._begin({path.parts[0] for path in below})
                continue
            await self._look(root)
            if await asyncio.to_thread(_identity, root) != watched:
                return

    async def _look(self, root: Path) -> None:
        """See what has changed without being told."""
        now = await asyncio.to_thread(take_prints, root)
        self._begin({name for name in {*now, *self._prints} if now.get(name) != self._prints.get(name)})

    def _begin(self, names: set[str]) -> None:
        for name in filter(is_model_name, names):  # a hidden folder is being copied, and no model yet
            if name not in self._settling:
                self._settling[name] = asyncio.get_running_loop().create_task(self._follow(name))

    def stop(self) -> None:
        """Follow no more."""
        self._stop.set()
        for task in self._settling.values():
            task.cancel()

    async def _follow(self, name: str) -> None:
        folder = self._repository.path / name
        try:
            loads, rested, loaded_as = 0, False, list[Stamp]()
            while True:
                found = await _settled(folder)
                if found is not None and digest(found) == self._prints.get(name):
                    break
                if found is None or await self._is_arriving(name):
                    continue
                if loads >= CALM_LOADS and not rested:
                    await self._rest(name, found, changed_places(loaded_as, found), loads - CALM_LOADS)
                    rested = True
                    continue
                self._prints[name] = digest(found)
                await self._repository.refresh(name)  # and look again: it may have changed meanwhile
                loads, rested, loaded_as = loads + 1, False, found
            if not folder.exists():
                self._prints.pop(name, None)
        except Exception:
            log.exception("could not follow the changes of model %s", name)
        finally:
            del self._settling[name]

    async def _is_arriving(self, name: str) -> bool:
        """Whether the model lacks its file, and something of it has come while that was waited for."""
        folder = self._repository.path / name
        before = await asyncio.to_thread(fingerprint, folder, everything=True)
        if not await asyncio.to_thread(_is_incomplete, folder):
            return False
        for _ in range(math.ceil(ARRIVAL_S / SETTLE_S)):
            await asyncio.sleep(SETTLE_S)
            if before != await asyncio.to_thread(fingerprint, folder, everything=True):
                return True
        return False

    async def _rest(self, name: str, found: list[Stamp], restless: set[str], times: int) -> None:
        """Wait before files that changed right behind a load cause another; any other change ends that."""
        rest_s = min(FIRST_REST_S * 2**times, LONGEST_REST_S)
        if not times:
            log.warning(
                "model %s: %s changed again while it was loaded, or right after; it is loaded anew in %.0f s, and more "
                "rarely from then on. If the model writes there itself, have it write elsewhere, or to a hidden file",
                name,
                ", ".join(sorted(place.lstrip("/") for place in restless)[:5]),
                rest_s,
            )
        for _ in range(math.ceil(rest_s / LOOK_S)):
            await asyncio.sleep(LOOK_S)
            if changed_places(found, await asyncio.to_thread(_stamps, self._repository.path / name)) - restless:
                return


async def _settled(folder: Path) -> list[Stamp] | None:
    """What it holds, if that has held still for ``SETTLE_S``."""
    before = await asyncio.to_thread(_stamps, folder)
    await asyncio.sleep(SETTLE_S)
    after = await asyncio.to_thread(_stamps, folder)
    return after if after == before else None


def changed_places(before: list[Stamp], after: list[Stamp]) -> set[str]:
    """The places of files that came, went or changed."""
    return {stamp.place for stamp in set(before) ^ set(after)}


def _stamps(folder: Path) -> list[Stamp]:
    return list(stamps(folder))


def _identity(root: Path) -> tuple[int, int]:
    """Which folder is at ``root``, or is led to from there."""
    status = root.stat()
    return status.st_dev, status.st_ino


def _is_incomplete(folder: Path) -> bool:
    return has_model(folder.parent, folder.name) and read_folder(folder).incomplete


def take_prints(root: Path) -> dict[str, str]:
    """The fingerprint of every model's folder."""
    return {name: fingerprint(root / name) for name in list_models(root)}
