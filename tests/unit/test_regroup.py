"""Waiting for the clients of the last batch: made-up times, and a closed loop that shows what it is for."""

from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.regroup import MOST_NS, SHARE, Regroup

MS = 1_000_000


def test_it_waits_until_as_many_are_there_as_were_answered_and_left():
    regroup = Regroup()
    regroup.ended(answered=4, waiting=4, most=32, execution_ns=40 * MS, now_ns=1000 * MS)
    assert regroup.wait_ns(4, 1000 * MS) == 8 * MS
    assert regroup.wait_ns(7, 1003 * MS) == 5 * MS
    assert regroup.wait_ns(8, 1004 * MS) == 0
    assert regroup.wait_ns(0, 1004 * MS) == 0, "what was decided stays so until the next batch"


def test_it_waits_no_longer_than_a_share_of_the_batch():
    regroup = Regroup()
    regroup.ended(8, 0, 32, 40 * MS, 0)
    assert regroup.wait_ns(3, int(40 * MS * SHARE) - 1) == 1
    assert regroup.wait_ns(3, int(40 * MS * SHARE)) == 0
    regroup = Regroup()
    regroup.ended(8, 0, 32, 10_000 * MS, 0)
    assert regroup.wait_ns(3, 0) == MOST_NS


def test_a_lone_client_and_the_first_batch_are_not_waited_for():
    regroup = Regroup()
    assert regroup.wait_ns(1, 0) == 0
    regroup.ended(1, 0, 32, 40 * MS, 0)
    assert regroup.wait_ns(1, 0) == 0


def test_a_full_batch_never_waits():
    regroup = Regroup()
    regroup.ended(32, 100, 32, 40 * MS, 0)
    assert regroup.wait_ns(100, 0) == 0


def waits_in_vain(regroup: Regroup, batches: int) -> list[bool]:
    """Whether it waited after each of so many batches whose clients never came back in time."""
    waited = []
    for _ in range(batches):
        regroup.ended(4, 0, 32, 40 * MS, 0)
        waited.append(regroup.wait_ns(1, 0) > 0)
        regroup.wait_ns(1, 10**12)
    return waited


def test_waiting_in_vain_gets_rare():
    regroup = Regroup()
    waited = waits_in_vain(regroup, 1000)
    assert waited[0]
    assert sum(waited[:100]) <= 7
    assert 10 <= sum(waited[100:]) <= 20, "but it is tried again now and then"


def test_one_success_brings_the_waiting_back():
    regroup = Regroup()
    waits_in_vain(regroup, 500)
    for _ in range(200):
        regroup.ended(4, 0, 32, 40 * MS, 0)
        regroup.wait_ns(4, 0)
    regroup.ended(4, 0, 32, 40 * MS, 0)
    assert regroup.wait_ns(1, 0) > 0


@given(st.integers(2, 31), st.integers(1, 12), st.data())
def test_clients_of_a_closed_loop_end_up_in_one_batch(clients, back_ms, data):
    """Each client is back ``back_ms`` after its answer; a batch takes 80 ms however large it is."""
    first = data.draw(st.integers(1, clients))
    regroup = Regroup()
    now, waiting, returning, batches = 0, clients - first, [(0, 0)], []
    running = first
    for _ in range(200):
        now += 80 * MS
        waiting += sum(count for at, count in returning if at <= now)
        returning = [(at, count) for at, count in returning if at > now]
        regroup.ended(running, waiting, 32, 80 * MS, now)
        returning.append((now + back_ms * MS, running))
        while not waiting or regroup.wait_ns(waiting, now):
            now += MS
            waiting += sum(count for at, count in returning if at <= now)
            returning = [(at, count) for at, count in returning if at > now]
        batches.append(waiting)
        running, waiting = waiting, 0
    if back_ms * MS < MOST_NS:
        assert set(batches[-20:]) == {clients}
    else:
        assert sum(batches[-20:]) > 0
