"""Prints of files: what changes when they do, without reading them."""

import os
import stat
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from headrace.core.passed_over import is_passed_over


class Stamp(NamedTuple):
    """What is known of a file without reading it; ``place`` is its path below where one looked."""

    place: str
    size_bytes: int
    changed: str


def fingerprint(path: Path, *, everything: bool = False) -> str:
    """A print of every file below ``path``: its place, size, time of change and inode, but not its contents.

    Whether it may be read counts too. Hidden and temporary files and Python's caches do not, unless ``everything``
    does: what writes them does not mean to change a model.
    """
    return digest(stamps(path, everything=everything))


def print_files(folder: Path, places: Iterable[str]) -> str:
    """A print of these files in ``folder``, whether they are there or not."""
    return digest(_stamp(folder / place, place) for place in places)


def digest(found: Iterable[Stamp]) -> str:
    """One print of many stamps."""
    running = blake2b(digest_size=16)
    for stamp in found:
        running.update(os.fsencode(f"{stamp.place}\0{stamp.size_bytes}\0{stamp.changed}\0"))
    return running.hexdigest()


def stamps(root: Path, *, everything: bool = False) -> Iterator[Stamp]:
    """A stamp for each file below ``root``, as ``fingerprint`` counts them.

    A folder is walked once, so links may lead in circles.
    """
    walked: set[tuple[int, int]] = set()
    waiting = [(root, "")]
    while waiting:
        path, place = waiting.pop()
        try:
            status = path.stat()
            if not stat.S_ISDIR(status.st_mode):
                yield _file_stamp(path, place, status)
                continue
            if (status.st_dev, status.st_ino) in walked:
                yield Stamp(place, 0, f"folder {status.st_ino}")
                continue
            walked.add((status.st_dev, status.st_ino))
            names = sorted(os.listdir(path))  # noqa: PTH208 - names are wanted, and paths cost four times as much
        except OSError as error:
            yield Stamp(place, 0, f"error {error.errno}")
            continue
        counted = names if everything else [name for name in names if not is_passed_over(name)]
        waiting += [(path / name, f"{place}/{name}") for name in reversed(counted)]


def _stamp(path: Path, place: str) -> Stamp:
    try:
        status = path.stat()
    except OSError as error:
        return Stamp(place, 0, f"error {error.errno}")
    return _file_stamp(path, place, status)


def _file_stamp(path: Path, place: str, status: os.stat_result) -> Stamp:
    # Of its permissions only what matters here: a model need not be loaded again for any other chmod.
    closed = "" if os.access(path, os.R_OK) else " closed"
    return Stamp(place, status.st_size, f"{status.st_mtime_ns} {status.st_ino}{closed}")
