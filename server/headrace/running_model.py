"""What a running server says of the batching of one model: its metrics, read by ``explain --url``."""

import urllib.error
import urllib.request
from collections.abc import Callable, Iterable

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 10.0

Say = Callable[[str], None]
# The value of each of a model's series, by the name of the series and its labels but those of the model.
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def explain_running(url: str, model: str, say: Say) -> int:
    """Say what the server at ``url`` has learned and decided about a model. Returns 1 when there is nothing to say."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=TIMEOUT_S) as response:  # noqa: S310 - the user's own URL
            text = response.read().decode()
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        say(f"no metrics at {url.rstrip('/')}/metrics: {reason}; expected the HTTP or the metrics address of a server")
        return 1
    versions = versions_in(text_string_to_metric_families(text), model)
    if not versions:
        say(f"the server at {url} serves no model '{model}'")
        return 1
    say(f"model {model} at {url}")
    for version in sorted(versions, key=lambda name: (len(name), name)):
        say(f"version {version}")
        for line in describe(versions[version]):
            say(f"  {line}")
    return 0


def versions_in(families: Iterable[Metric], model: str) -> dict[str, Series]:
    """The series of each version of a model."""
    versions: dict[str, Series] = {}
    for family in families:
        for sample in family.samples:
            labels = dict(sample.labels)
            if labels.pop("model", None) == model and "version" in labels:
                series = versions.setdefault(labels.pop("version"), {})
                series[sample.name, tuple(sorted(labels.items()))] = sample.value
    return versions


def describe(series: Series) -> Iterable[str]:
    """Lines for people: the objective and what became of it, the decisions, and the latency curves."""

    def value(name: str) -> float:
        # The parser ends the name of every counter with _total, as OpenMetrics does; Triton's have none.
        return series.get((name, ()), series.get((f"{name}_total", ()), 0.0))

    rows, batches = value("nv_inference_count"), value("nv_inference_exec_count")
    yield f"batches: {batches:.0f} of {rows / batches if batches else 0:.1f} rows on average"
    yield from _instances(value)
    yield from _plan(series)
    yield f"waiting now: {value('headrace_queue_requests'):.0f} request(s)"
    if ("headrace_objective_seconds", ()) in series:
        yield (
            f"objective: {value('headrace_objective_seconds') * 1e3:g} ms; requests are accepted up to a predicted "
            f"{value('headrace_objective_budget_seconds') * 1e3:.1f} ms"
        )
        yield (
            f"answers: {value('headrace_objective_timely_total'):.0f} within the objective, "
            f"{value('headrace_objective_late_total'):.0f} after it; "
            f"{value('headrace_objective_refusals_total'):.0f} request(s) refused"
        )
        yield f"arriving now: {value('headrace_arrival_rows_per_second'):.1f} rows/s"
    else:
        yield "objective: none"
    if ("headrace_batch_size_target", ()) in series:
        yield (
            f"decided: up to {value('headrace_batch_size_target'):.0f} rows a batch; "
            f"{value('headrace_batch_wait_seconds_total'):.3f} s spent on waiting for batches to fill"
        )
    yield from _curves(series)


def _instances(value: Callable[[str], float]) -> Iterable[str]:
    """Only where something is, or was, wrong with them."""
    count, up = value("headrace_instances"), value("headrace_instances_up")
    deaths, pause_s = value("headrace_worker_deaths_total"), value("headrace_restart_pause_seconds")
    if up < count or deaths:
        left_alone = f"; one that keeps dying is left alone for {pause_s:.1f} s now" if pause_s else ""
        yield f"instances: {up:.0f} of {count:.0f} up; their workers have died {deaths:.0f} time(s){left_alone}"


def _plan(series: Series) -> Iterable[str]:
    form = next((dict(labels)["form"] for name, labels in series if name == "headrace_plan_info"), None)
    replays = {
        dict(labels)["result"]: value
        for (name, labels), value in series.items()
        if name == "headrace_plan_replays_total"
    }
    if form is not None:
        speedup = series.get(("headrace_plan_speedup", ()), 0.0)
        yield f"plan: {form}, {speedup:.3g} x as fast as it was dropped in when it was made"
    elif replays:
        yield "plan: none; it is served as it was dropped in"
    if replays:
        yield (
            f"plans so far: recorded requests answered right {replays.get('right', 0):.0f} time(s) and wrong "
            f"{replays.get('wrong', 0):.0f}; {series.get(('headrace_plan_refusals_total', ()), 0):.0f} plan(s) refused"
        )


def _curves(series: Series) -> Iterable[str]:
    points = {
        (int(labels["row_elements"]), int(labels["rows"])): value
        for (name, pairs), value in series.items()
        if name == "headrace_batch_latency_seconds" and (labels := dict(pairs))
    }
    if not points:
        yield "batch latency: no batch has run yet"
    for elements in sorted({elements for elements, _ in points}):
        yield "batch latency" + (f" of rows of up to {elements} elements" if elements else "") + ", as learned:"
        for rows in sorted(rows for of, rows in points if of == elements):
            of_size = (("row_elements", str(elements)), ("rows", str(rows)))
            high = series.get(("headrace_batch_latency_high_seconds", of_size), 0.0)
            yield f"  {rows:5} rows  {points[elements, rows] * 1e3:9.3f} ms, 99 in 100 within {high * 1e3:9.3f} ms"
