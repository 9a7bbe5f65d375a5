"""One line in which nothing overtakes, over lists of events with made-up times."""

from hypothesis import given
from hypothesis import strategies as st
from unit.test_backlog import MS, Waiting

from headrace.batching.ordered_backlog import OrderedBacklog
from headrace.batching.policy import BatchLimits, Wait

OTHER = ((2,),)


def backlog_of(*waiting, max_rows=8, delay_ms=0):
    backlog = OrderedBacklog(BatchLimits(max_rows, (), delay_ms * MS))
    for one in waiting:
        backlog.add(one)
    return backlog


def test_another_shape_ends_a_batch_even_if_more_of_the_first_stands_behind_it():
    waiting = [Waiting(key=key) for key in (None, None, OTHER, None)]
    backlog = backlog_of(*waiting)
    assert [backlog.next_batch(0) for _ in range(4)] == [waiting[:2], [waiting[2]], [waiting[3]], None]


def test_neither_a_priority_nor_a_deadline_lifts_a_request():
    waiting = [Waiting(priority=2), Waiting(priority=1), Waiting(rank_ns=1)]
    backlog = backlog_of(*waiting)
    assert backlog.next_batch(0) == waiting


def test_company_is_waited_for_unless_somebody_stands_in_its_way():
    backlog = backlog_of(Waiting(), delay_ms=5)
    assert backlog.next_batch(0) == Wait(5 * MS)
    assert backlog.due_ns(0) == 5 * MS
    backlog.add(Waiting(key=OTHER))
    assert backlog.due_ns(0) == 0
    assert len(backlog.next_batch(0)) == 1
    assert backlog.next_batch(0) == Wait(5 * MS)


def test_what_failed_runs_one_by_one_and_in_its_place():
    waiting = [Waiting() for _ in range(5)]
    backlog = backlog_of(*waiting, max_rows=3, delay_ms=50)
    batch = backlog.next_batch(0)
    for one in batch:
        one.alone = True
    backlog.put_back(batch)
    assert [backlog.next_batch(0) for _ in range(3)] == [[one] for one in waiting[:3]]
    assert backlog.next_batch(60 * MS) == waiting[3:]


def test_the_dead_are_buried_and_the_living_move_up():
    waiting = [Waiting() for _ in range(5)]
    backlog = backlog_of(*waiting)
    for index in (0, 2):
        waiting[index].dead = True
    assert backlog.next_batch(0) == [waiting[1], *waiting[3:]]
    assert [one.buried for one in waiting] == [1, 0, 1, 0, 0]
    assert backlog.next_batch(0) is None


def test_all_rows_go_before_one_that_comes_now():
    backlog = backlog_of(Waiting(3), Waiting(2, priority=5))
    assert backlog.rows_before(1, 1) == 5
    assert (backlog.waiting_at(1), backlog.levels()) == (2, {})


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 4), st.sampled_from([None, OTHER])),
            st.tuples(st.just("die"), st.integers(0, 30)),
            st.tuples(st.just("pass"), st.integers(1, 5)),
            st.tuples(st.just("take"), st.sampled_from(["answered", "back", "alone"])),
            st.tuples(st.just("drop dead")),
        ),
        max_size=60,
    ),
    st.integers(1, 6),
    st.sampled_from([0, 3]),
)
def test_whatever_happens_answers_leave_in_the_order_of_arrival(events, max_rows, delay_ns):
    """One batch is out at a time, as the queue has it."""
    backlog = OrderedBacklog(BatchLimits(max_rows, (), delay_ns))
    everything, answered, now_ns = [], [], 0

    def take(then):
        batch = backlog.next_batch(now_ns)
        if batch is None or isinstance(batch, Wait):
            assert batch is not None or not len(backlog)
            return
        assert batch
        assert len({one.key for one in batch}) == 1
        assert len(batch) == 1 or sum(one.rows for one in batch) <= max_rows
        assert len(batch) == 1 or not any(one.alone for one in batch)
        assert not any(one.dead for one in batch)
        if then == "answered":
            answered.extend(one.number for one in batch)
            return
        for one in batch:
            one.alone = one.alone or then == "alone"
        backlog.put_back(batch)

    for name, *values in events:
        if name == "add":
            everything.append(Waiting(min(values[0], max_rows), values[1], queued_at_ns=now_ns))
            backlog.add(everything[-1])
        elif name == "die" and everything:
            one = everything[values[0] % len(everything)]
            one.dead = one.dead or one.number not in answered
        elif name == "pass":
            now_ns += values[0]
        elif name == "take":
            take(values[0])
        elif name == "drop dead":
            backlog.drop_dead()
        if backlog:
            due_ns = backlog.due_ns(now_ns)
            assert due_ns == 0 or due_ns > now_ns
    now_ns += 1000
    while len(backlog):
        take("answered")
    assert answered == sorted(answered)
    assert set(answered) == {one.number for one in everything if not one.buried}
