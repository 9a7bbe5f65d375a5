"""How soon what dies is started again, with made-up times."""

import pytest

from headrace.workers.restarts import (
    AT_ONCE,
    HOPELESS_AFTER_S,
    HOPELESS_DEATHS,
    LONGEST_S,
    LONGEST_USED_S,
    Pause,
    Restarts,
    backoff_s,
)

CAUSE = "signal SIGSEGV"


class Subject:
    """What lives, dies and is left alone, on a clock of its own."""

    def __init__(self, restarts=None, who=None):
        self.restarts = Restarts() if restarts is None else restarts
        self.who = who
        self.now = 1000.0
        self.pauses = []

    def lives(self, seconds, times=1, used=False, load_s=0.0):
        """It is up for so long, so many times, and is started again after each pause. Returns the last pause."""
        for _ in range(times):
            up_at, self.now = self.now, self.now + seconds
            self.pauses.append(self.restarts.died(self.who, CAUSE, up_at, self.now, used=used))
            self.now += self.pauses[-1].seconds + load_s
        return self.pauses[-1]

    @property
    def seconds(self):
        return [round(pause.seconds, 6) for pause in self.pauses]


@pytest.fixture
def subject():
    return Subject()


def test_the_first_start_is_at_once_and_later_ones_wait_longer_up_to_a_bound():
    waits = [backoff_s(failures) for failures in range(12)]
    assert waits[:4] == [0.0, 0.1, 0.2, 0.4]
    assert waits == sorted(waits)
    assert waits[-1] == 5.0


def test_a_worker_that_has_died_all_week_is_still_started_again():
    assert backoff_s(20_000) == 5.0


def test_a_death_and_that_of_the_second_chance_are_recovered_from_at_once(subject):
    subject.lives(0.0, times=AT_ONCE)
    assert subject.pauses == [Pause()] * AT_ONCE


def test_what_goes_on_dying_is_left_alone_for_longer_each_time_up_to_a_bound(subject):
    subject.lives(0.0, times=12)
    assert subject.seconds[:6] == [0.0, 0.0, 0.1, 0.2, 0.4, 0.8]
    assert subject.seconds == sorted(subject.seconds)
    assert subject.seconds[-1] == LONGEST_S
    assert subject.pauses[4].reason == (
        "its worker died 5 times in a row soon after it was up (signal SIGSEGV); it is started again in 0.4 s"
    )


def test_the_time_that_it_was_up_counts(subject):
    subject.lives(0.3, times=6)
    assert subject.seconds == [0.0, 0.0, 0.0, 0.0, 0.1, 0.5]
    assert subject.lives(LONGEST_S - 0.5, times=9).seconds == pytest.approx(0.5)


def test_a_life_as_long_as_the_longest_pause_makes_good_for_all(subject):
    subject.lives(0.0, times=12)
    subject.lives(LONGEST_S)
    subject.lives(0.0, times=2)
    assert subject.seconds[-3:] == [0.0, 0.0, 0.1]


def test_what_answers_before_it_dies_is_up_again_sooner(subject):
    subject.lives(0.01, times=12, used=True)
    assert subject.seconds[-1] == pytest.approx(LONGEST_USED_S - 0.01)
    assert subject.lives(LONGEST_USED_S, used=True) == Pause()
    assert subject.lives(0.0).seconds == LONGEST_S, "it is not forgotten"


def test_whoever_waits_is_told_when_it_has_gone_on_for_long_and_nothing_was_answered(subject):
    subject.lives(0.0, times=20)
    times = [sum(subject.seconds[:number]) for number in range(20)]
    assert [pause.hopeless for pause in subject.pauses] == [time > HOPELESS_AFTER_S for time in times]
    assert not subject.lives(0.0, used=True).hopeless
    assert not subject.lives(0.0, times=4).hopeless, "there is hope again, until it has gone on for as long"
    assert subject.lives(0.0, times=2).hopeless


def test_few_deaths_are_not_enough_however_far_apart(subject):
    """Each of its loads takes a minute."""
    subject.lives(0.0, load_s=60.0, times=HOPELESS_DEATHS - 1)
    assert not any(pause.hopeless for pause in subject.pauses)
    assert subject.lives(0.0).hopeless


def test_the_process_and_each_of_its_models_have_their_own(subject):
    whole, one, other = (Subject(subject.restarts, who) for who in (None, 1, 2))
    one.lives(0.0, times=5)
    assert one.seconds[-1] > 0.0
    assert whole.lives(0.0) == other.lives(0.0) == Pause()
    subject.restarts.forget(1)
    subject.restarts.forget(1)
    assert one.lives(0.0) == Pause()
