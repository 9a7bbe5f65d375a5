"""The server's load in a response header, for load balancers that ask for it (ORCA)."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from time import monotonic

FORMAT_HEADER = "endpoint-load-metrics-format"
REPORT_HEADER = "endpoint-load-metrics"
MAX_AGE_S = 0.1


@dataclass(frozen=True, slots=True)
class LoadSample:
    """How busy the server is: shares of its CPUs and its memory from 0 to 1, and other numbers by name."""

    cpu_utilization: float
    memory_utilization: float
    named: Mapping[str, float] = field(default_factory=dict)


class LoadReport:
    """Makes the header from a sample that is at most MAX_AGE_S old. Belongs to the event loop.

    ``read`` is called when a newer one is needed; ``now`` is a monotonic clock in seconds.
    """

    __slots__ = ("_made", "_now", "_read", "_read_at")

    def __init__(self, read: Callable[[], LoadSample], now: Callable[[], float] = monotonic) -> None:
        self._read = read
        self._now = now
        self._read_at = float("-inf")
        self._made: dict[str, str] = {}

    def header(self, wanted: str) -> str | None:
        """The value of ``endpoint-load-metrics`` for that of ``endpoint-load-metrics-format``.

        None for a format that there is none of: the response then goes without.
        """
        now = self._now()
        if now - self._read_at >= MAX_AGE_S:
            sample = self._read()
            self._made = {"text": as_text(sample), "json": as_json(sample)}
            self._read_at = now
        return self._made.get(wanted.strip().lower())


def as_text(sample: LoadSample) -> str:
    """``TEXT cpu_utilization=0.3, mem_utilization=0.2, named_metrics.queue_requests=3``."""
    named = {f"named_metrics.{name}": number for name, number in _numbers(sample.named).items()}
    return "TEXT " + ", ".join(f"{name}={number}" for name, number in (_shares(sample) | named).items())


def as_json(sample: LoadSample) -> str:
    """``JSON {"cpu_utilization":0.3,"mem_utilization":0.2,"named_metrics":{"queue_requests":3}}``."""
    fields = {**_shares(sample), "named_metrics": _numbers(sample.named)}
    return "JSON " + json.dumps(fields, separators=(",", ":"))


def _shares(sample: LoadSample) -> dict[str, float]:
    return _numbers({"cpu_utilization": sample.cpu_utilization, "mem_utilization": sample.memory_utilization})


def _numbers(values: Mapping[str, float]) -> dict[str, float]:
    """The values with four decimals, without the zeros; one that could not be read (NaN) is left out."""
    rounded = {name: round(value, 4) for name, value in values.items() if isfinite(value)}
    return {name: int(value) if value == int(value) else value for name, value in rounded.items()}
