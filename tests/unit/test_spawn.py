"""How a worker process ended, in words."""

import pytest

from headrace.workers.second_chance import KILLED
from headrace.workers.spawn import cause_of_end


@pytest.mark.parametrize(
    ("status", "words"), [(0, "exit status 0"), (3, "exit status 3"), (-11, "signal SIGSEGV"), (-250, "signal 250")]
)
def test_a_status_is_told_by_its_name(status, words):
    assert cause_of_end(status) == words


def test_a_kill_is_told_as_those_expect_who_forgive_it():
    assert cause_of_end(-9) == KILLED
