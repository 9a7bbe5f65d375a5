"""The metrics of a server for Prometheus, under Triton's names and our own."""

from headrace.core.machine_memory import Memory, read_memory
from headrace.metrics.machine import CpuUtilization
from headrace.metrics.model_families import FAILURE_REASONS
from headrace.metrics.samples import (
    GpuSample,
    LatencySample,
    ModelSample,
    ObjectiveSample,
    OptimizerSample,
    PlanSample,
    ResidencySample,
    ServerSample,
    WorkerSample,
)
from headrace.metrics.scrape import Metrics, prefers_openmetrics

__all__ = [
    "FAILURE_REASONS",
    "CpuUtilization",
    "GpuSample",
    "LatencySample",
    "Memory",
    "Metrics",
    "ModelSample",
    "ObjectiveSample",
    "OptimizerSample",
    "PlanSample",
    "ResidencySample",
    "ServerSample",
    "WorkerSample",
    "prefers_openmetrics",
    "read_memory",
]
