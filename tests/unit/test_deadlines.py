"""Whether a request can be answered by its deadline, over a made-up backlog, known speeds and a made-up clock."""

import pytest

from headrace.batching.admission import Admission
from headrace.batching.deadlines import Deadlines
from headrace.batching.sweep import Sweep
from headrace.core.errors import DeadlineExceeded, Overloaded

MS = 1_000_000
START_NS = 1000 * MS


class Known:
    """Every batch takes ten milliseconds."""

    def __init__(self):
        self.observed = []

    def observe(self, rows, took_ns, now_ns):
        self.observed.append((rows, took_ns, now_ns))

    def batch_ns(self, rows, now_ns):
        return 10 * MS


class Waiting:
    """A backlog of so many rows, and of some more that nobody waits for."""

    def __init__(self, rows, dead=0):
        self.rows, self.dead = rows, dead
        self.sweeps = 0

    def rows_before(self, priority, rank_ns):
        return self.rows + self.dead

    def drop_dead(self):
        self.sweeps += 1
        self.dead = 0


class Checked:
    """Deadlines of a queue, and the time."""

    def __init__(self, instances=1, known=True):
        self.now_ns = START_NS
        self.times = Known()
        admission = Admission(self.times, instances) if known else None
        self.deadlines = Deadlines("m", admission, Sweep(), lambda: self.now_ns)

    def check(self, left_ms, waiting=0, rows=1):
        """Whether a request with so much time left is accepted; ``waiting`` are rows, or a backlog."""
        backlog = Waiting(waiting) if isinstance(waiting, int) else waiting
        try:
            self.deadlines.check(backlog, 0, self.now_ns + int(left_ms * MS), rows, 0)
        except Overloaded:
            return False
        return True


@pytest.mark.parametrize("known", [True, False])
def test_what_is_over_is_refused_with_how_long_ago_it_was(known):
    with pytest.raises(DeadlineExceeded, match=r"model 'm' was over 2\.5 ms before it could be queued"):
        Checked(known=known).check(-2.5)


def test_without_an_admission_whatever_has_time_left_is_accepted_and_nothing_learned():
    checked = Checked(known=False)
    assert checked.check(0.001, waiting=1000)
    assert checked.deadlines.observe is None


def test_it_learns_from_the_first_deadline_on_and_counts_a_batch_without_rows_as_one():
    checked = Checked()
    assert checked.deadlines.observe is None
    assert checked.check(10)
    checked.deadlines.observe(0, 7 * MS)
    checked.deadlines.observe(3, 8 * MS)
    assert checked.times.observed == [(1, 7 * MS, START_NS), (3, 8 * MS, START_NS)]


def test_those_ahead_go_first_and_what_comes_too_late_by_that_is_told_so():
    checked = Checked()
    assert checked.check(40, waiting=3)
    assert not checked.check(39.9, waiting=3)
    told = r"'m' would answer in 40\.0 ms .* 3 rows .* request's 1, .* has 39\.9 ms"
    with pytest.raises(Overloaded, match=told) as caught:
        checked.deadlines.check(Waiting(3), 0, START_NS + int(39.9 * MS), 1, 0)
    assert caught.value.reason == "too_late"


def test_a_batch_holds_what_it_was_told():
    checked = Checked()
    checked.deadlines.set_max_rows(4)
    assert checked.check(20, waiting=4)
    assert not checked.check(19, waiting=4)
    Checked(known=False).deadlines.set_max_rows(4)


def test_before_anybody_is_refused_those_are_let_go_of_whom_nobody_waits_for_but_not_each_time():
    checked, waiting = Checked(), Waiting(3, dead=5)
    assert checked.check(40, waiting)
    assert (waiting.dead, waiting.sweeps) == (0, 1)
    waiting.dead = 5
    checked.now_ns += 10 * MS
    assert not checked.check(40, waiting)
    assert waiting.sweeps == 1
    checked.now_ns += 1
    assert checked.check(40, waiting)
    assert waiting.sweeps == 2


def test_nobody_is_let_go_of_where_there_is_time():
    waiting = Waiting(3, dead=5)
    assert Checked().check(90, waiting)
    assert waiting.sweeps == 0


def test_what_runs_is_counted_with_the_rest_of_its_time():
    checked = Checked()
    checked.deadlines.taken_at[START_NS - 4 * MS] = 1
    assert checked.check(16)
    assert not checked.check(15.9)
    checked.deadlines.taken_at.clear()
    assert checked.check(10)


def test_what_a_lone_instance_runs_was_staged_until_the_batch_before_it_had_ended():
    taken_ns, ended_ns = START_NS - 10 * MS, START_NS - 2 * MS
    for instances, needs_ms in ((1, 18), (2, 10)):
        checked = Checked(instances)
        checked.deadlines.taken_at[taken_ns] = 1
        checked.deadlines.finished_ns = ended_ns
        assert checked.check(needs_ms)
        assert not checked.check(needs_ms - 0.1)
