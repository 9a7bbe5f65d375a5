"""The metric families of GPUs, in Triton's names; none of them is there where there is no GPU."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily, UnknownMetricFamily
from prometheus_client.registry import Collector

from headrace.metrics.samples import GpuSample

_LABELS = ("gpu_uuid",)


class GpuCollector(Collector):
    """Asks the callable anew at each scrape; it must not wait."""

    def __init__(self, gpus: Callable[[], Iterable[GpuSample]]) -> None:
        self._gpus = gpus

    def collect(self) -> Iterator[Metric]:
        """A family for each thing that at least one GPU tells."""
        gpus = list(self._gpus())
        families: list[tuple[Metric, Callable[[GpuSample], float | None]]] = [
            (
                _gauge("nv_gpu_utilization", "Share of the last second in which the GPU was at work, 0 to 1"),
                _utilization,
            ),
            (_gauge("nv_gpu_memory_total_bytes", "Memory of the GPU"), lambda gpu: gpu.memory_total_bytes),
            (_gauge("nv_gpu_memory_used_bytes", "Memory of the GPU in use"), lambda gpu: gpu.memory_used_bytes),
            (_gauge("nv_gpu_power_usage", "Watts that the GPU draws"), lambda gpu: gpu.power_w),
            (_gauge("nv_gpu_power_limit", "Watts that the GPU may draw"), lambda gpu: gpu.power_limit_w),
            # A counter; but Triton's name for it lacks the ending that the library gives to every counter.
            (
                UnknownMetricFamily(
                    "nv_energy_consumption", "Joules that the GPU has used since the server started", labels=_LABELS
                ),
                lambda gpu: gpu.energy_j,
            ),
        ]
        for family, value in families:
            for gpu in gpus:
                number = value(gpu)
                if number is not None:
                    family.add_metric((gpu.uuid,), number)  # type: ignore[attr-defined] # of each of these families
            if family.samples:
                yield family


def _utilization(gpu: GpuSample) -> float | None:
    return gpu.utilization


def _gauge(name: str, documentation: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, labels=_LABELS)
