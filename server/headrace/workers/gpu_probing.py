"""Asking a process of its own what there is for GPUs here: what breaks in a library ends that process and no other."""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from headrace.core.device import gpu_number, visible_gpus
from headrace.workers.gpu_budget import Gpu

PROBE_MODULE = "headrace_backends.gpu_probe"
PROBE_TIMEOUT_S = 60.0  # importing torch from a cold disk takes its time

Facts = Mapping[str, Any]


async def ask(name: str, visible: str | None = None) -> Facts:
    """A probe's answer; where it breaks, what it said last is the error. ``visible``: CUDA_VISIBLE_DEVICES for it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        PROBE_MODULE,
        name,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=None if visible is None else {**os.environ, "CUDA_VISIBLE_DEVICES": visible},
    )
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            told, errors = await process.communicate()
    except TimeoutError:
        return broken(name, f"gave no answer within {PROBE_TIMEOUT_S:.0f} s")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    lines = told.decode(errors="replace").strip().splitlines()  # a library may print before the answer
    if process.returncode or not lines:
        said = errors.decode(errors="replace").strip().splitlines()
        return broken(name, f"ended with status {process.returncode}" + (f": {said[-1]}" if said else ""))
    facts: Facts = json.loads(lines[-1])
    return facts


def broken(name: str, error: str) -> Facts:
    """The facts of a probe that gave none."""
    return {"error": error, **({"library": "TensorRT"} if name == "tensorrt" else {})}


async def find_gpu(device: str) -> Gpu | None:
    """The GPU that a device means, as the driver tells; None where it tells of none such.

    Raises:
        ValueError: the server was told to use others.
    """
    facts = await ask("driver", visible_gpus(device, os.environ.get("CUDA_VISIBLE_DEVICES")))
    number = gpu_number(device)
    for gpu in facts.get("gpus", ()):
        if gpu["index"] == number:
            return Gpu(gpu["uuid"], gpu["name"], gpu["total_bytes"])
    return None
