"""How busy the machine's CPUs are, as the kernel tells."""

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
