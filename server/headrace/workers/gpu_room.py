"""Loads on GPUs whose memory has a limit: one at a time on each, so that what it took can be told."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from time import monotonic

import msgspec

from headrace.workers.frames import Load
from headrace.workers.gpu_budget import Gpu, GpuBudget, GpuLimits, NoGpuRoom
from headrace.workers.gpu_probing import find_gpu
from headrace.workers.instance import Instance
from headrace.workers.loads import LoadRefused

ROOM_TIMEOUT_S = 30.0  # that models which are leaving have to answer what they were given

FindGpu = Callable[[str], Awaitable[Gpu | None]]


class GpuRoom:
    """The budget with its loads. One event loop owns it; ``find`` tells which GPU a device is."""

    def __init__(self, limits: GpuLimits, find: FindGpu = find_gpu, room_timeout_s: float = ROOM_TIMEOUT_S) -> None:
        self.budget = GpuBudget(limits)
        self._find = find
        self._room_timeout_s = room_timeout_s
        self._changed = asyncio.Event()
        self._known: dict[str, Gpu] = {}  # by device; GPUs do not change while a server runs
        self._lines: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @asynccontextmanager
    async def loading(self, instance: Instance, device: str, expected_bytes: int) -> AsyncIterator[None]:
        """Hold room on its device while the instance is loaded within, and what it turns out to take after that.

        Nothing is held where there is no such GPU: the load fails, and its backend knows best why. Who unloads the
        instance says ``release``, also when this raises.

        Raises:
            LoadRefused: there is no room.
        """
        load = instance.load
        gpu = await self._gpu(device)
        if gpu is None:
            yield
            return
        async with self._lines[gpu.uuid]:
            try:
                await self._admit(load, device, gpu, expected_bytes)
                instance.load = msgspec.structs.replace(load, gpu_uuid=gpu.uuid)
                yield
                taken_bytes = instance.loaded.gpu_bytes if instance.loaded is not None else 0
                # What was declared stays reserved: it may be taken by the first large batch.
                self.budget.settle(load.instance, max(taken_bytes, expected_bytes))
            except NoGpuRoom as error:
                raise LoadRefused(str(error)) from None

    def leaves(self, number: int) -> None:
        """An instance answers what it has, and goes then: who needs its room waits for that."""
        self.budget.leaves(number)
        self._changed.set()

    def release(self, number: int) -> None:
        """An instance is off its GPU."""
        self.budget.release(number)
        self._changed.set()

    async def _admit(self, load: Load, device: str, gpu: Gpu, expected_bytes: int) -> None:
        ends = monotonic() + self._room_timeout_s
        while True:
            try:
                self.budget.admit(load.instance, load.name, device, gpu, expected_bytes)
            except NoGpuRoom as error:
                if not error.soon or monotonic() >= ends:
                    raise
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(asyncio.get_running_loop().time() + ends - monotonic()):
                        await self._changed.wait()
            else:
                return

    async def _gpu(self, device: str) -> Gpu | None:
        gpu = self._known.get(device)
        if gpu is None:
            try:
                gpu = await self._find(device)
            except ValueError as error:
                raise LoadRefused(str(error)) from None
            if gpu is not None:
                self._known[device] = gpu
        return gpu
