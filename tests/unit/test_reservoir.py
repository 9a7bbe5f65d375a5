"""The sample of a stream: its bounds, and that it is fair."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.recording.reservoir import Reservoir


@given(
    sizes=st.lists(st.integers(0, 50), max_size=80),
    most=st.integers(1, 20),
    most_bytes=st.integers(1, 200),
    seed=st.integers(0, 1000),
)
def test_neither_bound_is_passed_and_the_order_is_kept(sizes, most, most_bytes, seed):
    reservoir = Reservoir(most, most_bytes, Random(seed))
    for place, size in enumerate(sizes):
        reservoir.offer(size, lambda place=place: place)
        kept = reservoir.items()
        assert len(kept) == len(reservoir) <= most
        assert reservoir.nbytes == sum(map(sizes.__getitem__, kept)) <= most_bytes
        assert kept == sorted(kept)
    assert reservoir.too_large == sum(size > most_bytes for size in sizes)


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=10))
def test_everything_is_kept_while_there_is_room(sizes):
    reservoir = Reservoir(10, 50, Random(1))
    for place, size in enumerate(sizes):
        reservoir.offer(size, lambda place=place: place)
    assert reservoir.items() == list(range(len(sizes)))


@pytest.mark.parametrize(("most", "most_bytes"), [(10, 10**9), (1000, 10 * 16)])
def test_each_has_the_same_chance_however_large_it_is_and_whenever_it_comes(most, most_bytes):
    random = Random(7)
    sizes = [1, 31] * 20  # the mean is 16
    times = Counter()
    rounds = 4000
    for _ in range(rounds):
        reservoir = Reservoir(most, most_bytes, random)
        for place, size in enumerate(sizes):
            reservoir.offer(size, lambda place=place: place)
        times.update(reservoir.items())
    small = sum(times[place] for place in range(0, 40, 2))
    early = sum(times[place] for place in range(20))
    total = times.total()
    assert total / rounds == pytest.approx(10, rel=0.1)
    assert early / total == pytest.approx(0.5, abs=0.02)
    # By bytes, the last one that found no room was a large one more often than not.
    assert small / total == pytest.approx(0.5, abs=0.02 if most == 10 else 0.04)
    assert min(times.values()) > (0.8 if most == 10 else 0.7) * max(times.values())


def test_what_is_not_kept_is_not_copied():
    reservoir = Reservoir(1, 100, Random(3))
    copies = []
    for place in range(1000):
        reservoir.offer(1, lambda place=place: copies.append(place))
    assert len(copies) < 30  # the logarithm of a thousand, and some
    reservoir.offer(101, lambda: pytest.fail("it has no room"))
    assert reservoir.too_large == 1
