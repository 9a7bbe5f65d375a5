"""What a scrape of ``/metrics`` shows, read from plain counters at that moment.

What a server has once goes through a registry of prometheus_client. The families of models are written in
``model_text.py``: 1,400 models have 120,000 samples, which took the library 0.8 s on a machine where that file takes
0.12 s.
"""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from headrace.core.custom_metric import CustomMetric
from headrace.metrics.custom import custom_text
from headrace.metrics.gpu import GpuCollector
from headrace.metrics.model_text import model_text
from headrace.metrics.samples import GpuSample, ModelSample, ServerSample, WorkerSample
from headrace.metrics.server import ServerCollector

_OPENMETRICS = "application/openmetrics-text"


class Metrics:
    """The scrape. The callables are asked at every one and must give what is true at that moment."""

    def __init__(
        self,
        models: Callable[[], Iterable[ModelSample]],
        workers: Callable[[], Iterable[WorkerSample]],
        server: Callable[[], ServerSample],
        custom: Callable[[], Iterable[CustomMetric]] = tuple,
        gpus: Callable[[], Iterable[GpuSample]] = tuple,
    ) -> None:
        self._models = models
        self._custom = custom
        self._registry = CollectorRegistry()
        self._registry.register(ServerCollector(workers, server))
        self._registry.register(GpuCollector(gpus))
        ProcessCollector(registry=self._registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Body and content type: OpenMetrics where the Accept header prefers it, else the classic text format.

        Anyone may call it, one caller at a time. On the event loop, where the counters are written, a body is one
        moment; in a thread, if the callables allow that, its numbers are milliseconds apart and each histogram
        still adds up.
        """
        openmetrics = prefers_openmetrics(accept)
        encode, content_type = choose_encoder(_OPENMETRICS if openmetrics else "")
        # A folder's name need not be UTF-8, and one such model must not cost the scrape of all others.
        text = model_text(self._models(), openmetrics) + custom_text(self._custom(), openmetrics)
        # The registry comes last: in OpenMetrics its end is the end of the body, "# EOF".
        return text.encode(errors="replace") + encode(self._registry), content_type


def prefers_openmetrics(accept: str) -> bool:
    """Whether an Accept header names OpenMetrics and gives it at least the quality of plain text."""
    quality = {_OPENMETRICS: 0.0, "text/plain": 0.0}
    for choice in accept.lower().split(","):
        media, *parameters = (part.strip() for part in choice.split(";"))
        if media in quality:
            quality[media] = max(quality[media], _quality(parameters))
    return 0 < quality[_OPENMETRICS] >= quality["text/plain"]


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
