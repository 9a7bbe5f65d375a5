"""The folder of plans: found again by what they were made for, and only as whole as they were put there.

``ROOT/MODEL/VERSION/KEY`` is a plan, KEY being that of its basis. Beside them ``refused-...`` is what must not be used
again, kept to be looked at, and ``.new-...`` is being written. Whoever may write there decides what is run as a model:
the folder deserves the trust that the model repository has.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import msgspec

from headrace_backends.cache_folder import cache_folder
from headrace_backends.optimize.basis import basis_key, difference, file_digest, present_basis
from headrace_backends.optimize.plan import PLAN_FILE, REPLAY_FILE, BadPlan, Basis, Plan, read_plan, write_plan

MAX_PLANS = 8  # of one model version: for other machines, library versions, repositories
MAX_REFUSED = 3  # of one model version
REASON_FILE = "refused.txt"
REPORTS = ("report.html", "report.json", "trace.json", "scalars.tfevents")  # for people; may be added and removed

_ATTEMPTS = 3  # at reading one that is replaced at the same time
_REFUSED = "refused-"
_MAX_NAME = 120  # characters of a quoted model name


class NoPlan(BadPlan):
    """There is none."""


class StalePlan(BadPlan):
    """There is one for another model, machine or library."""


class RefusedPlan(BadPlan):
    """There was one, and it was found to be wrong."""


class BrokenPlan(BadPlan):
    """There is one, and its files are not what was put there."""

    def __init__(self, reason: str, folder: Path) -> None:
        super().__init__(reason)
        self.folder = folder


def default_plan_cache() -> Path:
    """Where plans are unless somebody says otherwise."""
    return cache_folder("plans")


class PlanCache:
    """Any number of processes may use one folder at the same time."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, model: str, version: str, basis: Basis) -> Path:
        """Where the plan of a model version for this basis is, or would be."""
        return self.place(model, version) / basis_key(basis)

    def place(self, model: str, version: str) -> Path:
        """The folder with everything of one model version; it may not exist."""
        return self.root / _safe(model) / _safe(version)

    def find(self, model: str, version: str, digest: str) -> tuple[Plan, Path]:
        """The plan of a model version that holds here and now, every file of it checked.

        ``digest`` is the model's (basis.py: model_digest). It reads all files.

        Raises:
            NoPlan: none was made.
            StalePlan: all were made for something else; the reason is the newest one's.
            RefusedPlan: none is left, and the last one was refused.
            BrokenPlan: its files are not what was put there.
        """
        stale = ""
        broken: BrokenPlan | None = None
        for folder in self._plans(model, version):
            try:
                return _read_whole(folder, model, version, digest), folder
            except StalePlan as error:
                stale = stale or str(error)
            except BadPlan as error:
                broken = broken or BrokenPlan(str(error), folder)
        if broken is not None:
            raise broken
        if stale:
            raise StalePlan(stale)
        for folder in self._refused(model, version):
            raise RefusedPlan(_reason(folder))
        raise NoPlan("none was made")

    def put(self, made_in: Path, plan: Plan) -> tuple[Plan, Path]:
        """Keep a plan whose files lie in ``made_in``, which stays as it is. It takes the place of an earlier one.

        The hashes of ``files`` are made here. Returns the plan as it was written, and its folder.

        Raises:
            BadPlan: a file that it needs is not there.
            OSError: it cannot be written.
        """
        for name in filter(None, (plan.artifact, REPLAY_FILE)):
            if not (made_in / name).is_file():
                raise BadPlan(f"'{name}' is missing in {made_in}")
        place = self.place(plan.model, plan.version)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".new-", dir=place))
        try:
            shutil.copytree(made_in, building, dirs_exist_ok=True, ignore=shutil.ignore_patterns(PLAN_FILE))
            plan = msgspec.structs.replace(plan, files=_digests(building))
            write_plan(building, plan)
            folder = self.folder(plan.model, plan.version, plan.basis)
            _swap(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
        for old in self._plans(plan.model, plan.version)[MAX_PLANS:]:
            shutil.rmtree(old, ignore_errors=True)
        for old in self._refused(plan.model, plan.version):
            shutil.rmtree(old, ignore_errors=True)  # what it was rebuilt for
        return plan, folder

    def refuse(self, folder: Path, reason: str, plan: Plan | None = None) -> None:
        """See that a plan is never used again, keep it to be looked at, and the reason beside it.

        Nothing happens where it is gone already, or where there is another than ``plan`` by now.

        Raises:
            OSError: the folder cannot be written to.
        """
        if plan is not None and _present(folder) != plan:
            return
        aside = Path(tempfile.mkdtemp(prefix=_REFUSED, dir=folder.parent)) if folder.parent.is_dir() else None
        if aside is None:
            return
        try:
            folder.rename(aside)  # over the empty one
        except FileNotFoundError:
            aside.rmdir()
            return
        (aside / REASON_FILE).write_text(reason, "utf-8")
        os.utime(aside)
        for old in _newest_first(folder.parent, refused=True)[MAX_REFUSED:]:
            shutil.rmtree(old, ignore_errors=True)

    def remove(self, folder: Path) -> None:
        """Delete a plan; nothing happens where it is gone already."""
        shutil.rmtree(folder, ignore_errors=True)

    def _plans(self, model: str, version: str) -> list[Path]:
        return _newest_first(self.place(model, version), refused=False)

    def _refused(self, model: str, version: str) -> list[Path]:
        return _newest_first(self.place(model, version), refused=True)


def _read_whole(folder: Path, model: str, version: str, digest: str) -> Plan:
    """The plan in a folder, if it holds and all of it is there.

    Raises:
        StalePlan: it was made for something else.
        BadPlan: something is wrong with it.
    """
    for attempt in range(_ATTEMPTS):
        identity = _identity(folder)
        try:
            plan = read_plan(folder)
            why = difference(plan.basis, present_basis(plan, digest))
            if why:
                raise StalePlan(why)
            check_files(folder, plan, model, version)
        except BadPlan:
            # Half of what was read may be of a plan that another has just taken the place of.
            if attempt == _ATTEMPTS - 1 or _identity(folder) == identity:
                raise
        else:
            return plan
    raise AssertionError("the last attempt returns or raises")


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _present(folder: Path) -> Plan | None:
    try:
        return read_plan(folder)
    except BadPlan:
        return None


def check_files(folder: Path, plan: Plan, model: str, version: str) -> None:
    """See that a plan lies where it belongs, and that its files are what they were.

    Raises:
        BadPlan: with the first thing that is wrong.
    """
    if (plan.model, plan.version) != (model, version) or folder.name != basis_key(plan.basis):
        raise BadPlan(f"it is not of this model: {PLAN_FILE} is of '{plan.model}' version {plan.version}")
    needed = {REPLAY_FILE, *([plan.artifact] if plan.artifact else [])}
    if missing := sorted(needed - plan.files.keys()):
        raise BadPlan(f"{PLAN_FILE} has no hash of '{missing[0]}'")
    found = {place for place, _ in _below(folder)} - {PLAN_FILE, *REPORTS}
    expected = plan.files.keys() - set(REPORTS)
    if missing := sorted(expected - found):
        raise BadPlan(f"its file '{missing[0]}' is missing")
    if foreign := sorted(found - expected):
        raise BadPlan(f"the file '{foreign[0]}' does not belong to it")
    for place in sorted(expected):
        try:
            digest = file_digest(folder / place)
        except OSError as error:
            raise BadPlan(f"its file '{place}' cannot be read: {error}") from error
        if digest != plan.files[place]:
            raise BadPlan(f"its file '{place}' is not what was put there")


def _digests(folder: Path) -> dict[str, str]:
    return {place: file_digest(file) for place, file in sorted(_below(folder)) if place != PLAN_FILE}


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            yield str(PurePosixPath(path.relative_to(folder))), path


def _swap(new: Path, folder: Path) -> None:
    """Put a folder in the place of another. For a moment there may be none, which is no worse than no plan."""
    old = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
    try:
        with suppress(FileNotFoundError):
            folder.rename(old)
        new.rename(folder)
        os.utime(folder)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _newest_first(place: Path, *, refused: bool) -> list[Path]:
    found: list[tuple[float, Path]] = []
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name.startswith(_REFUSED) == refused:
                    with suppress(FileNotFoundError):
                        found.append((entry.stat().st_mtime, Path(entry.path)))
    except OSError:
        return []
    return [path for _, path in sorted(found, reverse=True)]


def _reason(folder: Path) -> str:
    try:
        return (folder / REASON_FILE).read_text("utf-8").strip() or "no reason was noted"
    except OSError:
        return "no reason was noted"


def _safe(name: str) -> str:
    """A name for a folder: the same as that of the model where it is plain, and different for different ones."""
    quoted = quote(name, safe=" ")
    if quoted.startswith((".", _REFUSED)) or not quoted:
        quoted = f"%{quoted}"
    if len(quoted) > _MAX_NAME:
        quoted = f"{quoted[:80]}%{hashlib.blake2b(name.encode(errors='surrogateescape'), digest_size=8).hexdigest()}"
    return quoted
