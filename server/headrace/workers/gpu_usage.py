"""What a load has taken of a GPU's memory, by NVML, for which the process need not touch the GPU."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

UNMEASURED = (
    "what it takes of the GPU's memory is not measured ({why}): instances[].gpu_memory_bytes, "
    "or else the size of its files, counts"
)


@dataclass(frozen=True, slots=True)
class Reading:
    """At one moment. In some containers, and on some parts of GPUs, single processes are not told."""

    own_bytes: int | None  # of this process
    used_bytes: int  # of all


class GpuUsage:
    """One GPU's memory. ``library`` gives nvidia-ml-py's module, or raises ImportError where there is none."""

    def __init__(
        self, uuid: str, library: Callable[[], Any] = lambda: import_module("pynvml"), pid: int | None = None
    ) -> None:
        self.why_not = ""  # it cannot be read
        self._pid = os.getpid() if pid is None else pid
        try:
            self._nvml = library()
        except ImportError:
            self.why_not = "nvidia-ml-py is not installed: pip install 'headrace[gpu]'"
            return
        try:
            self._nvml.nvmlInit()
            self._handle = self._find(uuid)
        except self._nvml.NVMLError as error:
            self.why_not = f"NVML says {error}"

    def read(self) -> Reading | None:
        """What is in use now; None where that cannot be told."""
        if self.why_not:
            return None
        try:
            used_bytes = int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except self._nvml.NVMLError as error:
            self.why_not = f"NVML says {error}"
            return None
        return Reading(self._own_bytes(), used_bytes)

    def _own_bytes(self) -> int | None:
        with suppress(self._nvml.NVMLError):
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
                if process.pid == self._pid and process.usedGpuMemory is not None:
                    return int(process.usedGpuMemory)
        return None

    def _find(self, uuid: str) -> Any:
        """The GPU of that UUID, of which the driver does not say whether it is one of a part."""
        kind, _, rest = uuid.partition("-")
        try:
            return self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        except self._nvml.NVMLError:
            other = "MIG" if kind == "GPU" else "GPU"
            return self._nvml.nvmlDeviceGetHandleByUUID(f"{other}-{rest}")


def grown_bytes(before: Reading | None, after: Reading | None) -> int:
    """What a load between two readings has taken; 0 where nothing is known.

    By the process's own memory if it is told, which is nothing before it first uses the GPU, else by everybody's.
    """
    if before is None or after is None:
        return 0
    if after.own_bytes is not None:
        return max(0, after.own_bytes - (before.own_bytes or 0))
    return max(0, after.used_bytes - before.used_bytes)
