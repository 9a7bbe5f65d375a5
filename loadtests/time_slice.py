"""For how long the kernel lets a thread run before others may: a driver asks for little, so that it is run promptly.

The driver shares the CPUs with the server that it measures. Where all of them compute, a process that wakes up waits
for others' slices to end, milliseconds that no client on another machine would wait, and more of them beside a server
whose threads never sleep during a batch. Whoever has asked for a short slice is run as soon as it wakes up.
"""

import ctypes
import os
import platform
import struct

SLICE_NS = 100_000  # the least that Linux takes, as the runtime of SCHED_OTHER since 6.12; older ones ignore it
_CALLS = {"x86_64": 314, "aarch64": 274}  # sched_setattr, which the C library has no function for
_ATTRIBUTES = struct.Struct("=IIQiIQQQII")  # struct sched_attr of linux/sched/types.h
_RESET_ON_FORK = 1


def shorten() -> bool:
    """Ask for short slices for this thread, not for what it starts. False where that cannot be had.

    Whoever is run under another policy (``chrt``) is left under it.
    """
    call = _CALLS.get(platform.machine())
    if call is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    wanted = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, _RESET_ON_FORK, os.nice(0), 0, SLICE_NS, 0, 0, 0, 0)
    refused: int = ctypes.CDLL(None).syscall(call, 0, ctypes.c_char_p(wanted), 0)
    return not refused
