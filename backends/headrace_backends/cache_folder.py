"""Folders in which what was made for a model waits for the next time: where they are, and who makes what in them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Where things of this kind are kept unless somebody says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of that variable has relative paths ignored.
    root = Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()
    return root / "headrace" / kind


@contextmanager
def one_at_a_time(folder: Path, key: str) -> Iterator[None]:
    """Hold off every other process that would make the same thing: it finds it there when its turn comes.

    Raises:
        OSError: the folder cannot be written to.
    """
    with (folder / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process that holds it, whatever becomes of that
        yield
