"""Latency curves, from made-up batches."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.curve import FORGOTTEN, MAX_BUCKETS, LatencyCurve, LatencyCurves, shape_bucket

MS = 1_000_000


def line(rows, batch_ms=4.0, row_ms=0.7):
    return int((batch_ms + row_ms * rows) * MS)


def curve_of(*batches):
    curve = LatencyCurve()
    for rows, took_ns in batches:
        curve.observe(rows, took_ns)
    return curve


def noisy(seed, sizes, batches=3000, took_of=line, noise=0.1):
    chance = random.Random(seed)
    curve = LatencyCurve()
    for _ in range(batches):
        rows = chance.choice(sizes)
        curve.observe(rows, int(took_of(rows) * chance.lognormvariate(0, noise)))
    return curve


def test_before_the_first_batch_nothing_is_known():
    curve = LatencyCurve()
    assert (curve.mean_ns(1), curve.high_ns(7), curve.most_rows(10**9), curve.known_rows, curve.sizes()) == (
        0,
        0,
        0,
        0,
        [],
    )
    assert not curve.is_point


def test_one_size_tells_of_larger_ones_in_proportion_and_of_smaller_ones_that_they_take_no_longer():
    curve = curve_of((4, 20 * MS))
    assert curve.is_point
    assert [curve.mean_ns(rows) / MS for rows in (1, 4, 8)] == [20, 20, 40]
    assert curve.known_rows == 4


def test_a_straight_line_is_read_as_one_between_beyond_and_wherever_the_sizes_fell():
    curve = curve_of(*((rows, line(rows)) for rows in (1, 3, 6, 11, 27, 12, 5, 29)))
    for rows in (2, 8, 16, 24, 40):
        assert curve.mean_ns(rows) == pytest.approx(line(rows), rel=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_noise_averages_out_and_is_kept_as_what_few_batches_exceed(seed):
    curve = noisy(seed, [1, 2, 5, 9, 20, 31])
    chance = random.Random(seed + 100)
    for rows in (1, 6, 16, 31):
        assert curve.mean_ns(rows) == pytest.approx(line(rows), rel=0.05)
        exceeding = sum(line(rows) * chance.lognormvariate(0, 0.1) > curve.high_ns(rows) for _ in range(2000))
        assert 0.0005 < exceeding / 2000 < 0.05


def test_an_outlier_hardly_moves_it():
    curve = noisy(1, [8])
    before_ns = curve.mean_ns(8)
    curve.observe(8, 100 * line(8))
    assert curve.mean_ns(8) == pytest.approx(before_ns, rel=0.1)
    for _ in range(100):
        curve.observe(8, line(8))
    assert curve.mean_ns(8) == pytest.approx(before_ns, rel=0.03)


def test_a_new_size_that_begins_with_an_outlier_is_soon_known():
    curve = noisy(1, [1, 2, 4, 8], noise=0.02)
    curve.observe(16, 20 * line(16))
    assert curve.mean_ns(16) < 2 * line(16)
    for _ in range(5):
        curve.observe(16, line(16))
    assert curve.mean_ns(16) == pytest.approx(line(16), rel=0.15)


def test_a_new_size_that_really_is_so_much_slower_is_known_too():
    curve = noisy(1, [1, 2, 4, 8], noise=0.02)
    for _ in range(30):
        curve.observe(16, 10 * line(16))
    assert curve.mean_ns(16) == pytest.approx(10 * line(16), rel=0.3)


@pytest.mark.parametrize("factor", [0.5, 1.5, 2.0])
def test_a_slower_or_faster_machine_is_followed_by_sizes_that_do_not_run_meanwhile(factor):
    curve = noisy(2, [1, 2, 8, 30])
    chance = random.Random(3)
    for _ in range(60):
        curve.observe(2, int(factor * line(2) * chance.lognormvariate(0, 0.1)))
    assert curve.mean_ns(2) == pytest.approx(factor * line(2), rel=0.15)
    assert curve.mean_ns(30) == pytest.approx(factor * line(30), rel=0.25), "the sizes that run learn a part themselves"


def test_a_model_as_regular_as_a_clock_is_believed_when_it_changes():
    curve = curve_of(*[(4, 10 * MS)] * 1000)
    for _ in range(300):
        curve.observe(4, 15 * MS)
    assert curve.mean_ns(4) == pytest.approx(15 * MS, rel=0.05)


def test_a_larger_size_that_has_not_run_for_long_is_forgotten_and_a_smaller_one_is_not():
    curve = curve_of((1, 5 * MS), (2, 6 * MS), (32, 900 * MS))
    for _ in range(FORGOTTEN):
        curve.observe(2, 6 * MS)
    assert curve.mean_ns(32) > 800 * MS
    curve.observe(2, 6 * MS)
    assert curve.mean_ns(32) == pytest.approx(36 * MS, rel=0.05), "as the line through one and two goes on"
    assert curve.mean_ns(1) == pytest.approx(5 * MS, rel=0.05)
    assert curve.known_rows == 2


def test_what_was_seen_seldom_may_have_been_bad_luck():
    seldom, often = curve_of((1, 5 * MS), (2, 11 * MS)), curve_of(*[(1, 5 * MS), (2, 11 * MS)] * 500)
    assert seldom.hopeful_ns(2) < 0.85 * seldom.mean_ns(2)
    assert often.hopeful_ns(2) == pytest.approx(often.mean_ns(2), rel=0.01)


@given(st.lists(st.tuples(st.integers(1, 512), st.integers(1, 10**10)), min_size=1, max_size=60))
def test_it_is_monotone_and_consistent_whatever_was_observed(batches):
    curve = curve_of(*batches)
    sizes = range(1, 600, 7)
    for read in (curve.mean_ns, curve.high_ns, curve.hopeful_ns):
        values = [read(rows) for rows in sizes]
        assert all(later >= earlier * (1 - 1e-9) for earlier, later in pairwise(values))
        assert min(values) >= 0
    for rows in sizes:
        assert curve.hopeful_ns(rows) <= curve.mean_ns(rows) * (1 + 1e-9) <= curve.high_ns(rows) * (1 + 1e-6)
    assert len(curve.sizes()) <= 10
    for within_ns in (10**6, 10**8, 10**10):
        most = curve.most_rows(within_ns)
        if 0 < most < 10**6:
            assert curve.hopeful_ns(most) <= within_ns * (1 + 1e-6)


def test_the_largest_size_within_a_time_is_read_off_the_line():
    curve = curve_of(*[(rows, line(rows)) for rows in (1, 2, 4, 8, 16)] * 100)
    assert [curve.most_rows(line(rows) * 1.001) for rows in (3, 12, 30)] == pytest.approx([3, 12, 30], abs=1)
    assert curve.most_rows(line(1) * 0.9) == 0


def test_shapes_of_similar_size_share_a_curve_and_others_do_not():
    curves = LatencyCurves()
    curves.observe(((100,),), 1, 5 * MS)
    assert curves.of(((120,),)) is curves.of(((100,),)) is curves.of(((10, 10),))
    assert curves.of(((300,),)) is None
    assert curves.of(None) is None
    curves.observe(None, 1, 7 * MS)
    assert curves.of(None).mean_ns(1) == 7 * MS
    assert [elements for elements, _ in curves.named()] == [0, 128]


def test_an_optional_input_that_is_left_out_has_no_elements():
    assert shape_bucket(((64,), None)) == shape_bucket(((64,),)) == 6
    assert shape_bucket((None,)) == shape_bucket(((1,),)) == 1
    assert shape_bucket(None) == 0


def test_the_bucket_that_was_not_used_for_longest_makes_room():
    curves = LatencyCurves()
    for power in range(2, 2 + MAX_BUCKETS):
        curves.observe(((1 << power,),), 1, MS)
    curves.observe(((4,),), 1, MS)
    curves.observe(((1 << 30,),), 1, MS)
    assert len(curves) == MAX_BUCKETS
    assert curves.of(((4,),)) is not None
    assert curves.of(((8,),)) is None
