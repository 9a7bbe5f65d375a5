"""An instance's places for batches, and memory that is lent for as long as somebody reads it."""

import asyncio
import os
import threading

import pytest

from headrace.workers import slots as slots_module
from headrace.workers.arena import SMALLEST_BYTES, Segment
from headrace.workers.slots import AT_WORKER, MAX_LENT, Slots


class Places:
    """Slots, and how often somebody was told that one can be taken."""

    def __init__(self):
        self.told = 0
        self.slots = Slots(self._on_free)

    def _on_free(self):
        self.told += 1

    def done(self, nbytes=SMALLEST_BYTES):
        """A slot whose batch has ended, with outputs."""
        slot = self.slots.take()
        segment, descriptor = Segment.create(nbytes)
        os.close(descriptor)
        segment.view[:4] = b"done"
        slot.outputs = segment
        return slot


async def settle():
    for _ in range(3):
        await asyncio.sleep(0)


@pytest.fixture
async def places():
    return Places()


async def test_no_more_batches_are_at_the_worker_than_run_and_wait(places):
    slots = places.slots
    assert slots.idle
    taken = [slots.take() for _ in range(AT_WORKER)]
    assert len({slot.index for slot in taken}) == AT_WORKER
    assert not slots.available
    assert not slots.idle
    for slot in taken:
        slots.give(slot)
    assert slots.available
    assert slots.idle
    assert places.told == AT_WORKER


async def test_what_is_lent_leaves_a_place_at_the_worker_and_comes_back_after_the_last_view(places):
    slots = places.slots
    slot = places.done()
    view = slots.lend(slot)
    assert slots.idle
    assert places.told == 1
    part = view[:4]
    taken = [slots.take() for _ in range(AT_WORKER)]
    assert slot not in taken, "somebody reads it still"
    assert not slots.available
    for one in taken:
        slots.give(one)
    told = places.told
    del view
    await settle()
    assert places.told == told, "a part of it is still read"
    assert bytes(part) == b"done"
    del part
    await settle()
    assert places.told == told + 1
    assert slots.take() is slot


async def test_the_worker_is_given_other_memory_while_one_is_lent(places):
    slots = places.slots
    lent = [slots.lend(places.done()) for _ in range(5)]
    assert all(view is not None for view in lent)
    indices = set()
    while slots.available:
        indices.add(slots.take().index)
    assert len(indices) == AT_WORKER


async def test_no_more_is_lent_than_may_be_and_the_rest_is_for_giving(places):
    slots = places.slots
    lent = [slots.lend(places.done()) for _ in range(MAX_LENT)]
    assert None not in lent
    slot = places.done()
    assert slots.lend(slot) is None
    slots.give(slot)
    assert slots.idle
    lent.pop()
    await settle()
    assert slots.lend(places.done()) is not None


async def test_nor_more_bytes(places, monkeypatch):
    monkeypatch.setattr(slots_module, "MAX_LENT_BYTES", 3 * SMALLEST_BYTES)
    slots = places.slots
    lent = [slots.lend(places.done(SMALLEST_BYTES)), slots.lend(places.done(2 * SMALLEST_BYTES))]
    assert None not in lent
    slot = places.done(SMALLEST_BYTES)
    assert slots.lend(slot) is None
    slots.give(slot)
    del lent[1]
    await settle()
    assert slots.lend(places.done(2 * SMALLEST_BYTES)) is not None


async def test_a_batch_without_outputs_lends_nothing(places):
    slot = places.slots.take()
    assert places.slots.lend(slot) is None
    places.slots.give(slot)
    assert places.slots.idle


async def test_places_do_not_become_more_by_lending_again_and_again(places):
    slots = places.slots
    for _ in range(100):
        view = slots.lend(places.done())
        del view
        await settle()
    assert len(slots._free) <= AT_WORKER + 1
    assert slots._lent == slots._lent_bytes == 0


async def test_the_last_view_may_go_in_another_thread(places):
    views = [places.slots.lend(places.done())]
    told = places.told
    thread = threading.Thread(target=views.clear)
    thread.start()
    thread.join()
    await settle()
    assert places.told == told + 1


def test_views_may_outlive_the_loop():
    async def lend():
        places = Places()
        return places.slots.lend(places.done())

    view = asyncio.run(lend())
    assert bytes(view[:4]) == b"done"
    del view  # an exception here would be a warning, and so an error
