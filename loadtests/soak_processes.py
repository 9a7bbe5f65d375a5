"""What each process of a server's tree holds and has used, from /proc."""

import re
from dataclasses import dataclass
from pathlib import Path

from loadtests import cpu

MIB = 2**20
_WORKER = re.compile(r"worker-\d+")


@dataclass(frozen=True, slots=True)
class Reading:
    """One process at one moment.

    ``rss`` is all that it has mapped. ``pss`` shares out what others have mapped too, and so depends on who else runs
    on the machine. ``own`` is that without mapped files, of which only the processes of one tree have any.
    """

    pid: int
    started_ticks: int
    name: str
    rss_mib: float
    pss_mib: float
    own_mib: float
    ticks: int
    descriptors: int
    threads: int


def read_tree(root: int) -> list[Reading]:
    """The tree below ``root`` now; a process that ends while we look is left out.

    Raises:
        ProcessLookupError: ``root`` is gone.
    """
    everyone = {process.pid: process for process in cpu.read_processes()}
    readings = []
    for pid, _ in sorted(cpu.tree_times(root, everyone.values()).members):
        try:
            readings.append(read(everyone[pid], "front" if pid == root else None))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return readings


def read(process: cpu.ProcessTimes, name: str | None = None) -> Reading:
    """One process; its name is found out where none is given.

    Raises:
        FileNotFoundError: it has ended.
        ProcessLookupError: it ends just now.
    """
    folder = Path(f"/proc/{process.pid}")
    memory = _kib_by_name((folder / "smaps_rollup").read_text())
    return Reading(
        pid=process.pid,
        started_ticks=process.started_ticks,
        name=name or _name((folder / "cmdline").read_text()),
        rss_mib=memory["Rss"] / 1024,
        pss_mib=memory["Pss"] / 1024,
        own_mib=(memory["Pss_Anon"] + memory["Pss_Shmem"]) / 1024,
        ticks=process.ticks,
        descriptors=sum(1 for _ in (folder / "fd").iterdir()),
        threads=sum(1 for _ in (folder / "task").iterdir()),
    )


def busy_ticks() -> int:
    """Of all CPUs of the machine, whoever used them."""
    user, nice, system, _, _, interrupts, soft, *_ = map(int, Path("/proc/stat").read_text().split(maxsplit=8)[1:8])
    return user + nice + system + interrupts + soft


def _kib_by_name(rollup: str) -> dict[str, int]:
    return {name: int(kib) for name, kib in re.findall(r"^(\w+): +(\d+) kB$", rollup, re.MULTILINE)}


def _name(command: str) -> str:
    """A worker has its name among its arguments; any other process is named by its program."""
    arguments = command.split("\0")
    return next(filter(_WORKER.fullmatch, arguments), Path(arguments[0]).name or "ended")
