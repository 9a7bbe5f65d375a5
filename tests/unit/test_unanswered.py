"""What a worker is at, by a made-up clock."""

from types import SimpleNamespace

import pytest

from headrace.workers.instance import Batch
from headrace.workers.loads import Loading
from headrace.workers.unanswered import Unanswered, load_key


def model(number=3, name="m", timeout_s=5.0):
    streams = SimpleNamespace(awaited=False, awaited_since=0.0)
    return SimpleNamespace(
        load=SimpleNamespace(instance=number, name=name), execution_timeout_s=timeout_s, streams=streams
    )


class Worker:
    """What is unanswered, and the time."""

    def __init__(self):
        self.now = 100.0
        self.unanswered = Unanswered(lambda: self.now)

    def run(self, instance, sequence):
        batch = Batch(instance, SimpleNamespace(inputs=None), [], sequence)
        self.unanswered.add(sequence, batch)
        return batch

    def load(self, instance):
        loading = Loading(instance, None)
        self.unanswered.add(load_key(instance.load.instance), loading)
        return loading

    def overdue(self, now):
        return self.unanswered.overdue(now, 60.0)


@pytest.fixture
def worker():
    return Worker()


def test_it_is_at_the_oldest_and_answers_in_order(worker):
    instance = model()
    assert worker.unanswered.head is None
    loading, batch = worker.load(instance), worker.run(instance, 7)
    assert worker.unanswered.head is loading
    assert worker.unanswered.answered(load_key(3)) is loading
    assert worker.unanswered.head is batch
    assert worker.unanswered.answered(7) is batch
    assert worker.unanswered.head is None


def test_no_load_is_taken_for_a_batch():
    assert all(load_key(instance) < 0 for instance in range(5))
    assert len({load_key(instance) for instance in range(5)}) == 5


def test_each_has_its_time_from_when_the_worker_was_free_for_it(worker):
    instance = model()
    worker.run(instance, 1)
    worker.now = 103.0
    worker.run(instance, 2)
    assert worker.overdue(105.0) == ""
    assert worker.overdue(105.1) == "a batch of model 'm' took longer than 5 s"
    worker.now = 104.0
    worker.unanswered.answered(1)
    assert worker.overdue(109.0) == ""
    assert worker.overdue(109.1) == "a batch of model 'm' took longer than 5 s"
    worker.unanswered.answered(2)
    assert worker.overdue(1e9) == ""


def test_a_load_has_a_time_of_its_own_and_a_model_may_have_any(worker):
    worker.load(model())
    assert worker.overdue(160.0) == ""
    assert worker.overdue(160.1) == "loading model 'm' took longer than 60 s"
    worker.unanswered.clear()
    worker.run(model(timeout_s=0.0), 1)
    assert worker.overdue(1e9) == ""


def test_one_that_owes_a_response_and_is_silent_is_named(worker):
    quiet, slow = model(3, "quiet"), model(4, "slow")
    slow.streams.awaited = True
    worker.unanswered.heard_at = 100.0
    assert worker.unanswered.silent(105.0, [quiet, slow]) == ""
    assert worker.unanswered.silent(105.1, [quiet, slow]) == "model 'slow' gave no response for 5 s"
    slow.streams.awaited_since = 200.0  # its client had no room until then
    assert worker.unanswered.silent(205.0, [quiet, slow]) == ""
    slow.execution_timeout_s = 0.0
    assert worker.unanswered.silent(1e9, [quiet, slow]) == ""


def test_a_dead_worker_leaves_what_it_was_asked_in_order_and_forgets_what_was_begun(worker):
    instance = model()
    first = worker.run(instance, 1)
    worker.unanswered.begun[1] = worker.unanswered.answered(1)
    asked = [worker.run(instance, 2), worker.load(model(4)), worker.run(instance, 5)]
    assert worker.unanswered.batches_of(3, 1) == [first]
    assert worker.unanswered.clear() == asked
    assert worker.unanswered.head is None
    assert worker.unanswered.batches_of(3, 0) == []
