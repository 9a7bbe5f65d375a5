"""Fair shares of the CPUs, over lists of events with made-up times."""

import heapq
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.workers.fair_turns import FairTurns, Turn


class Batch(Turn):
    """A turn, with the length of its batch."""

    __slots__ = ("ticks",)


class Machine:
    """Models that are always busy: so many instances each, batches of so many ticks on so many threads."""

    def __init__(self, cpus, **models):
        self.turns = FairTurns(cpus)
        self.cpus = cpus
        self.now = 0
        self.used = Counter()
        self.running = []
        self.models = models
        self._numbers = iter(range(10**9))
        for name, (instances, ticks, threads, *weight) in models.items():
            for _ in range(instances):
                self.ask(name, ticks, threads, *weight)
        self.grant()

    def ask(self, name, ticks, threads, weight=1.0):
        turn = Batch(name, threads, weight)
        turn.ticks = ticks
        self.turns.ask(turn)

    def grant(self):
        for turn in self.turns.grants(self.now):
            heapq.heappush(self.running, (self.now + turn.ticks, next(self._numbers), turn))
        assert sum(turn.threads for _, _, turn in self.running) + self.turns.free == self.cpus
        assert self.turns.free >= 0

    def step(self):
        """The next batch ends; its model has the next one at once."""
        self.now, _, turn = heapq.heappop(self.running)
        self.used[turn.model] += turn.threads * (self.now - turn.granted_ns)
        self.ask(turn.model, turn.ticks, turn.threads, turn.weight)
        self.turns.end(turn, self.now)
        self.grant()
        return turn


def shares(machine, steps=2000):
    for _ in range(steps):
        machine.step()
    in_all = sum(machine.used.values())
    return {name: machine.used[name] / in_all for name in machine.models}


def test_long_batches_get_no_more_than_short_ones():
    assert shares(Machine(1, long=(1, 100, 1), short=(1, 1, 1))) == pytest.approx({"long": 0.5, "short": 0.5}, abs=0.1)


def test_many_instances_get_no_more_than_one():
    assert shares(Machine(2, many=(6, 10, 2), one=(1, 10, 2))) == pytest.approx({"many": 0.5, "one": 0.5}, abs=0.01)


def test_threads_count():
    found = shares(Machine(4, wide=(1, 10, 4), narrow=(4, 10, 1)))
    assert found == pytest.approx({"wide": 0.5, "narrow": 0.5}, abs=0.05)


def test_weights_are_shares():
    found = shares(Machine(1, heavy=(2, 10, 1, 3.0), light=(2, 10, 1, 1.0)))
    assert found == pytest.approx({"heavy": 0.75, "light": 0.25}, abs=0.01)


def test_a_model_that_asks_now_and_then_is_next_however_many_wait():
    machine = Machine(2, flood=(8, 50, 2))
    for _ in range(100):
        machine.step()
    quiet = Batch("quiet", 2)
    quiet.ticks = 1
    machine.turns.ask(quiet)
    machine.grant()
    assert quiet.granted_ns < 0
    ended = machine.step()
    assert ended.model == "flood"
    assert quiet.granted_ns == machine.now, "it waits for the batch that runs, and for no other"


def test_a_pause_is_no_credit_to_shut_others_out_with():
    machine = Machine(1, steady=(1, 10, 1))
    for _ in range(1000):
        machine.step()
    machine.models["back"] = (1, 10, 1)
    machine.ask("back", 10, 1)
    ran = [machine.step().model for _ in range(40)]
    assert max(len(run) for run in "".join("b" if one == "back" else "s" for one in ran).split("s")) <= 2
    assert 19 <= ran.count("back") <= 21


def test_a_small_wish_does_not_overtake_a_large_one_that_is_next():
    turns = FairTurns(2)
    first, large, small = Turn("a", 1), Turn("b", 2), Turn("c", 1)
    turns.ask(first)
    assert turns.grants(0) == [first]
    turns.ask(large)
    turns.ask(small)
    assert turns.grants(0) == []
    turns.end(first, 5)
    assert turns.grants(5) == [large]
    turns.end(large, 6)
    assert turns.grants(6) == [small]


def test_who_gives_up_lets_the_next_pass():
    turns = FairTurns(2)
    first, large, small = Turn("a", 1), Turn("b", 2), Turn("c", 1)
    turns.ask(first)
    turns.grants(0)
    turns.ask(large)
    turns.ask(small)
    turns.withdraw(large)
    assert turns.grants(0) == [small]


def test_fewer_cpus_are_lent_out_and_more_again():
    turns = FairTurns(4)
    both = Turn("a", 2), Turn("b", 2)
    for one in both:
        turns.ask(one)
    assert turns.grants(0) == list(both)
    turns.resize(1)
    wide, narrow = Turn("a", 4), Turn("b", 1)
    turns.ask(wide)
    turns.ask(narrow)
    assert turns.grants(0) == []
    turns.end(both[0], 10)
    assert (turns.grants(10), turns.free) == ([], -1)
    turns.end(both[1], 20)
    (first,) = turns.grants(20)
    assert (first, first.granted) == (wide, 1), "with all there is, though it wants more"
    turns.end(wide, 30)
    assert turns.grants(30) == [narrow]
    turns.resize(4)
    again = Turn("a", 4)
    turns.ask(again)
    turns.end(narrow, 40)
    assert turns.grants(40) == [again]
    assert again.granted == 4


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 4)), min_size=2, max_size=4),
)
def test_no_busy_model_falls_behind_another_by_more_than_the_longest_batches(cpus, wishes):
    models = {f"m{i}": (n, ticks, min(threads, cpus)) for i, (n, ticks, threads) in enumerate(wishes)}
    machine = Machine(cpus, **models)
    for _ in range(300):
        machine.step()
    # What runs is not charged yet; beside that, each may be ahead by a batch of every instance.
    bound = 2 * sum(n * ticks * threads for n, ticks, threads in models.values())
    waiting = {turn.model for turn in machine.turns._waiting}
    for model in waiting:
        assert max(machine.used.values()) - machine.used[model] <= bound
