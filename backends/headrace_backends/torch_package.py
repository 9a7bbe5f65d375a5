"""Compiled packages (.pt2 by AOTInductor) on PyTorch: machine code, run only where its owner has agreed to that.

The code reads its inputs unchecked unless an environment variable asks for its own checks, and believes that they have
the sizes that it was compiled for. Those checks are always on here. They leak the inputs that they refuse in torch
2.13, so that sizes are looked at before. torch's public loader, ``aoti_load_package``, compiles programs with g++ at
each first load, only to compare CPUs for a warning; the class that it comes to is used directly.
"""

import os
import platform
import shutil
import sys
import tempfile
import weakref
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.torch_version import TorchVersion
from torch.utils import _pytree

from headrace.core.model import TensorSpec
from headrace_backends import parameters
from headrace_backends.base import LoadError, ModelSource
from headrace_backends.compiled_package import CONSENT, MODEL, Here, Package, misfit, opened
from headrace_backends.compiled_source import DeclaredInput, Sizes
from headrace_backends.made_up import made_up
from headrace_backends.optimize.hardware import hardware
from headrace_backends.specs import FoundTensor, agreed, usual_rows
from headrace_backends.torch_exported import result_names
from headrace_backends.torch_model import DATATYPES, Call, TorchModel, gist, positions, tensor_of
from headrace_backends.torch_tensorrt_files import refusal

_CHECKS = "AOTI_RUNTIME_CHECK_INPUTS"


def read_package(source: ModelSource, device: torch.device) -> TorchModel:
    """The package's code, loaded.

    Raises:
        LoadError: nobody agreed to it, it cannot run here, or it does not go together with the configuration.
    """
    name = source.path.name
    if not parameters.flag(source.parameters, CONSENT):
        raise LoadError(
            f"'{name}' holds machine code (AOTInductor), which could do anything and is not loaded; save the program "
            "with torch.export.save, or, if you trust where the file comes from, set "
            f"parameters.{CONSENT}: true"
        )
    package = opened(source.path)
    wrong = misfit(package, device.type, _here(device))
    if wrong is not None:
        raise LoadError(f"'{name}' cannot run here: {wrong}")
    loader = _loaded(source.path, device)
    in_spec, out_spec = _call_spec(name, loader)
    found_inputs = _inputs(source, package, in_spec)
    out_names, out_order = result_names(source, out_spec)
    call = _checked(_loader_call(out_order, out_spec.num_leaves, device), found_inputs, package.inputs)
    found_outputs = _outputs(source, lambda tensors: call(loader, tensors), package, found_inputs, out_names, device)
    inputs, outputs = agreed(source, found_inputs, found_outputs)
    least, most = _rows(package.inputs)
    return TorchModel(
        loader,
        call,
        inputs,
        outputs,
        usual_rows(source, most, f"'{name}' was compiled for"),
        least_rows=least,
        compiled_threads=package.threads,
    )


def _loader_call(order: Sequence[int], count: int, device: torch.device) -> Call:
    """How the loaded code is called: of its ``count`` results those of ``order``."""

    def call(loader: Any, tensors: list[torch.Tensor]) -> list[Any]:
        try:
            # A dimension of one has the stride that the code was compiled for only in a tensor that was made as one.
            values = loader.run([tensor.reshape(-1).view(tensor.shape) for tensor in tensors])
        except RuntimeError as error:
            if device.type == "cpu":
                raise
            # It tells no more than that; there kernels do not refuse what they are given, so it is not the input.
            raise RuntimeError(f"its code failed on CUDA, and why is in the worker's log: {error}") from error
        if len(values) != count:
            raise RuntimeError(f"its code gave {len(values)} tensors, expected {count}")
        return [values[index] for index in order]

    return call


def _here(device: torch.device) -> Here:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return Here(sys.platform, platform.machine(), frozenset(hardware().features), capability)


def _loaded(path: Path, device: torch.device) -> Any:
    """The package's loader, from a folder of our own: torch leaves what it unpacks behind when a process is killed.

    What is mapped stays mapped, so that the folder can go at once; a GPU's kernels are read when they are first used.
    """
    os.environ[_CHECKS] = "1"  # each library asks for it once, when it is first run
    folder = tempfile.mkdtemp(prefix="headrace-package-")
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)  # never outside of it
        # Before 2.13 torch opens files alone, and unpacks them itself.
        place = folder if TorchVersion(torch.__version__) >= "2.13" else str(path)
        loader = torch._C._aoti.AOTIModelPackageLoader(  # noqa: SLF001 - see above
            place, MODEL, True, 1, -1 if device.index is None else device.index
        )
    except Exception as error:  # the loader promises no types: whatever it raises is about this file
        shutil.rmtree(folder, ignore_errors=True)
        raise LoadError(
            refusal(path)
            or f"cannot load '{path.name}': {gist(str(error))[:300]}; the code of a package runs with the version of "
            f"torch that compiled it, and here is {torch.__version__}"
        ) from error
    if device.type == "cpu":
        shutil.rmtree(folder, ignore_errors=True)
    else:
        weakref.finalize(loader, shutil.rmtree, folder, ignore_errors=True)
    return loader


def _call_spec(name: str, loader: Any) -> tuple[Any, Any]:
    try:
        in_spec, out_spec = map(_pytree.treespec_loads, loader.get_call_spec())
    except Exception as error:  # a class that only its own code registers
        raise LoadError(
            f"'{name}' takes or gives something other than tensors in tuples, lists and dicts: {gist(str(error))}"
        ) from error
    return in_spec, out_spec


def _inputs(source: ModelSource, package: Package, in_spec: Any) -> list[FoundTensor]:
    """The inputs in the order in which the code takes them, by the names that they are served with."""
    _, named = in_spec.children()
    keys = list(named.context) if named.num_leaves == len(named.context) else []
    found = [f"input_{index}" for index in range(in_spec.num_leaves - len(keys))] + keys
    if len(set(package.names)) == len(package.names) == len(found):
        found = list(package.names)
    names = _names(source, found, keys)
    if package.inputs is None:
        if not source.inputs:
            raise LoadError(f"'{source.path.name}' does not say what it takes; " + _to_declare("inputs", names))
        specs = {spec.name: spec for spec in source.inputs}
        if set(specs) != set(names):
            raise LoadError(f"the inputs {list(specs)} are configured, the package takes {names}")
        return [FoundTensor(specs[name]) for name in names]
    if len(package.inputs) != len(names):
        raise LoadError(
            f"'{source.path.name}' takes {len(names)} arguments, and {len(package.inputs)} of them are tensors: "
            "compile it with the others fixed"
        )
    return [_found(name, declared) for name, declared in zip(names, package.inputs, strict=True)]


def _names(source: ModelSource, found: list[str], keys: Sequence[str]) -> list[str]:
    """What each input is called: as the configuration has it, where positions have no names of their own."""
    wanted = [spec.name for spec in source.inputs]
    if not wanted or set(wanted) <= set(found):
        return found
    if len(wanted) != len(found) or set(keys) - set(wanted):
        raise LoadError(f"the inputs {wanted} are configured, the package takes {found}")
    free = [name for name in wanted if name not in keys]
    places = positions(free)
    return [free[places.index(index)] for index in range(len(free))] + list(keys)


def _found(name: str, declared: DeclaredInput) -> FoundTensor:
    datatype = DATATYPES.get(getattr(torch, declared.dtype, torch.complex64))
    if datatype is None:
        raise LoadError(f"'{name}' is {declared.dtype}, which the protocol has no datatype for")
    return FoundTensor(TensorSpec(name, datatype, declared.shape))


def _checked(call: Call, inputs: Sequence[FoundTensor], declared: Sequence[DeclaredInput] | None) -> Call:
    """The call for inputs of sizes that the code was compiled for; others are refused."""
    if declared is None:
        return call

    def checked(loader: Any, tensors: list[torch.Tensor]) -> list[Any]:
        for found, one, tensor in zip(inputs, declared, tensors, strict=True):
            for axis, (sizes, size) in enumerate(zip(one.sizes, tensor.shape, strict=True)):
                if size not in sizes:
                    raise ValueError(
                        f"input '{found.spec.name}' has {size} in dimension {axis}, and the model was compiled for "
                        f"{sizes}"
                    )
        return call(loader, tensors)

    return checked


def _rows(declared: Sequence[DeclaredInput] | None) -> tuple[int, int | None]:
    """How many rows the code takes at least and at most."""
    leading = [one.sizes[0] if one.sizes else Sizes(1, 1) for one in declared or ()]
    if not leading or any(one.fixed for one in leading):
        return 1, None
    bounds = [one.most for one in leading if one.most is not None]
    return max(1, *(one.least for one in leading)), min(bounds, default=None)


def _outputs(
    source: ModelSource,
    run: Any,
    package: Package,
    inputs: Sequence[FoundTensor],
    names: list[str],
    device: torch.device,
) -> list[FoundTensor]:
    """The outputs, of which a package tells the number alone: seen by running it twice on inputs of other sizes.

    Where it does not run on what is made up, the configuration has to tell them.
    """
    seen = []
    why = ""
    for more in (0, 1):
        arrays = made_up([_sized(*one, more) for one in zip(inputs, _ranges(package, inputs), strict=True)], None)
        if arrays is None:
            why = "its inputs are too large to be made up"
            break
        try:
            with torch.inference_mode():
                seen.append(run([tensor_of(arrays[one.spec.name]).to(device) for one in inputs]))
        except Exception as error:  # noqa: BLE001 - compiled code may raise anything
            why = f"it does not run on inputs made up for it ({gist(str(error))})"
            break
    if why and not source.outputs:
        raise LoadError(f"'{source.path.name}' does not say what it gives, and {why}; " + _to_declare("outputs", names))
    if not seen:
        return [FoundTensor(spec) for spec in source.outputs]
    configured = {spec.name: spec.shape for spec in source.outputs}
    return [
        _given(name, values, configured.get(name), told=not why) for name, *values in zip(names, *seen, strict=True)
    ]


def _ranges(package: Package, inputs: Sequence[FoundTensor]) -> list[tuple[Sizes, ...]]:
    """The sizes that each input may have."""
    if package.inputs is not None:
        return [one.sizes for one in package.inputs]
    return [tuple(Sizes(1) if size == -1 else Sizes(size, size) for size in one.spec.shape or ()) for one in inputs]


def _sized(found: FoundTensor, ranges: Sequence[Sizes], more: int) -> FoundTensor:
    """The input with a size for each free dimension: few, and one more."""
    shape = []
    for sizes in ranges:
        few = max(2, sizes.least)
        if sizes.most is not None:
            few = min(few, sizes.most - 1)  # two sizes that differ, where there are two
        shape.append(sizes.least if sizes.fixed else few + more)
    return FoundTensor(msgspec.structs.replace(found.spec, shape=tuple(shape)))


def _given(name: str, values: Sequence[Any], configured: tuple[int, ...] | None, *, told: bool) -> FoundTensor:
    """An output as it was seen; of its shape the dimensions that stayed, where it was seen twice."""
    if values[0].dtype not in DATATYPES:
        raise LoadError(f"'{name}' is {values[0].dtype}, which the protocol has no datatype for")
    shape: tuple[int, ...] | None = configured
    if told and len({value.ndim for value in values}) == 1:
        shape = tuple(
            sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*(v.shape for v in values), strict=True)
        )
    return FoundTensor(TensorSpec(name, DATATYPES[values[0].dtype], shape))


def _to_declare(what: str, names: Sequence[str]) -> str:
    """What to write in the configuration, with what has to be filled in."""
    lines = ", ".join(f"{{name: {name}, datatype: FP32, shape: [-1, 10]}}" for name in names)
    return f"write their datatypes and shapes in config.yaml, as\n{what}: [{lines}]"
