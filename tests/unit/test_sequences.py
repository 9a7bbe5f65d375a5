"""Sequences, their places and their batches, over lists of events with made-up times."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.batching.policy import BatchLimits, Wait
from headrace.batching.sequence_backlog import SequenceBacklog
from headrace.batching.sequence_marks import id_control, read_marks
from headrace.batching.sequences import MAX_REMEMBERED, Sequences
from headrace.core.errors import InternalError, InvalidRequest, Kind, NotReady
from headrace.core.sequence import ControlSpec, SequenceSpec
from headrace.core.tensor import DataType

MS = 1_000_000
IDLE_NS = 100 * MS
FLAG = ControlSpec("START", "start", DataType.INT32, (0, 1))


@dataclass(eq=False)
class Waiting:
    """As much of a pending request as sequences look at."""

    parameters: dict
    rows: int = 1
    key: object = None
    queued_at_ns: int = 0
    alone: bool = False
    dead: bool = False
    buried: int = 0
    error: Exception | None = None
    sequence: int = 0
    slot: int = -1
    number: int = field(default_factory=count().__next__)

    @property
    def request(self):
        return SimpleNamespace(parameters=self.parameters)

    @property
    def starts(self):
        return self.parameters.get("sequence_start", False)

    def bury(self):
        assert self.dead, "only the dead are buried"
        self.buried += 1

    def fail(self, error):
        if self.dead:
            self.buried += 1
        else:
            self.error = error
            self.dead = True


def request(identity, marks="", **more):
    """A request of a sequence: ``s`` among its marks begins it, ``e`` ends it."""
    parameters = {"sequence_id": identity}
    if "s" in marks:
        parameters["sequence_start"] = True
    if "e" in marks:
        parameters["sequence_end"] = True
    return Waiting(parameters, **more)


class Model:
    """Instances of a model over its sequences: heads go where they belong, and batches come out."""

    def __init__(self, places=2, instances=1, limits=None, spec=None, up=True):
        self.now_ns = 0
        self.sequences = Sequences("m", IDLE_NS, places)
        self.spec = spec or SequenceSpec("oldest")
        self.limits = limits or BatchLimits(8)
        self.backlogs = [
            SequenceBacklog(
                self.limits,
                self.spec,
                take=self.sequences.take,
                put_back=self.sequences.put_back,
                skip=self._skipper(at),
            )
            for at in range(instances)
        ]
        for index in range(instances if up else 0):
            self.hand_out(self.sequences.open(index))

    def _skipper(self, index):
        def skip(dead):
            heads = self.sequences.skip(dead, self.now_ns)
            assert all(self.sequences.instance_of(head) == index for head in heads), "other backlogs are not asked"
            return heads

        return skip

    def hand_out(self, heads):
        for head in heads:
            self.backlogs[self.sequences.instance_of(head)].add(head)

    def put(self, *requests):
        for one in requests:
            one.queued_at_ns = self.now_ns
            self.hand_out(self.sequences.accept(one, self.now_ns))
        return list(requests)

    def take(self, index=0):
        return self.backlogs[index].next_batch(self.now_ns)

    def finish(self, batch):
        for one in batch:
            one.dead = True  # its future is resolved
            self.hand_out(self.sequences.finish(one, self.now_ns))

    def run(self, index=0):
        batch = self.take(index)
        assert isinstance(batch, list)
        self.finish(batch)
        return batch

    def lose(self, index=0, cause="signal SIGKILL"):
        self.backlogs[index].clear()
        self.hand_out(self.sequences.lose(index, cause))

    def expire(self, after_ns=0):
        self.now_ns += after_ns
        self.hand_out(self.sequences.expire(self.now_ns))


# -- what a request says ----------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [{}, {"sequence_id": 0}, {"sequence_id": ""}, {"sequence_start": True}])
def test_a_request_of_no_sequence_is_refused_in_the_words_that_clients_know(parameters):
    words = "inference request to model 'm' must specify a non-zero or non-empty correlation ID"
    with pytest.raises(InvalidRequest, match=words):
        read_marks("m", parameters)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sequence_id", -1),
        ("sequence_id", 2**64),
        ("sequence_id", True),
        ("sequence_id", False),
        ("sequence_id", 1.5),
        ("sequence_id", "ä" * 65),
        ("sequence_start", 1),
        ("sequence_end", "true"),
    ],
)
def test_what_a_mark_cannot_be_is_named(name, value):
    with pytest.raises(InvalidRequest, match=f"model 'm': parameter '{name}' is "):
        read_marks("m", {"sequence_id": 5, name: value})


@pytest.mark.parametrize("identity", [1, 2**64 - 1, "a", "ä" * 64, "\ud800"])
def test_every_other_id_is_taken(identity):
    marks = read_marks("m", {"sequence_id": identity, "sequence_end": True})
    assert (marks.id, marks.start, marks.end) == (identity, False, True)


@pytest.mark.parametrize(
    ("datatype", "identity", "expected"),
    [
        (DataType.UINT64, "five", "'five', expected a number: the model is told ids in its input 'ID' of UINT64"),
        (DataType.INT64, 2**63, f"{2**63}, expected 1 to {2**63 - 1}: "),
        (DataType.UINT32, 2**32, f"{2**32}, expected 1 to {2**32 - 1}: "),
        (DataType.INT32, 2**31, f"{2**31}, expected 1 to {2**31 - 1}: "),
        (DataType.BYTES, 5, "5, expected a string: the model is told ids in its input 'ID' of BYTES"),
    ],
)
def test_an_id_that_the_model_cannot_be_told_takes_no_place(datatype, identity, expected):
    told = id_control(SequenceSpec(controls=(FLAG, ControlSpec("ID", "correlation_id", datatype))))
    sequences = Sequences("m", IDLE_NS, 1, told)
    with pytest.raises(InvalidRequest, match=f"^model 'm': parameter 'sequence_id' is {expected}"):
        sequences.accept(request(identity, "s"), 0)
    assert (sequences.active, len(sequences)) == (0, 0)


@pytest.mark.parametrize(
    ("datatype", "identity"),
    [
        (DataType.UINT64, 2**64 - 1),
        (DataType.INT64, 2**63 - 1),
        (DataType.UINT32, 2**32 - 1),
        (DataType.INT32, 2**31 - 1),
        (DataType.BYTES, "five"),
    ],
)
def test_the_largest_id_that_the_model_can_be_told_is_taken(datatype, identity):
    assert read_marks("m", {"sequence_id": identity}, ControlSpec("ID", "correlation_id", datatype)).id == identity


def test_a_model_that_is_told_no_ids_takes_any():
    assert id_control(SequenceSpec(controls=(FLAG,))) is None


def test_a_request_of_several_rows_is_refused():
    with pytest.raises(InvalidRequest, match="has 3 rows, expected 1"):
        Model().put(request(5, "s", rows=3))


# -- sequences and their places ---------------------------------------------------------------------------


def test_requests_of_a_sequence_run_one_after_the_other_in_one_slot():
    model = Model()
    requests = model.put(request(5, "s"), request(5), request(5, "e"))
    assert [model.run() for _ in range(3)] == [[one] for one in requests]
    assert model.take() is None
    assert {one.slot for one in requests} == {0}
    assert model.sequences.active == 0


def test_the_next_waits_while_one_runs():
    model = Model()
    first, second = model.put(request(5, "s"), request(5))
    batch = model.take()
    assert batch == [first]
    assert model.take() is None
    model.finish(batch)
    assert model.take() == [second]


def test_ids_that_look_alike_are_two_sequences():
    model = Model()
    requests = model.put(request(5, "s"), request("5", "s"))
    assert model.take() == requests


def test_who_was_not_begun_is_refused():
    model = Model()
    words = "inference request for sequence 5 to model 'm' must specify the START flag on the first request"
    with pytest.raises(InvalidRequest, match=words):
        model.put(request(5))
    model.put(request(5, "se"))
    with pytest.raises(InvalidRequest, match=words):
        model.put(request(5))  # though its end has not run yet
    model.run()
    with pytest.raises(InvalidRequest, match=words):
        model.put(request(5))
    assert len(model.sequences) == 0


def test_beginning_anew_keeps_the_order_and_ends_the_one_before():
    model = Model(places=1)
    requests = model.put(request(5, "s"), request(5), request(5, "s"), request(5, "e"))
    assert [model.run() for _ in range(4)] == [[one] for one in requests]
    assert model.sequences.active == 0


def test_after_the_end_it_can_be_begun_anew_and_goes_on():
    model = Model()
    requests = model.put(request(5, "se"), request(5, "s"), request(5))
    assert [model.run() for _ in range(3)] == [[one] for one in requests]
    assert model.sequences.active == 1


def test_a_new_sequence_goes_where_most_places_are_free():
    model = Model(places=2, instances=2)
    model.put(request(1, "s"), request(2, "s"), request(3, "s"), request(4, "s"))
    assert [len(backlog) for backlog in model.backlogs] == [2, 2]
    for identity in (1, 3):
        model.put(request(identity, "e"))
    model.run(0)
    model.run(0)
    model.put(request(5, "s"), request(6, "s"))
    assert [len(backlog) for backlog in model.backlogs] == [2, 2]


def test_without_a_place_a_sequence_waits_with_all_its_requests_for_the_end_of_another():
    model = Model(places=1)
    first = model.put(request(1, "s"))
    second = model.put(request(2, "s"), request(2, "e"))
    third = model.put(request(3, "se"))
    assert model.run() == first
    assert model.take() is None
    assert len(model.sequences) == 3
    end = model.put(request(1, "e"))
    batch = model.take()
    assert batch == end
    assert model.take() is None, "the place is free once the end is answered"
    model.finish(batch)
    assert [model.run() for _ in range(3)] == [second[:1], second[1:], third]


def test_who_begins_anew_goes_behind_those_that_wait_for_a_place():
    model = Model(places=1)
    first = model.put(request(1, "se"), request(1, "se"))
    second = model.put(request(2, "se"))
    assert [model.run() for _ in range(3)] == [first[:1], second, first[1:]]


def test_the_lowest_slot_is_given_first():
    model = Model(places=3, limits=BatchLimits(3), spec=SequenceSpec("direct"))
    model.put(request(1, "s"), request(2, "s"), request(3, "s"))
    model.run()
    for identity in (3, 2):
        model.put(request(identity, "e"))
        model.run()
    (new,) = model.put(request(4, "s"))
    model.run()
    assert new.slot == 1


def test_an_instance_that_is_not_up_gets_no_sequences():
    model = Model(places=1, instances=2, up=False)
    waiting = model.put(request(1, "s"), request(2, "s"))
    assert [len(backlog) for backlog in model.backlogs] == [0, 0]
    model.hand_out(model.sequences.open(1))
    assert [model.take(index) for index in (0, 1)] == [None, waiting[:1]]
    model.hand_out(model.sequences.open(0))
    assert model.take(0) == waiting[1:]


def test_an_instance_that_leaves_keeps_its_sequences_and_gets_no_more():
    model = Model(places=2, instances=2, up=False)
    model.hand_out(model.sequences.open(0))
    kept = model.put(request(1, "s"))
    assert model.run(0) == kept
    model.hand_out(model.sequences.leave(0))
    model.hand_out(model.sequences.open(0))  # it asks for work all the while
    model.put(request(2, "s"))
    assert model.take(0) is None
    model.hand_out(model.sequences.open(1))
    model.run(1)
    model.put(request(1), request(3, "s"))
    assert [len(model.run(index)) for index in (0, 1)] == [1, 1]
    assert (model.sequences.held_by(0), model.sequences.held_by(1)) == (1, 2)
    model.put(request(1, "e"))
    model.run(0)
    assert model.sequences.held_by(0) == 0
    model.sequences.forget(0)
    waiting = model.put(request(4, "s"))
    assert model.take(0) is None
    model.put(request(2, "e"))
    model.run(1)
    assert model.take(1) == waiting


def test_who_begins_anew_leaves_an_instance_that_leaves():
    model = Model(places=2, instances=2)
    first = model.put(request(1, "s"))
    at = model.sequences.instance_of(first[0])
    model.run(at)
    model.hand_out(model.sequences.leave(at))
    model.put(request(1), request(1, "s"))
    model.run(at)
    assert model.sequences.held_by(at) == 0
    (again,) = model.take(1 - at)
    assert again.starts


def test_an_instance_goes_when_its_sequences_have():
    model = Model()
    model.put(request(1, "s"))
    model.hand_out(model.sequences.leave(0))
    with pytest.raises(AssertionError, match="an instance goes when its sequences have"):
        model.sequences.forget(0)
    model.lose()
    model.sequences.forget(0)


def test_what_was_put_back_is_the_next_of_its_sequence():
    model = Model()
    first, second = model.put(request(5, "s"), request(5))
    batch = model.take()
    model.backlogs[0].put_back(batch)
    model.hand_out(model.sequences.finish(first, 0))
    assert [model.run(), model.run()] == [[first], [second]]


# -- endings ----------------------------------------------------------------------------------------------


def test_one_that_idles_too_long_has_ended_and_its_client_is_told():
    model = Model(places=1)
    model.put(request(1, "s"))
    waiting = model.put(request(2, "s"))
    model.run()
    assert model.sequences.next_expiry_ns == IDLE_NS
    model.expire(IDLE_NS - 1)
    assert model.take() is None
    model.expire(1)
    assert model.take() == waiting
    with pytest.raises(InvalidRequest, match="sequence 1 of model 'm' has ended: no request of it came for 100000 us"):
        model.put(request(1))
    model.put(request(1, "s"))


def test_one_of_which_something_waits_or_runs_does_not_idle():
    model = Model()
    model.put(request(5, "s"))
    model.expire(2 * IDLE_NS)
    batch = model.take()
    model.expire(2 * IDLE_NS)
    model.finish(batch)
    assert model.sequences.next_expiry_ns == model.now_ns + IDLE_NS
    model.put(request(5))
    assert model.sequences.next_expiry_ns is None
    model.expire(2 * IDLE_NS)
    assert model.sequences.active == 1


def test_when_the_worker_dies_all_that_was_begun_there_is_told_why():
    model = Model(places=4, instances=2)
    running, elsewhere, idle = (model.put(request(identity, "s")) for identity in (1, 2, 3))
    model.take(0)
    model.finish(idle)
    behind = model.put(request(1), request(1, "e"))
    model.lose(0)
    story = "sequence 1 of model 'm' has ended: its worker died (signal SIGKILL); begin it anew with sequence_start"
    for one in running + behind:
        assert isinstance(one.error, InternalError)
        assert str(one.error) == story
    with pytest.raises(InvalidRequest) as told:
        model.put(request(3))
    assert str(told.value) == story.replace("1", "3", 1)
    assert model.take(1) == elsewhere
    assert len(model.sequences) == 0
    model.finish(running)  # whoever had it in hand says so later
    assert model.sequences.active == 1


def test_a_sequence_that_was_not_begun_when_the_worker_died_goes_elsewhere():
    model = Model(places=2)
    begun, anew, other = model.put(request(1, "s"), request(1, "s"), request(2, "s"))
    (in_line,) = model.put(request(3, "s"))
    assert model.take() == [begun, other]
    model.lose()
    assert isinstance(begun.error, InternalError)
    assert isinstance(other.error, InternalError)
    model.hand_out(model.sequences.open(0))
    assert model.take() == [anew, in_line]


def test_one_that_was_put_back_before_the_death_is_known_is_lost_too():
    model = Model()
    (first,) = model.put(request(1, "s"))
    model.backlogs[0].put_back(model.take())
    model.lose()
    assert isinstance(first.error, InternalError)
    assert model.sequences.active == 0


def test_one_that_is_put_back_after_the_death_is_not_run():
    model = Model()
    model.put(request(1, "s"))
    batch = model.take()
    model.lose()
    model.put(request(1, "s"))
    model.backlogs[0].put_back(batch)
    assert len(model.backlogs[0]) == 0


def test_nor_when_its_sequence_is_begun_anew_behind_it():
    model = Model()
    _, anew = model.put(request(1, "s"), request(1, "s"))
    batch = model.take()
    model.lose()
    model.hand_out(model.sequences.open(0))
    model.backlogs[0].put_back(batch)
    model.hand_out(model.sequences.finish(batch[0], 0))
    assert [model.run(), model.take()] == [[anew], None]


def test_who_had_a_place_when_the_worker_died_goes_before_those_that_had_none():
    model = Model(places=2)
    had = model.put(request(1, "s"), request(2, "s"))
    had_none = model.put(request(3, "s"), request(4, "s"))
    model.lose()
    model.hand_out(model.sequences.open(0))
    assert model.run() == had
    model.put(request(1, "e"), request(2, "e"))
    model.run()
    assert model.run() == had_none


def test_causes_are_remembered_of_so_many_and_no_more():
    model = Model(places=MAX_REMEMBERED + 1, limits=BatchLimits(MAX_REMEMBERED + 1))
    model.put(*(request(identity, "s") for identity in range(1, MAX_REMEMBERED + 2)))
    model.run()
    model.lose()
    with pytest.raises(InvalidRequest, match="START flag"):
        model.put(request(1))
    with pytest.raises(InvalidRequest, match="its worker died"):
        model.put(request(2))


def test_refusing_answers_what_waits_and_frees_the_places_once_what_runs_is_answered():
    model = Model(places=1)
    running, behind = model.put(request(1, "s"), request(1))
    (unplaced,) = model.put(request(2, "s"))
    batch = model.take()
    model.backlogs[0].clear()
    model.sequences.refuse(Kind.NOT_READY, "the model is broken")
    assert all(isinstance(one.error, NotReady) for one in (behind, unplaced))
    assert running.error is None
    assert model.sequences.active == 1
    model.finish(batch)
    assert model.sequences.active == 0
    with pytest.raises(InvalidRequest, match="sequence 1 of model 'm' has ended: the model is broken"):
        model.put(request(1))


def test_once_no_more_can_come_sequences_end_by_themselves():
    model = Model(places=1)
    model.put(request(1, "s"))
    second = model.put(request(2, "s"))
    third = model.put(request(3, "s"))
    model.run()
    model.hand_out(model.sequences.close())
    assert [model.run(), model.run()] == [second, third]
    assert model.sequences.active == 0
    assert model.sequences.next_expiry_ns is None


# -- requests that nobody waits for -----------------------------------------------------------------------


def test_a_first_request_that_left_takes_the_ones_behind_it_along():
    model = Model(places=1)
    gone, behind = model.put(request(5, "s"), request(5))
    anew = model.put(request(5, "s"))
    gone.dead = True
    assert model.take() == anew
    assert gone.buried == 1
    assert isinstance(behind.error, InvalidRequest)
    assert "START flag" in str(behind.error)


def test_after_a_first_request_that_left_the_sequence_is_not_there():
    model = Model(places=1)
    (gone,) = model.put(request(5, "s"))
    other = model.put(request(6, "s"))
    gone.dead = True
    assert model.take() == other
    with pytest.raises(InvalidRequest, match="START flag"):
        model.put(request(5))


def test_one_in_the_middle_that_left_is_passed_over():
    model = Model()
    first, gone, last = model.put(request(5, "s"), request(5), request(5))
    gone.dead = True
    assert [model.run(), model.run()] == [[first], [last]]
    assert gone.buried == 1


def test_a_last_one_that_left_ends_its_sequence_all_the_same():
    model = Model(places=1)
    model.put(request(5, "s"))
    (gone,) = model.put(request(5, "e"))
    other = model.put(request(6, "s"))
    gone.dead = True
    model.run()
    assert model.take() == other
    with pytest.raises(InvalidRequest, match="START flag"):
        model.put(request(5))


def test_one_that_left_alone_in_line_lets_its_sequence_idle():
    model = Model()
    model.put(request(5, "s"))
    model.run()
    (gone,) = model.put(request(5))
    gone.dead = True
    model.now_ns = 7
    assert model.take() is None
    assert model.sequences.next_expiry_ns == 7 + IDLE_NS


def test_what_follows_a_first_request_that_left_in_line_is_refused_at_once():
    model = Model(places=1)
    model.put(request(1, "s"))
    model.run()
    first, second = request(2, "s"), request(2)
    model.put(first, second)
    first.dead = True
    with pytest.raises(InvalidRequest, match="must specify the START flag on the first request"):
        model.sequences.accept(request(2), 0)
    assert "must specify the START flag" in str(second.error)
    assert (len(model.sequences), model.sequences.active) == (0, 1)
    again = request(2, "se")
    model.put(again)
    model.put(request(1, "e"))
    model.run()
    assert model.run() == [again]


def test_a_middle_one_that_left_in_line_changes_nothing():
    model = Model(places=1)
    model.put(request(1, "s"))
    model.run()
    waiting = [request(2, "s"), request(2), request(2)]
    model.put(*waiting[:2])
    waiting[1].dead = True
    model.put(waiting[2])
    model.put(request(1, "e"))
    model.run()
    assert [model.run(), model.run()] == [[waiting[0]], [waiting[2]]]


def test_a_sequence_in_line_that_nobody_waits_for_is_forgotten():
    model = Model(places=1)
    model.put(request(1, "s"))
    (gone,) = model.put(request(2, "s"))
    gone.dead = True
    model.sequences.drop_dead()
    with pytest.raises(InvalidRequest, match="START flag"):
        model.put(request(2))
    model.put(request(1, "e"))
    assert [len(model.run()), len(model.run()), model.take()] == [1, 1, None]


def test_places_in_line_are_given_back_by_all_that_left():
    model = Model(places=2)
    placed = model.put(request(1, "s"), request(1), request(2, "s"), request(2))
    waiting = model.put(request(3, "s"), request(3), request(4, "s"))
    batch = model.take()
    for one in (placed[1], waiting[0], waiting[2]):
        one.dead = True
    for backlog in model.backlogs:
        backlog.drop_dead()
    model.sequences.drop_dead()
    assert len(model.sequences) == 1, "what is behind a first one that left goes too"
    assert isinstance(waiting[1].error, InvalidRequest)
    model.finish(batch)
    assert model.run() == [placed[3]]


# -- batches ----------------------------------------------------------------------------------------------


def test_the_oldest_of_different_sequences_go_together_up_to_the_bound():
    model = Model(places=5, limits=BatchLimits(3))
    first = model.put(*(request(identity, "s") for identity in range(1, 6)))
    model.now_ns = 1
    second = model.put(*(request(identity) for identity in range(1, 6)))
    assert model.run() == first[:3]
    assert model.run() == [*first[3:], second[0]]
    assert model.run() == second[1:4]
    assert model.run() == second[4:]


def test_one_that_came_early_and_waited_for_its_sequence_is_older_than_one_that_came_late():
    model = Model(places=3, limits=BatchLimits(1))
    early = model.put(request(1, "s"), request(1))
    model.now_ns = 1
    late = model.put(request(2, "s"))
    assert [model.run(), model.run(), model.run()] == [early[:1], early[1:], late]


def test_other_shapes_do_not_share_a_batch():
    for strategy in ("oldest", "direct"):
        model = Model(places=3, limits=BatchLimits(3), spec=SequenceSpec(strategy))
        waiting = model.put(*(request(at, "s", key=((at % 2,),)) for at in (1, 2, 3)))
        assert [model.take(), model.take()] == [[waiting[0], waiting[2]], [waiting[1]]]


def test_of_several_shapes_the_one_with_the_oldest_goes_first():
    model = Model(places=3, limits=BatchLimits(1))
    first, oldest = model.put(request(1, "s", key=((1,),)), request(1, key=((2,),)))
    model.now_ns = 1
    (late,) = model.put(request(2, "s", key=((1,),)))
    assert [model.run(), model.run(), model.run()] == [[first], [oldest], [late]]


def test_preferred_sizes_and_a_delay_hold_for_the_oldest():
    model = Model(places=8, limits=BatchLimits(8, (4,), 5 * MS))
    waiting = model.put(*(request(identity, "s") for identity in (1, 2, 3)))
    assert model.take() == Wait(5 * MS)
    assert model.backlogs[0].due_ns(0) == 5 * MS
    waiting += model.put(request(4, "s"), request(5, "s"))
    assert model.take() == waiting[:4]
    assert model.take() == Wait(5 * MS)
    model.now_ns = 5 * MS
    assert model.take() == waiting[4:]


@pytest.mark.parametrize(("share", "enough"), [(0.0, 1), (0.5, 2), (0.51, 3), (1.0, 4)])
def test_a_direct_batch_goes_when_enough_of_its_rows_have_a_request(share, enough):
    spec = SequenceSpec("direct", minimum_slot_utilization=share)
    model = Model(places=4, limits=BatchLimits(4, (), 5 * MS), spec=spec)
    for identity in range(1, enough):
        model.put(request(identity, "s"))
        assert model.take() == Wait(5 * MS)
    model.put(request(enough, "s"))
    assert len(model.take()) == enough


def test_a_direct_batch_goes_when_its_oldest_has_waited_long_enough():
    model = Model(
        places=4, limits=BatchLimits(4, (), 5 * MS), spec=SequenceSpec("direct", minimum_slot_utilization=1.0)
    )
    waiting = model.put(request(1, "s"))
    model.now_ns = 2 * MS
    waiting += model.put(request(2, "s"))
    assert model.take() == Wait(5 * MS)
    model.now_ns = 5 * MS
    assert model.take() == waiting


def test_a_direct_batch_is_in_the_order_of_its_slots():
    model = Model(places=3, limits=BatchLimits(3), spec=SequenceSpec("direct"))
    model.put(request(1, "s"), request(2, "s"), request(3, "s"))
    model.run()
    for identity in (3, 1, 2):
        model.now_ns += 1
        model.put(request(identity))
    assert [one.slot for one in model.take()] == [0, 1, 2]


def test_suspects_run_alone_and_first():
    model = Model()
    others = model.put(request(1, "s"))
    suspects = model.put(request(2, "s"))
    batch = model.take()
    assert batch == others + suspects
    suspects[0].alone = True
    model.backlogs[0].put_back(batch)
    assert [model.take(), model.take()] == [suspects, others]


def test_a_thousand_sequences_share_the_places_there_are():
    model = Model(places=32, limits=BatchLimits(32))
    lengths = 3
    for step in range(lengths):
        for identity in range(1, 1001):
            model.put(request(identity, "s" * (step == 0) + "e" * (step == lengths - 1)))
    ran = []
    while isinstance(batch := model.take(), list):
        assert len(batch) <= 32
        ran += batch
        model.finish(batch)
    assert len(ran) == 3000
    assert model.sequences.active == 0


# -- whatever happens -------------------------------------------------------------------------------------

INSTANCES, ROWS = 2, 3

events = st.lists(
    st.one_of(
        st.tuples(
            st.just("put"),
            st.sampled_from([1, 2, 3, "1", 4, 5, 6]),
            st.sampled_from(["s", "", "e", "se"]),
            st.booleans(),
        ),
        st.tuples(st.just("take"), st.integers(0, INSTANCES - 1)),
        st.tuples(st.just("take"), st.integers(0, INSTANCES - 1)),
        st.tuples(st.just("finish"), st.integers(0, 9)),
        st.tuples(st.just("finish"), st.integers(0, 9)),
        st.tuples(st.just("put back"), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("leave"), st.integers(0, 99)),
        st.tuples(st.just("pass"), st.integers(1, 12)),
        st.tuples(st.just("lose"), st.integers(0, INSTANCES - 1)),
        st.tuples(st.just("open"), st.integers(0, INSTANCES - 1)),
        st.tuples(st.just("sweep")),
        st.tuples(st.just("refuse")),
    ),
    max_size=120,
)
specs = st.sampled_from(
    [SequenceSpec("oldest"), SequenceSpec("direct"), SequenceSpec("direct", minimum_slot_utilization=1.0)]
)


@given(spec=specs, places=st.sampled_from([1, 2]), delay_ns=st.sampled_from([0, 5]), events=events)
def test_no_two_of_a_sequence_at_once_none_out_of_order_and_none_lost(spec, places, delay_ns, events):
    model = Model(places, INSTANCES, BatchLimits(ROWS, (), delay_ns), spec)
    model.sequences._max_idle_ns = 20
    up = [True] * INSTANCES
    everything: list[Waiting] = []
    batches: list[tuple[int, list[Waiting]]] = []
    answered: set[int] = set()
    taken: list[Waiting] = []
    slots: dict[int, tuple[int, int]] = {}  # of each sequence that is begun, by the number of its first request
    first_of: dict[int, int] = {}

    def check():
        waiting = {id(one) for sequence in model.sequences._by_number.values() for one in sequence.waiting}
        assert len(waiting) == len(model.sequences)
        running = {id(one) for _, batch in batches for one in batch}
        for one in everything:
            where = (id(one) in waiting) + (id(one) in running) + (id(one) in answered)
            assert where + one.buried + (one.error is not None) == 1, "each is in one place, or answered"
        heads = [head for backlog in model.backlogs for head in backlog]
        assert len(heads) == len(set(map(id, heads))) == sum(map(len, model.backlogs))
        ready = {
            id(sequence.waiting[0])
            for sequence in model.sequences._by_number.values()
            if sequence.waiting and sequence.running is None and sequence.instance >= 0
        }
        assert {id(head) for head in heads} == ready, "all that can run is offered"
        held = [instance.held for instance in model.sequences._instances.values()]
        assert all(len(one) <= places for one in held)
        assert sum(map(len, held)) == model.sequences.active
        if model.sequences._unplaced:
            assert all(len(one) == places for one, is_up in zip(held, up, strict=True) if is_up), "no place is free"
        for sequence in model.sequences._by_number.values():
            idle = not sequence.waiting and sequence.running is None
            assert (sequence.number in model.sequences._idle_since) == idle, "what does nothing idles, with a place"
            assert not idle or sequence.instance >= 0
        assert model.sequences.next_expiry_ns is None or model.sequences.next_expiry_ns > model.now_ns

    def check_batch(index, batch):
        assert 0 < len(batch) <= ROWS
        assert not any(one.dead for one in batch)
        assert len({one.key for one in batch}) == 1
        assert not any(one.alone for one in batch) or len(batch) == 1
        assert len({one.slot for one in batch}) == len(batch)
        at_once = Counter(one.sequence for _, other in batches for one in other)
        assert all(times == 1 for times in at_once.values()), "one of a sequence at a time"
        for one in batch:
            if one.starts:
                first_of[one.sequence] = one.number
                slots[one.number] = (index, one.slot)
            assert slots[first_of[one.sequence]] == (index, one.slot), "a sequence stays in its slot"

    for name, *values in events:
        if name == "put":
            identity, marks, wide = values
            one = request(identity, marks, key=((2,),) if wide else None)
            try:
                model.put(one)
            except InvalidRequest:
                assert "s" not in marks
            else:
                everything.append(one)
        elif name == "take" and up[values[0]]:
            batch = model.take(values[0])
            if isinstance(batch, list):
                batches.append((values[0], batch))
                taken += [one for one in batch if not one.alone]
                check_batch(values[0], batch)
            elif isinstance(batch, Wait):
                assert batch.until_ns > model.now_ns
        elif name in ("finish", "put back") and batches:
            index, batch = batches.pop(values[0] % len(batches))
            if name == "put back":
                for one in batch:
                    one.alone = one.alone or values[1]
                    if one in taken:
                        taken.remove(one)
                model.backlogs[index].put_back(batch)
            else:
                answered.update(map(id, batch))
                for one in batch:
                    one.dead = True
            for one in batch:
                model.hand_out(model.sequences.finish(one, model.now_ns))
        elif name == "leave" and everything:
            everything[values[0] % len(everything)].dead = True
        elif name == "pass":
            model.expire(values[0])
        elif name == "lose":
            up[values[0]] = False
            model.lose(values[0])
            lost = [batch for index, batch in batches if index == values[0]]
            batches[:] = [(index, batch) for index, batch in batches if index != values[0]]
            for batch in lost:
                assert all(one.dead for one in batch)
                for one in batch:
                    model.hand_out(model.sequences.finish(one, model.now_ns))
        elif name == "open":
            up[values[0]] = True
            model.hand_out(model.sequences.open(values[0]))
        elif name == "sweep":
            for backlog in model.backlogs:
                backlog.drop_dead()
            model.sequences.drop_dead()
            waiting = [one for sequence in model.sequences._by_number.values() for one in sequence.waiting]
            assert not any(one.dead for one in waiting)
        elif name == "refuse":
            for backlog in model.backlogs:
                backlog.clear()
            model.sequences.refuse(Kind.NOT_READY, "broken")
            assert len(model.sequences) == 0
        check()

    by_sequence: dict[object, list[int]] = {}
    for one in taken:
        by_sequence.setdefault(one.sequence, []).append(one.number)
    assert all(numbers == sorted(numbers) for numbers in by_sequence.values()), "in their order"

    for index in range(INSTANCES):
        model.hand_out(model.sequences.open(index))
    up[:] = [True] * INSTANCES
    model.hand_out(model.sequences.close())
    for _ in range(3 * len(everything) + 3):
        for _, batch in batches:
            answered.update(map(id, batch))
            model.finish(batch)
        batches.clear()
        model.now_ns += 10
        for index in range(INSTANCES):
            batch = model.take(index)
            if isinstance(batch, list):
                batches.append((index, batch))
                check_batch(index, batch)
    check()
    assert (len(model.sequences), model.sequences.active) == (0, 0), "nothing is left behind"
