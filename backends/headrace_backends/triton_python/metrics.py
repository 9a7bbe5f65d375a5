"""Metrics that a model's code keeps, with Triton's API for them; the server exports their values."""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import accumulate, pairwise
from math import isfinite
from threading import Lock

from headrace.core.custom_metric import CustomMetric
from headrace_backends.triton_python.errors import TritonModelException

MAX_METRICS = 1000  # of one model; each is a time series in whatever scrapes the server
_METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL_NAME = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")

Labels = tuple[tuple[str, str], ...]


class MetricKind(IntEnum):
    """What a metric's values mean."""

    COUNTER = 0
    GAUGE = 1
    HISTOGRAM = 2


class Metric:
    """One value, or the distribution of many. Any thread may use it."""

    def __init__(self, name: str, kind: MetricKind, bounds: tuple[float, ...]) -> None:
        self._name = name
        self._kind = kind
        self._lock = Lock()
        self._value = 0.0
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # the last is past every bound

    def increment(self, value: float) -> None:
        """Add to a counter or a gauge."""
        self._only("increment", MetricKind.COUNTER, MetricKind.GAUGE)
        if self._kind is MetricKind.COUNTER and value < 0:
            raise TritonModelException(f"counter '{self._name}' is incremented by {value}, expected at least 0")
        with self._lock:
            self._value += value

    def set(self, value: float) -> None:
        """Give a gauge a value."""
        self._only("set", MetricKind.GAUGE)
        with self._lock:
            self._value = float(value)

    def observe(self, value: float) -> None:
        """Count a value in a histogram."""
        self._only("observe", MetricKind.HISTOGRAM)
        with self._lock:
            self._value += value
            self._counts[bisect_left(self._bounds, value)] += 1

    def value(self) -> float:
        """The present value of a counter or a gauge."""
        self._only("value", MetricKind.COUNTER, MetricKind.GAUGE)
        return self._value

    @property
    def bounds(self) -> tuple[float, ...]:
        """The upper bounds of a histogram's buckets."""
        return self._bounds

    def sample(self, text: str, labels: Labels) -> CustomMetric:
        """The present state, for the server."""
        with self._lock:
            value, counts = self._value, tuple(accumulate(self._counts))
        buckets = tuple(zip(self._bounds, counts, strict=False))
        histogram = self._kind is MetricKind.HISTOGRAM
        count = counts[-1] if histogram else 0
        return CustomMetric(self._name, text, self._kind.name.lower(), labels, value, buckets, count)

    def _only(self, verb: str, *kinds: MetricKind) -> None:
        if self._kind not in kinds:
            raise TritonModelException(f"metric '{self._name}' is a {self._kind.name}, which has no {verb}()")


class _Family:
    """Metrics of one name, told apart by their labels."""

    def __init__(self, text: str, kind: MetricKind) -> None:
        self.text = text
        self.kind = kind
        self.metrics: dict[Labels, Metric] = {}


class ModelMetrics:
    """Every metric of one model. They stay until it is unloaded, also when its code lets go of them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._families: dict[str, _Family] = {}

    def family(self, name: str, text: str, kind: MetricKind) -> None:
        """Have a family of that name; one that is there already keeps its description.

        Raises:
            TritonModelException: the name cannot be a metric's, or is taken by another kind.
        """
        if not _METRIC_NAME.fullmatch(name):
            raise TritonModelException(f"'{name}' cannot be a metric's name, expected letters, digits, '_' and ':'")
        with self._lock:
            there = self._families.setdefault(name, _Family(text, kind))
        if there.kind is not kind:
            raise TritonModelException(f"metric family '{name}' is a {there.kind.name} already, got {kind.name}")

    def metric(self, name: str, labels: Mapping[str, str], bounds: tuple[float, ...]) -> Metric:
        """The metric with those labels in the family ``name``, made where it is not there.

        Raises:
            TritonModelException: a label cannot be one, or there are too many metrics.
        """
        for label, value in labels.items():
            if not (isinstance(value, str) and isinstance(label, str) and _LABEL_NAME.fullmatch(label)):
                raise TritonModelException(
                    f"metric '{name}' has the label {label!r}: {value!r}, "
                    "expected a name of letters, digits and '_', and a text"
                )
        key = tuple(sorted(labels.items()))
        with self._lock:
            family = self._families[name]
            there = family.metrics.get(key)
            if there is None:
                if sum(len(one.metrics) for one in self._families.values()) >= MAX_METRICS:
                    raise TritonModelException(f"metric '{name}' would be one more than the {MAX_METRICS} of a model")
                there = family.metrics[key] = Metric(name, family.kind, bounds)
        if there.bounds != bounds:
            raise TritonModelException(f"metric '{name}' has the buckets {list(there.bounds)}, got {list(bounds)}")
        return there

    def samples(self) -> tuple[CustomMetric, ...]:
        """The present state of all of them."""
        with self._lock:
            metrics = [
                (metric, family.text, labels)
                for family in self._families.values()
                for labels, metric in family.metrics.items()
            ]
        return tuple(metric.sample(text, labels) for metric, text, labels in metrics)


class MetricFamily:
    """Metrics of one name; every object of that name in a model means the same family."""

    COUNTER = MetricKind.COUNTER
    GAUGE = MetricKind.GAUGE
    HISTOGRAM = MetricKind.HISTOGRAM

    _metrics: ModelMetrics  # of the model whose API this is: see ``family_class``

    def __init__(self, name: str, description: str, kind: MetricKind) -> None:
        self._name = name
        self._kind = MetricKind(kind)
        self._metrics.family(name, description, self._kind)

    def Metric(  # noqa: N802 - the name that models know
        self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None
    ) -> Metric:
        """The metric with these labels; a histogram needs the upper bounds of its buckets, rising."""
        bounds = tuple(float(bound) for bound in buckets or ())
        if bool(bounds) != (self._kind is MetricKind.HISTOGRAM):
            raise TritonModelException(f"metric '{self._name}': buckets belong to a HISTOGRAM, and every one has some")
        if not all(map(isfinite, bounds)) or not all(low < high for low, high in pairwise(bounds)):
            raise TritonModelException(
                f"metric '{self._name}' has the buckets {list(bounds)}, expected finite bounds that rise"
            )
        return self._metrics.metric(self._name, labels or {}, bounds)


def family_class(metrics: ModelMetrics) -> type[MetricFamily]:
    """The class by which one model's code makes metrics."""
    return type("MetricFamily", (MetricFamily,), {"_metrics": metrics})
