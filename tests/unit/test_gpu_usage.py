"""What a load has taken of a GPU's memory, by a made-up NVML."""

from types import SimpleNamespace

import pytest

from headrace.workers.gpu_usage import GpuUsage, Reading, grown_bytes


class FakeNvml:
    """One GPU with processes; ``fails`` names calls that it refuses."""

    class NVMLError(Exception):
        pass

    def __init__(self, *known, fails=(), processes=(), used=0):
        self.known, self.fails, self.processes, self.used = known, fails, processes, used

    def _call(self, name):
        if name in self.fails:
            raise self.NVMLError("Not Supported")

    def nvmlInit(self):  # noqa: N802
        self._call("init")

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        if uuid not in self.known:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle):  # noqa: N802
        assert handle in self.known
        self._call("memory")
        return SimpleNamespace(used=self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):  # noqa: N802
        assert handle in self.known
        self._call("processes")
        return [SimpleNamespace(pid=pid, usedGpuMemory=nbytes) for pid, nbytes in self.processes]


def usage(nvml, uuid="GPU-1"):
    return GpuUsage(uuid, lambda: nvml, pid=7)


@pytest.mark.parametrize("known", ["GPU-1", "MIG-1"])
def test_the_process_s_own_memory_is_told(known):
    reading = usage(FakeNvml(known, processes=[(3, 10), (7, 20)], used=100)).read()
    assert reading == Reading(own_bytes=20, used_bytes=100)


@pytest.mark.parametrize(
    "nvml",
    [
        FakeNvml("GPU-1", fails=["processes"], used=100),
        FakeNvml("GPU-1", processes=[(3, 10)], used=100),
        FakeNvml("GPU-1", processes=[(7, None)], used=100),
    ],
)
def test_where_processes_are_not_told_everybody_s_memory_is(nvml):
    assert usage(nvml).read() == Reading(own_bytes=None, used_bytes=100)


@pytest.mark.parametrize("nvml", [FakeNvml(), FakeNvml("GPU-1", fails=["init"]), FakeNvml("GPU-1", fails=["memory"])])
def test_what_nvml_refuses_is_the_reason(nvml):
    found = usage(nvml)
    assert found.read() is None
    assert found.why_not.startswith("NVML says Not ")


def test_without_the_library_the_reason_says_how_to_come_by_it():
    def missing():
        raise ImportError

    found = GpuUsage("GPU-1", missing)
    assert found.read() is None
    assert "pip install 'headrace[gpu]'" in found.why_not


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (None, Reading(1, 1), 0),
        (Reading(1, 1), None, 0),
        (Reading(None, 100), Reading(30, 500), 30),  # the process had not touched the GPU; others took the rest
        (Reading(10, 100), Reading(30, 500), 20),
        (Reading(None, 100), Reading(None, 500), 400),
        (Reading(None, 500), Reading(None, 100), 0),
    ],
)
def test_growth(before, after, expected):
    assert grown_bytes(before, after) == expected
