"""What memory a process has, as the kernel counts it."""

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """``own_bytes`` are anonymous pages: what ends with the process and nothing else has.

    Libraries, mapped files and the shared memory of batches are in ``resident_bytes`` only: of those several processes
    count the same pages.
    """

    resident_bytes: int
    own_bytes: int


def process_memory(pid: int, proc: Path = Path("/proc")) -> ProcessMemory | None:
    """Its memory now, None when it is gone. One read of a few microseconds; ``smaps_rollup`` walks all its pages."""
    try:
        _, resident, shared, *_ = (proc / str(pid) / "statm").read_bytes().split()
    except (OSError, ValueError):
        return None
    return ProcessMemory(int(resident) * _PAGE_BYTES, (int(resident) - int(shared)) * _PAGE_BYTES)


def give_back() -> None:
    """Have this process give memory that it has freed back to the system, where the C library keeps it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
