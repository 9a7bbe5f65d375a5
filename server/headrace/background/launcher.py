"""Runs another program in place of itself, with idle CPU and disk priority, and first to be killed for memory.

``python -m headrace.background.launcher PARENT COMMAND...``. The program, and whatever it starts, keeps these
priorities; it is killed when the process with the id PARENT ends.
"""

import ctypes
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

from headrace.core.parent_death import die_with_parent

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # the numbers of the system call, for which libc has no name
_IOPRIO_WHO_PROCESS = 1
_IOPRIO_IDLE = 3 << 13


def stand_back() -> None:
    """Give this process the lowest priorities that there are."""
    # Only CPU that nobody else wants; beside it a nice value, which cgroups' schedulers look at too.
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError as error:
        sys.exit(
            f"this system has no idle scheduling ({error}), and the optimiser may take nothing from it: "
            "run headrace optimize yourself, and start the server with --optimize plans"
        )
    os.nice(19)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:  # elsewhere the nice value decides
        ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE)
    with suppress(OSError):  # a container may forbid it
        Path("/proc/self/oom_score_adj").write_text("1000")


def main(arguments: list[str]) -> None:
    """Become the command that the arguments name."""
    parent, *command = arguments
    die_with_parent()
    if os.getppid() != int(parent):
        sys.exit("the server has ended")
    stand_back()
    os.execvp(command[0], command)  # noqa: S606 - the server's own command


if __name__ == "__main__":
    main(sys.argv[1:])
