"""The worker's end of its socket: frames in their order for the main loop, answers at once for whoever waits."""

import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic_ns

from headrace.workers import channel, frames

log = logging.getLogger("headrace.worker")

_DONTWAIT = int(socket.MSG_DONTWAIT)

Received = tuple[frames.ToWorker, list[int]]  # a frame and its descriptors, the receiver's to close


class ConversationEnded(Exception):
    """The front process is gone, and nobody will answer any more."""


class Conversation:
    """Any thread may send, and any may wait: one of those that wait reads the socket for all.

    A model's threads wait in the middle of a batch, for an answer of another model or for a slow client, while the
    main thread may be inside the model or idle. So no thread is the reader for good: whoever has to wait and finds
    nobody at the socket reads, and hands out what comes. Frames that ``on_message`` takes are dealt with then and
    there; the others are kept for ``take``. If a frame cannot be dealt with, the conversation ends for everybody.
    """

    def __init__(self, sock: socket.socket, on_message: Callable[[frames.ToWorker, list[int]], bool]) -> None:
        self._sock = sock
        self._on_message = on_message
        self._inbox: deque[Received] = deque()
        self._changed = threading.Condition()
        self._reading = False
        self._ended = False

    def send(self, frame: frames.FromWorker, descriptors: Sequence[int] = ()) -> None:
        """Send one frame. The descriptors stay the caller's."""
        self.send_encoded(frames.encode(frame), descriptors)

    def send_encoded(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        """As ``send``, for a frame of which it is known already that it can be written."""
        channel.send_blocking(self._sock, frame, descriptors)

    def take(self, otherwise: Callable[[], bool], look_ns: int = 0) -> Received | None:
        """The next frame for the main loop; None when there is none yet and ``otherwise`` there is work.

        For ``look_ns`` it stays awake while it waits, which is quicker, and uses a CPU that nobody else wants.

        Raises:
            ConversationEnded: there will be none.
        """
        if not self._inbox:
            if otherwise():
                self.poll()
            elif not (look_ns and self._look_out(look_ns)):
                self.wait_until(lambda: bool(self._inbox) or otherwise())
        return self._inbox.popleft() if self._inbox else None

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Return once ``happened()``, which is asked with the conversation held, after each frame.

        Raises:
            ConversationEnded: it will not happen any more.
        """
        with self._changed:
            while not happened():
                if self._ended:
                    raise ConversationEnded
                if self._reading:
                    self._changed.wait()
                else:
                    self._read(0)

    def _look_out(self, look_ns: int) -> bool:
        """Whether a frame has come within this time."""
        ends_ns = monotonic_ns() + look_ns
        while True:
            self.poll()
            if self._inbox:
                return True
            if monotonic_ns() > ends_ns:
                return False
            os.sched_yield()

    def poll(self) -> None:
        """Take what has arrived, without waiting.

        Raises:
            ConversationEnded: nothing will arrive any more, and nothing is left.
        """
        with self._changed:
            while not (self._reading or self._ended):
                try:
                    self._read(_DONTWAIT)
                except BlockingIOError:
                    return
            if self._ended and not self._inbox:
                raise ConversationEnded

    def _read(self, flags: int) -> None:
        """Read one frame. The conversation is let go of meanwhile, so that other threads can have theirs."""
        self._reading = True
        self._changed.release()
        try:
            data, descriptors = channel.receive(self._sock, flags)
        except ConnectionResetError:
            data, descriptors = b"", []
        except BlockingIOError:
            raise
        except BaseException:
            self._ended = True
            raise
        finally:
            self._changed.acquire()
            self._reading = False
            # Also when nothing has come: somebody may have begun to wait meanwhile because there was a reader.
            self._changed.notify_all()
        if data:
            self._hand_out(data, descriptors)
        else:
            self._ended = True

    def _hand_out(self, data: bytes, descriptors: list[int]) -> None:
        try:
            frame = frames.decode_to_worker(data)
            taken = self._on_message(frame, descriptors)
        except BaseException:
            log.critical("a frame from the front process cannot be dealt with", exc_info=True)
            channel.close_all(descriptors)
            self._ended = True
            raise
        if taken:
            channel.close_all(descriptors)
        else:
            self._inbox.append((frame, descriptors))
