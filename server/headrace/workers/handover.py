"""A batch on its way to its worker: its rows laid into the slot, or told of where another worker has them."""

import os
from collections.abc import Sequence

from headrace.batching.pending import Pending
from headrace.core.tensor import Buffer
from headrace.workers import packing
from headrace.workers.arena import Segment, SegmentSize
from headrace.workers.frames import Load, Loaded, Piece, RequestFrame, Run
from headrace.workers.lending import PASS_BYTES, Attachments, lent_place
from headrace.workers.slots import Slot

MAX_ATTACHED = 2  # segments of others that one frame brings along: a packet holds few descriptors


class Handover:
    """What is to be sent: ``frame`` and ``descriptors``. ``undo`` it when that fails."""

    def __init__(self, slot: Slot, attachments: Attachments) -> None:
        self.frame: Run
        self.descriptors: list[int] = []
        self._slot = slot
        self._attachments = attachments
        self._attached: list[tuple[int, int]] = []
        self._segment_bytes = 0

    def prepare(self, load: Load, loaded: Loaded, sequence: int, pending: Sequence[Pending]) -> None:
        """Fill the slot with the batch, and write the frame that tells of it. On an error nothing is left."""
        try:
            self._prepare(load, loaded, sequence, pending)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """The worker was not told of it: the slot's next batch must bring another segment."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        for number, _ in self._attached:
            self._attachments.forget(number)
        if self._segment_bytes:
            self._slot.size, self._slot.inputs = SegmentSize(), None

    def _prepare(self, load: Load, loaded: Loaded, sequence: int, pending: Sequence[Pending]) -> None:
        slot = self._slot
        requests: tuple[RequestFrame, ...] = ()
        if loaded.wants_requests or loaded.signature.decoupled:
            requests = tuple(map(_request_frame, pending))
        batch = [one.inputs for one in pending]
        frames, needed = packing.input_frames(batch, loaded.signature.max_batch_size > 0)
        self._segment_bytes = slot.size.fit(needed)
        if self._segment_bytes:
            slot.inputs, descriptor = Segment.create(self._segment_bytes)
            self.descriptors.append(descriptor)
        assert slot.inputs is not None, "a segment has a header at least"
        pieces: tuple[Piece, ...] = ()
        if any(one.request.callers for one in pending):
            pieces = packing.fill_or_refer(slot.inputs.view, frames, batch, self.refer)
        else:
            packing.fill(slot.inputs.view, frames, batch)
        self.frame = Run(
            load.instance,
            sequence,
            slot.index,
            self._segment_bytes,
            frames,
            requests,
            pieces,
            tuple(self._attached),
            len(pending),
        )

    def refer(self, data: Buffer) -> tuple[int, int] | None:
        """Where the worker finds ``data`` in another's outputs; None when it is to be copied.

        A segment that the worker does not have is brought along.
        """
        place = lent_place(data) if len(data) >= PASS_BYTES else None
        if place is None:
            return None
        segment, offset = place
        number = self._attachments.number(segment)
        if number is None:
            if len(self._attached) == MAX_ATTACHED:
                return None
            self.descriptors.append(os.dup(segment.descriptor))
            number = self._attachments.add(segment)
            self._attached.append((number, segment.nbytes))
        return number, offset


def _request_frame(one: Pending) -> RequestFrame:
    request = one.request
    names = tuple(output.name for output in request.outputs)
    return RequestFrame(one.rows, request.id, request.parameters, names, one.slot)
