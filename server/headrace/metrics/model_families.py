"""Every metric that is kept for each model: its name, its type, its help and where its number is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from headrace.core.statistics import Histogram, Statistics, Summaries
from headrace.core.window import Window
from headrace.metrics.samples import LatencySample, ModelSample, ObjectiveSample, PlanSample

FAILURES = "nv_inference_request_failure"
FAILURE_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
REFUSED = "headrace_refused_requests_total"
BY_PRIORITY = "headrace_queue_requests_by_priority"
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


def _cached(model: ModelSample) -> bool:
    return model.cached


def _pages(model: ModelSample) -> bool:
    return model.pages


def _has_objective(model: ModelSample) -> bool:
    return model.objective is not None


def _is_adaptive(model: ModelSample) -> bool:
    return model.objective is not None and model.objective.target_rows is not None


def _has_plan(model: ModelSample) -> bool:
    return model.plan is not None and bool(model.plan.form)


def _had_plan(model: ModelSample) -> bool:
    return model.plan is not None


def _plan(model: ModelSample) -> PlanSample:
    assert model.plan is not None, "the family applies to it"
    return model.plan


def _objective(model: ModelSample) -> ObjectiveSample:
    assert model.objective is not None, "the family applies to models that have one"
    return model.objective


@dataclass(frozen=True, slots=True)
class Family:
    """One number for each model that it applies to."""

    name: str
    kind: str
    help: str
    read: Callable[[ModelSample], float]
    applies: Callable[[ModelSample], bool] | None = None  # None: to every model


@dataclass(frozen=True, slots=True)
class LatencyFamily:
    """One gauge for each size of batch that has run, so none for a model of which none has."""

    name: str
    help: str
    read: Callable[[LatencySample], float]

    def samples(self, model: ModelSample) -> Iterator[tuple[str, float]]:
        """Labels beside those of the model, as text, and values."""
        for latency in model.latencies:
            yield f'row_elements="{latency.row_elements}",rows="{latency.rows}"', self.read(latency)


@dataclass(frozen=True, slots=True)
class HistogramFamily:
    """One histogram for each model that it applies to."""

    name: str
    help: str
    read: Callable[[ModelSample], Histogram]
    applies: Callable[[ModelSample], bool] | None = None  # None: to every model


@dataclass(frozen=True, slots=True)
class SummaryFamily:
    """One summary, in microseconds, for each model that keeps summaries and that it applies to.

    The quantiles are those of the last minute; sum and count are of all time.
    """

    name: str
    help: str
    window: Callable[[Summaries], Window]
    count: Callable[[Statistics], int]
    sum_ns: Callable[[Statistics], int]
    applies: Callable[[ModelSample], bool] | None = None  # None: to every model


PLAN = "headrace_plan_info"
REPLAYS = "headrace_plan_replays_total"

FAMILIES = (
    Family(
        "nv_inference_request_success",
        "counter",
        "Requests answered without an error",
        lambda model: model.statistics.success,
    ),
    Family(
        "nv_inference_count",
        "counter",
        "Inferences, a batch of n rows counting n times",
        lambda model: model.statistics.rows,
    ),
    Family("nv_inference_exec_count", "counter", "Batches executed", lambda model: model.statistics.executions),
    Family(
        "nv_inference_request_duration_us",
        "counter",
        "Microseconds from a request's arrival to its answer, successful requests",
        lambda model: model.statistics.success_ns // 1000,
    ),
    Family(
        "nv_inference_queue_duration_us",
        "counter",
        "Microseconds that requests waited in the queue",
        lambda model: model.statistics.queue_ns // 1000,
    ),
    Family(
        "nv_inference_compute_input_duration_us",
        "counter",
        "Microseconds spent on preparing inputs, once for each request of a batch",
        lambda model: model.statistics.compute_input_ns // 1000,
    ),
    Family(
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Microseconds spent in the model, once for each request of a batch",
        lambda model: model.statistics.compute_infer_ns // 1000,
    ),
    Family(
        "nv_inference_compute_output_duration_us",
        "counter",
        "Microseconds spent on taking outputs, once for each request of a batch",
        lambda model: model.statistics.compute_output_ns // 1000,
    ),
    Family(
        "nv_inference_pending_request_count", "gauge", "Requests waiting to be executed", lambda model: model.waiting
    ),
    Family(
        "nv_model_load_duration_secs",
        "gauge",
        "Seconds that loading the model took",
        lambda model: model.statistics.load_seconds,
    ),
    Family(
        "nv_cache_num_hits_per_model",
        "counter",
        "Requests answered out of the response cache",
        lambda model: model.statistics.cache_hits,
        _cached,
    ),
    Family(
        "nv_cache_num_misses_per_model",
        "counter",
        "Requests that the response cache had no answer to",
        lambda model: model.statistics.cache_misses,
        _cached,
    ),
    Family(
        "nv_cache_hit_duration_per_model",
        "counter",
        "Microseconds spent on finding answers in the response cache",
        lambda model: model.statistics.cache_hit_ns // 1000,
        _cached,
    ),
    Family(
        "nv_cache_miss_duration_per_model",
        "counter",
        "Microseconds spent on looking in vain and on putting the answer into the response cache",
        lambda model: model.statistics.cache_miss_ns // 1000,
        _cached,
    ),
    Family("headrace_queue_requests", "gauge", "Requests in the queue", lambda model: model.waiting),
    Family("headrace_executing_batches", "gauge", "Batches being executed", lambda model: model.executing),
    Family(
        "headrace_streams_active",
        "gauge",
        "Requests that are being answered with several responses",
        lambda model: model.active_streams,
    ),
    Family(
        "headrace_sequences_active",
        "gauge",
        "Sequences that have begun and not ended",
        lambda model: model.active_sequences,
    ),
    Family("headrace_model_ready", "gauge", "1 if the model can answer now, else 0", lambda model: int(model.ready)),
    Family(
        "headrace_model_resident",
        "gauge",
        "1 if the model is in memory, 0 if a request will bring it there",
        lambda model: int(model.resident),
        _pages,
    ),
    Family(
        "headrace_model_memory_bytes",
        "gauge",
        "Memory that the model took when it was loaded last",
        lambda model: model.memory_bytes,
        _pages,
    ),
    Family(
        "headrace_plan_speedup",
        "gauge",
        "How many times faster the plan's form was than the model as it was dropped in, when it was made",
        lambda model: _plan(model).speedup,
        _has_plan,
    ),
    Family(
        "headrace_plan_refusals_total",
        "counter",
        "Plans that were refused because something was wrong with them",
        lambda model: _plan(model).refusals,
        _had_plan,
    ),
    Family("headrace_instances", "gauge", "Instances that should be up", lambda model: model.instances),
    Family("headrace_instances_up", "gauge", "Instances that are up", lambda model: model.instances_up),
    Family(
        "headrace_restart_pause_seconds",
        "gauge",
        "How long an instance that dies again and again is left alone before it is loaded anew; 0 once it is up",
        lambda model: model.restart_pause_s,
    ),
    Family(
        "headrace_worker_deaths_total",
        "counter",
        "Times that a worker died while it held the model",
        lambda model: model.statistics.worker_deaths,
    ),
    Family(
        "headrace_retried_requests_total",
        "counter",
        "Requests run again after the worker that held them died",
        lambda model: model.statistics.retries,
    ),
    Family(
        "headrace_objective_seconds",
        "gauge",
        "The latency that 99 in 100 accepted requests are to have at most",
        lambda model: _objective(model).objective_s,
        _has_objective,
    ),
    Family(
        "headrace_objective_budget_seconds",
        "gauge",
        "The latency up to which a request may be predicted to come and be accepted",
        lambda model: _objective(model).budget_s,
        _has_objective,
    ),
    Family(
        "headrace_objective_timely_total",
        "counter",
        "Requests answered within the objective",
        lambda model: _objective(model).timely,
        _has_objective,
    ),
    Family(
        "headrace_objective_late_total",
        "counter",
        "Requests that were accepted and answered after the objective",
        lambda model: _objective(model).late,
        _has_objective,
    ),
    Family(
        "headrace_objective_refusals_total",
        "counter",
        "Requests refused because they would have been answered after the objective",
        lambda model: _objective(model).refused,
        _has_objective,
    ),
    Family(
        "headrace_arrival_rows_per_second",
        "gauge",
        "Rows that arrive just now, refused ones included, over about the time of the objective",
        lambda model: _objective(model).arrival_rows_per_s,
        _has_objective,
    ),
    Family(
        "headrace_batch_size_target",
        "gauge",
        "Rows that a batch is to have when enough are waiting, as last decided",
        lambda model: _objective(model).target_rows or 0,
        _is_adaptive,
    ),
    Family(
        "headrace_batch_wait_seconds_total",
        "counter",
        "Time for which an idle instance waited for a batch to fill",
        lambda model: _objective(model).waited_s or 0.0,
        _is_adaptive,
    ),
)

LATENCIES = (
    LatencyFamily(
        "headrace_batch_latency_seconds",
        "What a batch of so many rows takes on average, as learned from those that ran",
        lambda latency: latency.mean_s,
    ),
    LatencyFamily(
        "headrace_batch_latency_high_seconds",
        "What one in a hundred batches of so many rows takes longer than, as learned",
        lambda latency: latency.high_s,
    ),
)

HISTOGRAMS = (
    HistogramFamily(
        "headrace_request_duration_seconds",
        "Time from a request's arrival to its answer, successful requests",
        lambda model: model.statistics.request_latency_s,
    ),
    HistogramFamily(
        "headrace_queue_duration_seconds",
        "Time that a request waited in the queue",
        lambda model: model.statistics.queue_time_s,
    ),
    HistogramFamily(
        "headrace_compute_duration_seconds",
        "Time that a batch took: inputs, model and outputs",
        lambda model: model.statistics.compute_time_s,
    ),
    HistogramFamily("headrace_batch_rows", "Rows in an executed batch", lambda model: model.statistics.batch_rows),
    HistogramFamily(
        "nv_inference_first_response_histogram_ms",
        "Milliseconds from a request's arrival to its first response",
        lambda model: model.statistics.first_response_ms,
        lambda model: model.decoupled,
    ),
)

SUMMARIES = (
    SummaryFamily(
        "nv_inference_request_summary_us",
        "Microseconds from a request's arrival to its answer, successful requests",
        lambda summaries: summaries.request,
        lambda statistics: statistics.success,
        lambda statistics: statistics.success_ns,
    ),
    SummaryFamily(
        "nv_inference_queue_summary_us",
        "Microseconds that a request waited in the queue",
        lambda summaries: summaries.queue,
        lambda statistics: statistics.success,
        lambda statistics: statistics.queue_ns,
    ),
    SummaryFamily(
        "nv_inference_compute_input_summary_us",
        "Microseconds spent on preparing the inputs of a request's batch",
        lambda summaries: summaries.compute_input,
        lambda statistics: statistics.computed,
        lambda statistics: statistics.compute_input_ns,
    ),
    SummaryFamily(
        "nv_inference_compute_infer_summary_us",
        "Microseconds that a request's batch spent in the model",
        lambda summaries: summaries.compute_infer,
        lambda statistics: statistics.computed,
        lambda statistics: statistics.compute_infer_ns,
    ),
    SummaryFamily(
        "nv_inference_compute_output_summary_us",
        "Microseconds spent on taking the outputs of a request's batch",
        lambda summaries: summaries.compute_output,
        lambda statistics: statistics.computed,
        lambda statistics: statistics.compute_output_ns,
    ),
    SummaryFamily(
        "nv_cache_hit_summary_per_model",
        "Microseconds spent on finding an answer in the response cache",
        lambda summaries: summaries.cache_hit,
        lambda statistics: statistics.cache_hits,
        lambda statistics: statistics.cache_hit_ns,
        _cached,
    ),
    SummaryFamily(
        "nv_cache_miss_summary_per_model",
        "Microseconds spent on looking in vain and on putting the answer into the response cache",
        lambda summaries: summaries.cache_miss,
        lambda statistics: statistics.cache_misses,
        lambda statistics: statistics.cache_miss_ns,
        _cached,
    ),
)
