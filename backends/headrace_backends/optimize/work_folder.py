"""Folders with the unfinished work of searches: found again by their keys, and each for one search at a time.

What a search has made is of no use to one of another model, budget or machine, and two that write the same files would
take each other's halves for their own.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MOST_AT_ONCE = 8  # searches with one key: each after the first begins from nothing
MOST_KEPT = 3  # folders beside each other: unfinished work is as large as some models
_LOCK = ".lock"


class Busy(Exception):
    """So many searches for the same are under way already; the message says where."""


@contextmanager
def claimed(parent: Path, name: str, alike: str = "") -> Iterator[Path]:
    """Have the folder ``name`` in ``parent`` for oneself; where another search has it, one of its own.

    It is made where there is none, and stays with all that is in it unless it is removed meanwhile. Of the others in
    ``parent`` whose names begin with ``alike``, those that were used longest ago are removed.

    Raises:
        Busy: there are too many of them.
        OSError: it cannot be written to.
    """
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in range(1, MOST_AT_ONCE + 1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        lock = _locked(folder)
        if lock is None:
            continue
        try:
            folder.mkdir(exist_ok=True)
            os.utime(folder)
            _forget(parent, alike, folder)
            yield folder
        finally:
            _let_go(lock, folder)
        return
    raise Busy(f"{MOST_AT_ONCE} searches for the same are under way in '{parent}' already")


def _locked(folder: Path) -> int | None:
    """An open file that is this process's as long as it is open; None where another has it."""
    path = _lock_file(folder)
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(path, lock):
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError:
            os.close(lock)
            raise
        os.close(lock)  # whoever had it has just removed it


def _let_go(lock: int, folder: Path) -> None:
    if not folder.exists():
        with suppress(OSError):
            _lock_file(folder).unlink()
    os.close(lock)


def _forget(parent: Path, alike: str, kept: Path) -> None:
    found = []
    for one in parent.iterdir():
        if one.is_dir() and one.name.startswith(alike) and one != kept:
            with suppress(OSError):  # another process may remove it meanwhile
                found.append((one.stat().st_mtime, one))
    for _, old in sorted(found, reverse=True)[MOST_KEPT - 1 :]:
        lock = _locked(old)
        if lock is not None:
            shutil.rmtree(old, ignore_errors=True)
            _let_go(lock, old)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{_LOCK}")


def _is(path: Path, lock: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(lock))
    except FileNotFoundError:
        return False
