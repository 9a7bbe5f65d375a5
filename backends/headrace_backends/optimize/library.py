"""``headrace.optimize``: the fastest faithful form of a model as a function in this process."""

import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from headrace.core.device import CPU, gpu_uuid, is_device
from headrace.core.tensor import NUMPY_DTYPES
from headrace_backends.base import Array, Backend
from headrace_backends.optimize.accuracy import Budget
from headrace_backends.optimize.basis import searched_versions
from headrace_backends.optimize.findings import Findings
from headrace_backends.optimize.form import Technique
from headrace_backends.optimize.given import array_in, digest_of, examples_of, file_of
from headrace_backends.optimize.goal import Aim, Goal
from headrace_backends.optimize.hardware import hardware, why_not_on
from headrace_backends.optimize.imported import as_onnx
from headrace_backends.optimize.listener import Listener, SilentListener
from headrace_backends.optimize.report import write_report
from headrace_backends.optimize.search import Outcome, Search, SearchFailed
from headrace_backends.optimize.search_key import file_key, search_key
from headrace_backends.optimize.subject import Subject
from headrace_backends.optimize.work_folder import claimed
from headrace_backends.optimize.workshop import Workshop
from headrace_backends.registry import backend_of_file, resolve

_Result = TypeVar("_Result")


class Place:
    """Where a backend is used: on the thread that calls, or on one of its own, as CUDA has a context for each."""

    def __init__(self, device: str) -> None:
        self._pool = None if device == CPU else ThreadPoolExecutor(1, thread_name_prefix="headrace-optimized")

    def run(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """What the function returns there."""
        return function(*arguments) if self._pool is None else self._pool.submit(function, *arguments).result()

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown()


class Optimized:
    """A model in its fast form: call it as the model was called. Any thread may; calls wait for each other.

    Tensors come back where a tensor was given, else arrays: one for a model with one output, else a tuple of them. A
    context manager, or ``close`` it: it holds the model in memory and its files in a folder.
    """

    def __init__(self, backend: Backend, findings: Findings, folder: Path, held: Any, place: Place) -> None:
        self.report = findings
        self.folder = folder  # the model file, report.html and report.json
        self._backend = backend
        self._held = held
        self._place = place
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The outputs for inputs in the model's order or by name, with rows along the first axis as it takes them."""
        specs = self._backend.signature.inputs
        given = {**{spec.name: value for spec, value in zip(specs, inputs, strict=False)}, **named}
        names = [spec.name for spec in specs]
        if len(given) != len(inputs) + len(named) or set(given) != set(names):
            raise TypeError(f"got {len(inputs)} inputs and {sorted(named)} by name, expected {names}")
        arrays = {
            spec.name: np.asarray(array_in(given[spec.name]), dtype=NUMPY_DTYPES[spec.datatype], order="C")
            for spec in specs
        }
        with self._lock:
            values: list[Any] = self._outputs(arrays)
        if any(hasattr(value, "detach") for value in given.values()):
            from headrace_backends.torch_model import tensor_of

            values = [value if value.dtype.kind == "O" else tensor_of(value) for value in values]  # texts stay arrays
        return values[0] if len(values) == 1 else tuple(values)

    def _outputs(self, arrays: Mapping[str, Array]) -> list[Array]:
        """Copies of the outputs, in their order; a form that was proved for single rows is given them singly."""
        signature = self._backend.signature
        count = min(map(len, arrays.values()), default=1) if signature.max_batch_size == 1 else 1
        if count > 1:
            rows = [
                self._outputs({name: array[row : row + 1] for name, array in arrays.items()}) for row in range(count)
            ]
            return [np.concatenate(parts) for parts in zip(*rows, strict=True)]
        outputs = self._place.run(self._backend.execute, arrays, ())
        assert isinstance(outputs, Mapping)
        return [np.array(outputs[spec.name]) for spec in signature.outputs]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model, and of its folder where that was made for it."""
        try:
            self._place.run(self._backend.close)
        finally:
            self._place.close()
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
    device: str = CPU,
) -> Optimized:
    """Find the fastest form of a model that stays within the budget.

    ``model`` is a ``torch.nn.Module``, an exported program, an ONNX model, or the path of a model file.
    ``example_inputs`` are real ones: a path (``.npz``, or a folder), arrays or tensors with examples along the first
    axis (one, a tuple in the model's order, or a mapping by name); half of them is held back to decide with.
    ``labels`` are what the owner knows of each example, for a budget like ``judge.py:accuracy>=0.97``, whose file lies
    beside the model's, or else in the working directory. Without a ``budget`` and ``allow`` only forms with the same
    answers are tried. ``folder`` keeps the files and the report; a search that was stopped goes on in there.
    ``device`` is where it is to be fast: ``cpu``, or ``gpu:N`` as this process numbers its GPUs.

    Raises:
        SearchFailed: the model cannot be loaded or refuses its examples, or there is no GPU.
        MetricFailed: the budget's metric is not there, or fails.
        BadCalibration: the examples do not suit the model.
        ValueError: the budget, a technique or the device is none.
    """
    techniques = frozenset(Technique(name) for name in allow)
    wanted = Budget.parse(budget) if isinstance(budget, str) else budget
    if techniques and wanted is None:
        raise ValueError(f"allow has what changes answers ({', '.join(sorted(techniques))}), so a budget is needed")
    _refuse_device(device, model)
    used_on = Place(device)
    held: Any = None
    if folder is None:
        held = tempfile.TemporaryDirectory(prefix="headrace-optimized-")
    place = Path(folder or held.name).resolve()
    place.mkdir(parents=True, exist_ok=True)
    goal = Goal(wanted, techniques, objective, time_limit_s=time_limit_s, several=False)
    count = cpus or hardware().cpus
    try:
        path = file_of(model, example_inputs, place)
        home = path.parent if isinstance(model, str | Path) else Path.cwd()
        code = Path(training) if training else None
        subject = as_onnx(Subject(path.stem, "1", path, backend_of_file(path), home, training=code, device=device))
        key = search_key(subject, goal, count, file_key(path), [digest_of(example_inputs), digest_of(labels or {})])
        with claimed(place / "work", key) as work:
            outcome = _searched(subject, goal, example_inputs, labels or {}, work, count, listener)
        write_report(outcome.findings, place)
        form = outcome.chosen.form
        backend = used_on.run(resolve(form.backend).load, subject.source(form, outcome.artifact, count))
    except BaseException:
        used_on.close()
        if held is not None:
            held.cleanup()
        raise
    return Optimized(backend, outcome.findings, place, held, used_on)


def _searched(
    subject: Subject,
    goal: Goal,
    example_inputs: Any,
    labels: Mapping[str, Array],
    work: Path,
    cpus: int,
    listener: Listener | None,
) -> Outcome:
    return Search(
        subject,
        goal,
        lambda signature: examples_of(example_inputs, labels, signature),
        Workshop(work, subject, cpus),
        listener or SilentListener(),
        cpus,
        hardware(),
        searched_versions(on_gpu=subject.device != CPU),
    ).run()


def _refuse_device(device: str, model: Any) -> None:
    """Raise where nothing can be optimised on the device, or the fast form could not be run on it in this process."""
    if not is_device(device) or gpu_uuid(device):
        raise ValueError(f"device is '{device}', expected 'cpu' or 'gpu:N' by the number that this process sees it by")
    if device == CPU and isinstance(model, str | Path) and backend_of_file(Path(model)) == "tensorrt":
        raise ValueError(f"'{model}' is an engine, which runs on a GPU: expected device='gpu:0' or another number")
    why_not = why_not_on(device, hardware().gpu)
    if why_not:
        raise SearchFailed(f"the model is to run on '{device}', and {why_not}")
