"""The owner's training code: a Python file that tells how the model is made, fed, trained and judged.

It has ``model()`` and ``batches(training)``, and where the owner likes ``loss(outputs, labels)``, ``student()`` and
``score(module)``; docs/compression.md shows one. Whatever goes wrong in it is a ``StepFailed`` that names the file, the
function and what was expected of it.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn import Module
from torch.nn.functional import cross_entropy

from headrace.core.model import Signature
from headrace_backends.optimize.steps.base import StepFailed

_NAME = "headrace_owner_training"
_EXPECTED = {
    "model": "model() -> torch.nn.Module, the trained model that is served",
    "batches": "batches(training: bool) -> an iterable of (tuple of input tensors, labels)",
    "loss": "loss(outputs, labels) -> a tensor of one number",
    "student": "student() -> torch.nn.Module, a smaller one with the model's inputs and outputs",
    "score": "score(module) -> a number, the larger the better",
}
_NEEDED = ("model", "batches")

Batch = tuple[tuple[torch.Tensor, ...], Any]  # a model's inputs in the order of its forward, and the labels


class OwnerTraining:
    """The file's functions, each checked as it is used."""

    def __init__(self, file: Path, module: ModuleType) -> None:
        self.file = file
        self._module = module

    @classmethod
    def load(cls, path: str) -> "OwnerTraining":
        """Run the file. It may import what lies beside it; no bytecode is written there.

        Raises:
            StepFailed: there is none, or it does not run, or lacks what it must have.
        """
        if not path:
            raise StepFailed("this needs the owner's training code, and optimize.training names none")
        file = Path(path)
        if not file.is_file():
            raise StepFailed(f"optimize.training is '{path}', and there is no such file")
        if file.suffix != ".py":
            raise StepFailed(f"optimize.training is '{path}', expected a Python file (.py)")
        owner = cls(file, ModuleType(_NAME))
        owner._module = owner._guarded("does not import", owner._imported)
        owner._check()
        return owner

    def model(self) -> Module:
        """A new copy of the trained model."""
        return self._made("model")

    def student(self) -> Module:
        """A new, smaller model.

        Raises:
            StepFailed: the file has none.
        """
        if not hasattr(self._module, "student"):
            raise StepFailed(f"{self.file.name} has no student(), expected {_EXPECTED['student']}")
        return self._made("student")

    def batches(self, training: bool) -> Iterator[Batch]:
        """One pass over the data: that to train on, or that to watch the training with.

        Raises:
            StepFailed: there is none, or it is of another kind.
        """
        what = f"batches({training})"
        iterator = self._guarded(f"{what} failed", lambda: iter(self._call("batches", training)))
        count = 0
        while (item := self._guarded(f"{what} failed", lambda: next(iterator, None))) is not None:
            count += 1
            yield self._batch(what, item)
        if not count:
            raise StepFailed(f"{self.file.name}: {what} gave no batches, expected {_EXPECTED['batches']}")

    @property
    def has_own_loss(self) -> bool:
        """Whether the owner says what a loss is; else it is the cross entropy of one output and class numbers."""
        return hasattr(self._module, "loss")

    def loss(self, outputs: Any, labels: Any) -> torch.Tensor:
        """What training makes small."""
        if self.has_own_loss:
            value = self._guarded("loss(outputs, labels) failed", lambda: self._module.loss(outputs, labels))
        else:
            value = self._guarded("the cross entropy failed", lambda: cross_entropy(outputs, labels))
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise self._unexpected("loss", value)
        return value.reshape(())

    def score(self, module: Module) -> float | None:
        """The owner's own measure of a model, or None where there is none. The module is in evaluation mode."""
        if not hasattr(self._module, "score"):
            return None
        module.eval()
        with torch.no_grad():
            value = self._guarded("score(module) failed", lambda: self._module.score(module))
        try:
            return float(value)
        except (TypeError, ValueError):
            raise self._unexpected("score", value) from None

    # -- parts --------------------------------------------------------------------------------------------

    def _imported(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location(_NAME, self.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        wrote_bytecode, sys.dont_write_bytecode = not sys.dont_write_bytecode, True  # the repository is watched
        sys.path.insert(0, str(self.file.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(self.file.parent))
            sys.dont_write_bytecode = not wrote_bytecode
        return module

    def _check(self) -> None:
        problems = [f"has no {_EXPECTED[name]}" for name in _NEEDED if not hasattr(self._module, name)]
        problems += [
            f"has '{name}', which is no function, expected {told}"
            for name, told in _EXPECTED.items()
            if not callable(getattr(self._module, name, len))
        ]
        if problems:
            raise StepFailed(f"{self.file.name} {'; '.join(problems)}")

    def _made(self, name: str) -> Module:
        module = self._guarded(f"{name}() failed", lambda: self._call(name))
        if not isinstance(module, Module):
            raise self._unexpected(name, module)
        return module.cpu()

    def _call(self, name: str, *arguments: Any) -> Any:
        return getattr(self._module, name)(*arguments)

    def _batch(self, what: str, item: Any) -> Batch:
        if not isinstance(item, tuple | list) or len(item) != 2:
            size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
            raise StepFailed(
                f"{self.file.name}: {what} gave a {type(item).__name__}{size}, expected {_EXPECTED['batches']}"
            )
        inputs, labels = item
        if isinstance(inputs, torch.Tensor):
            inputs = (inputs,)
        if not isinstance(inputs, tuple | list) or not all(isinstance(one, torch.Tensor) for one in inputs):
            raise StepFailed(
                f"{self.file.name}: {what} gave inputs of type {type(inputs).__name__}, expected {_EXPECTED['batches']}"
            )
        return tuple(inputs), labels

    def _unexpected(self, name: str, value: Any) -> StepFailed:
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        return StepFailed(f"{self.file.name}: {name}() gave {got}, expected {_EXPECTED[name]}")

    def _guarded(self, what: str, call: Any) -> Any:
        """The result of the owner's code, whose every failure is a StepFailed that says where it happened."""
        try:
            return call()
        except (Exception, SystemExit) as error:
            said = error.msg if isinstance(error, SyntaxError) else error
            text = " ".join(str(said).split())[:300]
            raise StepFailed(
                f"{self.file.name}: {what}: {type(error).__name__}: {text}{_place(error, self.file)}"
            ) from error


def argument_names(module: Module, signature: Signature) -> list[str]:
    """The served inputs' names in the order of forward's arguments; where those are called otherwise, in their own."""
    wanted = [spec.name for spec in signature.inputs]
    names = list(inspect.signature(module.forward).parameters)
    chosen = [name for name in names if name in wanted]
    return chosen if set(chosen) == set(wanted) and names[: len(wanted)] == chosen else wanted


def named_outputs(outputs: Any, signature: Signature) -> dict[str, torch.Tensor]:
    """What a module gave, by the served names: by key where it is a mapping, else by position.

    Raises:
        StepFailed: these are not the model's outputs.
    """
    wanted = [spec.name for spec in signature.outputs]
    values: Sequence[Any]
    if isinstance(outputs, torch.Tensor):
        values = [outputs]
    elif isinstance(outputs, dict):
        values = [outputs[name] for name in wanted] if set(wanted) <= set(outputs) else list(outputs.values())
    else:
        values = list(outputs) if isinstance(outputs, tuple | list) else []
    if len(values) != len(wanted) or not all(isinstance(value, torch.Tensor) for value in values):
        got = f"{len(values)} outputs" if values else type(outputs).__name__
        raise StepFailed(f"the module gives {got}, expected tensors for {wanted}")
    return dict(zip(wanted, values, strict=True))


def _place(error: BaseException, file: Path) -> str:
    """The line of the owner's file that was last on the way to the error."""
    if isinstance(error, SyntaxError):
        return f" (line {error.lineno})"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f" (line {lines[-1]})" if lines else ""
