"""The control groups that this process is in: where their files are, for version 2 and version 1."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
SELF = Path("/proc/self/cgroup")


def groups_v2(root: Path = ROOT, self_cgroup: Path = SELF) -> Iterator[Path]:
    """The folders of version 2 from this process's own group up to the root; every level may have a limit."""
    own = next((line[3:] for line in _lines(self_cgroup) if line.startswith("0::")), "/")
    yield from _upwards(root, own)


def groups_v1(controller: str, root: Path = ROOT, self_cgroup: Path = SELF) -> Iterator[Path]:
    """The folders of one of version 1's controllers, from this process's own group up to the controller's root.

    In a container the group is often mounted as the root, and its path leads nowhere: then only the root is left.
    """
    for line in _lines(self_cgroup):
        _, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if controller in controllers.split(","):
            for name in dict.fromkeys((controllers, controller)):  # cpu,cpuacct, and often cpu as a link to it
                if (root / name).is_dir():
                    yield from _upwards(root / name, own)
                    return


def read(path: Path) -> str:
    """A file's text without its line end; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _upwards(root: Path, own: str) -> Iterator[Path]:
    folder = root / own.strip("/")
    for group in (folder, *folder.parents):
        if group.is_relative_to(root):
            yield group


def _lines(path: Path) -> list[str]:
    return read(path).splitlines()
