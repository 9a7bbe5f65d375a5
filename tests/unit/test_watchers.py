"""Who waits for a queue to grow, each for a size of his own."""

from headrace.batching.watchers import Watchers


async def test_each_is_told_at_its_size_and_the_smallest_is_known():
    watchers = Watchers()
    assert watchers.size == 0
    five, two, three = (watchers.add(size) for size in (5, 2, 3))
    assert watchers.size == 2
    watchers.tell(3)
    assert (five.done(), two.done(), three.done()) == (False, True, True)
    assert watchers.size == 5
    watchers.tell(7)
    assert five.done()
    assert watchers.size == 0


async def test_who_was_told_something_else_or_has_left_is_no_trouble():
    watchers = Watchers()
    told, left, stays = (watchers.add(2) for _ in range(3))
    told.set_result(None)
    left.cancel()
    watchers.tell(2)
    assert stays.done()
    assert left.cancelled()


async def test_who_waits_no_longer_is_forgotten_when_the_next_one_comes():
    watchers = Watchers()
    for _ in range(5):
        watchers.add(1).cancel()
    watchers.add(4)
    assert watchers.size == 4
    assert len(watchers._watching) == 1
