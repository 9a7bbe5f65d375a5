"""The entry point of a worker process."""

import contextlib
import os
import signal
import socket
import sys
import threading

import numpy as np

from headrace.core.parent_death import die_with_parent
from headrace.log import set_up_logging
from headrace.workers import frames
from headrace.workers.calls import CallDesk
from headrace.workers.conversation import Conversation
from headrace.workers.streams import Streams
from headrace.workers.worker import Worker
from headrace_backends.base import DeviceLost

LOST_DEVICE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: another process may have more luck


def build(sock: socket.socket) -> Worker:
    """A worker over one socket."""
    desk = CallDesk()

    def on_message(frame: frames.ToWorker, descriptors: list[int]) -> bool:
        """Deal at once with what somebody may be waiting for in the middle of a batch."""
        if isinstance(frame, frames.Run):  # by far the most
            return False
        if isinstance(frame, frames.CallAnswer):
            desk.answer(frame, descriptors)
        elif isinstance(frame, frames.Credit):
            streams.credit(frame.sequence, frame.responses, frame.nbytes)
        elif isinstance(frame, frames.Cancel):
            streams.cancel(frame.sequence)
        else:
            return False
        return True

    conversation = Conversation(sock, on_message)
    streams = Streams(conversation)
    return Worker(conversation, streams, desk)


def ignore_signals() -> None:
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


def main() -> None:
    """Entry point: ``python -m headrace.workers.main DESCRIPTOR NAME LOG_FORMAT``."""
    die_with_parent()
    ignore_signals()
    descriptor, name, log_format = sys.argv[1:]
    set_up_logging(log_format, "info", name)
    sock = socket.socket(fileno=int(descriptor))
    os.set_inheritable(sock.fileno(), False)
    np.seterr(all="ignore")
    worker = build(sock)
    try:
        # Broken: the front process is gone.
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            worker.serve()
    except DeviceLost:  # told where it happened; closing models would fail, and the kernel frees all the same
        os._exit(LOST_DEVICE_STATUS)
    finally:
        worker.close()


if __name__ == "__main__":
    main()
