"""What is foretold of a request's answer, against a simulated model and made-up clocks."""

import copy
import heapq
from collections import deque
from dataclasses import dataclass, field

from hypothesis import example, given
from hypothesis import strategies as st

from headrace.batching.admission import Admission
from headrace.batching.service_times import FORGOTTEN_NS, ServiceTimes

MS = 1_000_000


class Known:
    """Batches of so many rows take so long."""

    def __init__(self, base_ms, row_ms):
        self.base_ms, self.row_ms = base_ms, row_ms

    def observe(self, rows, took_ns, now_ns):
        raise AssertionError("nothing is learned here")

    def batch_ns(self, rows, now_ns):
        return int((self.base_ms + rows * self.row_ms) * MS)


def admission(max_rows=8, instances=1, base_ms=10, row_ms=1):
    made = Admission(Known(base_ms, row_ms), instances)
    made.max_rows = max_rows
    return made


def test_on_an_idle_model_a_request_takes_what_its_own_batch_takes():
    assert admission().finish_ns(0, 3, [], 0) == 13 * MS


def test_full_batches_ahead_go_first_and_others_may_share_its_batch():
    assert admission().finish_ns(7, 1, [], 0) == 11 * MS
    assert admission().finish_ns(8, 1, [], 0) == (18 + 11) * MS
    assert admission().finish_ns(31, 1, [], 0) == (3 * 18 + 11) * MS


def test_what_runs_goes_on_for_the_rest_of_its_time():
    assert admission().finish_ns(0, 1, [(0, 3)], 4 * MS) == (9 + 11) * MS
    assert admission().finish_ns(0, 1, [(0, 3)], 50 * MS) == 11 * MS, "it takes longer than it should: it may end now"
    assert admission().finish_ns(0, 1, [(0, 3), (2 * MS, 1)], 4 * MS) == (9 + 11 + 11) * MS, "the second is staged"


def test_instances_share_the_work():
    assert admission(instances=2).finish_ns(32, 1, [(0, 8), (0, 2)], 0) == (12 + 18 + 18 + 11) * MS
    assert admission(instances=8).finish_ns(32, 1, [(0, 8), (0, 2)], 0) == 11 * MS
    assert admission(instances=2).finish_ns(0, 1, [(0, 8)], 0) == 11 * MS, "the other one is idle"


def test_a_request_in_parts_waits_for_its_own_first_ones():
    assert admission().finish_ns(0, 20, [], 0) == (2 * 18 + 18) * MS


def test_nothing_is_foretold_of_a_model_that_was_not_seen():
    made = Admission(ServiceTimes())
    assert made.finish_ns(1000, 1, [(0, 1)], 0) is None
    made.observe(1, 5 * MS, 10)
    assert made.finish_ns(1000, 1, [(0, 1)], 20) == 0, "one observation proves nothing"
    for _ in range(40):
        made.observe(1, 5 * MS, 20)
    assert 4.9 * MS < made.finish_ns(0, 1, [], 30) <= 5 * MS


def test_times_of_other_sizes_bound_those_that_were_not_seen():
    times = ServiceTimes()
    for _ in range(60):
        times.observe(8, 16 * MS, 0)
    assert 15.9 * MS < times.batch_ns(8, 0) <= 16 * MS
    assert 15.9 * MS < times.batch_ns(64, 0) <= 16 * MS, "a larger one takes as long at the least"
    assert 1.9 * MS < times.batch_ns(1, 0) <= 2 * MS, "a smaller one may take its rows' share"
    for _ in range(60):
        times.observe(1, 9 * MS, 0)
    assert 8.9 * MS < times.batch_ns(1, 0) <= 9 * MS


def test_times_that_vary_are_taken_to_be_short():
    times = ServiceTimes()
    for number in range(200):
        times.observe(1, (1 if number % 2 else 9) * MS, 0)
    assert times.batch_ns(1, 0) < 2 * MS


def test_the_slowness_of_a_moment_is_forgotten_so_that_a_model_that_gets_no_work_can_show_that_it_is_fast():
    times = ServiceTimes()
    for _ in range(40):
        times.observe(1, 100 * MS, 0)
    assert times.batch_ns(1, FORGOTTEN_NS) > 90 * MS
    later_ns = FORGOTTEN_NS + 201 * MS
    assert times.batch_ns(1, later_ns) is None
    times.observe(1, MS, later_ns)
    assert times.batch_ns(1, later_ns) <= MS


@dataclass
class Service:
    """Instances that serve requests of one row each, the nearest deadline first. Times in nanoseconds."""

    instances: int
    max_rows: int
    base_ns: int
    row_ns: int
    now_ns: int = 0
    waiting: list = field(default_factory=list)  # (deadline, number), a heap
    running: list = field(default_factory=list)  # (its end, its start, numbers), a heap
    answered: dict = field(default_factory=dict)

    def advance(self, to_ns, dropping=True):
        """Run until then; whose time is over when a batch is formed is dropped, as the queue does."""
        while self.running and self.running[0][0] <= to_ns:
            self.now_ns, _, batch = heapq.heappop(self.running)
            self.answered.update(dict.fromkeys(batch, self.now_ns))
            self.start(dropping)
        self.now_ns = to_ns

    def start(self, dropping=True):
        while self.waiting and len(self.running) < self.instances:
            batch = []
            while self.waiting and len(batch) < self.max_rows:
                deadline_ns, number = heapq.heappop(self.waiting)
                if deadline_ns > self.now_ns or not dropping:
                    batch.append(number)
            if batch:
                end_ns = self.now_ns + self.base_ns + self.row_ns * len(batch)
                heapq.heappush(self.running, (end_ns, self.now_ns, batch))

    def sweep(self):
        """Drop whose time is over, as the queue does before it refuses anybody."""
        self.waiting = [one for one in self.waiting if one[0] > self.now_ns]
        heapq.heapify(self.waiting)

    def add(self, deadline_ns, number, dropping=True):
        heapq.heappush(self.waiting, (deadline_ns, number))
        self.start(dropping)

    def would_answer_ns(self, deadline_ns, number):
        """When one more would be answered if nobody else came, and nobody ahead of it dropped out."""
        other = copy.deepcopy(self)
        other.add(deadline_ns, number, dropping=False)
        other.advance(1 << 62, dropping=False)
        return other.answered[number]


@given(
    st.lists(st.tuples(st.integers(0, 60 * MS), st.integers(1, 60)), max_size=60),
    st.integers(1, 3),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(0, 3),
)
@example([(0, 30)] * 16 + [(2 * MS, 30)], 1, 1, 1, 1)  # one that has to be refused, and one behind it
def test_nobody_is_refused_who_would_have_been_answered_in_time(arrivals, instances, max_rows, base_ms, row_ms):
    made = Admission(Known(base_ms, row_ms), instances)
    made.max_rows = max_rows
    service = Service(instances, max_rows, base_ms * MS, row_ms * MS)
    for number, (at_ns, left_ms) in enumerate(sorted(arrivals)):
        service.advance(at_ns)
        service.sweep()
        deadline_ns = at_ns + left_ms * MS
        ahead = sum(1 for one in service.waiting if one[0] <= deadline_ns)
        executing = sorted((since_ns, len(batch)) for _, since_ns, batch in service.running)
        if made.finish_ns(ahead, 1, executing, at_ns) <= left_ms * MS:
            service.add(deadline_ns, number)
        else:
            assert service.would_answer_ns(deadline_ns, number) > deadline_ns, "it would have been in time"


def test_under_twice_the_load_that_can_be_borne_what_is_admitted_is_in_time_and_no_capacity_is_lost():
    """One instance, 10 ms a batch of 4: 400 rows a second; 800 come, each with 50 ms."""
    made = Admission(Known(10, 0))
    made.max_rows = 4
    waiting, running, since_ns, done, refused = deque(), [], 0, [], 0
    for number in range(1600):
        now_ns = number * 1_250_000
        while running and since_ns + 10 * MS <= now_ns:
            since_ns += 10 * MS
            done += [(since_ns, deadline_ns) for deadline_ns in running]
            running = [waiting.popleft() for _ in range(min(4, len(waiting)))]
        if made.finish_ns(len(waiting), 1, [(since_ns, len(running))] if running else [], now_ns) > 50 * MS:
            refused += 1
            continue
        waiting.append(now_ns + 50 * MS)
        if not running:
            running, since_ns = [waiting.popleft()], now_ns
    assert all(end_ns <= deadline_ns for end_ns, deadline_ns in done)
    assert 0.97 * 800 <= len(done) <= 800
    assert len(done) + len(running) + len(waiting) + refused == 1600
