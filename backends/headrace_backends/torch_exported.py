"""Exported programs (.pt2): read without running what the file may carry; their symbols tell the free dimensions."""

import os
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree

from headrace.core.model import TensorSpec
from headrace_backends.base import LoadError, ModelSource
from headrace_backends.compiled_package import is_package, names_in
from headrace_backends.specs import FoundTensor, agreed, usual_rows
from headrace_backends.torch_flow import buffer_flow
from headrace_backends.torch_model import DATATYPES, TorchModel, gist, positions
from headrace_backends.torch_tensorrt_files import refusal

_ON_GPU = re.compile(rb'"type":\s*"cuda",\s*"index":\s*(\d+)')  # how an archive names a tensor's device
# In the names of torch's operators that read or write where an input says.
_INDEXING = ("index", "embedding", "gather", "scatter", "put", "take", "one_hot", "nll", "entropy", "bincount", "pool")


def read_exported(source: ModelSource, device: torch.device) -> TorchModel:
    """The program in the file, on the device.

    Raises:
        LoadError: it is none, or does not go together with the protocol or the configuration.
    """
    program = load_exported(source, device)
    signature = program.module_call_graph[0].signature
    graph = program.graph_signature
    untyped = [
        f"{kind} {argument!r} is no tensor"
        for kind, arguments in (("input", graph.user_inputs), ("output", graph.user_outputs))
        for argument in arguments
        if not isinstance(argument, str)
    ]
    if untyped:
        raise LoadError(f"cannot serve '{source.path.name}': {'; '.join(untyped)}")
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    in_names = argument_names(program)
    out_names, out_order = result_names(source, signature.out_spec)
    out_keys = [graph.user_outputs[index] for index in out_order]
    found_inputs = [_found(name, values[key]) for name, key in zip(in_names, graph.user_inputs, strict=True)]
    found_outputs = [_found(name, values[key]) for name, key in zip(out_names, out_keys, strict=True)]
    inputs, outputs = agreed(source, found_inputs, found_outputs)

    def call(module: Any, tensors: list[torch.Tensor]) -> list[Any]:
        arguments, named = _pytree.tree_unflatten(tensors, signature.in_spec)
        leaves = _pytree.tree_leaves(module(*arguments, **named))
        return [leaves[index] for index in out_order]

    leading = inputs[0].symbols[0] if inputs and inputs[0].symbols else ""
    most_rows = usual_rows(source, _most_rows(program, leading), f"'{source.path.name}' was exported for")
    reason = None
    if leading and not leading.isidentifier():
        reason = f"the leading dimensions are not one of any size: that of '{inputs[0].spec.name}' is {leading}"
    return TorchModel(
        program.module(),
        call,
        inputs,
        outputs,
        most_rows,
        reason,
        least_rows=_least_rows(program, leading),
        indexes=_indexes(program),
        flow=lambda: buffer_flow(program),
    )


def load_exported(source: ModelSource, device: torch.device = torch.device("cpu")) -> Any:  # noqa: B008 - it is constant
    """The program in the file, on the device, without running any code that the file may carry.

    Raises:
        LoadError: it is none, or it is on a GPU that is not here.
    """
    if not zipfile.is_zipfile(source.path):
        raise LoadError(f"'{source.path.name}' is no torch.export archive: it is not a zip file")
    names = names_in(source.path)
    if is_package(source.path):
        raise LoadError(
            f"'{source.path.name}' holds compiled code (AOTInductor), of which no other form can be made; "
            "save the exported program with torch.export.save"
        )
    if not any(name.endswith("models/model.json") for name in names):
        raise LoadError(
            f"'{source.path.name}' holds no exported program; make one with "
            "torch.export.save(torch.export.export(model, example_inputs), 'model.pt2')"
        )
    try:
        with _no_pickled_code():
            program = torch.export.load(source.path)
    except Exception as error:  # the reader promises no types: whatever it raises is about this file
        raise LoadError(
            refusal(source.path)
            or f"cannot load '{source.path.name}': {_on_missing_gpu(source.path) or gist(str(error))}"
        ) from error
    return on_device(program, device)


def on_device(program: Any, device: torch.device) -> Any:
    """The program with everything of it on the device. It may have been exported on another one.

    Regions where it turns autocast on or off, as rotary embeddings do to stay in float, are about the new device then.
    """
    values = _pytree.tree_leaves([node.meta.get("val") for node in program.graph.nodes])
    if all(value.device == device for value in values if isinstance(value, torch.Tensor)):
        return program
    from torch.export.passes import move_to_device_pass

    moved = move_to_device_pass(program, device)
    for module in moved.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if node.target is torch.ops.higher_order.wrap_with_autocast:
                node.args = (device.type, *node.args[1:])
    return moved


def _on_missing_gpu(path: Path) -> str:
    """What is said of a file with tensors on a GPU that torch does not see; empty where it has none such."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        with zipfile.ZipFile(path) as archive:
            told = [name for name in archive.namelist() if name.endswith(("_config.json", "models/model.json"))]
            numbers = {int(one) for name in told for one in _ON_GPU.findall(archive.read(name))}
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
        return ""
    if max(numbers, default=-1) < count:
        return ""
    return (
        f"it was exported on cuda:{max(numbers)}, and torch {torch.__version__} sees {count} GPUs; export it on the "
        "CPU: when it is loaded it is moved to the GPU of its instances"
    )


@contextmanager
def _no_pickled_code() -> Iterator[None]:
    """Keep torch.load, wherever the archive's reader calls it, from unpickling anything but tensors.

    torch 2.13's reader falls back to a full unpickling of sample inputs, and starts with one for some constants.
    """
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def argument_names(program: Any) -> list[str]:
    """The names of forward's arguments, or the graph's own names where arguments are nested."""
    signature = program.module_call_graph[0].signature
    names = list(signature.forward_arg_names or ())
    positional, named = signature.in_spec.children()
    flat = all(child.is_leaf() for child in (*positional.children(), *named.children()))
    user_inputs = list(program.graph_signature.user_inputs)
    return names if flat and len(names) == len(user_inputs) else user_inputs


def result_names(source: ModelSource, spec: Any) -> tuple[list[str], list[int]]:
    """What the outputs are called, and where each is among the module's flat results."""
    if spec.is_leaf():
        found, by_key = ["output_0"], False
    elif all(child.is_leaf() for child in spec.children()):
        by_key = issubclass(spec.type, dict)
        found = [str(key) for key in spec.context] if by_key else [f"output_{i}" for i in range(spec.num_leaves)]
    else:
        raise LoadError("its outputs are nested, expected a tensor, or a tuple, list or dict of them")
    return _chosen_names(source, found, by_key=by_key)


def _chosen_names(source: ModelSource, found: list[str], *, by_key: bool) -> tuple[list[str], list[int]]:
    """The configured names of the results, by key or by position; all the results where none are configured."""
    wanted = [spec.name for spec in source.outputs]
    if not wanted:
        return found, list(range(len(found)))
    if set(wanted) <= set(found):
        return wanted, [found.index(name) for name in wanted]
    if by_key or len(wanted) != len(found):
        raise LoadError(f"the outputs {wanted} are configured, the module has {found}")
    return wanted, positions(wanted)


def _found(name: str, value: Any) -> FoundTensor:
    """A tensor's spec, and the expression of each dimension that is not fixed ("" where it is)."""
    if not isinstance(value, torch.Tensor) or value.dtype not in DATATYPES:
        got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise LoadError(f"'{name}' is {got}, which the protocol has no datatype for")
    symbols = tuple("" if isinstance(size, int) else str(size.node.expr) for size in value.shape)
    shape = tuple(-1 if symbol else int(size) for size, symbol in zip(value.shape, symbols, strict=True))
    return FoundTensor(TensorSpec(name, DATATYPES[value.dtype], shape), symbols)


def _indexes(program: Any) -> bool:
    """Whether one of its operators may take an input's numbers for places in another tensor; those not torch's may."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    targets = {str(node.target) for node in nodes if isinstance(node.target, torch._ops.OperatorBase)}  # noqa: SLF001 - no other name for them
    return any(not name.startswith("aten.") or any(word in name for word in _INDEXING) for name in targets)


def _most_rows(program: Any, symbol: str) -> int | None:
    """How many rows the program was exported for at most; None for any number."""
    bounds = [bounds.upper for expression, bounds in program.range_constraints.items() if str(expression) == symbol]
    finite = [int(bound) for bound in bounds if bound < sys.maxsize]  # torch's "any number" is larger than that
    return min(finite, default=None)


def _least_rows(program: Any, symbol: str) -> int:
    """How many rows the program was exported for at least. Of a bound of 2, torch's own, it makes no condition."""
    bounds = [bounds.lower for expression, bounds in program.range_constraints.items() if str(expression) == symbol]
    least = max((int(bound) for bound in bounds), default=1)
    return least if least > 2 else 1
