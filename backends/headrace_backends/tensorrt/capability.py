"""Compute capabilities: what generation a GPU is of, as ``8.9``."""

import re
from typing import Any

from headrace_backends.base import LoadError

Capability = tuple[int, int]

# The bits of an RTX engine's header, as engines built for each of them have it. One more stands for later GPUs.
RTX_TARGETS: tuple[Capability, ...] = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
# What TensorRT-RTX builds for where it is not told for what; older GPUs have engines to themselves.
OLDEST_OF_RTX_BY_ITSELF: Capability = (8, 0)


def told(capability: Capability) -> str:
    """As ``8.9``."""
    return f"{capability[0]}.{capability[1]}"


def all_told(capabilities: tuple[Capability, ...]) -> str:
    """As ``8.6, 8.9``."""
    return ", ".join(map(told, capabilities)) or "none"


def parse(asked: Any) -> tuple[Capability, ...]:
    """``parameters.compute_capability``: one as 8.9, or several in a list or with commas.

    Raises:
        LoadError: it is none.
    """
    parts = asked if isinstance(asked, list | tuple) else str(asked).split(",")
    found = []
    for part in parts:
        match = re.fullmatch(r"\s*(\d{1,2})\.(\d)\s*", str(part))
        if match is None:
            raise LoadError(
                f"parameters.compute_capability is {asked!r}, expected one as 8.9, or several as '8.6, 8.9'"
            )
        found.append((int(match[1]), int(match[2])))
    return tuple(found)
