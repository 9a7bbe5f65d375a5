"""Shared memory for a batch: segments that both processes map, and how large they are to be."""

import contextlib
import mmap
import os
import struct

ALIGNMENT = 64
_SEQUENCE = struct.Struct("<Q")
SMALLEST_BYTES = 64 * 1024
HEADER_BYTES = 64  # at the start of an input segment: the sequence number of the batch that the worker began last
KEEP_BYTES = 4 * 1024 * 1024  # a segment up to this size is never given back for being too large
SHRINK_AFTER = 64  # batches in a row that would fit into an eighth


class Segment:
    """A piece of anonymous shared memory.

    It is a memfd passed over the socket rather than a name in /dev/shm, so nothing is left behind when a
    process dies: the kernel frees it with its last mapping.
    """

    __slots__ = ("__weakref__", "descriptor", "nbytes", "view")

    def __init__(self, descriptor: int, nbytes: int, *, keep: bool = False, writable: bool = True) -> None:
        """Map the memory. With ``keep`` a descriptor of it is kept, to be passed on to others."""
        self.descriptor = -1
        self.nbytes = nbytes
        self.view = memoryview(
            mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        )
        if keep:
            with contextlib.suppress(OSError):  # out of descriptors: then it is not passed on
                self.descriptor = os.dup(descriptor)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    @classmethod
    def create(cls, nbytes: int) -> tuple["Segment", int]:
        """A new segment and its descriptor, which the caller passes on and closes."""
        descriptor = os.memfd_create("headrace", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, nbytes)
            return cls(descriptor, nbytes), descriptor
        except BaseException:  # there is no memory to map: what is tried again and again must leave nothing
            os.close(descriptor)
            raise


def mark_begun(segment: memoryview, sequence: int) -> None:
    """The worker begins a batch: should it die now, this batch may be why."""
    _SEQUENCE.pack_into(segment, 0, sequence)


def begun(segment: memoryview) -> int:
    """The batch that was begun last in this segment; 0 for none."""
    sequence: int = _SEQUENCE.unpack_from(segment, 0)[0]
    return sequence


class SegmentSize:
    """How large a slot's segment should be. Pure: told of each batch's need, it says when to replace it."""

    __slots__ = ("_small", "nbytes")

    def __init__(self) -> None:
        self.nbytes = 0
        self._small = 0

    def fit(self, needed: int) -> int:
        """The size of a new segment to make for this batch, or 0 to go on with the present one."""
        if needed > self.nbytes:
            return self._resize(needed)
        if self.nbytes > KEEP_BYTES and needed <= self.nbytes // 8:
            self._small += 1
            if self._small >= SHRINK_AFTER:
                return self._resize(needed)
        else:
            self._small = 0
        return 0

    def _resize(self, needed: int) -> int:
        self._small = 0
        self.nbytes = max(SMALLEST_BYTES, 1 << (needed - 1).bit_length() if needed > 1 else 1)
        return self.nbytes


def aligned(nbytes: int) -> int:
    """The next multiple of the alignment that vector instructions like."""
    return (nbytes + ALIGNMENT - 1) & -ALIGNMENT
