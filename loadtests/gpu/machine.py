"""The GPU machine: what is asked of it before anything is run, and what is written beside the results."""

import asyncio
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from headrace.workers import gpu_probing
from loadtests.gpu.ledger import NotShown
from loadtests.machine import describe_machine, describe_versions

_PACKAGES = ("torch", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13-bindings", "nvidia-ml-py", "onnx")


def describe() -> dict[str, Any]:
    """Everything about it that a result depends on."""
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe_machine(),
        **describe_versions(),
        **versions,
        "driver": asyncio.run(gpu_probing.ask("driver")),
        "nvml": asyncio.run(gpu_probing.ask("nvml")),
    }


def require_gpu(facts: dict[str, Any]) -> None:
    """Raise NotShown where nothing can run on a GPU."""
    driver = facts["driver"]
    if "error" in driver:
        raise NotShown(f"there is no GPU: {driver['error']}")
    if not driver["gpus"]:
        raise NotShown("there is no GPU: the driver shows none")


def used_bytes() -> int | None:
    """What is in use of the first GPU's memory, by all processes; None where nobody tells."""
    with suppress(Exception):  # of a library that may be missing, or a driver that may not tell
        import pynvml

        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    return None
