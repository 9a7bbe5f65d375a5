"""A metric that a model's own code keeps, from there to the scrape."""

import msgspec


class CustomMetric(msgspec.Struct, frozen=True, array_like=True):
    """One value of one: of a histogram ``value`` is the sum of observations."""

    name: str
    help: str
    kind: str  # counter | gauge | histogram
    labels: tuple[tuple[str, str], ...]
    value: float
    buckets: tuple[tuple[float, int], ...] = ()  # upper bound and cumulative count, without the infinite one
    count: int = 0  # of observations
