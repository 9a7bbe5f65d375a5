"""What every process that ``spawn`` has started does first."""

import os
import signal
import socket
import sys
import threading

from headrace.core.parent_death import die_with_parent
from headrace.log import set_up_logging


def come_up() -> socket.socket:
    """The socket to the front process, with whom this one ends; the command line is ``DESCRIPTOR NAME LOG_FORMAT``."""
    die_with_parent()
    _ignore_signals()
    descriptor, name, log_format = sys.argv[1:]
    set_up_logging(log_format, "info", name)
    sock = socket.socket(fileno=int(descriptor))
    os.set_inheritable(sock.fileno(), False)
    return sock


def _ignore_signals() -> None:
    """Leave it to the front process when to stop: Ctrl-C and service managers signal the whole group.

    By handlers rather than SIG_IGN, because programs that a model starts would inherit that. What a model forks can be
    ended by SIGTERM again: ``multiprocessing`` ends its processes so, and then waits for them.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ignore_signal)

    blocked = threading.local()  # what a thread that forks had blocked before

    def block() -> None:  # what is sent to the child before its handler is another waits until then
        blocked.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked.before)

    def restore() -> None:
        if signal.getsignal(signal.SIGTERM) is _ignore_signal:  # a model may have set its own
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=restore)


def _ignore_signal(number: int, frame: object) -> None:
    del number, frame
