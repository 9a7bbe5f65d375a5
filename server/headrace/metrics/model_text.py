"""The families of models as Prometheus reads them, in its classic format or as OpenMetrics.

Triton's counters (``nv_*``) have no ``_total`` at the end, and dashboards name them as they are. The classic text
format takes any name for a counter. OpenMetrics does not, and Prometheus asks for OpenMetrics unless told
otherwise; there they are of type ``unknown``, because a lost type costs a hint and a changed name costs the
dashboard. ``rate()`` works on both.
"""

from collections.abc import Callable, Iterable, Sequence
from math import isnan

from headrace.core.statistics import REFUSALS, Histogram, Summaries
from headrace.metrics.model_families import (
    BY_PRIORITY,
    FAILURE_REASONS,
    FAILURES,
    FAMILIES,
    HISTOGRAMS,
    LATENCIES,
    PLAN,
    QUANTILES,
    REFUSED,
    REPLAYS,
    SUMMARIES,
    SummaryFamily,
)
from headrace.metrics.samples import ModelSample

Labelled = Sequence[tuple[str, ModelSample]]


def model_text(models: Iterable[ModelSample], openmetrics: bool) -> str:
    """Every family of every model. A family's samples must stand together, so models are the inner loop.

    A family that only some models have is left out when none of them is there.
    """
    labelled = [(_labels(model), model) for model in models]
    lines: list[str] = []
    for family in FAMILIES:
        name, read = family.name, family.read
        samples = [f"{name}{{{labels}}} {read(model)}" for labels, model in _having(labelled, family.applies)]
        if samples or family.applies is None:
            lines += header(name, family.kind, family.help, openmetrics)
            lines += samples
    lines += header(FAILURES, "counter", "Requests answered with an error, by reason", openmetrics)
    for labels, model in labelled:
        lines += _failure_lines(labels, model.statistics.failures)
    lines += _refusals(labelled, openmetrics)
    lines += _levels(labelled, openmetrics)
    lines += _plans(labelled, openmetrics)
    for latency in LATENCIES:
        lines += header(latency.name, "gauge", latency.help, openmetrics)
        for labels, model in labelled:
            lines += (f"{latency.name}{{{labels},{more}}} {value}" for more, value in latency.samples(model))
    for histogram in HISTOGRAMS:
        samples = [
            line
            for labels, model in _having(labelled, histogram.applies)
            for line in _histogram_lines(histogram.name, labels, histogram.read(model))
        ]
        if samples or histogram.applies is None:
            lines += header(histogram.name, "histogram", histogram.help, openmetrics)
            lines += samples
    for summary in SUMMARIES:
        samples = [
            line
            for labels, model in _having(labelled, summary.applies)
            if model.statistics.summaries is not None
            for line in _summary_lines(summary, labels, model, model.statistics.summaries)
        ]
        if samples:
            lines += header(summary.name, "summary", summary.help, openmetrics)
            lines += samples
    return "".join(f"{line}\n" for line in lines)


def _refusals(labelled: Labelled, openmetrics: bool) -> list[str]:
    lines = [
        *header(REFUSED, "counter", "Requests refused or given up for lack of room or time, by reason", openmetrics)
    ]
    for labels, model in labelled:
        refusals = model.statistics.refusals
        lines += [f'{REFUSED}{{{labels},reason="{reason}"}} {refusals.get(reason, 0)}' for reason in REFUSALS]
    return lines


def _levels(labelled: Labelled, openmetrics: bool) -> list[str]:
    levels = [
        f'{BY_PRIORITY}{{{labels},priority="{level}"}} {count}'
        for labels, model in labelled
        for level, count in model.waiting_by_priority.items()
    ]
    return (
        [*header(BY_PRIORITY, "gauge", "Requests in the queue, by priority level", openmetrics), *levels]
        if levels
        else []
    )


def _plans(labelled: Labelled, openmetrics: bool) -> list[str]:
    plans = [(labels, model.plan) for labels, model in labelled if model.plan is not None]
    if not plans:
        return []
    served = [f'{PLAN}{{{labels},form="{escaped(plan.form)}"}} 1' for labels, plan in plans if plan.form]
    replays = [
        f'{REPLAYS}{{{labels},result="{result}"}} {count}'
        for labels, plan in plans
        for result, count in (("right", plan.replays_right), ("wrong", plan.replays_wrong))
    ]
    return [
        *header(PLAN, "gauge", "The form that a plan has the model served in", openmetrics),
        *served,
        *header(REPLAYS, "counter", "Times that a plan's recorded requests were answered again", openmetrics),
        *replays,
    ]


def _having(labelled: Labelled, applies: Callable[[ModelSample], bool] | None) -> Labelled:
    return labelled if applies is None else [one for one in labelled if applies(one[1])]


def header(name: str, kind: str, documentation: str, openmetrics: bool) -> tuple[str, str]:
    """The lines that say what a family is."""
    if openmetrics and kind == "counter":
        # There a counter's family has no suffix and its samples must have it.
        family = name.removesuffix("_total")
        kind = "unknown" if family == name else kind
        name = family
    return f"# HELP {name} {documentation}", f"# TYPE {name} {kind}"


def _labels(model: ModelSample) -> str:
    return f'model="{escaped(model.name)}",version="{escaped(model.version)}"'


def escaped_help(text: str) -> str:
    """A family's description as its line has it."""
    return text.replace("\\", r"\\").replace("\n", r"\n")


def escaped(value: str) -> str:
    """A label's value as it stands between its quotes."""
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _failure_lines(labels: str, failures: dict[str, int]) -> list[str]:
    """All reasons, at 0 too: a series that begins with its first failure hides that one from ``rate()``."""
    return [f'{FAILURES}{{{labels},reason="{reason}"}} {failures.get(reason, 0)}' for reason in FAILURE_REASONS]


def _histogram_lines(name: str, labels: str, histogram: Histogram) -> list[str]:
    rows = histogram.cumulative()
    lines = [f'{name}_bucket{{{labels},le="{bound}"}} {count}' for bound, count in rows]
    lines += (f"{name}_sum{{{labels}}} {histogram.total}", f"{name}_count{{{labels}}} {rows[-1][1]}")
    return lines


def _summary_lines(summary: SummaryFamily, labels: str, model: ModelSample, summaries: Summaries) -> list[str]:
    """In microseconds; NaN, as Prometheus has it, where the last minute saw nothing."""
    name, statistics = summary.name, model.statistics
    values_ns = summaries.quantiles(summary.window(summaries), QUANTILES)
    lines = [
        f'{name}{{{labels},quantile="{quantile}"}} {_number(value_ns / 1000)}'
        for quantile, value_ns in zip(QUANTILES, values_ns, strict=True)
    ]
    lines += (
        f"{name}_sum{{{labels}}} {summary.sum_ns(statistics) / 1000}",
        f"{name}_count{{{labels}}} {summary.count(statistics)}",
    )
    return lines


def _number(value: float) -> str:
    return "NaN" if isnan(value) else str(value)
