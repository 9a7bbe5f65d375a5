"""An instance's places for batches: two at the worker, and those whose answers are still being read."""

import asyncio
import contextlib
import weakref
from collections.abc import Callable

from headrace.workers.arena import Segment, SegmentSize
from headrace.workers.lending import lent_memory

AT_WORKER = 2  # one batch running and one staged behind it, so that the worker never waits for the front
MAX_LENT = 16  # places whose outputs others read; past that, outputs are copied out
MAX_LENT_BYTES = 256 * 1024 * 1024


class Slot:
    """A batch's place in shared memory: the front owns the inputs' segment, the worker the outputs'."""

    __slots__ = ("index", "inputs", "outputs", "size")

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = SegmentSize()
        self.inputs: Segment | None = None
        self.outputs: Segment | None = None


class Slots:
    """The places of one instance for one life of its worker. ``on_free`` is told when one can be taken again."""

    def __init__(self, on_free: Callable[[], None]) -> None:
        self._on_free = on_free
        self._loop = asyncio.get_running_loop()
        self._free = [Slot(index) for index in range(AT_WORKER)]
        self._made = AT_WORKER
        self._at_worker = 0
        self._lent = 0
        self._lent_bytes = 0

    @property
    def available(self) -> bool:
        """Whether one more batch can be handed over."""
        return bool(self._free) and self._at_worker < AT_WORKER

    @property
    def idle(self) -> bool:
        """Whether the worker has no batch."""
        return not self._at_worker

    def take(self) -> Slot:
        """A place for one more batch; only when one is available."""
        self._at_worker += 1
        return self._free.pop()

    def give(self, slot: Slot) -> None:
        """The batch has ended, and its outputs have been copied."""
        self._at_worker -= 1
        self._free.append(slot)
        self._on_free()

    def lend(self, slot: Slot) -> memoryview | None:
        """The batch has ended; its outputs, to be read where they are for as long as anybody refers to them.

        The place is free again when nobody does any more: views of the memory hold on to it. None when too much is
        lent: then it is for ``give``.
        """
        outputs = slot.outputs
        if outputs is None or self._lent >= MAX_LENT or self._lent_bytes + outputs.nbytes > MAX_LENT_BYTES:
            return None
        self._at_worker -= 1
        self._lent += 1
        nbytes = outputs.nbytes
        self._lent_bytes += nbytes
        if len(self._free) + self._at_worker < AT_WORKER:
            self._free.append(Slot(self._made))
            self._made += 1
        base = lent_memory(outputs)
        weakref.finalize(base, self._no_longer_read, slot, nbytes).atexit = False
        self._on_free()
        return base.data

    def _no_longer_read(self, slot: Slot, nbytes: int) -> None:
        """Any thread may have held the last view."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody takes a place any more
            self._loop.call_soon_threadsafe(self._take_back, slot, nbytes)

    def _take_back(self, slot: Slot, nbytes: int) -> None:
        self._lent -= 1
        self._lent_bytes -= nbytes
        self._free.append(slot)
        self._on_free()
