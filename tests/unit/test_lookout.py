"""When a worker stays awake between two batches."""

import pytest

from headrace.workers.lookout import LOOK_NS, Lookout


def lookout(cpus=2, requests=1, waited_ns=LOOK_NS):
    made = Lookout(cpus)
    made.ran(requests)
    made.waited(waited_ns)
    return made


def test_a_worker_that_has_not_run_anything_sleeps():
    made = Lookout(8)
    assert made.look_ns == 0
    made.waited(10)
    assert made.look_ns == 0


@pytest.mark.parametrize(
    ("case", "look_ns"),
    [
        (lookout(), LOOK_NS),
        (lookout(requests=2, waited_ns=0), LOOK_NS),
        (lookout(requests=3), 0),
        (lookout(waited_ns=LOOK_NS + 1), 0),
        (lookout(cpus=1), 0),
    ],
)
def test_it_looks_out_where_one_or_two_clients_ask_again_at_once_and_a_cpu_is_left_for_them(case, look_ns):
    assert case.look_ns == look_ns


def test_having_looked_out_in_vain_it_sleeps_until_somebody_asks_at_once_again():
    made = lookout()
    made.waited(10 * LOOK_NS)
    made.ran(1)
    assert made.look_ns == 0
    made.waited(LOOK_NS // 2)
    made.ran(1)
    assert made.look_ns == LOOK_NS


def test_a_crowd_ends_it():
    made = lookout()
    made.ran(16)
    assert made.look_ns == 0
