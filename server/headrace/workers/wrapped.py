"""A backend that stands in front of another one and changes what goes in and out."""

from collections.abc import Sequence

from headrace.core.custom_metric import CustomMetric
from headrace.core.model import Signature
from headrace_backends.base import Backend, ModelSource


class Wrapped(Backend):
    """What every one of them has in common: another backend, and a signature that is not its own."""

    def __init__(self, backend: Backend, signature: Signature) -> None:
        self.cpu_threads = backend.cpu_threads
        self.warms_up = backend.warms_up
        self.remembers = backend.remembers
        self._backend = backend
        self._signature = signature

    @classmethod
    def load(cls, source: ModelSource) -> "Wrapped":
        """Another backend does that."""
        raise NotImplementedError(f"model {source.name}: {cls.__name__} is made of a backend that is loaded")

    @property
    def signature(self) -> Signature:
        """What clients give and get."""
        return self._signature

    def metrics(self) -> Sequence[CustomMetric]:
        """The other backend's."""
        return self._backend.metrics()

    def notes(self) -> list[str]:
        """The other backend's."""
        return self._backend.notes()

    def close(self) -> None:
        """Close the other backend."""
        self._backend.close()
