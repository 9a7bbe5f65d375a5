"""What waits for a model, over lists of events with made-up times."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.backlog import Backlog
from headrace.batching.pending import HORIZON_NS
from headrace.batching.policy import BatchLimits, Wait

MS = 1_000_000


@dataclass(eq=False)
class Waiting:
    """As much of a pending request as a backlog looks at."""

    rows: int = 1
    key: object = None
    priority: int = 0
    queued_at_ns: int = 0
    alone: bool = False
    dead: bool = False
    rank_ns: int = 0
    late_ns: int = 0
    buried: int = 0
    number: int = field(default_factory=count().__next__)

    def bury(self):
        assert self.dead, "only the dead are buried"
        self.buried += 1


def backlog_of(*waiting, max_rows=8, preferred=(), delay_ms=0):
    backlog = Backlog(BatchLimits(max_rows, preferred, delay_ms * MS))
    for one in waiting:
        backlog.add(one)
    return backlog


def test_nothing_waits_in_an_empty_one():
    backlog = backlog_of()
    assert (len(backlog), backlog.next_batch(0), list(backlog), backlog.clear()) == (0, None, [], [])
    assert not backlog


def test_what_waits_goes_together_up_to_the_bound_oldest_first():
    waiting = [Waiting(queued_at_ns=at) for at in range(10)]
    backlog = backlog_of(*waiting, max_rows=4)
    assert [backlog.next_batch(100) for _ in range(4)] == [waiting[:4], waiting[4:8], waiting[8:], None]
    assert len(backlog) == 0


def test_rows_count_not_requests():
    waiting = [Waiting(rows) for rows in (3, 4, 2, 8, 1)]
    backlog = backlog_of(*waiting)
    batches = [[one.rows for one in backlog.next_batch(0)] for _ in range(4)]
    assert batches == [[3, 4], [2], [8], [1]]


def test_a_request_is_never_overtaken_by_a_smaller_one_that_would_still_fit():
    waiting = [Waiting(6), Waiting(3), Waiting(2)]
    backlog = backlog_of(*waiting)
    assert backlog.next_batch(0) == waiting[:1]
    assert backlog.next_batch(0) == waiting[1:]


def test_other_shapes_never_share_a_batch_and_the_one_waiting_longest_goes_first():
    small, large = ((2,),), ((300,),)
    waiting = [Waiting(key=key, queued_at_ns=at) for at, key in enumerate([small, large, small, large])]
    backlog = backlog_of(*waiting)
    assert backlog.next_batch(9) == [waiting[0], waiting[2]]
    assert backlog.next_batch(9) == [waiting[1], waiting[3]]


def test_lower_numbers_go_first_however_late_they_came():
    late = [Waiting(priority=1, queued_at_ns=50), Waiting(priority=1, queued_at_ns=60)]
    early = [Waiting(priority=2, queued_at_ns=0), Waiting(priority=3, queued_at_ns=1)]
    backlog = backlog_of(*early, *late)
    assert [backlog.next_batch(99) for _ in range(3)] == [late, early[:1], early[1:]]


def test_a_batch_that_is_ready_is_not_held_up_by_one_of_higher_priority_that_is_not():
    patient = Waiting(priority=1, queued_at_ns=9 * MS)
    due = Waiting(priority=2, queued_at_ns=0)
    backlog = backlog_of(patient, due, delay_ms=5)
    assert backlog.next_batch(9 * MS) == [due]
    assert backlog.next_batch(9 * MS) == Wait(14 * MS)


def test_of_several_that_wait_the_soonest_says_when():
    waiting = [Waiting(key=((at,),), queued_at_ns=at * MS) for at in (3, 1, 2)]
    backlog = backlog_of(*waiting, delay_ms=5)
    assert backlog.next_batch(3 * MS) == Wait(6 * MS)
    assert backlog.due_ns(3 * MS) == 6 * MS
    assert backlog.due_ns(6 * MS) == 0
    assert backlog.next_batch(6 * MS) == [waiting[1]]
    assert backlog.due_ns(6 * MS) == 7 * MS


def test_the_dead_are_buried_once_and_their_places_go_to_the_living():
    waiting = [Waiting() for _ in range(6)]
    backlog = backlog_of(*waiting, max_rows=3)
    for index in (0, 2, 5):
        waiting[index].dead = True
    assert backlog.next_batch(0) == [waiting[1], waiting[3], waiting[4]]
    assert backlog.next_batch(0) is None
    assert [one.buried for one in waiting] == [1, 0, 1, 0, 0, 1]
    assert len(backlog) == 0


def test_a_group_of_nothing_but_dead_does_not_stop_the_next_one():
    gone = Waiting(key=((1,),), dead=True)
    alive = Waiting(key=((2,),), queued_at_ns=5)
    backlog = backlog_of(gone, alive)
    assert backlog.next_batch(9) == [alive]
    assert gone.buried == 1


def test_what_could_not_be_run_goes_again_first_and_in_its_order():
    waiting = [Waiting(queued_at_ns=at) for at in range(6)]
    backlog = backlog_of(*waiting, max_rows=3)
    first, second = backlog.next_batch(9), backlog.next_batch(9)
    backlog.put_back(second)
    backlog.put_back(first)
    assert len(backlog) == 6
    assert [backlog.next_batch(9), backlog.next_batch(9)] == [first, second]


def test_suspects_run_alone_and_before_all_others():
    waiting = [Waiting(priority=1), Waiting(priority=1)]
    suspects = [Waiting(priority=2, alone=True), Waiting(priority=2, alone=True)]
    backlog = backlog_of(*waiting, delay_ms=50)
    backlog.put_back(suspects)
    assert backlog.due_ns(0) == 0
    assert [backlog.next_batch(0), backlog.next_batch(0)] == [suspects[:1], suspects[1:]]
    assert backlog.next_batch(0) == Wait(50 * MS)


def test_a_suspect_that_nobody_waits_for_is_not_run():
    gone, alive = Waiting(alone=True, dead=True), Waiting()
    backlog = backlog_of(alive)
    backlog.put_back([gone])
    assert backlog.next_batch(0) == [alive]
    assert gone.buried == 1


def test_dropping_the_dead_keeps_the_living_in_their_order():
    waiting = [Waiting(priority=at % 2, queued_at_ns=at) for at in range(8)]
    suspects = [Waiting(alone=True), Waiting(alone=True)]
    backlog = backlog_of(*waiting, max_rows=16)
    backlog.put_back(suspects)
    for one in (suspects[0], waiting[0], waiting[3]):
        one.dead = True
    backlog.drop_dead()
    assert len(backlog) == 7
    assert [one.buried for one in (suspects[0], waiting[0], waiting[3])] == [1, 1, 1]
    assert backlog.next_batch(9) == [suspects[1]]
    assert backlog.next_batch(9) == [waiting[2], waiting[4], waiting[6]]
    assert backlog.next_batch(9) == [waiting[1], waiting[5], waiting[7]]


def test_the_nearest_deadline_goes_first_and_those_without_one_keep_their_order():
    plain = [Waiting(queued_at_ns=at) for at in (1, 2)]
    pressed = [Waiting(queued_at_ns=9, rank_ns=rank) for rank in (700, 300, 500)]
    backlog = backlog_of(plain[0], *pressed, plain[1], max_rows=2)
    assert [backlog.next_batch(10) for _ in range(3)] == [[pressed[1], pressed[2]], [pressed[0], plain[0]], [plain[1]]]


def test_who_has_no_deadline_is_overtaken_by_what_comes_within_the_horizon_and_by_nothing_later():
    plain = Waiting(queued_at_ns=0)
    before, after = Waiting(rank_ns=HORIZON_NS - 1), Waiting(rank_ns=HORIZON_NS + 1)
    backlog = backlog_of(after, plain, before, max_rows=1)
    assert [backlog.next_batch(5) for _ in range(3)] == [[before], [plain], [after]]


def test_of_two_shapes_the_one_with_the_nearer_deadline_goes_first():
    early = Waiting(key=((1,),), queued_at_ns=0)
    pressed = Waiting(key=((2,),), queued_at_ns=5, rank_ns=50)
    backlog = backlog_of(early, pressed)
    assert [backlog.next_batch(9), backlog.next_batch(9)] == [[pressed], [early]]


def test_a_deadline_does_not_lift_a_request_over_a_higher_priority():
    pressed, important = Waiting(priority=2, rank_ns=5), Waiting(priority=1)
    backlog = backlog_of(pressed, important)
    assert [backlog.next_batch(0), backlog.next_batch(0)] == [[important], [pressed]]


def test_a_pressed_request_gives_half_of_its_time_to_wait_for_company():
    pressed = Waiting(queued_at_ns=2 * MS, rank_ns=8 * MS)
    backlog = backlog_of(pressed, delay_ms=50)
    assert backlog.due_ns(2 * MS) == 5 * MS
    assert backlog.next_batch(4 * MS) == Wait(5 * MS)
    assert backlog.next_batch(5 * MS) == [pressed]


def test_who_is_late_goes_behind_all_of_its_level_and_before_lower_ones():
    late = [Waiting(priority=1, rank_ns=at, late_ns=at) for at in (5, 3)]
    in_time = Waiting(priority=1, queued_at_ns=9)
    lower = Waiting(priority=2)
    backlog = backlog_of(lower, *late, in_time, max_rows=1)
    assert len(backlog) == 4
    order = [backlog.next_batch(10) for _ in range(4)]
    assert order == [[in_time], [late[1]], [late[0]], [lower]]
    assert backlog.levels() == {}


def test_late_ones_of_one_shape_let_another_shape_pass():
    late = Waiting(key=((1,),), rank_ns=3, late_ns=3)
    in_time = Waiting(key=((2,),), queued_at_ns=9)
    backlog = backlog_of(late, in_time)
    assert [backlog.next_batch(10), backlog.next_batch(10)] == [[in_time], [late]]


def test_who_would_be_late_and_is_not_yet_goes_in_its_turn():
    one = Waiting(rank_ns=5, late_ns=5)
    backlog = backlog_of(one, Waiting(queued_at_ns=1), max_rows=1)
    assert backlog.next_batch(4) == [one]


def test_pressed_requests_that_could_not_be_run_go_before_their_equals():
    waiting = [Waiting(rank_ns=rank) for rank in (5, 7, 7)]
    backlog = backlog_of(*waiting[:2], max_rows=2)
    batch = backlog.next_batch(0)
    backlog.add(waiting[2])
    backlog.put_back(batch)
    assert backlog.next_batch(0) == waiting[:2]
    assert backlog.next_batch(0) == waiting[2:]


def test_what_two_instances_give_back_stands_in_the_order_in_which_it_came():
    waiting = [Waiting(queued_at_ns=at) for at in range(4)]
    backlog = backlog_of(*waiting, max_rows=2)
    first, second = backlog.next_batch(9), backlog.next_batch(9)
    backlog.put_back(first)
    backlog.put_back(second)
    assert [backlog.next_batch(9), backlog.next_batch(9)] == [first, second]


def test_suspects_of_a_low_level_do_not_hold_up_a_higher_one():
    suspects = [Waiting(priority=level, alone=True) for level in (3, 1)]
    important = [Waiting(priority=1), Waiting(priority=2)]
    backlog = backlog_of(*important)
    backlog.put_back(suspects)
    order = [backlog.next_batch(0) for _ in range(4)]
    assert order == [suspects[1:], important[:1], important[1:], suspects[:1]]


def test_levels_are_counted():
    waiting = [Waiting(priority=level) for level in (1, 2, 2)]
    backlog = backlog_of(*waiting, max_rows=1)
    assert backlog.levels() == {1: 1, 2: 2}
    assert (backlog.waiting_at(2), backlog.waiting_at(3)) == (2, 0)
    backlog.next_batch(0)
    batch = backlog.next_batch(0)
    assert backlog.levels() == {2: 1}
    batch[0].alone = True
    backlog.put_back(batch)
    assert backlog.levels() == {2: 2}
    backlog.drop_dead()
    assert backlog.levels() == {2: 2}
    backlog.next_batch(0)
    backlog.next_batch(0)
    assert backlog.levels() == {}


def test_rows_that_go_before_a_request_are_counted_from_below():
    backlog = backlog_of(
        Waiting(4, priority=1),
        Waiting(2, priority=2, rank_ns=50),
        Waiting(3, priority=2, rank_ns=90),
        Waiting(5, priority=2),
        Waiting(6, priority=3),
        max_rows=1,
    )
    assert backlog.rows_before(2, 60) == 6
    assert backlog.rows_before(2, 90) == 9
    assert backlog.rows_before(2, 0) == 14
    assert backlog.rows_before(1, 10) == 0
    backlog.put_back([Waiting(2, priority=3, alone=True), Waiting(1, priority=1, alone=True)])
    assert backlog.rows_before(2, 60) == 7


def test_clearing_hands_everything_over():
    waiting = [Waiting(priority=at) for at in range(3)]
    backlog = backlog_of(*waiting)
    backlog.put_back([suspect := Waiting(alone=True)])
    assert backlog.clear() == [suspect, *waiting]
    assert (len(backlog), backlog.next_batch(0)) == (0, None)


limits_of = st.builds(
    BatchLimits,
    max_rows=st.integers(1, 8),
    preferred_rows=st.sampled_from([(), (1,), (2, 4)]),
    max_delay_ns=st.sampled_from([0, 3]),
).map(lambda it: BatchLimits(it.max_rows, tuple(s for s in it.preferred_rows if s <= it.max_rows), it.max_delay_ns))
events = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.integers(0, 8),
            st.integers(0, 2),
            st.sampled_from([None, ((2,),), ((3,),)]),
            st.sampled_from([0, 0, 2, 9]),
            st.booleans(),
        ),
        st.tuples(st.just("die"), st.integers(0, 30)),
        st.tuples(st.just("pass"), st.integers(1, 5)),
        st.tuples(st.just("take")),
        st.tuples(st.just("refused"), st.booleans()),
        st.tuples(st.just("drop dead")),
    ),
    max_size=60,
)


@given(limits=limits_of, events=events)
def test_nothing_is_lost_or_run_twice_whatever_happens(limits, events):
    backlog = Backlog(limits)
    everything: list[Waiting] = []
    running: list[list[Waiting]] = []
    done: list[Waiting] = []
    now_ns = 0

    def check():
        inside = list(backlog)
        assert len(inside) == len(backlog) == len(set(map(id, inside)))
        assert bool(backlog) is bool(inside)
        levels = Counter(one.priority for one in inside if one.priority)
        assert backlog.levels() == dict(levels)
        places = Counter(map(id, inside + [one for batch in running for one in batch] + done))
        for one in everything:
            assert places[id(one)] + one.buried == 1, "each is in one place"
        if inside:
            due_ns = backlog.due_ns(now_ns)
            assert due_ns == 0 or due_ns > now_ns

    def take():
        if running and len(running) > 1:
            done.extend(running.pop(0))
        due_ns = backlog.due_ns(now_ns) if backlog else 0
        anyone_lives = any(not one.dead for one in backlog)
        batch = backlog.next_batch(now_ns)
        if batch is None:
            assert not backlog
            assert not anyone_lives
            return
        if isinstance(batch, Wait):
            assert batch.until_ns > now_ns
            assert backlog
            return
        assert due_ns == 0, "a batch is only had when one is due"
        assert batch
        assert not any(one.dead for one in batch)
        assert len({(one.priority, one.key) for one in batch}) == 1
        assert len({0 < one.late_ns <= now_ns for one in batch}) == 1, "late ones do not share a batch with others"
        assert not any(one.alone for one in batch) or len(batch) == 1
        assert len(batch) == 1 or sum(one.rows or 1 for one in batch) <= limits.max_rows
        running.append(batch)

    for name, *values in events:
        if name == "add":
            rows, priority, key, time_left, delays = values
            rank_ns = now_ns + time_left if time_left else 0
            late_ns = rank_ns if delays else 0
            one = Waiting(min(rows, limits.max_rows), key, priority, now_ns, rank_ns=rank_ns, late_ns=late_ns)
            everything.append(one)
            backlog.add(everything[-1])
        elif name == "die" and everything:
            one = everything[values[0] % len(everything)]
            if one not in done:
                one.dead = True
        elif name == "pass":
            now_ns += values[0]
        elif name == "take":
            take()
        elif name == "refused" and running:
            batch = running.pop()
            for one in batch:
                one.alone = one.alone or values[0]
            backlog.put_back(batch)
            if any(not one.dead for one in batch) and values[0]:
                assert backlog.due_ns(now_ns) == 0
        elif name == "drop dead":
            backlog.drop_dead()
            assert not any(one.dead for one in backlog)
        check()
    now_ns += 1000
    while backlog:
        take()
        check()


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from([0, 1]), st.booleans()), max_size=40))
def test_within_a_priority_and_shape_the_order_of_arrival_is_kept(arrivals):
    waiting = [
        Waiting(rows, ((2,),) if wide else None, priority, at) for at, (rows, priority, wide) in enumerate(arrivals)
    ]
    backlog = backlog_of(*waiting)
    taken = []
    while (batch := backlog.next_batch(1000)) is not None:
        taken += batch
    assert len(taken) == len(waiting)
    for key in {(one.priority, one.key) for one in waiting}:
        numbers = [one.number for one in taken if (one.priority, one.key) == key]
        assert numbers == sorted(numbers)
    priorities = [one.priority for one in taken]
    assert priorities == sorted(priorities), "without a delay a higher priority always goes first"


@given(
    st.lists(st.tuples(st.sampled_from([0, 3, 10, 40]), st.sampled_from([1, 2]), st.integers(1, 3)), max_size=40),
    st.integers(1, 6),
)
def test_with_all_there_the_order_is_that_of_priorities_and_deadlines(arrivals, max_rows):
    waiting = [
        Waiting(rows, None, priority, at, rank_ns=at + left if left else 0)
        for at, (left, priority, rows) in enumerate(arrivals)
    ]
    backlog = backlog_of(*waiting, max_rows=max_rows)
    taken = []
    while (batch := backlog.next_batch(50)) is not None:
        taken += batch
    places = [(one.priority, one.rank_ns or one.queued_at_ns + HORIZON_NS) for one in taken]
    assert places == sorted(places)
    assert len(taken) == len(waiting)


@given(st.lists(st.sampled_from(["plain", "pressed"]), min_size=1, max_size=60))
def test_nobody_starves_under_a_flood_of_deadlines(arrivals):
    """Each step a request comes, and one is served in each second: a plain one waits for those of its horizon."""
    step_ns = HORIZON_NS // 10
    backlog = backlog_of(max_rows=1)
    served = {}
    everything = []
    for step, kind in enumerate([*arrivals, *["pressed"] * 200]):
        now_ns = step * step_ns
        rank_ns = now_ns + step_ns * 5 if kind == "pressed" else 0
        everything.append(Waiting(queued_at_ns=now_ns, rank_ns=rank_ns))
        backlog.add(everything[-1])
        if step % 2:  # twice as much comes as can be served
            (one,) = backlog.next_batch(now_ns)
            served[one.number] = step
    for step, one in enumerate(everything[: len(arrivals)]):
        if not one.rank_ns:
            assert one.number in served
            assert served[one.number] - step <= 2 * (step + 10) + 2, "it waits for what came in its horizon, no more"
