"""What is to be optimised: a model file, as it was dropped in and as its owner has configured it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.core.device import CPU
from headrace.core.model import TensorSpec
from headrace_backends.base import ModelSource
from headrace_backends.optimize.form import Form

_THREADS = "intra_op_threads"


@dataclass(frozen=True, slots=True)
class Subject:
    """One model version. ``folder`` is where the files lie that the configuration names."""

    name: str
    version: str
    path: Path
    backend: str
    folder: Path
    parameters: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[TensorSpec, ...] = ()  # as configured
    outputs: tuple[TensorSpec, ...] = ()
    max_batch_size: int | None = None
    training: Path | None = None  # the owner's training code
    device: str = CPU  # where every form runs

    @property
    def reference(self) -> Form:
        """The model as it was dropped in."""
        return Form(self.backend)

    def source(self, form: Form, path: Path, cpus: int) -> ModelSource:
        """What a backend is given to load one instance of the form, exactly as when it is served."""
        asked = {_THREADS: form.threads} if form.threads and _THREADS not in self.parameters else {}
        return ModelSource(
            self.name,
            self.version,
            path,
            self.device,
            threads=min(form.threads or cpus, cpus),
            inputs=self.inputs,
            outputs=self.outputs,
            max_batch_size=self.max_batch_size if form.max_batch_size is None else form.max_batch_size,
            parameters={**self._kept(form), **form.parameters, **asked},
        )

    def overruled(self, form: Form) -> list[str]:
        """Those of the form's parameters that it would be served without: the configuration says otherwise of them."""
        kept = self._kept(form)
        return [name for name, value in form.parameters.items() if kept.get(name, value) != value]

    def _kept(self, form: Form) -> Mapping[str, Any]:
        """The configured parameters; those of another backend would only be refused."""
        if form.backend == self.backend:
            return self.parameters
        threads = self.parameters.get(_THREADS)
        return {} if threads is None else {_THREADS: threads}
