"""One instance of a model over a made-up worker process."""

import asyncio
import errno
import gc
import os
from pathlib import Path
from time import monotonic_ns

import msgspec
import pytest

from headrace.batching.pending import Pending
from headrace.batching.policy import BatchLimits
from headrace.batching.queue import BatchQueue
from headrace.batching.streamed import StreamedRequest
from headrace.core.errors import InternalError, InvalidRequest, Kind, Overloaded
from headrace.core.model import Signature, TensorSpec
from headrace.core.request import InferRequest
from headrace.core.statistics import Statistics
from headrace.core.tensor import DataType, Tensor
from headrace.core.validation import ModelInputs
from headrace.workers import pump as pump_module
from headrace.workers import second_chance
from headrace.workers.arena import SMALLEST_BYTES, Segment
from headrace.workers.frames import (
    Begun,
    Cancel,
    Done,
    Ended,
    Failed,
    Load,
    Loaded,
    NamedTensor,
    Part,
    RequestFrame,
    TensorFrame,
    encode,
)
from headrace.workers.instance import Instance
from headrace.workers.rate_limit import RateLimiter
from headrace.workers.resources import Claim, Resources
from headrace.workers.second_chance import MAX_DEATHS
from headrace.workers.slots import AT_WORKER
from headrace.workers.turns import CpuTurns

SIGNATURE = Signature(
    (TensorSpec("x", DataType.UINT8, (-1, 2)),), (TensorSpec("y", DataType.UINT8, (-1, 2)),), max_batch_size=4
)


def loaded(signature=SIGNATURE, wants_requests=False, cpu_threads=0):
    return Loaded(0, signature, wants_requests, cpu_threads, (), 0.1)


class Host:
    """A worker process that keeps what it is asked, and reads the memory as a worker would."""

    def __init__(self):
        self.asked = []
        self.attachments = None  # nothing comes from other workers here
        self.told = []
        self.refuses = False
        self._sequence = 0
        self._inputs = {}
        self._answered = {}

    def next_sequence(self):
        self._sequence += 1
        return self._sequence

    def tell(self, frame):
        encode(frame)
        self.told.append(frame)

    def run(self, batch, frame, descriptors):
        encode(frame)
        if self.refuses:
            raise OSError("no room")
        if frame.segment_bytes:
            (descriptor,) = descriptors
            self._inputs[frame.slot] = Segment(descriptor, frame.segment_bytes)
            os.close(descriptor)
        else:
            assert not descriptors
        self.asked.append((batch, frame))

    def rows(self, at=0):
        """What the worker finds in the memory of a batch's input."""
        frame = self.asked[at][1]
        tensor = frame.inputs[0]
        data = self._inputs[frame.slot].view[tensor.offset : tensor.offset + tensor.nbytes]
        assert len(data) == tensor.shape[0] * 2
        return [bytes(data[start : start + 2]) for start in range(0, len(data), 2)]

    def answer(self, at=0, rows=None):
        """Answer a batch with its own input, or with so many rows of it."""
        found = self.rows(at)[:rows]
        batch, frame = self.asked.pop(at)
        segment = None
        if frame.slot not in self._answered:
            segment, descriptor = Segment.create(SMALLEST_BYTES)
            os.close(descriptor)
            self._answered[frame.slot] = segment
        data = b"".join(found)
        self._answered[frame.slot].view[64 : 64 + len(data)] = data
        output = TensorFrame(64, len(data), (len(found), 2), "UINT8")
        done = Done(frame.sequence, (output,), SMALLEST_BYTES if segment else 0, 10, 100, 5)
        batch.instance.done(batch, done, segment)

    def refuse(self, kind=Kind.INTERNAL, message="broken"):
        batch, frame = self.asked.pop(0)
        batch.instance.failed(batch, Failed(frame.sequence, kind.value, message))


def open_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


class Model:
    """A queue and what serves it."""

    def __init__(self, turns=None, preserve_order=False, **more):
        self.statistics = Statistics()
        self.queue = BatchQueue("m", BatchLimits(4), 100, preserve_order=preserve_order, **more)
        self.turns = turns or CpuTurns(2)
        self.instances = []

    def instance(self, host=None, **more):
        load = Load(len(self.instances), "fake", "m", "1", "/m", "cpu", 1, Signature((), ()), None, {}, False)
        made = Instance(load, self.queue, self.statistics, self.turns, 0)
        self.instances.append(made)
        if host is not None:
            made.up(host, loaded(**more))
            made.start()
        return made

    def put(self, *values, **parameters):
        """A request for each of the values: a number is one row of it, a list is several."""
        made = []
        for value in values:
            rows = value if isinstance(value, list) else [value]
            x = Tensor("x", DataType.UINT8, (len(rows), 2), bytes(one for row in rows for one in (row, row)))
            request = InferRequest("m", "", f"r-{rows[0]}", (x,), (), parameters)
            loop = asyncio.get_running_loop()
            made.append(Pending(request, ModelInputs((x,), len(rows), None), "1", self.statistics, loop))
            self.queue.put(made[-1])
        return made


def answer_of(pending):
    """The rows that a request was answered with."""
    assert pending.future.done(), "it was not answered"
    (y,) = pending.future.result().outputs
    assert y.shape == (pending.rows, 2)
    return list(bytes(y.data)[::2])


@pytest.fixture
async def model():
    made = Model()
    yield made
    for instance in made.instances:
        instance.stop()
    await settle()


@pytest.fixture
def host():
    return Host()


async def test_it_is_not_up_until_its_model_is_loaded(model, host):
    instance = model.instance()
    assert not instance.is_up
    model.put(1)
    instance.up(host, loaded())
    instance.start()
    assert instance.is_up
    assert instance.signature == SIGNATURE
    assert instance.waiting == 1
    await settle()
    assert [host.rows()] == [[b"\1\1"]]


async def test_a_batch_is_answered_to_each_its_own_rows(model, host):
    model.instance(host)
    requests = model.put(1, [2, 3], 4)
    await settle()
    assert host.rows() == [b"\1\1", b"\2\2", b"\3\3", b"\4\4"]
    host.answer()
    assert [answer_of(one) for one in requests] == [[1], [2, 3], [4]]
    assert model.queue.executing == 0
    statistics = model.statistics
    assert (statistics.success, statistics.executions, statistics.rows) == (3, 1, 4)
    assert statistics.last_inference_ms > 0


async def test_one_batch_runs_one_is_staged_and_the_rest_waits(model, host):
    model.instance(host)
    requests = model.put(*range(16))
    await settle()
    assert len(host.asked) == AT_WORKER == 2
    assert len(model.queue) == 8
    host.answer()
    await settle()
    assert (len(host.asked), len(model.queue)) == (2, 4)
    assert host.asked[0][1].slot != host.asked[1][1].slot
    while host.asked:
        host.answer()
        await settle()
    assert [answer_of(one) for one in requests] == [[number] for number in range(16)]


async def test_memory_is_made_once_a_slot_and_used_again(model, host):
    model.instance(host)
    made = []
    for number in range(6):
        model.put(number)
        await settle()
        made.append(host.asked[0][1].segment_bytes)
        assert host.rows() == [bytes([number, number])]
        host.answer()
    assert made == [SMALLEST_BYTES, 0, 0, 0, 0, 0]


async def test_an_answer_stays_as_it_is_when_the_memory_is_used_again(model, host):
    model.instance(host)
    (first,) = model.put(1)
    await settle()
    host.answer()
    model.put(2)
    await settle()
    host.answer()
    assert answer_of(first) == [1]


async def test_only_backends_that_want_it_are_told_of_single_requests(model, host):
    model.instance(host)
    model.put(1, 2, colour="red")
    await settle()
    assert host.asked[0][1].requests == ()
    other_host = Host()
    other = Model()
    instance = other.instance(other_host, wants_requests=True)
    other.put(1, [2, 3], colour="red")
    await settle()
    instance.stop()
    assert other_host.asked[0][1].requests == (
        RequestFrame(1, "r-1", {"colour": "red"}),
        RequestFrame(2, "r-2", {"colour": "red"}),
    )


async def test_a_request_that_fails_alone_has_its_answer(model, host):
    model.instance(host)
    (request,) = model.put(1)
    await settle()
    host.refuse(Kind.INVALID, "x is odd")
    assert isinstance(request.future.exception(), InvalidRequest)
    assert str(request.future.exception()) == "model 'm': x is odd"
    await settle()
    assert (host.asked, model.queue.executing, model.statistics.retries) == ([], 0, 0)


async def test_one_bad_request_never_fails_its_batch_mates(model, host):
    model.instance(host)
    requests = model.put(1, 66, 3)
    await settle()
    host.refuse()
    for _ in range(3):
        await settle()
        if host.rows() == [b"BB"]:
            host.refuse(message="66 is bad")
        else:
            assert len(host.rows()) == 1
            host.answer()
    assert [answer_of(requests[0]), answer_of(requests[2])] == [[1], [3]]
    assert isinstance(requests[1].future.exception(), InternalError)
    assert "66 is bad" in str(requests[1].future.exception())
    assert (model.queue.executing, len(model.queue)) == (0, 0)
    assert model.statistics.retries == 3
    assert model.statistics.failures == {"BACKEND": 1}


async def test_a_batch_whose_outputs_cannot_be_shared_out_runs_one_by_one(model, host):
    model.instance(host)
    requests = model.put(1, 2)
    await settle()
    host.answer(rows=1)
    await settle()
    assert [len(batch.pending) for batch, _ in host.asked] == [1, 1]
    host.answer()
    host.answer()
    assert [answer_of(one) for one in requests] == [[1], [2]]
    assert model.queue.executing == 0


async def test_members_that_left_do_not_disturb_the_others(model, host):
    model.instance(host)
    requests = model.put(1, 2, 3)
    await settle()
    requests[1].future.cancel()
    host.answer()
    assert [answer_of(requests[0]), answer_of(requests[2])] == [[1], [3]]
    assert requests[1].future.cancelled()


async def test_a_client_that_leaves_while_its_request_runs_is_counted_too(model, host):
    model.instance(host)
    (request,) = model.put(1)
    await settle()
    request.future.cancel()
    host.answer()
    assert (model.statistics.success, model.statistics.failures) == (0, {"CANCELED": 1})


async def test_when_its_process_dies_what_it_held_runs_again(model, host):
    instance = model.instance(host)
    requests = model.put(*range(12))
    await settle()
    (executing, _), (staged, _) = host.asked
    instance.down(executing, [staged], "signal SIGKILL")
    assert not instance.is_up
    assert (model.queue.executing, len(model.queue)) == (0, 12)
    assert model.statistics.worker_deaths == 1
    await settle()
    assert len(host.asked) == 2, "nothing is given to a dead one"

    again = Host()
    instance.up(again, loaded())
    instance.start()
    sizes = []
    await settle()
    while again.asked:
        sizes.append(len(again.asked[0][0].pending))
        again.answer()
        await settle()
    assert sizes == [1, 1, 1, 1, 4, 4], "the suspects alone, the others as before"
    assert [answer_of(one) for one in requests] == [[number] for number in range(12)]
    assert model.statistics.failures == {}


async def test_another_instance_takes_over_at_once(model, host):
    dying = model.instance(host)
    requests = model.put(1, 2)
    await settle()
    other = Host()
    model.instance(other)
    await settle()
    dying.down(host.asked[0][0], [], "exit status 1")
    await settle()
    assert [len(batch.pending) for batch, _ in other.asked] == [1, 1]
    other.answer()
    other.answer()
    assert [answer_of(one) for one in requests] == [[1], [2]]


async def test_a_request_that_kills_two_workers_is_refused_alone(model):
    instance = model.instance()
    requests = model.put(1, 66, 3)
    hosts = []

    def bring_up():
        hosts.append(Host())
        instance.up(hosts[-1], loaded())
        instance.start()

    bring_up()
    deaths = 0
    for _ in range(20):
        await settle()
        asked = hosts[-1].asked
        if not asked:
            break
        if b"BB" in hosts[-1].rows():
            deaths += 1
            instance.down(asked[0][0], [batch for batch, _ in asked[1:]], "signal SIGSEGV")
            bring_up()
        else:
            hosts[-1].answer()
    assert deaths == MAX_DEATHS == 2
    assert [answer_of(requests[0]), answer_of(requests[2])] == [[1], [3]]
    message = str(requests[1].future.exception())
    assert "signal SIGSEGV" in message
    assert "2 times" in message
    assert (len(model.queue), model.queue.executing) == (0, 0)
    assert model.statistics.worker_deaths == 2


async def test_only_what_really_runs_again_counts_as_a_retry(model, host):
    instance = model.instance(host)
    (request,) = model.put(1)
    await settle()
    instance.down(host.asked[0][0], [], "signal SIGSEGV")
    again = Host()
    instance.up(again, loaded())
    instance.start()
    await settle()
    instance.down(again.asked[0][0], [], "signal SIGSEGV")
    assert request.future.exception() is not None
    assert model.statistics.retries == 1


async def test_a_death_while_idle_disturbs_nobody(model, host):
    instance = model.instance(host)
    await settle()
    instance.down(None, [], "signal SIGTERM")
    assert (model.queue.executing, instance.is_up) == (0, False)
    (request,) = model.put(1)
    await settle()
    again = Host()
    instance.up(again, loaded())
    instance.start()
    await settle()
    again.answer()
    assert answer_of(request) == [1]


async def test_after_a_restart_memory_is_passed_anew(model, host):
    instance = model.instance(host)
    model.put(1)
    await settle()
    host.answer()
    instance.down(None, [], "signal SIGKILL")
    again = Host()
    instance.up(again, loaded())
    instance.start()
    (request,) = model.put(2)
    await settle()
    assert again.asked[0][1].segment_bytes == SMALLEST_BYTES
    again.answer()
    assert answer_of(request) == [2]


async def test_stopping_takes_no_more_and_answers_what_runs(model, host):
    instance = model.instance(host)
    (running,) = model.put(1)
    await settle()
    instance.stop()
    (waiting,) = model.put(2)
    await settle()
    assert len(host.asked) == 1
    host.answer()
    assert answer_of(running) == [1]
    await settle()
    assert not waiting.dead
    assert len(model.queue) == 1


async def test_a_broken_one_says_why_and_tells_its_owner_also_when_it_is_back(model, host):
    instance = model.instance(host)
    states = []
    instance.on_change = lambda: states.append((instance.is_up, instance.broken))
    instance.break_down("the file has gone")
    instance.up(host, loaded())
    instance.start()
    assert states == [(False, "the file has gone"), (True, "")]


async def test_a_model_that_comes_back_another_is_not_served(model, host):
    instance = model.instance(host)
    instance.down(None, [], "signal SIGKILL")
    other = Signature(SIGNATURE.inputs, SIGNATURE.outputs, 8)
    instance.up(Host(), loaded(other))
    assert "changed" in instance.broken
    assert not instance.is_up
    assert instance.signature == SIGNATURE


async def test_what_cannot_be_handed_over_is_answered_and_the_next_is_served_right(model, host, caplog):
    instance = model.instance(host)
    before = open_descriptors()
    host.refuses = True
    failed = model.put(*range(40))
    await settle()
    await settle()
    assert all("could not hand the request over" in str(one.future.exception()) for one in failed)
    assert instance.is_up
    assert model.queue.executing == 0
    assert open_descriptors() <= before + AT_WORKER, "a mapping holds a descriptor, and nothing else does"
    host.refuses = False
    (request,) = model.put(7)
    await settle()
    assert host.rows() == [b"\7\7"], "the worker was told of the memory that is used now"
    host.answer()
    assert answer_of(request) == [7]
    assert "could not hand a batch of model m" in caplog.text


async def test_what_there_is_no_room_for_now_may_be_asked_again(model, host, monkeypatch, caplog):
    model.instance(host)

    def refuse(_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(Segment, "create", refuse)
        (failed,) = model.put(7)
        await settle()
    assert isinstance(failed.future.exception(), Overloaded)
    assert "model 'm': could not hand the request over" in str(failed.future.exception())
    (request,) = model.put(7)
    await settle()
    host.answer()
    assert answer_of(request) == [7]


async def test_a_heavy_model_waits_for_its_turn(model, host):
    model.instance(host, cpu_threads=2)
    turn = await model.turns.take(1)
    (request,) = model.put(1)
    await settle()
    assert host.asked == []
    model.turns.give(turn)
    await settle()
    host.answer()
    assert answer_of(request) == [1]


async def test_turns_are_given_back_after_a_batch_and_on_death(model, host):
    instance = model.instance(host, cpu_threads=2)
    model.put(*range(8))
    await settle()
    assert len(host.asked) == 1, "a heavy batch has nothing staged behind it"
    waiting = asyncio.get_running_loop().create_task(model.turns.take(2))
    await settle()
    assert not waiting.done()
    host.answer()
    await asyncio.wait_for(waiting, 30)
    model.turns.give(waiting.result())
    await settle()
    instance.down(host.asked[0][0], [], "signal SIGKILL")
    await asyncio.wait_for(model.turns.take(2), 30)


async def test_a_busy_model_lets_another_have_its_turn():
    turns = CpuTurns(2)
    busy, other = Model(turns), Model(turns)
    hosts = [Host(), Host()]
    instances = [busy.instance(hosts[0], cpu_threads=2), other.instance(hosts[1], cpu_threads=2)]
    busy.put(*range(40))
    await settle()
    (request,) = other.put(1)
    for _ in range(AT_WORKER + 1):
        await settle()
        if hosts[1].asked:
            break
        hosts[0].answer()
    assert not hosts[0].asked, "never both at once"
    hosts[1].answer()
    assert answer_of(request) == [1]
    await settle()
    assert hosts[0].asked, "and on it goes"
    for instance in instances:
        instance.stop()
    await settle()


async def test_when_one_dies_waiting_for_its_turn_another_takes_its_work(model, host):
    """The one that was woken for a request may be gone before the CPUs are free."""
    first = model.instance(host, cpu_threads=1)
    await settle()
    other = Host()
    model.instance(other, cpu_threads=1)
    await settle()
    turn = await model.turns.take(2)
    (request,) = model.put(1)
    await settle()
    first.down(None, [], "signal SIGKILL")
    await settle()
    model.turns.give(turn)
    await settle()
    assert other.asked, "an idle instance and free CPUs, and still the request waits"
    other.answer()
    assert answer_of(request) == [1]


def limited(model, host, limiter, needs, **more):
    """An instance that runs only with what it needs."""
    instance = model.instance()
    claim = Claim(f"m{id(model)}", needs)
    limiter.resources.add(claim)
    instance.limit(limiter, claim)
    instance.up(host, loaded(**more))
    instance.start()
    return instance


async def test_limited_instances_run_one_after_the_other():
    limiter, models, hosts = RateLimiter(Resources({})), [Model(), Model()], [Host(), Host()]
    for model, host in zip(models, hosts, strict=True):
        limited(model, host, limiter, {("cpu", "R"): 1})
        model.put(*range(12))
    served = []
    for _ in range(6):
        await settle()
        (busy,) = [host for host in hosts if host.asked]
        assert len(busy.asked) == 1, "nothing is staged behind a batch that holds what others wait for"
        assert limiter.resources.usage() == {("cpu", "R"): (1, 1)}
        served.append(hosts.index(busy))
        busy.answer()
    await settle()
    assert served == [0, 1, 0, 1, 0, 1], "each model gets its share, though either has always more work"
    assert limiter.resources.usage() == {("cpu", "R"): (0, 1)}
    for model in models:
        model.instances[0].stop()
    await settle()


async def test_what_a_dead_worker_held_can_be_had_by_others():
    limiter, models, hosts = RateLimiter(Resources({})), [Model(), Model()], [Host(), Host()]
    for model, host in zip(models, hosts, strict=True):
        limited(model, host, limiter, {("cpu", "R"): 1}, cpu_threads=1)
        model.put(*range(8))
    await settle()
    (busy,) = [index for index, host in enumerate(hosts) if host.asked]
    models[busy].instances[0].down(hosts[busy].asked[0][0], [], "signal SIGKILL")
    await settle()
    assert hosts[1 - busy].asked
    models[1 - busy].instances[0].down(hosts[1 - busy].asked[0][0], [], "signal SIGKILL")
    await settle()
    assert limiter.resources.usage() == {("cpu", "R"): (0, 1)}
    for model in models:
        await asyncio.wait_for(model.turns.take(2), 30)


async def test_an_instance_that_stands_in_line_and_stops_lets_others_pass():
    turns = CpuTurns(1)
    models, hosts = [Model(turns), Model(turns)], [Host(), Host()]
    for model, host in zip(models, hosts, strict=True):
        model.instance(host, cpu_threads=1)
        model.put(*range(12))
    await settle()
    (busy,) = [index for index, host in enumerate(hosts) if host.asked]
    hosts[busy].answer()  # it stands in line for its next batch now
    models[busy].instances[0].stop()
    await settle()
    other = 1 - busy
    assert hosts[other].asked
    hosts[other].answer()
    await settle()
    assert hosts[other].asked, "nobody else wants the CPU"
    models[other].instances[0].stop()
    await settle()


async def test_a_turn_that_was_stood_in_line_for_is_not_kept_when_others_have_taken_the_work():
    """Two instances of one model and one CPU: what the first stood in line for is done by the second."""
    model = Model(CpuTurns(2))
    hosts = [Host(), Host()]
    for host in hosts:
        model.instance(host, cpu_threads=1)
    model.put(*range(12))
    await settle()
    assert all(host.asked for host in hosts)
    hosts[0].answer()
    hosts[1].answer()  # one batch is left, and both stand in line
    await settle()
    (busy,) = [host for host in hosts if host.asked]
    busy.answer()
    await settle()
    await asyncio.wait_for(model.turns.take(2), 30)
    for instance in model.instances:
        instance.stop()
    await settle()


async def test_in_a_shared_worker_a_quiet_model_stands_behind_two_batches_of_a_busy_one():
    """The worker serves its socket in order, and no model has more than two batches in there."""
    host, busy, quiet = Host(), Model(), Model()
    busy.instance(host)
    quiet.instance(host)
    busy.put(*range(80))
    await settle()
    for _ in range(3):
        host.answer()
        await settle()
    (request,) = quiet.put(99)
    await settle()
    served = 0
    while not request.future.done():
        host.answer()
        served += 1
        await settle()
    assert served == AT_WORKER + 1
    assert len(busy.queue) > 40, "the busy one always has more"
    for model in (busy, quiet):
        model.instances[0].stop()
    await settle()


async def test_in_order_answers_leave_as_requests_came():
    model = Model(preserve_order=True)
    hosts = [Host(), Host()]
    for host in hosts:
        model.instance(host)
    requests = model.put(*range(12))
    order = []
    for number, one in enumerate(requests):
        one.future.add_done_callback(lambda _, number=number: order.append(number))
    for _ in range(3):
        await settle()
        (busy,) = [host for host in hosts if host.asked]
        busy.answer()
    await settle()
    assert order == list(range(12))
    for instance in model.instances:
        instance.stop()
    await settle()


async def test_in_order_a_batch_that_failed_or_died_is_answered_before_what_came_after_it():
    model = Model(preserve_order=True)
    hosts = [Host(), Host()]
    for host in hosts:
        model.instance(host)
    requests = model.put(*range(6))
    order = []
    for number, one in enumerate(requests):
        one.future.add_done_callback(lambda _, number=number: order.append(number))
    await settle()
    (busy,) = [index for index, host in enumerate(hosts) if host.asked]
    hosts[busy].refuse()  # the first four run alone now
    await settle()
    (busy,) = [index for index, host in enumerate(hosts) if host.asked]
    hosts[busy].answer()
    await settle()
    (busy,) = [index for index, host in enumerate(hosts) if host.asked]
    model.instances[busy].down(hosts[busy].asked.pop()[0], [], "signal SIGKILL")
    for _ in range(4):
        await settle()
        hosts[1 - busy].answer()
    await settle()
    assert order == list(range(6))
    for instance in model.instances:
        instance.stop()
    await settle()


async def test_how_long_batches_take_is_told_where_somebody_wants_to_know(model, host):
    model.instance(host)
    told = []
    model.queue.deadlines.observe = lambda rows, took_ns: told.append((rows, took_ns))
    model.put([1, 2], 3)
    await settle()
    host.answer()
    assert told == [(3, 115)]


async def test_times_are_taken_from_the_queue_to_the_answer(model, host):
    model.instance(host)
    model.put(1)
    await settle()
    host.answer()
    statistics = model.statistics
    assert 0 <= statistics.queue_ns <= statistics.success_ns < monotonic_ns()
    assert (statistics.compute_input_ns, statistics.compute_infer_ns, statistics.compute_output_ns) == (10, 100, 5)


async def test_two_workers_killed_in_one_stroke_count_once_but_a_request_that_kills_is_still_refused(
    model, monkeypatch
):
    monkeypatch.setattr(second_chance, "SAME_STROKE_NS", 60 * 10**9)
    first, second = Host(), Host()
    one, two = model.instance(first), model.instance(second)
    (request,) = model.put(1)
    await settle()
    (busy, idle) = ((one, first), (two, second)) if first.asked else ((two, second), (one, first))
    busy[0].down(busy[1].asked[0][0], [], "signal SIGKILL")
    await settle()
    idle[0].down(idle[1].asked[0][0], [], "signal SIGKILL")
    await settle()
    assert not request.future.done(), "the same stroke"
    back = Host()
    busy[0].up(back, busy[0].loaded)
    busy[0].start()
    await settle()
    busy[0].down(back.asked[0][0], [], "signal SIGKILL")
    with pytest.raises(InternalError, match="not tried again"):
        await request.future


# ---- decoupled models ----

STREAMING = Signature((TensorSpec("x", DataType.UINT8, (-1,)),), (TensorSpec("y", DataType.UINT8, None),), 0, True)


class Streaming:
    """A decoupled model with one instance; the test is its worker."""

    def __init__(self, host):
        self.model = Model()
        self.queue = self.model.queue = BatchQueue("m", BatchLimits(1), 100)
        self.host = host
        self.instance = self.model.instance(host, signature=STREAMING)

    def put(self, count=1):
        made = []
        for number in range(count):
            x = Tensor("x", DataType.UINT8, (2,), bytes((number, number)))
            request = InferRequest("m", "", f"r-{number}", (x,))
            inputs = ModelInputs((x,), 1, None)
            loop = asyncio.get_running_loop()
            made.append(StreamedRequest(request, inputs, "1", self.model.statistics, loop))
            self.queue.put(made[-1])
        return made

    async def begin(self):
        """The worker begins the oldest request that it was asked; its number."""
        await settle()
        batch, frame = self.host.asked.pop(0)
        assert frame.requests == (RequestFrame(1, batch.pending[0].request.id, {}),)
        self.instance.begun(batch, Begun(frame.sequence, 5))
        await settle()
        return frame.sequence

    def part(self, sequence, value):
        y = NamedTensor("y", "UINT8", (1,), bytes([value]))
        self.instance.part(Part(sequence, (y,), {}))

    async def end(self, sequence):
        self.instance.ended(Ended(sequence))
        await settle()


@pytest.fixture
async def streaming(host):
    made = Streaming(host)
    yield made
    made.instance.stop()
    await settle()


async def responses(pending):
    return [item if isinstance(item, Exception) else item.outputs[0].data[0] async for item in pending.stream]


async def test_a_decoupled_request_leaves_its_slot_when_it_is_begun_and_is_under_way_until_it_has_ended(streaming):
    requests = streaming.put(5)
    sequences = [await streaming.begin() for _ in requests]
    assert streaming.host.asked == []
    assert (len(streaming.instance.streams), streaming.instance.in_flight, streaming.queue.executing) == (5, 5, 5)
    for value, sequence in enumerate(sequences):
        streaming.part(sequence, value)
    drained = asyncio.get_running_loop().create_task(streaming.queue.drained())
    for sequence in sequences:
        await settle()
        assert not drained.done()
        await streaming.end(sequence)
    await asyncio.wait_for(drained, 30)
    assert [await responses(one) for one in requests] == [[0], [1], [2], [3], [4]]
    assert (len(streaming.instance.streams), streaming.instance.in_flight) == (0, 0)
    assert streaming.model.statistics.success == 5


async def test_what_answers_part_by_part_is_used_by_it(streaming):
    """So that it is not the first to leave a memory that is full."""
    streaming.put()
    sequence = await streaming.begin()
    before_ns = streaming.instance.used_at_ns
    streaming.part(sequence, 7)
    assert (responded_ns := streaming.instance.used_at_ns) > before_ns
    await streaming.end(sequence)
    assert streaming.instance.used_at_ns > responded_ns


async def test_so_many_are_open_and_no_more(streaming, monkeypatch):
    monkeypatch.setattr(pump_module, "MAX_OPEN", 3)
    requests = streaming.put(8)
    sequences = [await streaming.begin() for _ in range(3)]
    # Two had been handed over before the third was begun, as with any model.
    waiting = len(streaming.queue)
    assert waiting >= 3
    await streaming.end(sequences[0])
    for _ in range(20):
        await settle()
        if not streaming.host.asked:
            break
        await streaming.end(await streaming.begin())
    for sequence in sequences[1:]:
        await streaming.end(sequence)
    while not all(one.dead for one in requests):
        await streaming.end(await streaming.begin())
    assert streaming.queue.executing == 0


async def test_a_client_that_left_before_its_request_was_begun_is_told_of_then(streaming):
    (request,) = streaming.put()
    await settle()
    request.stream.cancel()
    await settle()
    assert streaming.host.told == [], "the worker does not know of it"
    sequence = await streaming.begin()
    assert set(streaming.host.told) == {Cancel(sequence)}
    await streaming.end(sequence)
    assert (streaming.instance.in_flight, streaming.queue.executing) == (0, 0)
    assert streaming.model.statistics.failures == {"CANCELED": 1}


async def test_a_request_that_the_model_refuses_is_not_begun(streaming):
    (request,) = streaming.put()
    await settle()
    streaming.host.refuse(Kind.INVALID, "x is odd")
    assert [str(one) for one in await responses(request)] == ["model 'm': x is odd"]
    assert (streaming.instance.in_flight, streaming.queue.executing) == (0, 0)


async def test_when_its_process_dies_those_begun_fail_and_those_not_begun_run_again(streaming):
    begun, other, executing, staged, waiting = requests = streaming.put(5)
    sequences = [await streaming.begin() for _ in range(2)]
    streaming.part(sequences[0], 7)
    other.stream.cancel()
    (suspect, _), (behind, _) = streaming.host.asked
    streaming.instance.down(suspect, [behind], "signal SIGSEGV")
    first, error = await responses(begun)
    assert first == 7
    assert "signal SIGSEGV" in str(error)
    assert (streaming.instance.in_flight, len(streaming.instance.streams), streaming.queue.executing) == (0, 0, 0)
    assert not any(one.dead for one in (executing, staged, waiting))
    assert streaming.model.statistics.failures == {"BACKEND": 1, "CANCELED": 1}

    again = streaming.host = Host()
    streaming.instance.up(again, loaded(STREAMING))
    streaming.instance.start()
    for _ in range(3):
        await streaming.end(await streaming.begin())
    assert all(one.dead for one in requests)
    assert streaming.queue.executing == 0


async def test_the_turn_of_a_heavy_model_ends_when_its_request_is_begun():
    streaming = Streaming(None)
    host = streaming.host = Host()
    streaming.instance.up(host, loaded(STREAMING, cpu_threads=2))
    streaming.instance.start()
    (request,) = streaming.put()
    sequence = await streaming.begin()
    streaming.model.turns.give(await asyncio.wait_for(streaming.model.turns.take(2), 30))
    await streaming.end(sequence)
    assert request.dead
    streaming.instance.stop()
    await settle()


# ---- memory that is lent ----


async def test_an_answer_that_is_lent_stays_as_it_is_and_its_place_comes_back_when_it_is_let_go_of(model, host):
    instance = model.instance(host)

    def put(value):
        (one,) = model.put(value)
        one.request = msgspec.structs.replace(one.request, borrows=True)
        return one

    first = put(1)
    await settle()
    slot = host.asked[0][0].slot
    host.answer()
    (y,) = first.future.result().outputs
    assert isinstance(y.data, memoryview)
    later = []
    for number in range(2, 8):
        later.append(put(number))
        await settle()
        assert host.asked[0][0].slot is not slot
        host.answer()
    assert bytes(y.data) == b"\1\1"
    assert [answer_of(one) for one in later] == [[number] for number in range(2, 8)]
    assert instance._pump.slots._lent == 7
    del y, first, later
    (last,) = model.put(8)  # the instance holds on to its last batch until the next one
    await settle()
    host.answer()
    assert answer_of(last) == [8]
    gc.collect()
    await settle()
    assert instance._pump.slots._lent == 0


async def test_nobody_is_lent_the_memory_of_a_batch_that_somebody_else_is_in(model, host):
    model.instance(host)
    requests = model.put(1, 2)
    requests[0].request = msgspec.structs.replace(requests[0].request, borrows=True)
    await settle()
    host.answer()
    assert all(isinstance(one.future.result().outputs[0].data, bytes) for one in requests)


async def test_memory_that_is_lent_outlives_the_worker(model, host):
    instance = model.instance(host)
    (one,) = model.put(1)
    one.request = msgspec.structs.replace(one.request, borrows=True)
    await settle()
    host.answer()
    instance.down(None, [], "signal SIGKILL")
    assert answer_of(one) == [1]
    again = Host()
    instance.up(again, loaded())
    instance.start()
    del one
    gc.collect()
    await settle()
    (other,) = model.put(2)
    await settle()
    again.answer()
    assert answer_of(other) == [2]


async def test_a_twin_takes_over_and_the_one_before_it_answers_what_it_has(model, host):
    old = model.instance(host)
    told = []
    old.on_change = lambda: told.append("change")
    old.on_replaced = lambda *pair: told.append(pair)
    running = model.put(1)
    await settle()
    staged = model.put(2)
    await settle()
    twin = old.twin(77)
    model.instances.append(twin)
    assert (twin.load.instance, twin.load.name) == (77, "m")
    other = Host()
    twin.up(other, loaded())
    twin.start()
    old.replaced_by(twin)
    assert told == [(old, twin)]
    leaving = asyncio.get_running_loop().create_task(old.leave())
    await settle()
    later = model.put(3)
    await settle()
    assert other.rows() == [b"\3\3"]
    assert not leaving.done()
    host.answer()
    host.answer()
    other.answer()
    await asyncio.wait_for(leaving, 30)
    assert [answer_of(one) for one in (*running, *staged, *later)] == [[1], [2], [3]]
    old.break_down("nobody is told of that any more")
    assert told == [(old, twin)]
    twin.break_down("but of this")
    assert told[1:] == ["change"]


async def test_one_that_leaves_does_not_come_back_with_its_process(model, host):
    old = model.instance(host)
    (one,) = model.put(1)
    await settle()
    leaving = asyncio.get_running_loop().create_task(old.leave())
    await settle()
    ((batch, _),) = host.asked
    old.down(None, [batch], "signal SIGKILL")
    await asyncio.wait_for(leaving, 30)
    again = Host()
    old.up(again, loaded())
    old.start()
    await settle()
    assert not old.is_up
    assert again.asked == []
    model.instance(again)
    await settle()
    again.answer()
    assert answer_of(one) == [1]


async def test_a_twin_of_other_files_breaks(model, host):
    twin = model.instance(host).twin(5)
    twin.up(Host(), loaded(Signature((), (), 4)))
    assert twin.broken == "the model's files have changed since it was loaded"


# What is learned, and what an objective changes


async def test_every_batch_that_runs_tells_what_it_took(model, host):
    model.instance(host)
    model.put(1, 2, 3)
    await settle()
    await asyncio.sleep(0.02)
    host.answer()
    curve = model.queue.curves.of(None)
    assert curve.batches == 1
    assert 15e6 < curve.mean_ns(3) < 60e9
    model.put(1)
    await settle()
    host.refuse()
    assert curve.batches == 1, "a refusal tells nothing"


async def test_instances_that_are_up_are_counted(model, host):
    first, second = model.instance(host), model.instance(host)
    forecast = model.queue.forecast()
    assert forecast.instances == 2
    second.stop()
    second.stop()
    assert forecast.instances == 1
    first.down(None, [], "signal SIGKILL")
    assert forecast.instances == 0


@pytest.mark.parametrize(("handover_s", "staged"), [(0.0005, False), (100, True)])
async def test_under_an_objective_a_batch_is_staged_only_when_the_worker_is_about_to_be_free(
    host, monkeypatch, handover_s, staged
):
    monkeypatch.setattr(pump_module, "HANDOVER_NS", int(handover_s * 1e9))
    model = Model(objective_ns=600 * 10**9, adaptive=True)
    for _ in range(20):
        for rows in (1, 2, 4):
            model.queue.curves.observe(None, rows, 60 * 10**9)
    instance = model.instance(host)
    try:
        model.put(1)
        await settle()
        model.put(2)
        await settle()
        assert len(host.asked) == 1 + staged, "others may still join the second"
    finally:
        instance.stop()
        await settle()


async def test_a_batch_that_ends_early_is_followed_at_once_under_an_objective(host):
    model = Model(objective_ns=600 * 10**9, adaptive=True)
    for _ in range(20):
        for rows in (1, 2, 4):
            model.queue.curves.observe(None, rows, 60 * 10**9)
    instance = model.instance(host)
    try:
        model.put(1)
        await settle()
        model.put(2, 3)
        await settle()
        assert len(host.asked) == 1
        host.answer()
        await settle()
        assert [len(batch.pending) for batch, _ in host.asked] == [2]
    finally:
        instance.stop()
        await settle()


async def test_what_kills_two_workers_waits_where_the_model_has_another_form(model):
    instance = model.instance()
    told = []
    instance.on_death = lambda cause, used_up: told.append((cause, used_up))
    (request,) = model.put(66)
    for _ in range(MAX_DEATHS):
        host = Host()
        instance.up(host, loaded())
        instance.start()
        await settle()
        instance.down(host.asked[0][0], [], "signal SIGSEGV")
    assert told == [("signal SIGSEGV", False), ("signal SIGSEGV", True)]
    assert not request.future.done()
    other = Model()
    model.queue.hand_over(other.queue, other.statistics)
    assert request.deaths == 0
    host = Host()
    heir = other.instance(host)
    await settle()
    host.answer()
    assert answer_of(request) == [66]
    assert (model.statistics.success, other.statistics.success) == (0, 1)
    heir.stop()


async def test_an_instance_that_is_held_takes_nothing_and_answers_what_it_has(model, host):
    instance = model.instance(host)
    (running,) = model.put(1)
    await settle()
    instance.hold()
    (waiting,) = model.put(2)
    await settle()
    host.answer()
    assert answer_of(running) == [1]
    instance.down(None, [], "signal SIGKILL")
    instance.up(Host(), loaded())
    instance.start()  # its process has come back
    await settle()
    assert not instance.is_up
    twin = instance.twin(7)
    twin.up(Host(), loaded())
    twin.start()  # and so has another in its place
    await settle()
    assert not twin.is_up
    assert not waiting.future.done()


async def test_a_recheck_is_no_inference(model, host):
    class Recheck(Pending):
        __slots__ = ()
        counts = False

    model.instance(host)
    x = Tensor("x", DataType.UINT8, (1, 2), b"\7\7")
    request = InferRequest("m", "", "", (x,))
    pending = Recheck(request, ModelInputs((x,), 1, None), "1", None, asyncio.get_running_loop())
    model.queue.put_back([pending])
    await settle()
    host.answer()
    assert answer_of(pending) == [7]
    assert (model.statistics.rows, model.statistics.executions, model.statistics.last_inference_ms) == (0, 0, 0)
