"""A Unix socket that carries whole frames and, beside them, memory descriptors."""

import array
import asyncio
import errno
import mmap
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

# Frames are a few hundred bytes. A larger one (a model with a thousand tensors) travels as a memory
# descriptor instead, because a packet socket bounds what one packet may hold.
INLINE_BYTES = 32 * 1024
RECEIVE_BYTES = INLINE_BYTES + 1024
_SPILLED = b"\xc1"  # a byte that never starts a MessagePack value
_MAX_DESCRIPTORS = 4
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)  # plain, because enum's flags take a microsecond to combine
_ANCILLARY_BYTES = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends. Packets keep frames whole, so nobody has to put them together again."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _packet(frame: bytes, descriptors: Sequence[int]) -> tuple[bytes, list[int], int | None]:
    """What to send for ``frame``: bytes, descriptors, and a descriptor to close afterwards.

    Raises:
        OSError: there is no descriptor or no memory for it now; nothing is left of it.
    """
    if len(frame) <= INLINE_BYTES:
        return frame, list(descriptors), None
    spill = os.memfd_create("headrace-frame", os.MFD_CLOEXEC)
    try:
        with os.fdopen(spill, "wb", closefd=False) as file:
            file.write(frame)
    except BaseException:
        os.close(spill)
        raise
    return _SPILLED, [spill, *descriptors], spill


def _send(sock: socket.socket, data: bytes, descriptors: Sequence[int]) -> None:
    if descriptors:
        socket.send_fds(sock, [data], list(descriptors))
    else:
        sock.send(data)


def receive(sock: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """One frame and its descriptors, which are the caller's to close; an empty frame is the end.

    A large one for which this process has no descriptor or no memory is given as what no reader understands.

    Raises:
        BlockingIOError: the socket does not block, or ``flags`` say so, and nothing is there.
    """
    data, ancillary, _, _ = sock.recvmsg(RECEIVE_BYTES, _ANCILLARY_BYTES, _CLOEXEC | flags)
    if not ancillary:
        return data, []
    descriptors = array.array("i")
    for _, _, packed in ancillary:
        descriptors.frombytes(packed[: len(packed) - len(packed) % descriptors.itemsize])
    if data != _SPILLED:
        return data, descriptors.tolist()
    spill, *rest = descriptors
    try:
        with mmap.mmap(spill, 0) as memory:
            frame = memory[:]
    except (OSError, MemoryError):
        close_all(rest)
        return data, []
    finally:
        os.close(spill)
    return frame, rest


def send_blocking(sock: socket.socket, frame: bytes, descriptors: Sequence[int] = ()) -> None:
    """Send one frame from the worker's side. The descriptors stay the caller's."""
    data, passed, spill = _packet(frame, descriptors)
    try:
        _send(sock, data, passed)
    finally:
        if spill is not None:
            os.close(spill)


def _may_pass(error: OSError) -> bool:
    """Whether sending again may work: the worker has not read yet, or the system is short of memory."""
    return error.errno in (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS)


def close_all(descriptors: Sequence[int]) -> None:
    """Close descriptors that are not needed any more, or never were."""
    for descriptor in descriptors:
        os.close(descriptor)


class Channel:
    """The front process's end: never blocks the loop, calls back for each frame that comes.

    ``send`` takes over the descriptors it is given and closes them once they are sent. Only a frame that is too large
    for a packet may find no room in this process: then it raises OSError, and the descriptors stay the caller's.
    """

    def __init__(self, sock: socket.socket, on_frame: Callable[[bytes, list[int]], None]) -> None:
        self._sock = sock
        self._on_frame = on_frame
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock, self.read)

    def send(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send now, or as soon as the worker has read what was sent before. Nothing is sent to a closed end."""
        data, passed, _ = _packet(frame, descriptors)
        if self._closed:
            close_all(passed)
            return
        if not self._unsent:
            try:
                _send(self._sock, data, passed)
            except OSError as error:
                if not _may_pass(error):  # the worker is gone; its process descriptor tells of its death
                    close_all(passed)
                    return
                self._loop.add_writer(self._sock, self._flush)
            else:
                close_all(passed)
                return
        self._unsent.append((data, passed))

    def read(self) -> None:
        """Deliver every frame that has arrived."""
        while not self._closed:
            try:
                frame, descriptors = receive(self._sock)
            except BlockingIOError:
                return
            except OSError:
                frame, descriptors = b"", []
            if not frame:
                self._stop_reading()
                return
            self._on_frame(frame, descriptors)

    def close(self) -> None:
        """Close this end; what was not sent is dropped."""
        if self._closed:
            return
        self._stop_reading()
        self._closed = True
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for _, passed in self._unsent:
            close_all(passed)
        self._unsent.clear()

    def _stop_reading(self) -> None:
        self._loop.remove_reader(self._sock)

    def _flush(self) -> None:
        while self._unsent:
            data, passed = self._unsent[0]
            try:
                _send(self._sock, data, passed)
            except OSError as error:
                if _may_pass(error):
                    return
            close_all(passed)
            self._unsent.popleft()
        self._loop.remove_writer(self._sock)
