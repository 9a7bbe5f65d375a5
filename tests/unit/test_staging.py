"""When a batch is staged: with half of the crowd, never more than a batch holds, and the crowd is forgotten in time."""

import pytest

from headrace.batching.staging import Staging


@pytest.mark.parametrize(("clients", "wanted"), [(1, 1), (2, 1), (3, 2), (8, 4), (31, 16), (32, 16)])
def test_half_of_those_that_are_unanswered(clients, wanted):
    assert Staging().wanted(clients, 64) == wanted


def test_a_batch_holds_no_more():
    assert Staging().wanted(1000, 8) == 8
    assert Staging().wanted(1000, 1) == 1


def test_a_moment_of_few_does_not_make_the_batches_small():
    staging = Staging()
    staging.wanted(32, 64)
    assert staging.wanted(4, 64) > 14


def test_a_crowd_that_has_left_is_forgotten():
    staging = Staging()
    staging.wanted(1000, 1024)
    for _ in range(200):
        wanted = staging.wanted(2, 1024)
    assert wanted == 1
