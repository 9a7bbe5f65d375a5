"""Where a form's time goes: the time of each operator, by the profiler of the runtime that runs it."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from headrace_backends.base import Array, ModelSource
from headrace_backends.optimize import onnxruntime_profile
from headrace_backends.optimize.findings import OperatorTime, Profile
from headrace_backends.optimize.form import Form
from headrace_backends.registry import canonical

WARM_UP_RUNS = 3  # the first runs allocate, and some runtimes compile
_FEWEST_RUNS = 3
_MOST_RUNS = 50
_SECONDS = 2.0


def profile_form(form: Form, source: ModelSource, inputs: Mapping[str, Array], folder: Path) -> Profile:
    """Load the form once more, with its profiler on, and run it on ``inputs``.

    Operators are named as the runtime names them, the fused ones too. There are none where the backend has no profiler,
    or where the model is on a GPU, of which runtimes' CPU profilers see nothing but the launches. ``folder`` is for
    files that are gone afterwards. Call it in a process of its own, for which the form's framework is imported.

    Raises:
        BackendUnavailable, LoadError: as by the backend's ``load``.
        HeadraceError: the model refuses the inputs.
    """
    profilers = {"onnxruntime": _onnxruntime, "torch": _torch, "openvino": _openvino}
    profiler = profilers.get(canonical(form.backend))
    operators = profiler(source, inputs, folder) if profiler is not None and source.gpu is None else []
    return Profile(form.name, tuple(operators))


def _onnxruntime(source: ModelSource, inputs: Mapping[str, Array], folder: Path) -> list[OperatorTime]:
    from headrace_backends.onnxruntime import OnnxRuntimeBackend

    backend = OnnxRuntimeBackend.load(source)
    backend.begin_profile(source, folder / "onnxruntime_profile")
    _repeat(lambda: backend.execute(inputs, ()))
    written = backend.end_profile()
    try:
        return onnxruntime_profile.operator_times(msgspec.json.decode(written.read_bytes()), WARM_UP_RUNS)
    finally:
        written.unlink()


def _torch(source: ModelSource, inputs: Mapping[str, Array], folder: Path) -> list[OperatorTime]:
    from headrace_backends.optimize import torch_profile
    from headrace_backends.torch import TorchBackend

    del folder
    backend = TorchBackend.load(source)
    runs = _repeat(lambda: backend.execute(inputs, ()))  # without the profiler, to know how many there is time for
    return torch_profile.operator_times(lambda: backend.execute(inputs, ()), runs)


def _openvino(source: ModelSource, inputs: Mapping[str, Array], folder: Path) -> list[OperatorTime]:
    from headrace_backends.registry import resolve

    del folder
    loaded: Any = resolve("openvino").load(replace(source, parameters={**source.parameters, "profiling": True}))
    took: defaultdict[tuple[str, str], float] = defaultdict(float)

    def run() -> None:
        for name, operator, duration_us in loaded.operator_times(inputs):
            took[name, operator] += duration_us

    runs = _repeat(run, forget=took.clear)
    return _one_after_the_other((name, operator, total / runs) for (name, operator), total in took.items())


def _repeat(run: Callable[[], Any], forget: Callable[[], None] = lambda: None) -> int:
    """Warm up, ``forget`` that, and run for so long. Returns the number of runs after the warm-up."""
    for _ in range(WARM_UP_RUNS):
        run()
    forget()
    runs, until = 0, perf_counter() + _SECONDS
    while runs < _FEWEST_RUNS or (runs < _MOST_RUNS and perf_counter() < until):
        run()
        runs += 1
    return runs


def _one_after_the_other(operators: Iterable[tuple[str, str, float]]) -> list[OperatorTime]:
    """For runtimes that tell no starts: as if there were no time between operators."""
    timed, start_us = [], 0.0
    for name, operator, duration_us in operators:
        timed.append(OperatorTime(name, operator, duration_us, start_us))
        start_us += duration_us
    return timed
