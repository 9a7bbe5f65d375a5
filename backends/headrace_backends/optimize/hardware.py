"""The machine that plans are made for, as far as it matters to them."""

from functools import cache
from pathlib import Path
from typing import Any

from headrace.core.cpus import usable_cpus
from headrace.core.device import CPU, EXPECTED, is_device
from headrace_backends.optimize.findings import Hardware

CPUINFO = Path("/proc/cpuinfo")

# Instructions by which runtimes choose their kernels, and so which form is fast, and how it rounds.
FEATURES = frozenset(
    {
        "avx2",
        "fma",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "avx_vnni",
        "amx_tile",
        "amx_int8",
        "amx_bf16",
        "asimd",
        "asimddp",
        "i8mm",
        "bf16",
        "sve",
    }
)


def hardware(cpuinfo: Path = CPUINFO) -> Hardware:
    """This machine. No framework is imported; of GPUs is known what ``nvidia-ml-py`` tells, where it is installed."""
    described = _described(cpuinfo)
    name = next((described[key] for key in ("model name", "Processor", "CPU part") if key in described), "")
    flags = f"{described.get('flags', '')} {described.get('Features', '')}".split()
    return Hardware(name, usable_cpus(), tuple(sorted(FEATURES.intersection(flags))), _gpus())


def why_not_on(device: str, gpu: str) -> str:
    """Why nothing can be optimised on a device, where these GPUs are seen (``Hardware.gpu``); empty if it can."""
    if not is_device(device):
        return f"there is no such device: expected {EXPECTED}"
    if device == CPU or gpu:
        return ""
    return (
        "no GPU is seen here: a driver is needed, and nvidia-ml-py (pip install 'headrace[gpu]'); "
        "headrace check --gpu tells more"
    )


def _described(cpuinfo: Path) -> dict[str, str]:
    """What the system says of the first CPU that it describes whole; they are alike where it matters."""
    found: dict[str, str] = {}
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return found
    for line in text.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found


@cache
def _gpus() -> str:
    """The GPUs with their compute capability, and the driver; asked once, since that takes a while."""
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]  # an extra
    except ImportError:
        return ""
    return told_by(pynvml)


def told_by(nvml: Any) -> str:
    """What nvidia-ml-py's module tells of GPUs, as ``NVIDIA L4 8.9, driver 580.95.05``; empty where there are none."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return ""
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
        if not handles:
            return ""
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        return ", ".join([*(_gpu(nvml, handle) for handle in handles), f"driver {driver}"])
    except nvml.NVMLError:
        return ""
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any) -> str:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return f"{_text(nvml.nvmlDeviceGetName(handle))} {major}.{minor}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
