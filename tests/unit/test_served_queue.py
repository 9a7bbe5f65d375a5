"""The queue that a version has by its configuration."""

from pathlib import Path
from time import monotonic_ns

import pytest

from headrace.batching.policy import BatchLimits
from headrace.batching.queue import BatchQueue
from headrace.batching.sequence_queue import SequenceQueue
from headrace.core.errors import Overloaded
from headrace.core.model import Signature
from headrace.core.sequence import SequenceSpec
from headrace.repository.layout import ModelFolder
from headrace.repository.model_config import BatchingConfig, ModelConfig
from headrace.repository.served_queue import limits_for, queue_for

SECOND_NS = 10**9


def queue(sequence=None, instances=2, **batching):
    config = ModelConfig(batching=BatchingConfig(**batching))
    return queue_for(ModelFolder("m", Path("/m"), config, sequence=sequence), instances)


async def test_it_is_bounded_as_configured():
    made = queue(max_queue_size=1, priority_levels=2, priorities={2: {"max_queue_size": 5}})
    assert isinstance(made, BatchQueue)
    assert made._level_sizes == {2: 5}
    assert queue(max_queue_size=3)._level_sizes is None
    none_there = queue(SequenceSpec(), max_queue_size=1)
    assert isinstance(none_there, SequenceQueue)
    none_there.make_room()


@pytest.mark.parametrize(("order", "seconds"), [(False, 20), (True, 40)])
async def test_late_requests_are_refused_by_what_all_instances_can_do_but_in_order_by_what_one_can(order, seconds):
    made = queue(preserve_order=order)
    made.make_room(0, monotonic_ns() + 3600 * SECOND_NS)
    for _ in range(60):
        made.deadlines.observe(1, 10 * SECOND_NS)
    made.make_room(0, monotonic_ns() + (seconds + 1) * SECOND_NS, 4)
    with pytest.raises(Overloaded, match="Refused at arrival"):
        made.make_room(0, monotonic_ns() + (seconds - 1) * SECOND_NS, 4)


async def test_where_nobody_wants_it_nobody_is_refused_for_being_late():
    made = queue(refuse_late=False)
    made.make_room(0, monotonic_ns() + 3600 * SECOND_NS)
    assert made.deadlines.observe is None


async def test_an_objective_is_kept_in_nanoseconds_and_sizes_batches_unless_they_are_given():
    assert queue().objective is None
    assert queue(p99_objective_ms=2.5).objective.budget.objective_ns == 2_500_000
    assert queue(p99_objective_ms=2.5).objective.adaptive
    assert not queue(p99_objective_ms=2.5, preferred_sizes=(4,)).objective.adaptive


@pytest.mark.parametrize(
    ("most", "decoupled", "limits"),
    [
        (8, False, BatchLimits(8, (2, 8), 5000)),
        (0, False, BatchLimits(1, (), 0)),
        (8, True, BatchLimits(1, (2, 8), 5000)),
    ],
    ids=["batched", "one by one", "part by part"],
)
def test_batches_are_bounded_by_the_model_first(most, decoupled, limits):
    batching = BatchingConfig(preferred_sizes=(2, 8, 64), max_queue_delay_us=5)
    assert limits_for(batching, Signature((), (), most, decoupled)) == limits
