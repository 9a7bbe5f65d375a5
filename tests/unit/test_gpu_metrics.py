"""GPU metrics: Triton's names, read through an NVML of our own, absent where there is nothing."""

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from headrace.gpu_sampler import GpuSampler
from headrace.metrics import GpuSample, Metrics, ServerSample

ROOT = Path(__file__).parents[2]
SERVER = ServerSample(inflight_requests=0, inflight_bytes=0, uptime_seconds=1.0, ready=True)


class NvmlError(Exception):
    pass


class FakeNvml:
    """Two GPUs; the second tells neither its use nor its energy."""

    NVMLError = NvmlError

    def __init__(self, count=2, broken=False):
        self.count, self.broken, self.energy_mj = count, broken, 5_000_000

    def nvmlInit(self):  # noqa: N802 - NVML's names
        if self.broken:
            raise NvmlError("Driver Not Loaded")

    def nvmlDeviceGetCount(self):  # noqa: N802
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle):  # noqa: N802
        return [b"GPU-a", "GPU-b"][handle]

    def nvmlDeviceGetUtilizationRates(self, handle):  # noqa: N802
        if handle:
            raise NvmlError("Not Supported")
        return SimpleNamespace(gpu=40, memory=3)

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        return SimpleNamespace(total=1000 + handle, used=100, free=900)

    def nvmlDeviceGetPowerUsage(self, handle):  # noqa: N802
        return 123_000

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):  # noqa: N802
        return 700_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        if handle:
            raise NvmlError("Not Supported")
        self.energy_mj += 1500
        return self.energy_mj


async def sampled(nvml):
    sampler = GpuSampler(0.001, lambda: nvml)
    running = asyncio.get_running_loop().create_task(sampler.run())
    while not (found := sampler.latest()) and not running.done():
        await asyncio.sleep(0)
    running.cancel()
    return found


async def test_gpus_are_read():
    first, second = await sampled(FakeNvml())
    assert first.energy_j >= 1.5
    assert first == GpuSample("GPU-a", 0.4, 1000, 100, 123.0, 700.0, first.energy_j)
    assert second == GpuSample("GPU-b", None, 1001, 100, 123.0, 700.0, None)


async def test_a_gpu_that_is_lost_takes_no_other_out_of_the_metrics():
    nvml = FakeNvml()

    def lost(handle):
        raise NvmlError("GPU is lost")

    whole = nvml.nvmlDeviceGetHandleByIndex
    nvml.nvmlDeviceGetHandleByIndex = lambda index: whole(index) if index else lost(index)
    assert [sample.uuid for sample in await sampled(nvml)] == ["GPU-b"]


async def test_nothing_is_read_where_there_is_nothing():
    def missing():
        raise ImportError("No module named 'pynvml'")

    await GpuSampler(60, missing).run()  # it ends by itself
    for nvml in (FakeNvml(broken=True), FakeNvml(count=0)):
        sampler = GpuSampler(60, lambda nvml=nvml: nvml)
        await sampler.run()
        assert sampler.latest() == ()


def scrape(*gpus, accept=""):
    body, _ = Metrics(tuple, tuple, lambda: SERVER, gpus=lambda: gpus).render(accept)
    return body.decode()


def test_the_names_are_tritons():
    text = scrape(GpuSample("GPU-a", 0.4, 1000, 100, 123.0, 700.0, 2.5), GpuSample("GPU-b", memory_used_bytes=7))
    found = {
        (sample.name, sample.labels["gpu_uuid"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "gpu_uuid" in sample.labels
    }
    shown = re.findall(r"^\| `(nv_\w+)`", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE)
    assert {name for name, _ in found} == set(shown)
    assert found == {
        ("nv_gpu_utilization", "GPU-a"): 0.4,
        ("nv_gpu_memory_total_bytes", "GPU-a"): 1000,
        ("nv_gpu_memory_used_bytes", "GPU-a"): 100,
        ("nv_gpu_memory_used_bytes", "GPU-b"): 7,
        ("nv_gpu_power_usage", "GPU-a"): 123,
        ("nv_gpu_power_limit", "GPU-a"): 700,
        ("nv_energy_consumption", "GPU-a"): 2.5,
    }


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text"])
def test_without_gpus_no_family_is_there(accept):
    assert "nv_gpu" not in scrape(accept=accept)
    assert "nv_energy" not in scrape(accept=accept)
