"""The shell round the schedule: what it runs, what it has taken, and what it makes of how runs end."""

import asyncio
import contextlib
import sys
from dataclasses import replace

import pytest

from headrace.background.optimizer import BackgroundOptimizer
from headrace.background.schedule import Result, Room, Subject
from headrace.background.subjects import command_for

A = Subject("a", "1", "print")


class Server:
    """What is served, and what became of it; a run is a line of Python."""

    def __init__(self, *subjects, code="pass", makes_plans=True):
        self.subjects = list(subjects)
        self.code = code
        self.makes_plans = makes_plans
        self.begun = []
        self.taken = []
        self.memory_bytes = 1 << 40
        self.optimizer = BackgroundOptimizer(
            lambda: self.subjects,
            lambda: Room(self.memory_bytes, 1 << 40),
            self.command,
            self.take,
            600,
            look_s=0.01,
        )

    def command(self, subject):
        self.begun.append(subject)
        return [sys.executable, "-c", self.code]

    async def take(self, model):
        self.taken.append(model)
        if self.makes_plans:
            self.subjects = [replace(one, planned=one.planned or one.model == model) for one in self.subjects]

    @contextlib.asynccontextmanager
    async def running(self):
        task = asyncio.create_task(self.optimizer.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def until(self, condition):
        async with asyncio.timeout(300):  # of what nobody else wants there may be very little
            while not condition():
                await asyncio.sleep(0.005)


@pytest.mark.parametrize(("code", "result"), [("pass", Result.PLANNED), ("exit(3)", Result.NOTHING_BETTER)])
async def test_what_was_made_is_taken(code, result):
    server = Server(A, replace(A, model="b"), code=code)
    async with server.running():
        await server.until(lambda: server.optimizer.results[result] == 2)
    assert [one.model for one in server.begun] == server.taken == ["a", "b"]
    assert server.optimizer.running is None


async def test_a_failure_is_counted_and_nothing_is_taken(caplog):
    server = Server(A, code="exit('no such luck')")
    async with server.running():
        await server.until(lambda: server.optimizer.results[Result.FAILED] == 1)
        await asyncio.sleep(0.05)
    assert server.taken == []
    assert len(server.begun) == 1
    assert "no such luck; it goes on in 60 s" in caplog.text


async def test_a_plan_that_the_server_does_not_use_is_a_failure(caplog):
    server = Server(replace(A, why_not="its answers are wrong"), makes_plans=False)
    async with server.running():
        await server.until(lambda: server.optimizer.results[Result.FAILED] == 1)
        await asyncio.sleep(0.05)
    assert len(server.begun) == 1
    assert "is not used: its answers are wrong" in caplog.text


async def test_a_take_that_fails_is_told_and_others_go_on(caplog):
    server = Server(A, replace(A, model="b"))
    take = server.take

    async def fail_once(model):
        if model == "a":
            raise RuntimeError("the disk is gone")
        await take(model)

    server.optimizer._take = fail_once
    async with server.running():
        await server.until(lambda: server.optimizer.results[Result.PLANNED] == 1)
    assert server.optimizer.results[Result.FAILED] == 1
    assert "the disk is gone" in caplog.text


async def test_a_refused_plan_is_made_again():
    server = Server(A)
    async with server.running():
        await server.until(lambda: server.optimizer.results[Result.PLANNED] == 1)
        await asyncio.sleep(0.05)
        server.subjects = [A]
        server.optimizer.on_refused("a", "1", "its file is broken")
        await server.until(lambda: server.optimizer.results[Result.PLANNED] == 2)
    assert len(server.begun) == 2


async def test_a_plan_that_is_refused_while_it_is_taken_counts_once():
    server = Server(A, makes_plans=False)
    take = server.take

    async def refuse(model):
        await take(model)
        server.optimizer.on_refused("a", "1", "wrong answers")

    server.optimizer._take = refuse
    async with server.running():
        await server.until(lambda: server.optimizer.results[Result.FAILED] == 1)
    assert server.optimizer._schedule._attempts["a", "1"].failures == 1


async def test_a_run_is_stopped_when_memory_runs_out_and_its_progress_is_known():
    server = Server(A, code="print('headrace-progress: {\"done\": 4}', flush=True); import time; time.sleep(600)")
    async with server.running():
        await server.until(lambda: server.optimizer.progress == {"done": 4})
        assert server.optimizer.running == A
        server.memory_bytes = 0
        await server.until(lambda: server.optimizer.results[Result.STOPPED] == 1)
        assert server.optimizer.running is None
        assert server.optimizer.progress == {}


async def test_an_obstacle_is_told_once(caplog):
    server = Server(A)
    server.memory_bytes = 0
    async with server.running():
        await asyncio.sleep(0.1)
    assert server.begun == []
    assert caplog.text.count("is not optimised for now: optimising it takes up to 768 MiB of memory") == 1


def test_the_command_is_that_of_the_command_line(tmp_path):
    command = command_for(replace(A, version="7"), tmp_path / "models", tmp_path / "plans")
    assert command[:4] == [sys.executable, "-m", "headrace", "optimize"]
    assert command[4:] == [
        "a",
        "--version",
        "7",
        "--repository",
        str(tmp_path / "models"),
        "--plan-cache",
        str(tmp_path / "plans"),
        "--background",
    ]
