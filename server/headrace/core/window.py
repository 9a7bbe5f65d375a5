"""Quantiles of what was observed within the last minute, in bounded memory."""

from collections import deque
from collections.abc import Sequence
from math import nan

WINDOW_NS = 60_000_000_000
SLICES = 6  # the window moves on by a sixth at a time, so it covers the last 50 to 60 seconds
_SLICE_NS = WINDOW_NS // SLICES
_BITS = 7  # leading bits of a value that its bucket keeps: off by less than one part in 128


class Window:
    """Whole numbers, none negative, counted by their leading bits and apart for each slice of time.

    A slice has at most 64 buckets for each doubling of the values, whatever the number of observations. ``now_ns``
    never goes back.
    """

    __slots__ = ("_buckets", "_ends_ns", "_slices")

    def __init__(self) -> None:
        self._slices: deque[tuple[int, dict[int, int]]] = deque(maxlen=SLICES)  # with the end of each
        self._buckets: dict[int, int] = {}  # of the slice that is being filled
        self._ends_ns = 0

    def observe(self, value: int, now_ns: int, times: int = 1) -> None:
        """Count ``times`` observations of ``value``."""
        if now_ns >= self._ends_ns:
            self._ends_ns = (now_ns // _SLICE_NS + 1) * _SLICE_NS
            self._buckets = {}
            self._slices.append((self._ends_ns, self._buckets))
        dropped = value.bit_length() - _BITS
        bucket = value if dropped <= 0 else (dropped << _BITS) + (value >> dropped)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + times

    def quantiles(self, wanted: Sequence[float], now_ns: int) -> list[float]:
        """The value at each of ``wanted``, which rise from 0 to 1; NaN where nothing was observed."""
        merged: dict[int, int] = {}
        for ends_ns, buckets in self._slices:
            if ends_ns > now_ns - WINDOW_NS + _SLICE_NS:
                for bucket, count in buckets.items():
                    merged[bucket] = merged.get(bucket, 0) + count
        ordered = sorted(merged.items())
        total = sum(merged.values())
        return [_at_rank(ordered, quantile * total) for quantile in wanted]


def _at_rank(ordered: Sequence[tuple[int, int]], rank: float) -> float:
    """The middle of the bucket that holds the observation of this rank."""
    seen = 0
    for bucket, count in ordered:
        seen += count
        if seen >= rank:
            return _middle(bucket)
    return nan


def _middle(bucket: int) -> float:
    dropped = bucket >> _BITS
    if not dropped:
        return float(bucket)
    lowest = (bucket & ((1 << _BITS) - 1)) << dropped
    return lowest + ((1 << dropped) - 1) / 2
