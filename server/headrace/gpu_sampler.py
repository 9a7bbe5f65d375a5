"""What GPUs tell of themselves through NVML, read in a thread of its own: a reading takes milliseconds."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from headrace.metrics import GpuSample

log = logging.getLogger(__name__)

INTERVAL_S = 2.0  # as Triton's


class GpuSampler:
    """Keeps the last reading. ``library`` gives nvidia-ml-py's module, or raises ImportError where there is none."""

    def __init__(
        self, interval_s: float = INTERVAL_S, library: Callable[[], Any] = lambda: import_module("pynvml")
    ) -> None:
        self._interval_s = interval_s
        self._library = library
        self._latest: tuple[GpuSample, ...] = ()

    def latest(self) -> tuple[GpuSample, ...]:
        """Every GPU as it was a moment ago; empty where there is none."""
        return self._latest

    async def run(self) -> None:
        """Read again and again until cancelled. Ends by itself where there is nothing to read."""
        gpus = await asyncio.to_thread(self._open)
        while gpus:
            self._latest = await asyncio.to_thread(lambda: tuple(gpu.read() for gpu in gpus))
            await asyncio.sleep(self._interval_s)

    def _open(self) -> "list[_Gpu]":
        try:
            nvml = self._library()
        except ImportError:
            return []
        try:
            nvml.nvmlInit()
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            log.info("no GPU metrics: %s", error)
            return []
        gpus = []
        for index in range(count):
            try:
                gpus.append(_Gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index)))
            except nvml.NVMLError as error:  # it has fallen off the bus, or is not this container's
                log.info("no metrics of NVML's GPU %d: %s", index, error)
        return gpus


class _Gpu:
    """One GPU. What it does not tell (in MIG mode its use, on some its energy) is None, and asked for again."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        uuid = nvml.nvmlDeviceGetUUID(handle)
        self._uuid = uuid.decode() if isinstance(uuid, bytes) else str(uuid)
        self._energy_mj_at_start = self._ask("nvmlDeviceGetTotalEnergyConsumption")

    def read(self) -> GpuSample:
        rates = self._ask("nvmlDeviceGetUtilizationRates")
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        power_mw = self._ask("nvmlDeviceGetPowerUsage")
        limit_mw = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        energy_mj, start_mj = self._ask("nvmlDeviceGetTotalEnergyConsumption"), self._energy_mj_at_start
        return GpuSample(
            self._uuid,
            utilization=None if rates is None else rates.gpu / 100,
            memory_total_bytes=None if memory is None else memory.total,
            memory_used_bytes=None if memory is None else memory.used,
            power_w=None if power_mw is None else power_mw / 1000,
            power_limit_w=None if limit_mw is None else limit_mw / 1000,
            energy_j=None if energy_mj is None or start_mj is None else max(0, energy_mj - start_mj) / 1000,
        )

    def _ask(self, function: str) -> Any:
        with suppress(self._nvml.NVMLError):
            return getattr(self._nvml, function)(self._handle)
        return None
