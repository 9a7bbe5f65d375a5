"""When an open loop means to send: the arrival times of a Poisson process."""

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
