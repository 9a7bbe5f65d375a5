"""When an open loop means to send: steady, in bursts, or rising and falling. The same seed gives the same times."""

from collections.abc import Sequence

import numpy as np


def poisson_offsets_ns(rate_per_s: float, seconds: float, seed: int) -> list[int]:
    """Ascending send times within ``seconds``, in nanoseconds after the start.

    Gaps are exponential and independent, as those of many clients who know nothing of each other.

    Raises:
        ValueError: the rate or the duration is not positive.
    """
    if rate_per_s <= 0 or seconds <= 0:
        raise ValueError(f"the rate is {rate_per_s}/s for {seconds} s, expected both above 0")
    random = np.random.default_rng(seed)
    end_ns = seconds * 1e9
    draw = int(rate_per_s * seconds) + 64
    offsets = np.cumsum(random.exponential(1e9 / rate_per_s, draw))
    while offsets[-1] < end_ns:
        more = np.cumsum(random.exponential(1e9 / rate_per_s, draw)) + offsets[-1]
        offsets = np.concatenate([offsets, more])
    kept: list[int] = offsets[offsets < end_ns].astype(np.int64).tolist()
    return kept


def burst_offsets_ns(
    rate_per_s: float, seconds: float, seed: int, *, burst_s: float = 0.2, high: float = 1.8, low: float = 0.2
) -> list[int]:
    """Send times of a source that is busy and quiet in turn, ``rate_per_s`` on average.

    It is a Poisson process of ``high`` times the rate in bursts, which last ``burst_s`` on average, and of ``low``
    times the rate between them; both lengths are exponential, as in a two-state Markov-modulated process.

    Raises:
        ValueError: the rate or a duration is not positive, or the average is not between ``low`` and ``high``.
    """
    if min(rate_per_s, seconds, burst_s) <= 0:
        raise ValueError(f"{rate_per_s}/s for {seconds} s in bursts of {burst_s} s: expected all above 0")
    if not 0 <= low < 1 < high:
        raise ValueError(f"bursts of {high} and pauses of {low} times the rate: expected 0 <= low < 1 < high")
    random = np.random.default_rng(seed)
    pause_s = burst_s * (high - 1) / (1 - low)
    pieces: list[Sequence[float]] = []
    start_s, bursting = 0.0, True
    while start_s < seconds:
        length_s = random.exponential(burst_s if bursting else pause_s)
        count = random.poisson(rate_per_s * (high if bursting else low) * length_s)
        pieces.append(start_s + length_s * np.sort(random.random(count)))
        start_s += length_s
        bursting = not bursting
    return _within(np.concatenate(pieces), seconds)


def ramp_offsets_ns(
    rate_per_s: float, seconds: float, seed: int, *, period_s: float = 4.0, high: float = 1.8, low: float = 0.2
) -> list[int]:
    """Send times of a Poisson process whose rate rises from ``low`` to ``high`` times ``rate_per_s`` and falls again.

    Raises:
        ValueError: the rate or a duration is not positive.
    """
    if min(rate_per_s, seconds, period_s) <= 0:
        raise ValueError(f"{rate_per_s}/s for {seconds} s in periods of {period_s} s: expected all above 0")
    candidates = np.array(poisson_offsets_ns(rate_per_s * high, seconds, seed)) * 1e-9
    phase = np.abs((candidates / period_s) % 1.0 * 2 - 1)  # 1, 0, 1 over a period
    kept = np.random.default_rng(seed + 1).random(len(candidates)) * high < high - (high - low) * phase
    return _within(candidates[kept], seconds)


def _within(offsets_s: "np.ndarray[tuple[int], np.dtype[np.float64]]", seconds: float) -> list[int]:
    kept: list[int] = (offsets_s[offsets_s < seconds] * 1e9).astype(np.int64).tolist()
    return kept
