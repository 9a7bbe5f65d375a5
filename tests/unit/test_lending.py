"""Outputs of one worker as inputs of another, where they lie."""

import asyncio
import gc
import os
from pathlib import Path

import numpy as np

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType, Tensor
from headrace.core.validation import ModelInputs
from headrace.workers.arena import Segment
from headrace.workers.frames import Piece
from headrace.workers.lending import Attachments, lent_memory, lent_place
from headrace.workers.packing import fill_or_refer, input_frames
from headrace.workers.slot_memory import read_inputs

SIGNATURE = Signature((TensorSpec("x", DataType.UINT8, (-1, 8)),), (), 8)


def segment(nbytes, keep=True):
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, nbytes)
    try:
        return Segment(descriptor, nbytes, keep=keep)
    finally:
        os.close(descriptor)


def descriptors():
    """How many there are of segments like the ones made here, once those that nobody has any more are gone."""
    gc.collect()
    return sum(os.path.realpath(one).startswith("/memfd:test ") for one in Path("/proc/self/fd").iterdir())


def rows(data, count=1):
    return ModelInputs((Tensor("x", DataType.UINT8, (count, 8), data),), count, None)


def test_a_view_of_lent_memory_tells_whose_it_is():
    lent = segment(4096)
    view = lent_memory(lent).data
    assert lent_place(view[128:256]) == (lent, 128)
    assert lent_place(view[100:300][28:64]) == (lent, 128)
    assert lent_place(bytes(8)) is None
    assert lent_place(memoryview(bytearray(8))) is None


def test_memory_without_a_descriptor_cannot_be_passed_on():
    assert lent_place(lent_memory(segment(4096, keep=False)).data[:64]) is None


def test_a_segment_gives_its_descriptor_back():
    before = descriptors()
    kept = segment(4096)
    assert descriptors() > before
    del kept
    assert descriptors() == before


def test_data_of_others_is_referred_to_and_ones_own_is_copied():
    lent = segment(4096)
    theirs = lent_memory(lent).data[64:72]
    batch = [rows(b"aaaaaaaa"), rows(theirs), rows(b"bbbbbbbbcccccccc", 2)]
    frames, needed = input_frames(batch, batches=True)
    own = memoryview(bytearray(needed))
    pieces = fill_or_refer(own, frames, batch, lambda data: (7, 64) if lent_place(data) else None)
    start = frames[0].offset
    assert pieces == (Piece(start + 8, 7, 64, 8),)
    assert bytes(own[start : start + 32]) == b"aaaaaaaa" + bytes(8) + b"bbbbbbbbcccccccc"


def test_an_input_that_is_elsewhere_is_read_there():
    frames, needed = input_frames([rows(b"aaaaaaaa")], batches=True)
    own = memoryview(bytearray(needed))
    elsewhere = memoryview(b"zzzzzzzz")
    read = read_inputs(SIGNATURE, frames, own, {frames[0].offset: elsewhere})
    assert read["x"].tobytes() == b"zzzzzzzz"
    assert np.shares_memory(read["x"], np.frombuffer(elsewhere, dtype=np.uint8))


async def test_a_worker_is_told_when_nobody_refers_to_a_segment_any_more():
    detached = []
    attachments = Attachments(detached.append)
    first, second = segment(4096), segment(4096)
    assert attachments.number(first) is None
    one, two = attachments.add(first), attachments.add(second)
    assert one != two
    assert attachments.number(first) == one
    view = lent_memory(first).data[:8]
    del first
    gc.collect()
    await asyncio.sleep(0)
    assert detached == [], "a view of it is still there"
    del view
    gc.collect()
    await asyncio.sleep(0)
    assert detached == [one]
    attachments.forget(two)
    assert attachments.number(second) is None


async def test_the_end_of_a_segment_of_an_earlier_life_means_nothing_to_the_next():
    detached = []
    attachments = Attachments(detached.append)
    first, second = segment(4096), segment(4096)
    old = attachments.add(first)
    attachments.forget_all()
    assert attachments.number(first) is None
    new = attachments.add(second)
    del first
    gc.collect()
    await asyncio.sleep(0)
    assert new not in detached
    assert old != new
