"""TorchScript archives (.pt): the configuration tells their tensors, and the file nothing but the arguments' names."""

import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from headrace_backends.base import LoadError, ModelSource
from headrace_backends.compiled_package import names_in
from headrace_backends.specs import FoundTensor, leading_problems
from headrace_backends.torch_flow import BufferFlow
from headrace_backends.torch_model import TORCH_DTYPES, TorchModel, gist, positions
from headrace_backends.torch_tensorrt_files import refusal
from headrace_backends.torchscript_attributes import unread


def read_torchscript(source: ModelSource, device: torch.device) -> TorchModel:
    """The module in the file, on the device.

    Raises:
        LoadError: it is none, or does not go together with the configuration.
    """
    module = load_torchscript(source, device)  # first: whoever has saved weights alone need not declare their tensors
    if not source.inputs or not source.outputs:
        raise LoadError(
            "TorchScript does not say what tensors it takes; write them in config.yaml, as\n"
            "inputs:  [{name: x, datatype: FP32, shape: [-1, 784]}]\n"
            "outputs: [{name: y, datatype: FP32, shape: [-1, 10]}]"
        )
    unserved = [spec.name for spec in (*source.inputs, *source.outputs) if spec.datatype not in TORCH_DTYPES]
    if unserved:
        raise LoadError(f"torch has no strings, so {unserved} cannot be BYTES")
    problems = leading_problems(source.max_batch_size or 0, (*source.inputs, *source.outputs))
    if problems:
        raise LoadError("; ".join(problems))
    order = argument_order(source, module)
    _refuse_needed(source, module, order)
    wanted = [spec.name for spec in source.outputs]

    def call(module: Any, tensors: list[Any]) -> list[Any]:
        result = module(**{name: tensors[index] for name, index in order.items() if tensors[index] is not None})
        if isinstance(result, torch.Tensor):
            return [result]
        if isinstance(result, dict):
            return [result.get(name) for name in wanted]
        return [result[index] for index in positions(wanted)] if len(result) == len(wanted) else list(result)

    return TorchModel(
        module,
        call,
        [FoundTensor(spec) for spec in source.inputs],
        [FoundTensor(spec) for spec in source.outputs],
        unmergeable="TorchScript does not tell whether they may be; set max_batch_size",
        flow=lambda: BufferFlow(frozenset(unread(module)), unfed=None),
    )


def load_torchscript(source: ModelSource, device: torch.device) -> Any:
    """The archive's module. A pickle is not opened.

    Raises:
        LoadError: it is none.
    """
    archived = zipfile.is_zipfile(source.path)
    if archived and not any(name.endswith("/constants.pkl") for name in names_in(source.path)):
        raise LoadError(
            f"'{source.path.name}' was made by torch.save: it is a pickle, which could run "
            "any code and is not opened; save the model with torch.export.save (model.pt2) or torch.jit.script"
        )
    try:
        with warnings.catch_warnings():  # torch calls all of TorchScript deprecated; that is the model owner's choice
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(source.path, map_location=device).eval()  # type: ignore[no-untyped-call] # unannotated
    except (RuntimeError, ValueError, OSError, MemoryError) as error:  # it believes sizes in the file
        raise LoadError(
            refusal(source.path)
            or f"'{source.path.name}' is no TorchScript archive: {gist(str(error))[:300]}; "
            "save the model with torch.export.save (model.pt2) or torch.jit.script"
        ) from error


def _refuse_needed(source: ModelSource, module: Any, order: Mapping[str, int]) -> None:
    """Raise LoadError where an input is configured as optional whose argument has no default."""
    needed = {one.name for one in module.forward.schema.arguments if not one.has_default_value()}
    wrong = [source.inputs[index].name for name, index in order.items() if name in needed]
    wrong = [spec.name for spec in source.inputs if spec.optional and spec.name in wrong]
    if wrong:
        raise LoadError(
            f"the inputs {wrong} are configured as optional, and their arguments of forward have no default"
        )


def argument_order(source: ModelSource, module: Any) -> dict[str, int]:
    """For each of forward's arguments that is given, which configured input it is."""
    arguments = [argument for argument in module.forward.schema.arguments if argument.name != "self"]
    names = [argument.name for argument in arguments]
    needed = [argument.name for argument in arguments if not argument.has_default_value()]
    configured = [spec.name for spec in source.inputs]
    if set(configured) <= set(names) and set(needed) <= set(configured):
        return {name: index for index, name in enumerate(configured)}
    if set(configured) & set(names) or not len(needed) <= len(configured) <= len(names):
        raise LoadError(f"the inputs {configured} are configured, forward takes {names}")
    return {names[position]: index for index, position in enumerate(positions(configured))}
