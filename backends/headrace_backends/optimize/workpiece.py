"""The owner's model on the bench: proved to be the one that is served, changed and trained, and written as ONNX."""

import logging
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn import Module

from headrace_backends.base import Array, LoadError, ModelSource
from headrace_backends.optimize.accuracy import Errors, compare
from headrace_backends.optimize.examples import merged, shapes_of
from headrace_backends.optimize.folding import fold
from headrace_backends.optimize.quiet import hushed
from headrace_backends.optimize.steps.base import StepFailed, StepTask
from headrace_backends.optimize.training import OwnerTraining, argument_names, named_outputs
from headrace_backends.registry import backend_of_file, resolve
from headrace_backends.torch_model import array_of, tensor_of

_ROWS = 4  # of the examples that are run to compare, to trace and to export
_SAME = 1e-2  # of the largest value: another runtime's rounding, and no other weights
_OPSET = 18


@dataclass(frozen=True, slots=True)
class Workpiece:
    """A module to be changed in place, and inputs to run it with."""

    task: StepTask
    owner: OwnerTraining
    module: Module
    inputs: tuple[torch.Tensor, ...]  # in the order of its forward; they have ``rows`` rows
    rows: int

    @classmethod
    def begin(cls, task: StepTask) -> "Workpiece":
        """Load the owner's code and model, with the step's seed and threads.

        Raises:
            StepFailed: the code is not as expected, or its model is not the one that is served.
        """
        torch.set_num_threads(max(1, task.threads))
        seed(task.seed)
        owner = OwnerTraining.load(task.training)
        module = owner.model().eval()
        arrays = _some_rows(task, owner, module)
        names = argument_names(module, task.signature)
        piece = cls(task, owner, module, tuple(tensor_of(arrays[name].copy()) for name in names), _row_count(arrays))
        piece._prove_same(arrays)
        torch.set_num_threads(max(1, task.threads))  # the reference's backend may have set its own
        return piece

    def answers(self, module: Module | None = None) -> dict[str, Array]:
        """What a module answers to the inputs, by the served names.

        Raises:
            StepFailed: it does not run, or gives other outputs.
        """
        module = (module or self.module).eval()
        try:
            with torch.no_grad():
                outputs = module(*self.inputs)
        except Exception as error:
            shapes = [list(one.shape) for one in self.inputs]
            raise StepFailed(f"the module does not run on inputs of shape {shapes}: {_gist(error)}") from error
        return {name: array_of(value) for name, value in named_outputs(outputs, self.task.signature).items()}

    def export(self, module: Module | None = None, name: str = "model.onnx") -> Path:
        """Fold what can be folded, and write the module as ONNX with the served names and free dimensions.

        Raises:
            StepFailed: it cannot be written, or the file answers differently.
        """
        module = (module or self.module).eval()
        folded = fold(module)
        if folded is None:
            self.task.note("batch normalisations stay for the runtime to fold: the module's code cannot be traced")
        elif folded:
            self.task.note(f"{folded} batch normalisations are folded into the layers before them")
        wanted = self.answers(module)
        path = self.task.folder / name
        try:
            with hushed():
                _write(module, self, path)
        except Exception as error:
            raise StepFailed(f"the module cannot be written as ONNX: {_gist(error)}") from error
        errors = compare([wanted], [self._answers_of(path, "onnxruntime")])
        if errors.mismatches or not (errors.max_rel or 0.0) <= _SAME:
            raise StepFailed(f"the ONNX file does not answer as the module that it was made of: {_difference(errors)}")
        return path

    def score(self) -> float | None:
        """The owner's score of the module as it is now."""
        return self.owner.score(self.module)

    # -- parts --------------------------------------------------------------------------------------------

    def _prove_same(self, arrays: dict[str, Array]) -> None:
        """Raise StepFailed where the owner's model does not answer as the file that is served."""
        mine = self.answers()
        try:
            theirs = self._answers_of(self.task.source, backend_of_file(self.task.source), arrays)
        except LoadError as error:
            raise StepFailed(f"the served file cannot be compared with: {error}") from error
        errors = compare([theirs], [mine])
        if errors.mismatches or not (errors.max_rel or 0.0) <= _SAME:
            raise StepFailed(
                f"{self.owner.file.name}'s model() is not the model that is served: on an example its answers differ, "
                f"{_difference(errors)}; expected the same module with the weights that were exported"
            )

    def _answers_of(self, path: Path, backend: str, arrays: dict[str, Array] | None = None) -> dict[str, Array]:
        """What a model file answers to the inputs, run as it is served."""
        from headrace_backends.optimize.trial_process import Bench

        signature = self.task.signature
        if arrays is None:
            names = argument_names(self.module, signature)
            arrays = {name: array_of(tensor) for name, tensor in zip(names, self.inputs, strict=True)}
        bench = Bench()
        source = ModelSource(
            "model",
            "1",
            path,
            threads=max(1, self.task.threads),
            inputs=signature.inputs,
            outputs=signature.outputs,
            max_batch_size=signature.max_batch_size,
        )
        resolve(backend)
        with hushed():
            bench.load(backend, source)
            return bench.answer([arrays])[0]


def seed(value: int) -> None:
    """Let everything that draws at random begin at the same place."""
    torch.manual_seed(value)
    np.random.seed(value)  # noqa: NPY002 - what the owner's code draws from, if anything of numpy's
    random.seed(value)


def _some_rows(task: StepTask, owner: OwnerTraining, module: Module) -> dict[str, Array]:
    """A few rows of real inputs by name: the calibration examples, or else the owner's own."""
    if len(task.examples):
        first = task.examples.inputs[0]
        if not task.signature.max_batch_size:
            return dict(first)
        alike = [one for one in islice(task.examples.inputs, 64) if shapes_of(one) == shapes_of(first)]
        rows = merged(alike[:_ROWS])
        return {name: np.concatenate([array] * 2)[:2] if len(array) == 1 else array for name, array in rows.items()}
    inputs, _ = next(owner.batches(training=False))
    names = argument_names(module, task.signature)
    if len(inputs) != len(names):
        raise StepFailed(f"{owner.file.name}: batches(False) gives {len(inputs)} inputs, the model has {names}")
    return {name: array_of(tensor[:_ROWS]) for name, tensor in zip(names, inputs, strict=True)}


def _row_count(arrays: dict[str, Array]) -> int:
    first = next(iter(arrays.values()))
    return len(first) if first.ndim else 1


def _write(module: Module, piece: Workpiece, path: Path) -> None:
    signature = piece.task.signature
    names = argument_names(piece.module, signature)
    specs = {spec.name: spec for spec in signature.inputs}
    leading = torch.export.Dim("batch", min=1) if signature.max_batch_size else torch.export.Dim.AUTO
    shapes: list[dict[int, object]] = []
    for name in names:
        free = [axis for axis, size in enumerate(specs[name].shape or ()) if size == -1]
        shapes.append({axis: torch.export.Dim.AUTO if axis else leading for axis in free})
    logger = logging.getLogger("torch.onnx")  # it warns of packages that it could have used
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        torch.onnx.export(
            module,
            piece.inputs,
            path,
            input_names=names,
            output_names=[spec.name for spec in signature.outputs],
            dynamic_shapes=tuple(shapes),
            dynamo=True,
            opset_version=_OPSET,
            external_data=False,
            verbose=False,
        )
    finally:
        logger.setLevel(before)


def _difference(errors: Errors) -> str:
    if errors.mismatches:
        return f"{errors.mismatches} values are others"
    return f"by {errors.max_rel or 0.0:.2g} of the largest value"


def _gist(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
