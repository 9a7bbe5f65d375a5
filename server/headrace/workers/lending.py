"""One worker's outputs as another's inputs, where they lie: who lends what, and who has what of it mapped."""

import asyncio
import weakref
from collections.abc import Callable
from itertools import count
from typing import cast

import numpy as np
import numpy.typing as npt

from headrace.core.tensor import Buffer
from headrace.workers.arena import Segment

PASS_BYTES = 64 * 1024  # of a tensor: copying less costs less than telling of it


class LentMemory(np.ndarray[tuple[int], np.dtype[np.uint8]]):  # not npt.NDArray, which is no class from NumPy 2.5 on
    """The bytes of a segment that others read for as long as they refer to them; views of it say whose they are."""

    segment: Segment


def lent_memory(segment: Segment) -> LentMemory:
    """The whole of ``segment``."""
    memory = np.frombuffer(segment.view, dtype=np.uint8).view(LentMemory)
    memory.segment = segment
    return memory


def lent_place(data: Buffer) -> tuple[Segment, int] | None:
    """The segment that ``data`` is a view of, and where in it; None for memory that cannot be passed on."""
    owner = data.obj if isinstance(data, memoryview) else None
    if not isinstance(owner, LentMemory) or owner.segment.descriptor < 0:
        return None
    return owner.segment, _address(np.frombuffer(data, dtype=np.uint8)) - _address(owner)


def _address(array: npt.NDArray[np.uint8]) -> int:
    return cast("int", array.__array_interface__["data"][0])


class Attachments:
    """The segments of others that one worker has mapped.

    ``detach`` is called with a segment's number when nobody in this process refers to it any more. Numbers are never
    used twice: the end of a segment that was known in one life of the worker means nothing to the next.
    """

    def __init__(self, detach: Callable[[int], None]) -> None:
        self._detach = detach
        self._loop = asyncio.get_running_loop()
        self._numbers: weakref.WeakKeyDictionary[Segment, int] = weakref.WeakKeyDictionary()
        self._next = count(1)

    def number(self, segment: Segment) -> int | None:
        """The segment's number; None when the worker does not have it."""
        return self._numbers.get(segment)

    def add(self, segment: Segment) -> int:
        """A number for a segment that the worker is about to be given."""
        number = self._numbers[segment] = next(self._next)
        # By way of the loop, because a collector may run this in the middle of anything.
        weakref.finalize(segment, self._unreferred, number).atexit = False
        return number

    def _unreferred(self, number: int) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._detach, number)

    def forget_all(self) -> None:
        """The worker has died; the next one has nothing mapped."""
        self._numbers.clear()

    def forget(self, segment_number: int) -> None:
        """The worker was not given it after all."""
        for segment, number in list(self._numbers.items()):
            if number == segment_number:
                del self._numbers[segment]
