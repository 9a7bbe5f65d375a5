"""CPU time of a process and all its descendants, from /proc, in clock ticks (10 ms on most machines)."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MIN_SECONDS = 3.0  # one tick in each of a few processes is then under one per cent
_TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessTimes:
    """One line of /proc/PID/stat. ``ticks`` includes the children that died and were waited for."""

    pid: int
    parent: int
    ticks: int
    started_ticks: int


@dataclass(frozen=True, slots=True)
class TreeTimes:
    """A process tree's CPU time at one moment, and who was in it: pid and start time, as pids come again."""

    cpu_us: int
    members: frozenset[tuple[int, int]]


def parse_stat(text: str) -> ProcessTimes:
    """The line of /proc/PID/stat. The command in it is in parentheses and may hold anything, those included."""
    pid = int(text[: text.index(" ")])
    fields = text[text.rindex(")") + 2 :].split()
    return ProcessTimes(pid, int(fields[1]), sum(map(int, fields[11:15])), int(fields[19]))


def tree_times(root: int, processes: Iterable[ProcessTimes]) -> TreeTimes:
    """The times of ``root`` and all below it.

    A child that dies and is waited for moves its ticks to its parent, so the sum over the tree never loses
    any. Only one whose parent is outside the tree takes its ticks along; ``left`` tells of those who went.

    Raises:
        ProcessLookupError: ``root`` is not among the processes.
    """
    everyone = {process.pid: process for process in processes}
    if root not in everyone:
        raise ProcessLookupError(f"the server's process {root} is gone")
    children: dict[int, list[int]] = {}
    for process in everyone.values():
        children.setdefault(process.parent, []).append(process.pid)
    tree, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        tree.append(everyone[pid])
        waiting.extend(children.get(pid, ()))
    return TreeTimes(
        cpu_us=sum(process.ticks for process in tree) * _TICK_US,
        members=frozenset((process.pid, process.started_ticks) for process in tree),
    )


def left(before: TreeTimes, after: TreeTimes) -> int:
    """How many processes of the tree died (or left it) between two moments."""
    return len(before.members - after.members)


def read_processes() -> list[ProcessTimes]:
    """Every process of the machine; one that ends while we look is left out."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        try:
            found.append(parse_stat(Path(entry.path, "stat").read_text(errors="replace")))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
