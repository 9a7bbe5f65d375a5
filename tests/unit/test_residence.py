"""A model's place in memory: over a real queue and pager, and instances that are only said to be there."""

import asyncio
from types import SimpleNamespace

import pytest

from headrace.batching.pending import Pending
from headrace.batching.policy import BatchLimits
from headrace.batching.queue import BatchQueue
from headrace.core.errors import NotReady
from headrace.core.request import InferRequest
from headrace.core.validation import ModelInputs
from headrace.repository import residence as residence_module
from headrace.repository.pager import Pager
from headrace.repository.residence import Residence
from headrace.workers.loads import LoadRefused


class Model:
    """One with an instance that answers all that waits; ``gate`` holds up its load, ``refusal`` refuses it."""

    def __init__(self, pager, name="m", nbytes=60):
        self.name = self.label = name
        self.pinned = False
        self.estimated_bytes = nbytes
        self.queue = BatchQueue(name, BatchLimits(), 100)
        self.instances = []
        self.residence = Residence(self, pager)
        self.log = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.refusal = ""
        self._pump = None

    async def start_instances(self):
        self.log.append("load")
        await self.gate.wait()
        if self.refusal:
            raise LoadRefused(self.refusal)
        self._pump = asyncio.get_running_loop().create_task(self._answer_all())
        self.instances = [SimpleNamespace(used_at_ns=0, stop=self._pump.cancel)]

    async def stop_instances(self):
        self.log.append("stop")
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait([self._pump])
            self._pump = None
        self.instances = []

    def measured_bytes(self):
        return self.estimated_bytes

    def distrust(self, _):
        return False

    async def _answer_all(self):
        while True:
            batch = await self.queue.take()
            for one in batch:
                one.resolve((), one.taken_at_ns)
            self.queue.finished(batch)

    def put(self):
        loop = asyncio.get_running_loop()
        pending = Pending(InferRequest(self.name, "", "", (), (), {}), ModelInputs((), 1, None), "1", None, loop)
        self.queue.put(pending)
        return pending.future


@pytest.fixture
async def pager():
    made = Pager(100, room_timeout_s=30)
    yield made
    await made.close()


@pytest.fixture
async def away(pager):
    """A model that had to leave for another."""
    model = Model(pager, "away")
    await model.residence.come()
    other = Model(pager, "other")
    await other.residence.come()
    assert model.residence.is_away
    assert not other.residence.is_away
    yield SimpleNamespace(model=model, other=other)
    for one in (model, other):
        await one.residence.close()
    assert pager.resident_bytes == 0


async def test_a_request_brings_it_in_and_the_other_leaves(pager, away):
    answer = away.model.put()
    await asyncio.wait_for(answer, 30)
    assert not away.model.residence.is_away
    assert away.other.residence.is_away
    assert away.model.log == ["load", "stop", "load"]
    assert (pager.resident_bytes, pager.counts.page_ins, pager.counts.evictions) == (60, 1, 2)


async def test_many_requests_bring_it_in_once(away):
    answers = [away.model.put() for _ in range(50)]
    await asyncio.wait_for(asyncio.gather(*answers), 30)
    assert away.model.log.count("load") == 2


async def test_back_and_forth(away):
    for _ in range(20):
        await asyncio.wait_for(away.model.put(), 30)
        await asyncio.wait_for(away.other.put(), 30)
    assert away.model.log.count("load") == 21


async def test_both_at_once_have_their_turns(away):
    """Each leaves only when it has answered what it has."""
    answers = [one.put() for _ in range(30) for one in (away.model, away.other)]
    await asyncio.wait_for(asyncio.gather(*answers), 30)


async def test_a_request_that_comes_while_it_leaves_is_answered(away):
    away.other.gate.clear()
    first = away.model.put()  # the other has to leave
    await asyncio.sleep(0)
    second = away.other.put()
    away.other.gate.set()
    await asyncio.wait_for(asyncio.gather(first, second), 30)


async def test_while_it_cannot_come_requests_are_refused_and_then_it_tries_again(away, monkeypatch):
    monkeypatch.setattr(residence_module, "COME_AGAIN_S", 0.05)
    away.model.refusal = "its file is gone"
    answer = away.model.put()
    with pytest.raises(NotReady, match="'away' is not at ready state: it cannot be brought into memory: its file is"):
        await asyncio.wait_for(answer, 30)
    assert away.model.residence.unready
    with pytest.raises(NotReady):
        away.model.put()
    away.model.refusal = ""
    async with asyncio.timeout(30):
        while away.model.residence.unready:
            await asyncio.sleep(0.01)
    await asyncio.wait_for(away.model.put(), 30)


async def test_it_is_closed_while_it_is_away_and_while_it_comes(pager, away):
    away.model.gate.clear()
    answer = away.model.put()
    async with asyncio.timeout(30):
        while away.model.log[-1] != "load" or away.model.log.count("load") < 2:
            await asyncio.sleep(0)
    answer.cancel()
    await asyncio.wait_for(away.model.residence.close(), 30)
    assert pager.bytes_of(away.model.residence) == 0
    assert away.model.instances == []
    await asyncio.wait_for(away.other.put(), 30)


async def test_a_bug_does_not_leave_requests_waiting(away, caplog):
    async def broken():
        raise ZeroDivisionError

    away.model.start_instances = broken
    with pytest.raises(NotReady, match="it cannot be brought into memory any more; the server's log says why"):
        await asyncio.wait_for(away.model.put(), 30)
    assert "ZeroDivisionError" in caplog.text
    assert away.model.residence.unready


async def test_what_is_busy_stays():
    pager = Pager(100, room_timeout_s=0.2)
    model = Model(pager, "busy")
    await model.residence.come()
    model._pump.cancel()
    model.put()
    assert model.residence.busy
    other = Model(pager, "other")
    with pytest.raises(LoadRefused, match="were busy"):
        await other.residence.come()
    assert not model.residence.is_away
    with pytest.raises(AssertionError, match="what is in use stays"):
        model.residence.page_out()
    await model.residence.close()
