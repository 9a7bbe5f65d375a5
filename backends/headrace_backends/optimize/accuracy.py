"""How far answers are from the reference's, and whether a budget allows that."""

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from headrace_backends.base import Array

Outputs = Mapping[str, Array]
Floats = npt.NDArray[np.float64]
# The owner's own: outputs and labels of all judged examples, by name and in the same order, to one number.
Metric = Callable[[Mapping[str, Sequence[Array]], Mapping[str, Sequence[Array]]], float]

FLOAT_NOISE = 1e-3  # of an output's largest value: what another order of additions may change
TOP_K = 5
_TEXTS, _NO_FLOATS = "OSU", "OSUbiu"  # kinds of numpy's
_MODULE = "headrace_owner_metric"
_AT_LEAST = ("top1_agreement", "topk_agreement", "cosine", "mean_cosine")
_AT_MOST = ("max_abs", "max_rel")
_BOUND = re.compile("[<>]=")


class MetricFailed(Exception):
    """The owner's metric is not there or raised; the message says which."""


class Budget(msgspec.Struct, frozen=True, omit_defaults=True):
    """The bound on one metric. ``metric`` is a field of ``Errors``, or ``module:function`` or ``file.py:function``."""

    metric: str
    min: float | None = None
    max: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """A budget as people write it: ``cosine>=0.99``, ``max_abs<=1e-3``, ``judge.py:accuracy>=0.97``.

        Raises:
            ValueError: it is none; the message says what is expected.
        """
        found = _BOUND.search(text)
        sign = found[0] if found else ""
        metric, _, bound = (part.strip() for part in text.partition(sign or "="))
        known = [*_AT_LEAST, *_AT_MOST]
        try:
            value = float(bound)
            if not sign or not math.isfinite(value):
                raise ValueError(text)  # noqa: TRY301 - said below, with what is no number
        except ValueError:
            raise ValueError(f"the budget {text!r} is none, expected METRIC>=N or METRIC<=N, as cosine>=0.99") from None
        if ":" not in metric and metric not in known:
            raise ValueError(
                f"the budget's metric is {metric!r}, expected one of {', '.join(known)} or module:function"
            )
        wanted = ">=" if metric in _AT_LEAST else "<=" if metric in _AT_MOST else sign
        if sign != wanted:
            raise ValueError(
                f"the budget {text!r} bounds {metric} from the wrong side, expected {metric}{wanted}{bound}"
            )
        if (metric in _AT_LEAST and value > 1) or (metric in _AT_MOST and value < 0):
            raise ValueError(f"the budget {text!r} cannot be met, since {metric} is {1 if sign == '>=' else 0} at best")
        return cls(metric, min=value) if sign == ">=" else cls(metric, max=value)

    def __str__(self) -> str:
        return f"{self.metric} >= {self.min:g}" if self.min is not None else f"{self.metric} <= {self.max:g}"

    @property
    def is_own(self) -> bool:
        """Whether the metric is a function of the owner's."""
        return ":" in self.metric

    def problem(self, errors: "Errors") -> str | None:
        """Why these errors are beyond the budget; None where they are within."""
        if errors.max_abs is not None and not math.isfinite(errors.max_abs):
            return "answers have another shape than the reference's, or NaN or infinite values where it has none"
        value = self._value(errors)
        if value is None:
            return f"{self.metric} cannot be told of these outputs"
        within = value >= self.min if self.min is not None else value <= (self.max or 0.0)
        if not within:  # nor is NaN
            return f"{self.metric} is {value:.4g}, the budget asks for {self}"
        if self.is_own or self.min is None or errors.same is None or errors.same >= self.min:
            return None
        return f"only {errors.same:.4g} of an output's whole numbers or texts are the same, the budget asks for {self}"

    def tells(self, errors: "Errors") -> bool:
        """Whether there is such a metric of these outputs at all."""
        return self._value(errors) is not None

    def is_near(self, errors: "Errors") -> bool:
        """Whether errors are not so far beyond that a milder change could not be within."""
        value = self._value(errors)
        if value is None:
            return False
        return value >= self.min - abs(self.min) / 3 if self.min is not None else value <= 30 * (self.max or 0.0)

    def _value(self, errors: "Errors") -> float | None:
        found: float | None = errors.own if self.is_own else getattr(errors, self.metric)
        return found


class Errors(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answers against the reference's, over some examples. None where outputs of that kind are not among them.

    ``max_abs`` and ``max_rel`` (of the output's largest absolute value in the reference) are the worst of any element,
    booleans being 0 and 1 and a text that differs being off by 1. The others are those of the worst output: ``cosine``
    the worst of any row, ``mean_cosine`` the mean over rows, the agreements and ``same`` shares. A row is everything
    that a float output has for one example.
    """

    examples: int
    max_abs: float | None = None
    max_rel: float | None = None
    cosine: float | None = None
    mean_cosine: float | None = None
    top1_agreement: float | None = None  # of what is no float each element counts, as a class that somebody chose
    topk_agreement: float | None = None  # share of the reference's five best that are among the five best
    mismatches: int = 0  # elements that are no floats and differ
    same: float | None = None  # of those, the share that does not
    own: float | None = None  # the owner's metric

    @property
    def faithful(self) -> bool:
        """Whether nothing differs but by float noise. A bar that NaN does not pass."""
        return self.mismatches == 0 and (self.max_rel is None or self.max_rel <= FLOAT_NOISE)


class _Means:
    """The mean of some numbers for each output."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: npt.ArrayLike) -> None:
        """Some more of them; shares are given as booleans."""
        array = np.asarray(values)
        self._sums[name] = self._sums.get(name, 0.0) + float(array.sum())
        self._counts[name] = self._counts.get(name, 0) + array.size

    def worst(self) -> float | None:
        """The least of the means; None where there is nothing."""
        means = [total / self._counts[name] for name, total in self._sums.items()]
        return min(means, default=None, key=_nan_first)

    def missing(self) -> int:
        """How many booleans were false."""
        return sum(self._counts.values()) - int(sum(self._sums.values()))


def compare(reference: Sequence[Outputs], answers: Sequence[Outputs]) -> Errors:
    """Answers beside the reference's, example by example."""
    assert len(reference) == len(answers), "answers belong to the reference's"
    scales = _scales(reference)
    worst_abs: list[float] = []
    worst_rel: list[float] = []
    worst_cosines: list[float] = []
    cosines, top1, topk, same = (_Means() for _ in range(4))
    for wanted, got in zip(reference, answers, strict=True):
        for name, right in wanted.items():
            mine = got[name]
            if mine.shape != right.shape:
                return Errors(len(reference), float("nan"), float("nan"), mismatches=right.size)
            if not right.size:
                continue
            left, other = _numbers(right, mine)
            difference = _largest_difference(left, other)
            worst_abs.append(difference)
            worst_rel.append(difference / scales[name] if scales[name] else difference)
            if right.dtype.kind in _NO_FLOATS:
                same.add(name, left == other)
                continue
            worst_cosines.append(_cosine(left, other))
            cosines.add(name, worst_cosines[-1:])
            if right.ndim and right.shape[-1] > 1:
                one, two = left.reshape(-1, right.shape[-1]), other.reshape(-1, right.shape[-1])
                top1.add(name, one.argmax(-1) == two.argmax(-1))
                if right.shape[-1] > TOP_K:  # the best five of no more than five are always the same
                    topk.add(name, _shared_best(one, two))
    return Errors(
        len(reference),
        max(worst_abs, default=None, key=_nan_last),
        max(worst_rel, default=None, key=_nan_last),
        min(worst_cosines, default=None, key=_nan_first),
        cosines.worst(),
        min((one for one in (top1.worst(), same.worst()) if one is not None), default=None),
        topk.worst(),
        same.missing(),
        same.worst(),
    )


def untold(budget: Budget, answers: Sequence[Outputs]) -> list[str]:
    """The outputs of which the budget says nothing, as ``top1_agreement`` of a single number, from some answers."""
    if budget.is_own or not answers:
        return []
    alone = {name: [{name: one[name]} for one in answers if one[name].size][:1] for name in answers[0]}
    errors = {name: compare(one, one) for name, one in alone.items()}
    return [name for name, one in errors.items() if not budget.tells(one) and one.same is None]


def judged(metric: Metric, outputs: Sequence[Outputs], labels: Sequence[Mapping[str, Array]]) -> float:
    """What the owner's metric says of these answers.

    Raises:
        MetricFailed: it raised, or gave no number.
    """
    by_output = {name: [one[name] for one in outputs] for name in (outputs[0] if outputs else {})}
    by_label = {name: [one[name] for one in labels] for name in (labels[0] if labels else {})}
    try:
        return float(metric(by_output, by_label))
    except (Exception, SystemExit) as error:
        raise MetricFailed(f"the budget's metric failed: {type(error).__name__}: {error}") from error


def own_metric(name: str, folder: Path) -> Metric:
    """The owner's metric; ``folder`` is where a ``file.py:function`` lies.

    Raises:
        MetricFailed: it is not there.
    """
    module_name, _, function = name.partition(":")
    try:
        module: Any = _of_file(folder / module_name) if module_name.endswith(".py") else import_module(module_name)
        metric: Metric = getattr(module, function)
    except (Exception, SystemExit) as error:
        raise MetricFailed(f"the budget's metric '{name}' is not there: {type(error).__name__}: {error}") from error
    return metric


def _of_file(path: Path) -> Any:
    """The owner's module, which may import what lies beside it."""
    spec = spec_from_file_location(_MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[_MODULE] = module  # dataclasses look for it there
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def _scales(reference: Sequence[Outputs]) -> dict[str, float]:
    scales: dict[str, float] = {}
    for outputs in reference:
        for name, array in outputs.items():
            values = np.abs(_numbers(array, array)[0])
            scales[name] = max(scales.get(name, 0.0), float(values[np.isfinite(values)].max(initial=0.0)))
    return scales


def _numbers(right: Array, mine: Array) -> tuple[Floats, Floats]:
    """Both as floats, one after the other; what differs does so afterwards too, and texts differ by 1."""
    if right.dtype.kind in _TEXTS:
        ones = np.ones(right.size)
        return ones, ones - np.asarray(mine != right, np.float64).reshape(-1)
    left, other = right.astype(np.float64).reshape(-1), mine.astype(np.float64).reshape(-1)
    if right.dtype.kind in _NO_FLOATS:  # beyond 2**53 neighbours become one float
        other = np.where((left == other) & (mine != right).reshape(-1), np.nextafter(left, np.inf), other)
    return left, other


def _largest_difference(right: Floats, mine: Floats) -> float:
    """The largest difference of any element; infinities and NaNs differ from everything but their own kind."""
    with np.errstate(invalid="ignore"):
        same = (right == mine) | (np.isnan(right) & np.isnan(mine))
        return float(np.where(same, 0.0, np.abs(right - mine)).max())


def _cosine(right: Floats, mine: Floats) -> float:
    same = ((right == mine) | (np.isnan(right) & np.isnan(mine))) & ~np.isfinite(right)  # masked values, as -inf
    right, mine = right[~same], mine[~same]
    lengths = float(np.linalg.norm(right) * np.linalg.norm(mine))
    if not lengths:
        return 1.0 if np.array_equal(right, mine) else 0.0
    with np.errstate(invalid="ignore"):  # of infinities
        return float(np.dot(right, mine) / lengths)


def _shared_best(right: Floats, mine: Floats) -> list[float]:
    count = min(TOP_K, right.shape[-1])
    best, others = (np.argsort(-values, -1, kind="stable")[:, :count] for values in (right, mine))
    return [len(set(one) & set(other)) / count for one, other in zip(best.tolist(), others.tolist(), strict=True)]


def _nan_last(value: float) -> tuple[bool, float]:
    return (np.isnan(value), value)


def _nan_first(value: float) -> tuple[bool, float]:
    return (not np.isnan(value), value)
