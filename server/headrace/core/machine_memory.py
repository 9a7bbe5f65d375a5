"""The memory of the machine, or of the group that this process is confined to, as the kernel tells."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace.core.cgroups import ROOT, groups_v1, groups_v2, read


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory that this process lives in: its cgroup's, where that has a limit below the machine's."""

    total_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """What may be taken without anybody being killed for it."""
        return max(0, self.total_bytes - self.used_bytes)


def read_memory(proc: Path = Path("/proc"), cgroups: Path = ROOT) -> Memory:
    """The tightest cgroup limit (v2 or v1) from this process's group up, else the machine.

    Used is what would have to be killed to get it back: file cache that nobody touched lately is not counted, as
    Kubernetes counts for evictions. Tensors in memfds are counted.
    """
    machine = _numbers(proc / "meminfo")
    total_bytes = machine["MemTotal:"] * 1024
    limits = [*_limits_v2(proc, cgroups), *_limits_v1(proc, cgroups)]
    limit = min(limits, key=lambda one: one.nbytes, default=None)
    if limit is None or limit.nbytes >= total_bytes:
        return Memory(total_bytes, total_bytes - machine["MemAvailable:"] * 1024)
    return Memory(limit.nbytes, max(0, int(limit.usage.read_text()) - _numbers(limit.stat)[limit.inactive]))


@dataclass(frozen=True, slots=True)
class _Limit:
    """A group's limit, and where it says what of that is used and what of it is idle file cache."""

    nbytes: int
    usage: Path
    stat: Path
    inactive: str


def _limits_v2(proc: Path, root: Path) -> Iterator[_Limit]:
    for group in groups_v2(root, proc / "self" / "cgroup"):
        # No such file: the root group, cgroup v1, or a path from outside of this container.
        text = read(group / "memory.max")
        if text and text != "max":
            yield _Limit(int(text), group / "memory.current", group / "memory.stat", "inactive_file")


def _limits_v1(proc: Path, root: Path) -> Iterator[_Limit]:
    for group in groups_v1("memory", root, proc / "self" / "cgroup"):
        text = read(group / "memory.limit_in_bytes")  # without a limit it is a number past any machine
        if text:
            yield _Limit(int(text), group / "memory.usage_in_bytes", group / "memory.stat", "total_inactive_file")


def _numbers(path: Path) -> dict[str, int]:
    """A kernel file of lines ``name number [unit]``."""
    return {name: int(rest[0]) for name, *rest in map(str.split, path.read_text().splitlines())}
