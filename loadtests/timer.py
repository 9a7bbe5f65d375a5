"""A timer finer than an event loop's: those of asyncio and uvloop round to whole milliseconds.

Half a millisecond of rounding is more than a small request takes, and an open loop counts it as latency.
Python has timerfd from 3.13 on; until then ctypes asks the C library for it.
"""

import asyncio
import ctypes
import os
from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))


class PreciseTimer:
    """Calls ``due`` in the running event loop once a moment of ``time.monotonic_ns`` has come."""

    def __init__(self, due: Callable[[], None]) -> None:
        self._due = due
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._loop = asyncio.get_running_loop()
        self._descriptor = self._checked(
            self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC), "timerfd_create"
        )
        self._loop.add_reader(self._descriptor, self._readable)

    def arm(self, at_ns: int) -> None:
        """Set the next moment, in place of one not yet come. A moment that has passed is due at once."""
        seconds, nanoseconds = divmod(max(at_ns, 1), 1_000_000_000)
        spec = _TimerSpec(_TimeSpec(0, 0), _TimeSpec(seconds, nanoseconds))
        self._checked(
            self._libc.timerfd_settime(self._descriptor, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None),
            "timerfd_settime",
        )

    def close(self) -> None:
        """Give the descriptor back; ``due`` is not called any more."""
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _readable(self) -> None:
        os.read(self._descriptor, 8)
        self._due()

    @staticmethod
    def _checked(result: int, call: str) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{call}: {os.strerror(number)}")
        return result
