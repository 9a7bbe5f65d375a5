"""An ONNX model with fewer operators and the same answers: constants folded, batch norms merged, dead nodes removed."""

import copy
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from headrace_backends.optimize import onnx_model
from headrace_backends.optimize.quiet import hushed
from headrace_backends.optimize.steps.base import StepFailed, StepTask


def apply(task: StepTask) -> Path:
    """Let onnxslim and then ONNX Runtime's own first level work on the graph; keep what is smaller."""
    original = onnx_model.read(task.source)
    before = onnx_model.counts(original)
    with hushed():
        slim = _slimmed(task, original)
        model = _folded(task, slim)
    after = onnx_model.counts(model)
    if sum(after.values()) >= sum(before.values()):
        raise StepFailed(f"nothing to simplify: the graph has {sum(before.values())} operators, none of them idle")
    task.note(f"{sum(before.values())} operators became {sum(after.values())}: {_told(before, after)}")
    return onnx_model.write(model, task, original)


def _slimmed(task: StepTask, original: Any) -> Any:
    """What onnxslim makes of it; the model as it was where that is not installed or fails."""
    try:
        import onnxslim
    except ImportError:
        task.note("onnxslim is not installed; the graph is simplified by ONNX Runtime alone")
        return original
    try:
        return onnxslim.slim(copy.deepcopy(original)) or original
    except Exception as error:  # noqa: BLE001 - of any kind: ONNX Runtime still does its part
        task.note(f"onnxslim gave up: {type(error).__name__}: {str(error)[:200]}")
        return original


def _folded(task: StepTask, model: Any) -> Any:
    """What ONNX Runtime makes of it before it chooses operators of its own for this machine."""
    source, target = task.folder / "slim.onnx", task.folder / "folded.onnx"
    onnx.save(model, source)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.intra_op_num_threads = task.threads
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        return onnx.load(target)
    except Exception as error:  # one class of its own for every status
        raise StepFailed(f"ONNX Runtime cannot load the model: {' '.join(str(error).split())[:300]}") from error
    finally:
        for file in (source, target):
            file.unlink(missing_ok=True)


def _told(before: dict[str, int], after: dict[str, int]) -> str:
    """The operators whose number changed most, as "Constant 40 -> 0"."""
    kinds = sorted({*before, *after}, key=lambda kind: -abs(before.get(kind, 0) - after.get(kind, 0)))
    changed = [kind for kind in kinds if before.get(kind, 0) != after.get(kind, 0)]
    return ", ".join(f"{kind} {before.get(kind, 0)} -> {after.get(kind, 0)}" for kind in changed[:8])
