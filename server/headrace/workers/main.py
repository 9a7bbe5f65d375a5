"""The entry point of a worker process."""

import contextlib
import os
import socket

import numpy as np

from headrace.workers import frames
from headrace.workers.calls import OpenCalls
from headrace.workers.conversation import Conversation
from headrace.workers.spawned import come_up
from headrace.workers.streams import Streams
from headrace.workers.worker import Worker
from headrace_backends.base import DeviceLost

LOST_DEVICE_STATUS = 75  # EX_TEMPFAIL of sysexits.h: another process may have more luck


def build(sock: socket.socket) -> Worker:
    """A worker over one socket."""
    open_calls = OpenCalls()

    def on_message(frame: frames.ToWorker, descriptors: list[int]) -> bool:
        """Deal at once with what somebody may be waiting for in the middle of a batch."""
        if isinstance(frame, frames.Run):  # by far the most
            return False
        if isinstance(frame, frames.CallAnswer):
            open_calls.answer(frame, descriptors)
        elif isinstance(frame, frames.Credit):
            streams.credit(frame.sequence, frame.responses, frame.nbytes)
        elif isinstance(frame, frames.Cancel):
            streams.cancel(frame.sequence)
        else:
            return False
        return True

    conversation = Conversation(sock, on_message)
    streams = Streams(conversation)
    return Worker(conversation, streams, open_calls)


def main() -> None:
    """Entry point: ``python -m headrace.workers.main DESCRIPTOR NAME LOG_FORMAT``."""
    sock = come_up()
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
