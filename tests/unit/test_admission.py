"""What is foretold of a request's answer, against a simulated model and made-up clocks."""

import heapq
from collections import deque

from hypothesis import given
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


def simulate(arrivals, instances, max_rows, base_ns, row_ns):
    """Serve requests of one row, the nearest deadline first; each is asked about at its arrival.

    Gives back for each whether it would have been admitted, and when it was answered. All are served, so that it is
    seen what became of those that would have been refused. Requests whose time is over are dropped when a batch is
    formed, as the queue does.
    """
    made = Admission(Known(base_ns / MS, row_ns / MS), instances)
    made.max_rows = max_rows
    waiting, running, since, verdicts, answered = [], [], {}, {}, {}
    coming = deque(sorted(arrivals))
    now_ns = 0

    def start():
        while waiting and len(running) < instances:
            batch = []
            while waiting and len(batch) < max_rows:
                deadline_ns, number = heapq.heappop(waiting)
                if deadline_ns > now_ns:
                    batch.append(number)
            if batch:
                heapq.heappush(running, (now_ns + base_ns + row_ns * len(batch), batch))
                since[batch[0]] = now_ns

    for number in range(len(coming)):
        at_ns, left_ns = coming.popleft()
        while running and running[0][0] <= at_ns:
            now_ns, batch = heapq.heappop(running)
            answered.update(dict.fromkeys(batch, now_ns))
            start()
        now_ns = at_ns
        waiting[:] = [one for one in waiting if one[0] > now_ns]  # as the queue sweeps before it refuses
        heapq.heapify(waiting)
        ahead = sum(1 for one in waiting if one[0] <= at_ns + left_ns)
        executing = sorted((since[batch[0]], len(batch)) for _, batch in running)
        finish_ns = made.finish_ns(ahead, 1, executing, now_ns)
        verdicts[number] = (finish_ns <= left_ns, at_ns + left_ns)
        heapq.heappush(waiting, (at_ns + left_ns, number))
        start()
    while running:
        now_ns, batch = heapq.heappop(running)
        answered.update(dict.fromkeys(batch, now_ns))
        start()
    return verdicts, answered


@given(
    st.lists(st.integers(0, 60 * MS), max_size=60),
    st.integers(1, 3),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_nobody_is_refused_who_would_have_been_answered_in_time(times, instances, max_rows, base_ms, row_ms):
    """Deadlines of one length, as clients of one kind have: then nobody ahead drops out before it is served."""
    arrivals = [(at_ns, 30 * MS) for at_ns in times]
    verdicts, answered = simulate(arrivals, instances, max_rows, base_ms * MS, row_ms * MS)
    for number, (admitted, deadline_ns) in verdicts.items():
        if not admitted and number in answered:
            assert answered[number] > deadline_ns, "it was refused, and would have been in time"


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
