"""Every metric that is kept for each model: its name, its type, its help and where its number is."""

from collections.abc import Callable
from dataclasses import dataclass

from headrace.core.statistics import Histogram, Statistics, Summaries
from headrace.core.window import Window
from headrace.metrics.samples import ModelSample

FAILURES = "nv_inference_request_failure"
FAILURE_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
REFUSED = "headrace_refused_requests_total"
BY_PRIORITY = "headrace_queue_requests_by_priority"
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)


def _cached(model: ModelSample) -> bool:
    return model.cached


def _pages(model: ModelSample) -> bool:
    return model.pages


@dataclass(frozen=True, slots=True)
class Family:
    """One number for each model that it applies to."""

    name: str
    kind: str
    help: str
    read: Callable[[ModelSample], float]
    applies: Callable[[ModelSample], bool] | None = None  # None: to every model


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
    Family("headrace_instances", "gauge", "Instances that should be up", lambda model: model.instances),
    Family("headrace_instances_up", "gauge", "Instances that are up", lambda model: model.instances_up),
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
