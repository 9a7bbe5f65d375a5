"""What a level's policy makes of a request's time, with made-up times."""

import pytest

from headrace.batching.pending import HORIZON_NS, rank_of
from headrace.batching.queue_policy import QueuePolicy

US = 1000


@pytest.mark.parametrize(
    ("policy", "given_us", "deadline_ns", "limits"),
    [
        (QueuePolicy(), 0, 0, (0, 0)),
        (QueuePolicy(), 0, 77, (77, 0)),
        (QueuePolicy(), 5, 0, (100 + 5 * US, 0)),
        (QueuePolicy(default_timeout_us=3), 0, 0, (100 + 3 * US, 0)),
        (QueuePolicy(default_timeout_us=3), 2, 0, (100 + 2 * US, 0)),
        (QueuePolicy(default_timeout_us=3), 9, 0, (100 + 3 * US, 0)),  # it can be shortened only
        (QueuePolicy(default_timeout_us=3, allow_timeout_override=False), 2, 0, (100 + 3 * US, 0)),
        (QueuePolicy(allow_timeout_override=False), 2, 0, (0, 0)),
        (QueuePolicy(allow_timeout_override=False), 2, 77, (77, 0)),  # the client's own patience always counts
        (QueuePolicy(default_timeout_us=3), 0, 150, (150, 0)),
        (QueuePolicy(default_timeout_us=3), 0, 9999, (100 + 3 * US, 0)),
        (QueuePolicy(default_timeout_us=3, delays=True), 0, 0, (0, 100 + 3 * US)),
        (QueuePolicy(default_timeout_us=3, delays=True), 2, 9999, (9999, 100 + 2 * US)),
        (QueuePolicy(delays=True), 0, 9999, (9999, 0)),
    ],
)
def test_time_limits(policy, given_us, deadline_ns, limits):
    assert policy.time_limits(given_us, deadline_ns, 100) == limits


@pytest.mark.parametrize(
    ("deadline_ns", "late_ns", "rank_ns"),
    [
        (0, 0, 0),
        (600, 0, 600),
        (500 + HORIZON_NS, 0, 0),  # a deadline so far off is none
        (0, 700, 700),
        (600, 700, 600),
        (900, 700, 700),
        (0, 500 + 9 * HORIZON_NS, 500 + HORIZON_NS),  # looked at when its time is over, and ranked like all others
    ],
)
def test_ranks(deadline_ns, late_ns, rank_ns):
    assert rank_of(500, deadline_ns, late_ns) == rank_ns
