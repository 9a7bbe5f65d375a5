"""Segments of shared memory, and how large they are to be."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.workers import arena
from headrace.workers.arena import ALIGNMENT, KEEP_BYTES, SHRINK_AFTER, SMALLEST_BYTES, Segment, SegmentSize, aligned

MIB = 1024 * 1024


def test_both_ends_see_what_either_writes():
    ours, descriptor = Segment.create(SMALLEST_BYTES)
    theirs = Segment(descriptor, SMALLEST_BYTES)
    os.close(descriptor)
    ours.view[10:13] = b"abc"
    assert bytes(theirs.view[10:13]) == b"abc"
    theirs.view[0] = 7
    assert ours.view[0] == 7
    assert len(ours.view) == len(theirs.view) == ours.nbytes == SMALLEST_BYTES


def test_a_new_segment_is_all_zeros_and_has_no_name():
    segment, descriptor = Segment.create(SMALLEST_BYTES)
    assert not any(segment.view)
    assert str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith("/memfd:")
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


def test_memory_that_cannot_be_mapped_leaves_no_descriptor(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    before = sorted(Path("/proc/self/fd").iterdir())
    monkeypatch.setattr(arena.mmap, "mmap", refuse)
    with pytest.raises(OSError, match="memory"):
        Segment.create(SMALLEST_BYTES)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_the_first_batch_makes_one_and_like_ones_go_on_with_it():
    size = SegmentSize()
    assert size.fit(1000) == SMALLEST_BYTES
    assert [size.fit(needed) for needed in (1, 1000, 0, SMALLEST_BYTES)] == [0, 0, 0, 0]
    assert size.fit(SMALLEST_BYTES + 1) == 2 * SMALLEST_BYTES


def test_a_batch_of_no_bytes_needs_none():
    assert SegmentSize().fit(0) == 0


def test_growing_bit_by_bit_makes_few_new_ones():
    size = SegmentSize()
    made = [new for needed in range(0, 64 * MIB, 64 * 1024) if (new := size.fit(needed))]
    assert made == sorted(made)
    assert len(made) <= 11


def test_one_large_batch_does_not_hold_its_memory_for_ever():
    size = SegmentSize()
    assert size.fit(100 * MIB) == 128 * MIB
    assert [size.fit(MIB) for _ in range(SHRINK_AFTER - 1)] == [0] * (SHRINK_AFTER - 1)
    assert size.fit(MIB) == MIB
    assert size.nbytes == MIB


def test_large_batches_now_and_then_keep_it():
    size = SegmentSize()
    size.fit(100 * MIB)
    for _ in range(5):
        assert not any(size.fit(MIB) for _ in range(SHRINK_AFTER - 1))
        assert size.fit(90 * MIB) == 0


def test_small_ones_are_never_given_back():
    size = SegmentSize()
    assert size.fit(KEEP_BYTES) == KEEP_BYTES
    assert not any(size.fit(1) for _ in range(3 * SHRINK_AFTER))


@given(st.lists(st.integers(0, 200 * MIB), max_size=300))
def test_there_is_always_room_and_never_more_than_twice_what_was_asked(needs):
    size = SegmentSize()
    for needed in needs:
        new = size.fit(needed)
        assert new in (0, size.nbytes)
        assert size.nbytes >= needed
        assert size.nbytes <= max(SMALLEST_BYTES, 2 * max(needs))
        assert not new or new % 4096 == 0


@pytest.mark.parametrize(("nbytes", "expected"), [(0, 0), (1, 64), (64, 64), (65, 128), (1000, 1024)])
def test_alignment(nbytes, expected):
    assert aligned(nbytes) == expected
    assert aligned(nbytes) % ALIGNMENT == 0
