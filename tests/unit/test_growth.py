"""When a worker's memory has grown too much: made-up samples and times."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.workers.growth import (
    CONFIRM,
    FUTILE,
    GIVE_UP_INTERVALS,
    SETTLE_BATCHES,
    GiveUp,
    GrowthLimits,
    MemorySample,
    MemoryWatch,
    Recycle,
)

MB = 1 << 20
LIMITS = GrowthLimits(growth=1.5, least_bytes=10 * MB, interval_s=60)


class Story:
    """A watch that is told of workers every second."""

    def __init__(self, limits=LIMITS):
        self.watch = MemoryWatch(limits)
        self.now = 1000.0
        self.batches = dict.fromkeys("abc", 0)

    def second(self, life="life", limit=0, batches=1, at_rest=True, **memory):
        self.now += 1
        samples = []
        for name, megabytes in memory.items():
            self.batches[name] = self.batches.get(name, 0) + batches
            samples.append(MemorySample(name, life, megabytes * MB, self.batches[name], limit, at_rest))
        return self.watch.observe(samples, self.now)

    def seconds(self, count, **sample):
        """The verdicts of so many seconds that are alike."""
        return [verdict for _ in range(count) if (verdict := self.second(**sample)) is not None]


def test_one_that_grows_past_its_factor_is_replaced():
    story = Story()
    assert story.seconds(31, a=100) == []
    assert story.watch.baseline_bytes("a") == 100 * MB
    assert story.seconds(50, a=149) == []
    (verdict,) = story.seconds(CONFIRM, a=150)
    assert (verdict.worker, verdict.reason) == ("a", "growth")
    assert f"from {100 * MB} to {150 * MB} bytes" in verdict.why


def test_what_comes_and_goes_with_a_batch_is_no_growth():
    story = Story()
    story.seconds(31, a=100)
    for _ in range(50):
        assert story.seconds(CONFIRM - 1, a=500) == []
        assert story.second(a=100) is None


def test_a_small_worker_may_grow_by_a_little_whatever_the_factor():
    story = Story()
    story.seconds(31, a=10)
    assert story.seconds(10, a=19) == []
    assert len(story.seconds(CONFIRM, a=20)) == 1


def test_the_baseline_is_taken_after_time_and_traffic():
    story = Story()
    assert story.seconds(500, a=100, batches=0) == []
    assert story.watch.baseline_bytes("a") == 0
    assert story.seconds(SETTLE_BATCHES, a=400) == []  # the first batches make the framework set memory aside
    assert story.watch.baseline_bytes("a") == 400 * MB
    assert story.seconds(20, a=500) == []


def test_a_load_or_unload_or_another_process_begins_anew():
    story = Story()
    story.seconds(31, a=100)
    assert story.seconds(20, life="two models", a=300) == []
    assert story.watch.baseline_bytes("a") == 0
    story.seconds(20, life="two models", a=300)
    assert story.watch.baseline_bytes("a") == 300 * MB


def test_one_that_loads_or_comes_back_is_not_looked_at_and_not_forgotten():
    story = Story(GrowthLimits(limit_bytes=100 * MB, interval_s=60))
    for name, successor in (("a", "b"), ("b", "c"), ("c", "d")):
        assert len(story.seconds(CONFIRM, **{name: 150})) == 1
        story.watch.replaced(name, successor, story.now)
    assert story.seconds(CONFIRM - 1, d=150) == []
    assert story.seconds(20, at_rest=False, life="loading", d=150) == []
    (verdict,) = story.seconds(CONFIRM, life="two models", d=150)
    assert isinstance(verdict, GiveUp), "it is still known that the three before it did not last"


def test_a_limit_needs_no_baseline():
    story = Story(GrowthLimits(limit_bytes=200 * MB))
    assert story.seconds(20, a=200) == []
    (verdict,) = story.seconds(CONFIRM, a=201)
    assert verdict == Recycle("a", "limit", f"it holds {201 * MB} bytes, allowed are {200 * MB}")


def test_the_tighter_of_two_limits_counts():
    story = Story(GrowthLimits(limit_bytes=200 * MB))
    assert len(story.seconds(CONFIRM, limit=100 * MB, a=150)) == 1
    story = Story(GrowthLimits(limit_bytes=100 * MB))
    assert len(story.seconds(CONFIRM, limit=200 * MB, a=150)) == 1


def test_without_bounds_nothing_is_ever_replaced():
    story = Story(GrowthLimits())
    story.seconds(31, a=100)
    assert story.seconds(100, a=100_000) == []


def test_one_at_a_time_and_not_too_often():
    story = Story()
    story.seconds(31, a=100, b=100)
    (verdict,) = story.seconds(10, a=200, b=200)
    assert verdict.worker == "a"
    story.watch.replaced("a", "c", story.now)
    assert story.seconds(40, c=100, b=200) == []
    (verdict,) = story.seconds(20, c=100, b=200)
    assert verdict.worker == "b"


def test_a_limit_does_not_wait_for_the_interval_and_goes_before_growth():
    story = Story(GrowthLimits(growth=1.5, least_bytes=10 * MB, limit_bytes=300 * MB, interval_s=60))
    story.seconds(31, a=100, b=100)
    (verdict,) = story.seconds(CONFIRM, a=200, b=400)
    assert (verdict.worker, verdict.reason) == ("b", "limit")
    story.watch.replaced("b", "c", story.now)
    (verdict,) = story.seconds(CONFIRM, a=200, c=100)
    assert (verdict.worker, verdict.reason) == ("a", "growth")


def test_it_gives_up_when_replacing_does_not_help():
    """The model itself is larger than the limit: each successor is over it at once."""
    story = Story(GrowthLimits(limit_bytes=100 * MB, interval_s=60))
    names = [f"worker-{number}" for number in range(FUTILE + 1)]
    for name, successor in itertools.pairwise(names):
        (verdict,) = story.seconds(CONFIRM, **{name: 150})
        assert isinstance(verdict, Recycle)
        story.watch.replaced(name, successor, story.now)
    (verdict,) = story.seconds(CONFIRM, **{names[-1]: 150})
    assert isinstance(verdict, GiveUp)
    assert verdict.worker == names[-1]
    assert story.seconds(GIVE_UP_INTERVALS * 60 - 1, **{names[-1]: 150}) == []
    (verdict,) = story.seconds(1, **{names[-1]: 150})
    assert isinstance(verdict, Recycle), "once in a while it tries again"


def test_a_leak_that_takes_its_time_is_replaced_for_ever():
    story = Story()
    name = "w0"
    for number in range(1, 4 * FUTILE):
        story.seconds(31, **{name: 100})
        story.seconds(100, **{name: 120})
        (verdict,) = story.seconds(CONFIRM, **{name: 160})
        assert isinstance(verdict, Recycle)
        story.watch.replaced(name, f"w{number}", story.now)
        name = f"w{number}"


def test_one_that_could_not_be_replaced_is_left_alone_and_others_are_not():
    story = Story()
    story.seconds(31, a=100, b=100)
    (verdict,) = story.seconds(CONFIRM, a=200, b=100)
    gave_up = story.watch.failed("a", "its file is gone", story.now)
    assert gave_up == GiveUp("a", "its file is gone")
    assert story.seconds(70, a=300, b=100) == []
    (verdict,) = story.seconds(CONFIRM, a=300, b=200)
    assert verdict.worker == "b"


def test_one_that_went_while_it_was_to_be_replaced():
    story = Story()
    story.seconds(31, a=100, b=100)
    story.seconds(CONFIRM, a=200, b=100)
    story.seconds(5, b=100)
    assert story.watch.failed("a", "it was unloaded", story.now) is None
    story.seconds(60, b=100)
    assert len(story.seconds(CONFIRM, b=200)) == 1


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400), st.booleans()), max_size=200))
def test_whatever_happens_one_at_a_time_and_growth_keeps_its_interval(events):
    story = Story(GrowthLimits(growth=1.2, least_bytes=MB, limit_bytes=350 * MB, interval_s=10))
    growth_at = -100.0
    for a, b, ends_well in events:
        verdict = story.second(a=a, b=b)
        if not isinstance(verdict, Recycle):
            continue
        if verdict.reason == "growth":
            assert story.now - growth_at >= 10
            growth_at = story.now
        assert story.second(a=400, b=400) is None
        if ends_well:
            story.watch.replaced(verdict.worker, "c", story.now)
        else:
            story.watch.failed(verdict.worker, "no", story.now)


def test_only_what_was_named_is_replaced():
    with pytest.raises(AssertionError):
        MemoryWatch(LIMITS).replaced("a", "b", 0.0)
