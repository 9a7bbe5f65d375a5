"""``headrace.optimize``: the fastest faithful form of a model as a function in this process."""

import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from headrace.core.model import Signature
from headrace.core.tensor import NUMPY_DTYPES
from headrace_backends.base import Array, Backend
from headrace_backends.optimize.accuracy import Budget
from headrace_backends.optimize.basis import searched_versions
from headrace_backends.optimize.calibration import read_examples
from headrace_backends.optimize.examples import Examples
from headrace_backends.optimize.findings import Findings
from headrace_backends.optimize.form import Technique
from headrace_backends.optimize.goal import Aim, Goal
from headrace_backends.optimize.hardware import hardware
from headrace_backends.optimize.imported import as_onnx
from headrace_backends.optimize.listener import Listener, SilentListener
from headrace_backends.optimize.report import write_report
from headrace_backends.optimize.search import Search
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.workshop import Workshop
from headrace_backends.registry import backend_of_file, resolve


class Optimized:
    """A model in its fast form: call it as the model was called. Any thread may; calls wait for each other.

    Tensors come back where a tensor was given, else arrays: one for a model with one output, else a tuple of them. A
    context manager, or ``close`` it: it holds the model in memory and its files in a folder.
    """

    def __init__(self, backend: Backend, findings: Findings, folder: Path, held: Any) -> None:
        self.report = findings
        self.folder = folder  # the model file, report.html and report.json
        self._backend = backend
        self._held = held
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The outputs for inputs in the model's order or by name, with rows along the first axis as it takes them."""
        specs = self._backend.signature.inputs
        given = {**{spec.name: value for spec, value in zip(specs, inputs, strict=False)}, **named}
        names = [spec.name for spec in specs]
        if len(inputs) > len(specs) or set(given) != set(names):
            raise TypeError(f"got {len(inputs)} inputs and {sorted(named)} by name, expected {names}")
        arrays = {
            spec.name: np.ascontiguousarray(_array(given[spec.name]), dtype=NUMPY_DTYPES[spec.datatype])
            for spec in specs
        }
        with self._lock:
            outputs = self._backend.execute(arrays, ())
            assert isinstance(outputs, Mapping)
            values = [np.array(outputs[spec.name]) for spec in self._backend.signature.outputs]
        if any(hasattr(value, "detach") for value in given.values()):
            import torch

            tensors = [torch.from_numpy(value) for value in values]
            return tensors[0] if len(tensors) == 1 else tuple(tensors)
        return values[0] if len(values) == 1 else tuple(values)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model, and of its folder where that was made for it."""
        self._backend.close()
        if isinstance(self._held, tempfile.TemporaryDirectory):
            self._held.cleanup()


def optimize(
    model: Any,
    example_inputs: Any,
    budget: str | Budget | None = None,
    *,
    allow: Sequence[str] = (),
    labels: Mapping[str, Array] | None = None,
    objective: Aim = "latency",
    training: str | Path | None = None,
    time_limit_s: float = 600.0,
    folder: str | Path | None = None,
    cpus: int | None = None,
    listener: Listener | None = None,
) -> Optimized:
    """Find the fastest form of a model that stays within the budget.

    ``model`` is a ``torch.nn.Module``, an exported program, an ONNX model, or the path of a model file.
    ``example_inputs`` are real ones: a path (``.npz``, or a folder), arrays or tensors with examples along the first
    axis (one, a tuple in the model's order, or a mapping by name); half of them is held back to decide with.
    ``labels`` are what the owner knows of each example, for a budget like ``judge.py:accuracy>=0.97``. Without a
    ``budget`` and ``allow`` only forms with the same answers are tried. ``folder`` keeps the files and the report.

    Raises:
        SearchFailed: the model cannot be loaded or refuses its examples.
        BadCalibration: the examples do not suit the model.
        ValueError: the budget or a technique is none.
    """
    techniques = frozenset(Technique(name) for name in allow)
    wanted = Budget.parse(budget) if isinstance(budget, str) else budget
    if techniques and wanted is None:
        raise ValueError(f"allow has what changes answers ({', '.join(sorted(techniques))}), so a budget is needed")
    held: Any = None
    if folder is None:
        held = tempfile.TemporaryDirectory(prefix="headrace-optimized-")
    place = Path(folder or held.name).resolve()
    place.mkdir(parents=True, exist_ok=True)
    path = _file_of(model, example_inputs, place)
    code = Path(training) if training else None
    subject = as_onnx(Subject(path.stem, "1", path, backend_of_file(path), path.parent, training=code))
    count = cpus or hardware().cpus
    search = Search(
        subject,
        Goal(wanted, techniques, objective, time_limit_s=time_limit_s),
        lambda signature: _examples(example_inputs, labels or {}, signature),
        Workshop(place / "work", subject, count),
        listener or SilentListener(),
        count,
        hardware(),
        searched_versions(),
    )
    outcome = search.run()
    write_report(outcome.findings, place)
    form = outcome.chosen.form
    backend = resolve(form.backend).load(subject.source(form, outcome.artifact, count))
    return Optimized(backend, outcome.findings, place, held)


def _file_of(model: Any, example_inputs: Any, folder: Path) -> Path:
    """The model's file: its own, or one that it is written to."""
    if isinstance(model, str | Path):
        return Path(model).resolve()
    if hasattr(model, "SerializeToString"):  # an onnx.ModelProto
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path
    import torch

    path = folder / "model.pt2"
    program = model if isinstance(model, torch.export.ExportedProgram) else _exported(model, example_inputs)
    torch.export.save(program, path)
    return path


def _exported(module: Any, example_inputs: Any) -> Any:
    """The program of a module, for batches of any size where it allows that."""
    import torch

    if isinstance(example_inputs, str | Path):
        raise TypeError("a module is exported with example inputs, expected tensors or arrays, got a path")
    named = example_inputs if isinstance(example_inputs, Mapping) else None
    values = list(named.values()) if named else list(_several(example_inputs))
    rows = [torch.as_tensor(np.asarray(_array(value))[:2]) for value in values]
    module = module.eval()
    arguments = () if named else tuple(rows)
    keywords = dict(zip(named, rows, strict=True)) if named else None
    batch = torch.export.Dim("batch", min=1)
    shapes: Any = {name: {0: batch} for name in named} if named else tuple({0: batch} for _ in rows)
    with torch.no_grad():
        try:
            return torch.export.export(module, arguments, keywords, dynamic_shapes=shapes)
        except Exception:  # noqa: BLE001 - it has no batch dimension, or ties it to others; the exporter's types are many
            return torch.export.export(module, arguments, keywords)


def _examples(given: Any, labels: Mapping[str, Array], signature: Signature) -> Examples:
    if isinstance(given, str | Path):
        return read_examples(Path(given), signature)
    arrays = (
        {name: np.asarray(_array(value)) for name, value in given.items()}
        if isinstance(given, Mapping)
        else {
            spec.name: np.asarray(_array(value)) for spec, value in zip(signature.inputs, _several(given), strict=True)
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "example_inputs.npz"
        np.savez(path, **arrays, **{name: np.asarray(value) for name, value in labels.items()})  # type: ignore[arg-type]
        return read_examples(path, signature, "given")


def _several(given: Any) -> Sequence[Any]:
    return given if isinstance(given, list | tuple) else [given]


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value
