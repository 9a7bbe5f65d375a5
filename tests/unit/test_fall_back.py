"""What becomes of a version whose plan turned out to be wrong; loads are made up."""

import asyncio
from types import SimpleNamespace

import pytest

from headrace.repository import fall_back as fall_back_module
from headrace.repository.fall_back import FallBack
from headrace.repository.model_record import ModelRecord


class Served:
    """The plan's form, distrusted."""

    def __init__(self, log):
        self.folder = SimpleNamespace(name="m")
        self.files = SimpleNamespace(version=1)
        self.planned = object()
        self.distrusted = "it gives wrong answers"
        self.handed_over = True
        self._log = log

    async def vacate(self):
        self._log.append("vacate")

    def give_up(self, reason):
        self._log.append(f"give up: {reason}")


class Story:
    """A record with that form; loads of the model as it was dropped in succeed from the ``good``th on."""

    def __init__(self, monkeypatch, good=1):
        monkeypatch.setattr(fall_back_module, "AGAIN_S", 0.001)
        self.log = []
        self.served = Served(self.log)
        self.record = ModelRecord(serving={1: self.served}, folder=SimpleNamespace())
        self.record.statuses = {1: SimpleNamespace(reason="out of memory")}
        self.closed = asyncio.Event()
        self.loads = 0
        self._good = good
        self.fall_back = FallBack(self, self, self._follow, self.closed)

    async def refuse(self, planned, reason):
        assert planned is self.served.planned
        self.log.append(f"refuse: {reason}")

    async def finish_elsewhere(self, served):
        self.log.append("finish elsewhere")

    async def _follow(self, name, record):
        assert record.change.locked()
        self.loads += 1
        if self.loads >= self._good:
            record.serving[1] = object()

    async def run(self):
        await asyncio.wait_for(self.fall_back.run(self.served, self.record), 30)


async def test_the_plan_is_set_aside_first_and_then_the_model_served_as_it_was_dropped_in(monkeypatch):
    story = Story(monkeypatch)
    await story.run()
    assert story.log == ["refuse: it gives wrong answers", "vacate"]
    assert story.loads == 1


async def test_while_that_cannot_be_loaded_requests_are_refused_and_it_is_tried_again(monkeypatch):
    story = Story(monkeypatch, good=3)
    await story.run()
    given_up = "give up: it gives wrong answers; and as it was dropped in: out of memory"
    assert story.log[2:] == [given_up, given_up]
    assert story.loads == 3


async def test_it_ends_with_the_server(monkeypatch):
    story = Story(monkeypatch, good=10**9)
    monkeypatch.setattr(fall_back_module, "AGAIN_S", 3600)
    running = asyncio.get_running_loop().create_task(story.run())
    while not story.loads:
        await asyncio.sleep(0)
    story.closed.set()
    await running
    assert story.loads == 1


@pytest.mark.parametrize("serving", [{}, {1: object()}], ids=["nothing serves", "something else does"])
async def test_what_waits_is_answered_elsewhere_where_it_is_not_served_any_more(monkeypatch, serving):
    story = Story(monkeypatch)
    story.record.serving = serving
    story.served.handed_over = False
    await story.run()
    assert story.loads == 0
    assert story.log[-1] == "finish elsewhere"


async def test_a_model_that_nobody_wants_any_more_is_not_loaded(monkeypatch):
    story = Story(monkeypatch)
    story.record.folder = None
    story.closed.set()
    await story.run()
    assert story.loads == 0
