"""The metrics that models' own code keeps, added up over a model's instances."""

from collections.abc import Iterable
from dataclasses import dataclass

from headrace.core.custom_metric import CustomMetric
from headrace.metrics.model_text import escaped, escaped_help, header

Labels = tuple[tuple[str, str], ...]

OURS = ("nv_", "headrace_", "process_", "python_")  # no model's metric may pass for one of the server's


@dataclass(slots=True)
class _Total:
    """What several instances say of one metric."""

    value: float
    buckets: dict[float, int]
    count: int


def custom_text(samples: Iterable[CustomMetric], openmetrics: bool) -> str:
    """The families of all models.

    A counter or a histogram is the sum over whoever keeps it; a gauge is the value that was told last. Of a name
    that two models use for different kinds, the first kind counts.
    """
    heads: dict[str, tuple[str, str]] = {}
    totals: dict[str, dict[Labels, _Total]] = {}
    for sample in samples:
        if sample.name.startswith(OURS):
            continue
        kind, _ = heads.setdefault(sample.name, (sample.kind, sample.help))
        if kind == sample.kind:
            _add(totals.setdefault(sample.name, {}), sample)
    lines: list[str] = []
    for name, (kind, documentation) in heads.items():
        lines += header(name, kind, escaped_help(documentation), openmetrics)
        for labels, total in totals[name].items():
            lines += _lines(name, kind, labels, total)
    return "".join(f"{line}\n" for line in lines)


def _add(totals: dict[Labels, _Total], sample: CustomMetric) -> None:
    total = totals.get(sample.labels)
    if total is None or sample.kind == "gauge":
        totals[sample.labels] = _Total(sample.value, dict(sample.buckets), sample.count)
        return
    total.value += sample.value
    total.count += sample.count
    # Of bounds that only one of them has, the number below is not known.
    told = dict(sample.buckets)
    total.buckets = {bound: count + told[bound] for bound, count in total.buckets.items() if bound in told}


def _lines(name: str, kind: str, labels: Labels, total: _Total) -> list[str]:
    text = ",".join(f'{label}="{escaped(value)}"' for label, value in labels)
    shown = f"{{{text}}}" if text else ""
    if kind != "histogram":
        return [f"{name}{shown} {total.value}"]
    before = f"{text}," if text else ""
    lines = [f'{name}_bucket{{{before}le="{bound}"}} {count}' for bound, count in sorted(total.buckets.items())]
    lines.append(f'{name}_bucket{{{before}le="+Inf"}} {total.count}')
    return [*lines, f"{name}_sum{shown} {total.value}", f"{name}_count{shown} {total.count}"]
