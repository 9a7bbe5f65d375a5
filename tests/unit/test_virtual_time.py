"""Who has had how much."""

from hypothesis import given
from hypothesis import strategies as st

from headrace.workers.virtual_time import VirtualTime


def test_who_comes_back_after_a_pause_has_no_credit_for_it():
    time = VirtualTime()
    time.join("busy")
    time.charge("busy", 1000)
    time.join("back")
    assert time.had("back") == time.had("busy") == 1000


def test_who_has_had_more_than_the_others_does_not_lose_that_by_a_short_pause():
    time = VirtualTime()
    time.join("greedy")
    time.join("other")
    time.charge("greedy", 500)
    time.leave("greedy")
    time.charge("other", 100)
    time.join("greedy")
    assert (time.had("greedy"), time.had("other")) == (500, 100)


def test_accounts_are_forgotten_when_nothing_is_lost_by_it():
    time = VirtualTime()
    for number in range(1000):
        time.join(f"m{number}")
        time.charge(f"m{number}", number)
        time.leave(f"m{number}")
    assert len(time._had) <= 1000
    time.join("last")
    time.charge("last", 10**6)
    time.leave("last")
    assert len(time._had) <= 1


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["join", "leave", "charge"])), max_size=80))
def test_the_common_time_never_goes_back_and_nobody_present_is_behind_it(events):
    time, present, last = VirtualTime(), dict.fromkeys("abc", 0), 0.0
    for account, what in events:
        if what == "join":
            time.join(account)
            present[account] += 1
        elif present[account]:
            if what == "charge":
                time.charge(account, 7)
            else:
                time.leave(account)
                present[account] -= 1
        assert time._now >= last
        last = time._now
        for one, times in present.items():
            if times:
                assert time.had(one) >= time._now
