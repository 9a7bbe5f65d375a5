"""What a model's folder holds: names, and small files read whole and with care."""

import errno
import os
import stat
from pathlib import Path

from headrace.core.plain_text import plain


class Unusable(Exception):
    """Something on disk that cannot be used; the message says why. It may name files that are called anything."""

    def __init__(self, message: str) -> None:
        super().__init__(plain(message))


def list_names(folder: Path) -> list[str]:
    """What a folder holds, sorted."""
    return sorted(os.listdir(folder))  # noqa: PTH208 - names are wanted, and paths cost four times as much


def read_bytes(path: Path, limit_bytes: int) -> bytes:
    """What a file holds.

    Raises:
        Unusable: it is no ordinary file, too large or out of reach.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Unusable("is not an ordinary file")
            raw = file.read(limit_bytes + 1)
    except OSError as error:
        raise Unusable(why_unread(error)) from error
    if len(raw) > limit_bytes:
        raise Unusable(f"is larger than {limit_bytes} bytes")
    return raw


def read_beginning(path: Path, most_bytes: int) -> bytes:
    """How a file begins; nothing of what is no ordinary file or out of reach."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            return file.read(most_bytes) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    except OSError:
        return b""


def read_text(path: Path, limit_bytes: int) -> str:
    """A file's text.

    Raises:
        Unusable: as ``read_bytes``, or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable(f"is not UTF-8 text: {error.reason} at byte {error.start}") from error


def may_come_back(error: OSError) -> bool:
    """Whether something is there and cannot be read now, as when a network file system does not answer."""
    gone = isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno == errno.ELOOP
    return not gone


def why_unread(error: OSError) -> str:
    """An error of the file system as a reason."""
    return f"cannot be read: {error.strerror or error}"


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe would else be waited for
