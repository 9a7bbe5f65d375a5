"""A worker that is kept to a node's CPUs: all of its threads are, those of its framework too."""

import asyncio
import os

import psutil
import pytest

from headrace.core.model import Signature
from headrace.workers import channel
from headrace.workers.frames import Load, Loaded, decode_from_worker, encode
from headrace.workers.spawn import spawn


@pytest.mark.parametrize("kept", [True, False])
async def test_every_thread_of_a_worker_runs_there(kept):
    mine = os.sched_getaffinity(0)
    cpus = {max(mine)} if kept else None
    spawned = spawn("worker-1", shared=False, threads=2, log_format="text", cpus=cpus)
    heard = asyncio.get_running_loop().create_future()
    conversation = channel.Channel(spawned.socket, lambda data, _: heard.set_result(decode_from_worker(data)))
    try:
        load = Load(1, "fake", "m", "1", "/nowhere", "cpu", 2, Signature((), ()), None, {}, False)
        conversation.send(encode(load))
        assert isinstance(await asyncio.wait_for(heard, 60), Loaded)
        threads = [one.id for one in psutil.Process(spawned.process.pid).threads()]
        assert {frozenset(os.sched_getaffinity(one)) for one in threads} == {frozenset(cpus or mine)}
    finally:
        spawned.process.kill()
        await spawned.exited
        spawned.process.wait()
        conversation.close()
