"""Loads on GPUs: one at a time on each, and who waits for whom."""

import asyncio
from contextlib import AsyncExitStack
from types import SimpleNamespace

import pytest

from headrace.core.model import Signature
from headrace.workers.frames import Load
from headrace.workers.gpu_budget import Gpu, GpuLimits
from headrace.workers.gpu_room import GpuRoom
from headrace.workers.loads import LoadRefused

GPUS = {"gpu:0": Gpu("GPU-1", "L4", 1000), "gpu:1": Gpu("GPU-2", "L4", 1000), "gpu:UUID": Gpu("GPU-1", "L4", 1000)}


class Instance(SimpleNamespace):
    """As much of an instance as a load on a GPU looks at."""

    @classmethod
    def of(cls, number, device="gpu:0"):
        load = Load(number, "fake", f"m{number}", "1", "", device, 1, Signature((), (), 0), None, {}, warmup=False)
        return cls(load=load, loaded=None)


def room(**options):
    async def find(device):
        if device == "gpu:foreign":
            raise ValueError("it is not among them")
        return GPUS.get(device)

    return GpuRoom(GpuLimits(nbytes=100), find, **options)


async def load(gpus, instance, expected, measured=0, device=None):
    async with gpus.loading(instance, device or instance.load.device, expected):
        instance.loaded = SimpleNamespace(gpu_bytes=measured)


async def test_a_load_is_measured_on_its_gpu_and_holds_what_it_took():
    gpus = room()
    first = Instance.of(1, "gpu:UUID")
    await load(gpus, first, 10, measured=60)
    assert first.load.gpu_uuid == "GPU-1"
    assert gpus.budget.held_bytes("GPU-1") == 60
    await load(gpus, Instance.of(2), 30, measured=20)
    assert gpus.budget.held_bytes("GPU-1") == 90  # what was declared stays held
    with pytest.raises(LoadRefused, match="model 'm3' needs about 1 MiB of the memory of gpu:0"):
        await load(gpus, Instance.of(3), 11)
    await load(gpus, Instance.of(4, "gpu:1"), 100)


async def test_what_runs_on_a_gpu_though_it_is_configured_for_the_cpu_has_its_room_there():
    gpus = room()
    engine = Instance.of(1, "cpu")
    await load(gpus, engine, 80, device="gpu:0")
    assert (engine.load.device, engine.load.gpu_uuid) == ("cpu", "GPU-1")
    with pytest.raises(LoadRefused, match="model 'm2' needs about 1 MiB of the memory of gpu:0"):
        await load(gpus, Instance.of(2, "cpu"), 80, device="gpu:0")


async def test_what_turns_out_too_large_is_refused_until_it_is_unloaded():
    gpus = room()
    with pytest.raises(LoadRefused, match="model 'm1' takes"):
        await load(gpus, Instance.of(1), 10, measured=101)
    gpus.release(1)
    await load(gpus, Instance.of(2), 100)


async def test_without_such_a_gpu_the_load_goes_on_and_says_why_itself():
    gpus = room()
    instance = Instance.of(1, "gpu:7")
    await load(gpus, instance, 10**9)
    assert instance.load.gpu_uuid == ""
    with pytest.raises(LoadRefused, match="it is not among them"):
        await load(gpus, Instance.of(2, "gpu:foreign"), 1)


async def test_loads_on_one_gpu_take_turns_and_others_do_not_wait():
    gpus = room()
    async with AsyncExitStack() as first:
        await first.enter_async_context(gpus.loading(Instance.of(1), "gpu:0", 10))
        waiting = asyncio.create_task(load(gpus, Instance.of(2, "gpu:UUID"), 10))
        await load(gpus, Instance.of(3, "gpu:1"), 10)
        assert not waiting.done()
    await waiting


async def test_who_needs_the_room_of_one_that_leaves_waits_for_it():
    gpus = room()
    await load(gpus, Instance.of(1), 80)
    with pytest.raises(LoadRefused, match="'m1' has"):
        await load(gpus, Instance.of(2), 80)
    gpus.leaves(1)
    waiting = asyncio.create_task(load(gpus, Instance.of(2), 80))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    gpus.release(1)
    await waiting
    assert gpus.budget.held_bytes("GPU-1") == 80


async def test_the_wait_has_an_end():
    gpus = room(room_timeout_s=0.0)
    await load(gpus, Instance.of(1), 80)
    gpus.leaves(1)
    with pytest.raises(LoadRefused, match="'m1' has"):
        await load(gpus, Instance.of(2), 80)
    assert gpus.budget.held_bytes("GPU-1") == 80
