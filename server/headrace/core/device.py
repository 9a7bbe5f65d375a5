"""Where an instance runs, as configurations name it: ``cpu``, ``gpu:N`` by CUDA's number, ``gpu:UUID``.

A UUID names a GPU, or a part of one in MIG mode, which has no number of its own.
"""

import re

CPU = "cpu"
IPC_HANDLE_BYTES = 64  # of what stands for memory of a GPU between processes, a cudaIpcMemHandle_t
EXPECTED = "'cpu', 'gpu:N' or 'gpu:UUID' with a whole UUID (GPU-..., MIG-...)"

_HEX = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
_NUMBERED = re.compile(r"gpu:(0|[1-9][0-9]{0,2})")
# Drivers before 470 named a part by its GPU and two numbers.
_NAMED = re.compile(rf"gpu:(GPU-{_HEX}|MIG-{_HEX}|MIG-GPU-{_HEX}/[0-9]{{1,3}}/[0-9]{{1,3}})")


def is_device(text: str) -> bool:
    """Whether it names one."""
    return text == CPU or bool(_NUMBERED.fullmatch(text) or _NAMED.fullmatch(text))


def gpu_uuid(device: str) -> str:
    """The UUID that a device is named by; empty where it is not named by one."""
    match = _NAMED.fullmatch(device)
    return match[1] if match else ""


def gpu_number(device: str) -> int | None:
    """The number by which the process that hosts the instance sees its GPU; None where it is on no GPU.

    A process for a UUID sees that one alone (``visible_gpus``), so it is number 0 there.

    Raises:
        ValueError: it names no device.
    """
    if device == CPU:
        return None
    if gpu_uuid(device):
        return 0
    match = _NUMBERED.fullmatch(device)
    if match is None:
        raise ValueError(f"device '{device}' is unknown, expected {EXPECTED}")
    return int(match[1])


def visible_gpus(device: str, inherited: str | None) -> str | None:
    """What CUDA_VISIBLE_DEVICES has to be for a process on this device; None for what it is.

    ``inherited`` is the server's own value, None where it has none. Numbers count what that shows, so nothing changes
    for them. Names of it that are numbers say nothing of UUIDs: then the owner's word is taken.

    Raises:
        ValueError: the server was told to use other GPUs.
    """
    uuid = gpu_uuid(device)
    if not uuid:
        return None
    shown = [name.strip() for name in inherited.split(",")] if inherited is not None else None
    if shown is not None and not any(name.isdigit() or (name and uuid.startswith(name)) for name in shown):
        raise ValueError(
            f"device '{device}' is not among the GPUs that this server may use: CUDA_VISIBLE_DEVICES is '{inherited}'"
        )
    return uuid
