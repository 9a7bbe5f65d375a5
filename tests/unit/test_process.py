"""A worker process as the front process sees it; the worker is the test's end of the socket."""

import asyncio
import contextlib
import errno
import os
from types import SimpleNamespace

import msgspec
import pytest

from headrace.core.model import Signature
from headrace.workers import channel, process
from headrace.workers.arena import mark_begun
from headrace.workers.frames import (
    Begun,
    Cancel,
    Credit,
    Ended,
    Failed,
    Load,
    Loaded,
    Part,
    Run,
    decode_to_worker,
    encode,
)
from headrace.workers.instance import Batch
from headrace.workers.loads import GIVE_UP_AFTER_S, PUT_OFF_S, Loading
from headrace.workers.process import WorkerProcess
from headrace.workers.spawn import Spawned


class Popen:
    """A process that is there until it is killed or has ended."""

    pid = 77

    def __init__(self, exited):
        self.exited = exited
        self.kills = 0

    def kill(self):
        self.kills += 1
        self.end()

    def end(self):
        if not self.exited.done():
            self.exited.set_result(None)

    def wait(self):
        return -9


class OpenStreams:
    """What an instance's clients wait for."""

    awaited = False
    awaited_since = 0.0

    def __len__(self):
        return 1


class Model:
    """An instance that keeps what it is told."""

    is_up = False
    in_flight = up_at_ns = used_at_ns = 0

    def __init__(self, number, name):
        self.load = SimpleNamespace(instance=number, name=name)
        self.execution_timeout_s = 5.0
        self.streams = OpenStreams()
        self.heard = []
        self.causes = []

    def begun(self, batch, frame):
        self.heard.append(frame)

    def failed(self, batch, frame):
        self.heard.append(frame)

    def part(self, frame):
        self.heard.append(frame)

    def ended(self, frame):
        self.heard.append(frame)

    def down(self, executing, staged, cause):
        self.causes.append(cause)


class Hosted(Model):
    """One that was up before, and comes back with its process."""

    def __init__(self, number, name, waiting=0):
        super().__init__(number, name)
        self.load = Load(number, "fake", name, "1", "/m", "cpu", 1, Signature((), ()), None, {}, False)
        self.loaded = loaded(number)
        self.waiting = waiting
        self.broken = ""
        self.pause = None
        self.is_up = True

    def up(self, host, loaded):
        self.broken, self.pause = "", None
        self.up_at_ns = int(process.monotonic() * 1e9)

    def start(self):
        self.is_up = True

    def retire(self):
        self.is_up = False

    def down(self, executing, staged, cause):
        super().down(executing, staged, cause)
        self.is_up = False

    def leave_alone(self, pause):
        self.pause = pause

    def break_down(self, reason):
        self.is_up, self.broken = False, reason


def loaded(number):
    return Loaded(number, Signature((), ()), False, 0, (), 0.1)


class Worker:
    """The process under test, and the other end of its socket in its first life; later ones are silent."""

    def __init__(self, monkeypatch):
        self.lives = []
        monkeypatch.setattr(process, "spawn", self._spawn)
        self.process = WorkerProcess("w", shared=False, threads=1, log_format="text")

    def _spawn(self, name, **_):
        ours, theirs = channel.pair()
        popen = Popen(asyncio.get_running_loop().create_future())
        self.lives.append((popen, theirs))
        return Spawned(popen, ours, popen.exited)

    @property
    def popen(self):
        return self.lives[0][0]

    @property
    def sock(self):
        return self.lives[0][1]

    async def close(self):
        """End every life, and the looking after it."""
        stopping = asyncio.get_running_loop().create_task(self.process.stop())
        await settle()
        for popen, sock in self.lives:
            popen.end()
            sock.close()
        await stopping

    def host(self, *models):
        for model in models:
            self.process.hosted[model.load.instance] = model

    def run(self, model, sequence):
        """Give it a batch."""
        batch = Batch(model, SimpleNamespace(inputs=None), [], sequence)
        self.process.run(batch, Run(model.load.instance, sequence, 0, 0, (), ()), [])
        return batch

    async def say(self, *frames, life=0):
        """What the worker says, bytes as they are."""
        for frame in frames:
            self.lives[life][1].send(frame if isinstance(frame, bytes) else encode(frame))
        await settle()

    async def die(self):
        """End the present life, and wait for the next one."""
        lives = len(self.lives)
        self.lives[-1][0].end()
        async with asyncio.timeout(30):
            while len(self.lives) == lives:
                await asyncio.sleep(0)
        await settle()

    def told(self, life=0):
        """What the worker has been told."""
        sock = self.lives[life][1]
        sock.setblocking(False)
        frames = []
        while True:
            try:
                data, descriptors = channel.receive(sock)
            except BlockingIOError:
                return frames
            channel.close_all(descriptors)
            frames.append(decode_to_worker(data))


async def settle():
    for _ in range(6):
        await asyncio.sleep(0)


@pytest.fixture
async def worker(monkeypatch):
    made = Worker(monkeypatch)
    await settle()
    yield made
    await made.close()


# ---- what the worker is at ----


async def test_a_batch_is_found_by_its_number_until_it_is_answered(worker):
    model = Model(3, "m")
    worker.host(model)
    first, second = worker.run(model, 7), worker.run(model, 8)
    assert worker.process.unanswered.batches_of(3, 7) == [first]
    assert worker.process.unanswered.batches_of(3, 8) == [second]
    assert worker.process.unanswered.batches_of(3, 9) == []
    await worker.say(Failed(7, "internal", "no"))
    assert worker.process.unanswered.batches_of(3, 7) == []


async def test_one_that_is_answered_part_by_part_until_it_has_ended(worker):
    model = Model(3, "m")
    worker.host(model)
    batch = worker.run(model, 7)
    await worker.say(Begun(7, 5), Part(7, (), {}))
    assert worker.process.unanswered.batches_of(3, 7) == [batch]
    await worker.say(Ended(7))
    assert worker.process.unanswered.batches_of(3, 7) == []


async def test_without_a_number_all_of_the_instance_s_are_found_and_no_other_s(worker):
    model, other = Model(3, "m"), Model(4, "other")
    worker.host(model, other)
    first, _, second = worker.run(model, 7), worker.run(other, 8), worker.run(model, 9)
    await worker.say(Begun(7, 5))
    assert {one.sequence for one in worker.process.unanswered.batches_of(3, 0)} == {first.sequence, second.sequence}
    assert [one.sequence for one in worker.process.unanswered.batches_of(4, 0)] == [8]
    assert worker.process.unanswered.batches_of(5, 0) == []
    await worker.say(Ended(7))
    assert worker.process.unanswered.batches_of(3, 0) == [second]


async def test_a_model_that_is_being_loaded_is_no_batch(worker):
    load = Load(4, "fake", "m", "1", "/m", "cpu", 1, None, None, {}, False)
    model = Model(4, "m")
    worker.host(model)
    model.load = load
    worker.process._send_load(Loading(model, None))
    assert worker.process.unanswered.batches_of(4, 0) == []
    assert worker.process.unanswered.batches_of(4, -5) == []


# ---- what it says ----


async def test_a_thread_that_goes_on_after_the_end_is_not_heard(worker):
    model = Model(3, "m")
    worker.host(model)
    worker.run(model, 7)
    await worker.say(Begun(7, 5), Ended(7))
    await worker.say(Part(7, (), {}), Ended(7), Part(99, (), {}))
    assert [type(frame) for frame in model.heard] == [Begun, Ended]
    assert worker.popen.kills == 0


@pytest.mark.parametrize("said", [b"\xff not a frame", encode(Credit(1, 2))])
async def test_a_worker_that_cannot_be_understood_is_killed(worker, said, caplog):
    model = Model(3, "m")
    worker.host(model)
    await worker.say(said)
    assert worker.popen.kills == 1
    await settle()
    assert model.causes == ["it sent a frame that cannot be read"]
    assert "worker w sent a frame that cannot be read" in caplog.text


# ---- what it is told ----


@pytest.mark.parametrize(
    ("frame", "starts", "told"),
    [(Cancel(1), True, [Cancel(1)]), (Cancel(1 << 80), True, []), (Cancel(1), False, [])],
    ids=["told", "cannot be written", "down"],
)
async def test_descriptors_are_not_kept_whatever_becomes_of_what_they_came_with(monkeypatch, frame, starts, told):
    worker = Worker(monkeypatch)
    if starts:
        await settle()
    descriptor = os.memfd_create("test")
    with contextlib.suppress(OverflowError):
        worker.process.tell(frame, [descriptor])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    await settle()
    assert worker.told() == told
    await worker.close()


# ---- how long it may be silent ----


async def test_its_silence_counts_from_when_somebody_had_room(worker):
    model = Model(3, "m")
    worker.host(model)
    worker.run(model, 7)
    await worker.say(Begun(7, 5))
    heard_at = worker.process.unanswered.heard_at
    model.streams.awaited = True
    worker.process.check_time(heard_at + 4.9, 60.0)
    model.streams.awaited_since = heard_at + 100
    worker.process.check_time(heard_at + 104.9, 60.0)
    model.streams.awaited = False
    worker.process.check_time(heard_at + 500, 60.0)
    assert worker.popen.kills == 0
    model.streams.awaited = True
    worker.process.check_time(heard_at + 105.1, 60.0)
    assert worker.popen.kills == 1


# ---- what comes back when it has died ----


async def test_a_model_that_kills_the_worker_when_it_comes_back_does_not_keep_the_others_away(worker, monkeypatch):
    monkeypatch.setattr(process, "backoff_s", lambda _: 0.0)
    bad, good = Hosted(3, "bad", waiting=9), Hosted(4, "good")
    worker.host(bad, good)
    await worker.die()  # of whatever
    assert worker.told(-1) == [bad.load, good.load]
    await worker.die()  # of the first of them
    for _ in range(2):
        assert worker.told(-1) == [good.load, bad.load]
        await worker.say(loaded(4), life=-1)
        assert good.is_up
        await worker.die()
    assert worker.told(-1) == [good.load]
    assert bad.broken == (
        "the worker died while it loaded the model: signal SIGKILL; so that its other models come back, it is tried "
        f"again in {PUT_OFF_S:g} s"
    )
    await worker.say(loaded(4), life=-1)
    worker.process._load_again(bad)  # the time is over
    await settle()
    assert worker.told(-1) == [bad.load]
    await worker.die()
    assert worker.told(-1) == [good.load]
    assert bad.broken.endswith(f"again in {2 * PUT_OFF_S:g} s")


async def test_one_that_is_alone_is_tried_on_and_on(worker, monkeypatch):
    monkeypatch.setattr(process, "backoff_s", lambda _: 0.0)
    model = Hosted(3, "m")
    worker.host(model)
    for _ in range(6):
        await worker.die()
        assert worker.told(-1) == [model.load]


async def test_where_no_process_can_be_started_for_long_nobody_waits_for_it(worker, monkeypatch):
    monkeypatch.setattr(process, "backoff_s", lambda _: 0.0)
    model, now = Hosted(3, "m"), 50.0
    monkeypatch.setattr(process, "monotonic", lambda: now)
    worker.host(model)
    attempts = 0

    def refuse(*_, **__):
        nonlocal attempts
        attempts += 1
        raise OSError("no more processes")

    monkeypatch.setattr(process, "spawn", refuse)
    worker.popen.end()
    async with asyncio.timeout(30):
        while attempts < 5:
            await asyncio.sleep(0)
        assert not model.broken
        now += GIVE_UP_AFTER_S + 1
        while not model.broken:
            await asyncio.sleep(0)
    assert model.broken == "cannot start a worker process: no more processes; it goes on trying"
    monkeypatch.setattr(process, "spawn", worker._spawn)
    await settle()
    assert worker.told(-1) == [model.load]
    await worker.say(loaded(3), life=-1)
    assert (model.is_up, model.broken) == (True, "")


# ---- when it dies as often as it has come up ----


class Clock:
    """The time by which workers live and die; what waits for it waits for no longer than a real moment."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        self.pauses = []
        monkeypatch.setattr(process, "monotonic", lambda: self.now)
        monkeypatch.setattr(WorkerProcess, "_rest", lambda _, seconds: self._rest(seconds))

    async def _rest(self, seconds):
        self.pauses.append(round(seconds, 6))
        self.now += seconds
        await asyncio.sleep(0)


@pytest.fixture
async def clocked(monkeypatch):
    clock = Clock(monkeypatch)
    made = Worker(monkeypatch)
    made.clock = clock
    await settle()
    yield made
    await made.close()


def begin(worker, model, sequence):
    """Give it a batch that the worker has begun to run when it dies."""
    inputs = SimpleNamespace(view=memoryview(bytearray(64)))
    mark_begun(inputs.view, sequence)
    batch = Batch(model, SimpleNamespace(inputs=inputs), [], sequence)
    worker.process.run(batch, Run(model.load.instance, sequence, 0, 0, (), ()), [])


async def test_a_model_that_its_first_batch_kills_is_brought_back_in_ever_longer_intervals(clocked, caplog):
    model = Hosted(3, "m")
    clocked.host(model)
    await clocked.die()  # of whatever
    for sequence in range(1, 5):
        await clocked.say(loaded(3), life=-1)
        begin(clocked, model, sequence)
        await clocked.die()
    assert clocked.clock.pauses == [0.0, 0.0, 0.0, 0.1, 0.2, 0.4], "one for each life"
    assert model.pause.reason in caplog.text
    assert "died 5 times in a row" in model.pause.reason
    await clocked.say(loaded(3), life=-1)
    assert (model.is_up, model.pause) == (True, None)
    clocked.clock.now += 10.0
    begin(clocked, model, 9)
    await clocked.die()
    assert clocked.clock.pauses[-1] == 0.0, "it was up for long"


async def test_of_several_models_only_the_one_that_the_worker_dies_of_is_left_out(clocked, monkeypatch):
    again = []
    monkeypatch.setattr(
        asyncio.get_running_loop(), "call_later", lambda seconds, *what: again.append((round(seconds, 6), *what))
    )
    bad, good = Hosted(3, "bad"), Hosted(4, "good")
    clocked.host(bad, good)
    await clocked.die()  # of whatever
    for sequence in (1, 2, 3):
        await clocked.say(loaded(3), loaded(4), life=-1)
        begin(clocked, bad, sequence)
        assert not again
        await clocked.die()
    assert clocked.told(-1) == [good.load]
    assert set(clocked.clock.pauses) == {0.0}, "the process is there at once"
    assert bad.pause.seconds == pytest.approx(0.1)
    assert (good.pause, len(good.causes)) == (None, 4)
    await clocked.say(loaded(4), life=-1)
    ((seconds, load_again, instance),) = again
    assert (seconds, instance) == (0.1, bad)
    load_again(instance)
    await settle()
    assert clocked.told(-1) == [bad.load]


async def test_one_that_is_left_out_stays_so_when_the_process_dies_meanwhile(clocked):
    bad, good = Hosted(3, "bad"), Hosted(4, "good")
    clocked.host(bad, good)
    await clocked.die()  # of whatever
    for sequence in range(1, 11):
        await clocked.say(loaded(3), loaded(4), life=-1)
        begin(clocked, bad, sequence)
        await clocked.die()
        clocked.process._load_again(bad)
        await settle()
    await clocked.say(loaded(3), loaded(4), life=-1)
    begin(clocked, bad, 11)
    await clocked.die()
    await clocked.die()
    assert clocked.told(-1) == [good.load]


async def test_a_process_that_dies_of_itself_without_a_model_is_not_started_as_fast_as_it_dies(clocked):
    for _ in range(5):
        await clocked.die()
    assert clocked.clock.pauses == [0.0, 0.0, 0.0, 0.1, 0.2, 0.4]


async def test_a_pause_does_not_hold_up_the_end(monkeypatch):
    worker = Worker(monkeypatch)
    await settle()
    monkeypatch.setattr(process, "backoff_s", lambda _: 3600.0)
    worker.popen.end()
    await settle()
    async with asyncio.timeout(30):
        await worker.process.stop(grace_s=3600.0)
    assert len(worker.lives) == 1
    await worker.close()


# ---- when this process is short of something, or has a bug ----


def big(number):
    """A load whose frame is too large for a packet."""
    model = Hosted(number, "m")
    model.load = msgspec.structs.replace(model.load, config_json="x" * 100_000)
    return model


async def test_a_load_that_cannot_be_sent_now_is_tried_again_with_another_process(worker, monkeypatch, caplog):
    def out_of_descriptors(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    model = big(3)
    worker.host(model)
    with monkeypatch.context() as patch:
        patch.setattr(channel.os, "memfd_create", out_of_descriptors)
        worker.popen.end()
        await settle()
    assert "Too many open files" in caplog.text
    async with asyncio.timeout(30):
        while len(worker.lives) < 3:
            await asyncio.sleep(0)
    assert worker.told(-1) == [model.load]
    await worker.say(loaded(3), life=-1)
    assert model.is_up


async def test_nothing_more_is_loaded_in_a_process_that_is_given_up(worker, monkeypatch, caplog):
    def fail():
        raise RuntimeError("a bug")

    assert not worker.process.leaving
    monkeypatch.setattr(worker.process, "_bury", fail)
    worker.popen.end()
    await settle()
    assert "worker w is given up" in caplog.text
    assert worker.process.leaving
    worker.process._channel.close()
