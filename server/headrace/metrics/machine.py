"""The machine as the kernel tells of it: CPU use and memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class CpuUtilization:
    """The machine's CPU use between two readings, as Triton has it: of all CPUs, whatever the cgroup allows."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._idle, self._total = self._ticks()
        self._utilization = 0.0

    def read(self) -> float:
        """0 to 1 since the last reading, or since this was made; that of the last while no tick has passed."""
        idle, total = self._ticks()
        if total > self._total:
            # The kernel's idle count may step back a tick or two, hence the bounds.
            share = 1 - (idle - self._idle) / (total - self._total)
            self._utilization = min(1.0, max(0.0, share))
            self._idle, self._total = idle, total
        return self._utilization

    def _ticks(self) -> tuple[int, int]:
        """Idle and all, from the line ``cpu user nice system idle iowait irq softirq steal guest guest_nice``."""
        with self._stat.open() as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]  # guests are in user and nice already
        return ticks[3] + ticks[4], sum(ticks)


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory that the server lives in: its cgroup's, where that has a limit below the machine's."""

    total_bytes: int
    used_bytes: int


def read_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Memory:
    """The tightest limit of cgroup v2 from this process's group up, else the machine.

    Used is what would have to be killed to get it back: file cache that nobody touched lately is not counted, as
    Kubernetes counts for evictions. Tensors in memfds are counted.
    """
    machine = _numbers(proc / "meminfo")
    total_bytes = machine["MemTotal:"] * 1024
    limit_bytes, group = min(_limits(proc / "self" / "cgroup", cgroups), default=(total_bytes, None))
    if group is None or limit_bytes >= total_bytes:
        return Memory(total_bytes, total_bytes - machine["MemAvailable:"] * 1024)
    current_bytes = int((group / "memory.current").read_text())
    return Memory(limit_bytes, max(0, current_bytes - _numbers(group / "memory.stat")["inactive_file"]))


def _limits(self_cgroup: Path, root: Path) -> Iterator[tuple[int, Path]]:
    """Each group from this process's up to the root that has a limit, and that limit in bytes."""
    own = next((line[3:] for line in self_cgroup.read_text().splitlines() if line.startswith("0::")), "/")
    folder = root / own.strip("/")
    for group in (folder, *folder.parents):
        limit = group / "memory.max"
        # No such file: the root group, cgroup v1, or a path from outside of this container.
        if group.is_relative_to(root) and limit.exists():
            text = limit.read_text().strip()
            if text != "max":
                yield int(text), group


def _numbers(path: Path) -> dict[str, int]:
    """A kernel file of lines ``name number [unit]``."""
    return {name: int(rest[0]) for name, *rest in map(str.split, path.read_text().splitlines())}
