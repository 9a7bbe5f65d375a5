"""PyTorch models: exported programs (.pt2) and TorchScript (.pt)."""

import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import NUMPY_DTYPES, DataType
from headrace_backends.base import Array, Backend, InputError, LoadError, ModelSource, RequestInfo

DEFAULT_MAX_BATCH_SIZE = 32

_TORCH_DTYPES: dict[DataType, torch.dtype] = {
    DataType.BOOL: torch.bool,
    DataType.UINT8: torch.uint8,
    DataType.UINT16: torch.uint16,
    DataType.UINT32: torch.uint32,
    DataType.UINT64: torch.uint64,
    DataType.INT8: torch.int8,
    DataType.INT16: torch.int16,
    DataType.INT32: torch.int32,
    DataType.INT64: torch.int64,
    DataType.FP16: torch.float16,
    DataType.BF16: torch.bfloat16,
    DataType.FP32: torch.float32,
    DataType.FP64: torch.float64,
}
_DATATYPES = {dtype: datatype for datatype, dtype in _TORCH_DTYPES.items()}
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|bad_alloc", re.IGNORECASE)
_DEVICE_FAILURE = re.compile(r"CUDA error|cuDNN error|CUBLAS_STATUS|CUDA driver", re.IGNORECASE)
_TRITON_NAME = re.compile(r"(?:INPUT|OUTPUT)__(\d+)")
_REFUSALS = (RuntimeError, IndexError, ValueError, AssertionError)

# A model as it is called: tensors in the order of the signature's inputs, tensors in the order of its outputs.
_Call = Callable[[list[torch.Tensor]], list[Any]]


@dataclass(frozen=True, slots=True)
class _Model:
    """A model that was read: how to call it, what it takes and gives, and how far its rows may be merged."""

    call: _Call
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int = 0
    notes: tuple[str, ...] = ()


class TorchBackend(Backend):
    """One module in inference mode."""

    def __init__(self, source: ModelSource, device: torch.device, model: _Model) -> None:
        self._name = source.name
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._call = model.call
        self._signature = Signature(model.inputs, model.outputs, model.max_batch_size)
        self._notes = model.notes

    @classmethod
    def load(cls, source: ModelSource) -> "TorchBackend":
        """Read the file; the ending tells exported programs from TorchScript."""
        if source.parameters:
            raise LoadError(
                f"model '{source.name}': the backend torch has no parameters, got {sorted(source.parameters)}"
            )
        device = _device(source)
        torch.set_num_threads(source.threads)
        with suppress(RuntimeError):  # it can be set once in a process, before the first parallel work
            torch.set_num_interop_threads(1)
        read = _read_exported if source.path.suffix == ".pt2" else _read_torchscript
        return cls(source, device, read(source, device))

    @property
    def signature(self) -> Signature:
        """What the exported program or the configuration says."""
        return self._signature

    def notes(self) -> list[str]:
        """How batching was decided."""
        return list(self._notes)

    def execute(self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> Mapping[str, Array]:
        """Run the module; an exception of its own is told to the client as a refused input."""
        del requests
        tensors = [self._tensor(inputs[spec.name]) for spec in self._signature.inputs]
        try:
            with torch.inference_mode():
                values = self._call(tensors)
        except _REFUSALS as error:
            raise self._translated(error) from error
        specs = self._signature.outputs
        if len(values) != len(specs):
            raise RuntimeError(
                f"model '{self._name}' gave {len(values)} outputs, expected {[spec.name for spec in specs]}"
            )
        return {spec.name: self._array(spec, value) for spec, value in zip(specs, values, strict=True)}

    def close(self) -> None:
        """Let go of the module, and give the GPU's cached memory back."""
        del self._call
        if not self._on_cpu:
            torch.cuda.empty_cache()

    def _tensor(self, array: Array) -> torch.Tensor:
        tensor = _tensor_of(array)
        return tensor if self._on_cpu else tensor.to(self._device)

    def _array(self, spec: TensorSpec, value: Any) -> Array:
        if not isinstance(value, torch.Tensor) or value.dtype is not _TORCH_DTYPES[spec.datatype]:
            got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise RuntimeError(
                f"model '{self._name}': output '{spec.name}' is {got}, expected {_TORCH_DTYPES[spec.datatype]}"
            )
        return _array_of(value)

    def _translated(self, error: Exception) -> Exception:
        text = str(error)
        message = f"model '{self._name}': {_gist(text) or type(error).__name__}"
        if isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(text):
            return MemoryError(message)
        if _DEVICE_FAILURE.search(text):
            return RuntimeError(message)
        return InputError(message)


def _device(source: ModelSource) -> torch.device:
    if source.device == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"gpu:(\d+)", source.device)
    if match is None:
        raise LoadError(f"model '{source.name}': device '{source.device}' is unknown, expected cpu or gpu:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(match[1]) >= count:
        raise LoadError(
            f"model '{source.name}': device '{source.device}' is not here: torch {torch.__version__} sees "
            f"{count} GPUs; a GPU needs an NVIDIA driver and a torch built with CUDA"
        )
    return torch.device("cuda", int(match[1]))


def _gist(message: str) -> str:
    """The lines of a message that say what happened: of a TorchScript error, which is mostly source code, the last."""
    if "TorchScript interpreter" in message:
        return message.strip().splitlines()[-1].removeprefix("RuntimeError: ")
    return " ".join(message.strip().splitlines()[:2])


def _tensor_of(array: Array) -> torch.Tensor:
    """A tensor that shares the array's memory, or holds a copy of memory that torch could not promise not to write."""
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()
    if array.dtype == NUMPY_DTYPES[DataType.BF16]:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array_of(tensor: torch.Tensor) -> Array:
    tensor = tensor.detach().to("cpu").resolve_neg().contiguous()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(NUMPY_DTYPES[DataType.BF16])
    array: Array = tensor.numpy()
    return array


# Exported programs


def _read_exported(source: ModelSource, device: torch.device) -> _Model:
    program = _load_exported(source)
    signature = program.module_call_graph[0].signature
    graph = program.graph_signature
    in_problems = [
        f"input {argument!r} is no tensor" for argument in graph.user_inputs if not isinstance(argument, str)
    ]
    out_problems = [
        f"output {argument!r} is no tensor" for argument in graph.user_outputs if not isinstance(argument, str)
    ]
    if in_problems or out_problems:
        raise LoadError(
            f"model '{source.name}': cannot serve '{source.path.name}': {'; '.join(in_problems + out_problems)}"
        )
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    in_names = _argument_names(program, signature)
    out_names, out_order = _result_names(source, signature.out_spec)
    inputs = [_symbolic(source, name, values[key]) for name, key in zip(in_names, graph.user_inputs, strict=True)]
    found_outputs = [values[graph.user_outputs[index]] for index in out_order]
    outputs = [_symbolic(source, name, value) for name, value in zip(out_names, found_outputs, strict=True)]
    problems = _configured_problems(source, inputs, outputs)
    if problems:
        raise LoadError(f"model '{source.name}': {'; '.join(problems)}")
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    module = program.module()

    def call(tensors: list[torch.Tensor]) -> list[Any]:
        arguments, named = _pytree.tree_unflatten(tensors, signature.in_spec)
        leaves = _pytree.tree_leaves(module(*arguments, **named))
        return [leaves[index] for index in out_order]

    in_specs = _with_configured([spec for spec, _ in inputs], source.inputs)
    out_specs = _with_configured([spec for spec, _ in outputs], source.outputs)
    if source.max_batch_size is not None:
        return _Model(call, in_specs, out_specs, source.max_batch_size)
    size, notes = _batching(program, call, inputs, outputs, device=device, served=(*in_specs, *out_specs))
    return _Model(call, in_specs, out_specs, size, notes)


def _load_exported(source: ModelSource) -> Any:
    """The program in the file, without running any code that the file may carry."""
    if not zipfile.is_zipfile(source.path):
        raise LoadError(f"model '{source.name}': '{source.path.name}' is no torch.export archive: it is not a zip file")
    with zipfile.ZipFile(source.path) as archive:
        names = archive.namelist()
    if any("/data/aotinductor/" in name for name in names):
        raise LoadError(
            f"model '{source.name}': '{source.path.name}' holds compiled code (AOTInductor), which is not served; "
            "save the exported program with torch.export.save"
        )
    if not any(name.endswith("models/model.json") for name in names):
        raise LoadError(
            f"model '{source.name}': '{source.path.name}' holds no exported program; make one with "
            "torch.export.save(torch.export.export(model, example_inputs), 'model.pt2')"
        )
    try:
        with _no_pickled_code():
            return torch.export.load(source.path)
    except Exception as error:  # the reader promises no types: whatever it raises is about this file
        raise LoadError(f"model '{source.name}': cannot load '{source.path.name}': {_gist(str(error))}") from error


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


def _argument_names(program: Any, signature: Any) -> list[str]:
    """The names of forward's arguments, or the graph's own names where arguments are nested."""
    names = list(signature.forward_arg_names or ())
    positional, named = signature.in_spec.children()
    flat = all(child.is_leaf() for child in (*positional.children(), *named.children()))
    user_inputs = list(program.graph_signature.user_inputs)
    return names if flat and len(names) == len(user_inputs) else user_inputs


def _result_names(source: ModelSource, spec: Any) -> tuple[list[str], list[int]]:
    """What the outputs are called, and where each is among the module's flat results."""
    if spec.is_leaf():
        found, by_key = ["output_0"], False
    elif all(child.is_leaf() for child in spec.children()):
        by_key = issubclass(spec.type, dict)
        found = [str(key) for key in spec.context] if by_key else [f"output_{i}" for i in range(spec.num_leaves)]
    else:
        raise LoadError(
            f"model '{source.name}': its outputs are nested, expected a tensor, or a tuple, list or dict of them"
        )
    return _chosen_names(source, found, by_key=by_key)


def _chosen_names(source: ModelSource, found: list[str], *, by_key: bool) -> tuple[list[str], list[int]]:
    """The configured names of the results, by key or by position; all the results where none are configured."""
    wanted = [spec.name for spec in source.outputs]
    if not wanted:
        return found, list(range(len(found)))
    if set(wanted) <= set(found):
        return wanted, [found.index(name) for name in wanted]
    if by_key or len(wanted) != len(found):
        raise LoadError(f"model '{source.name}': the outputs {wanted} are configured, the module has {found}")
    return wanted, _positions(wanted)


def _positions(names: list[str]) -> list[int]:
    """Where each name stands: as its number says in Triton's INPUT__0 convention, else in the order given."""
    matches = [_TRITON_NAME.fullmatch(name) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    return numbers if sorted(numbers) == list(range(len(names))) else list(range(len(names)))


def _symbolic(source: ModelSource, name: str, value: Any) -> tuple[TensorSpec, tuple[str, ...]]:
    """A tensor's spec, and the expression of each dimension that is not fixed ("" where it is)."""
    if not isinstance(value, torch.Tensor) or value.dtype not in _DATATYPES:
        got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise LoadError(f"model '{source.name}': '{name}' is {got}, which the protocol has no datatype for")
    symbols = tuple("" if isinstance(size, int) else str(size.node.expr) for size in value.shape)
    shape = tuple(-1 if symbol else int(size) for size, symbol in zip(value.shape, symbols, strict=True))
    return TensorSpec(name, _DATATYPES[value.dtype], shape), symbols


def _configured_problems(
    source: ModelSource,
    inputs: list[tuple[TensorSpec, tuple[str, ...]]],
    outputs: list[tuple[TensorSpec, tuple[str, ...]]],
) -> list[str]:
    problems = []
    for kind, configured, found in (("input", source.inputs, inputs), ("output", source.outputs, outputs)):
        specs = {spec.name: spec for spec, _ in found}
        for wanted in configured:
            spec = specs.get(wanted.name)
            if spec is None:
                problems.append(f"the program has no {kind} '{wanted.name}'; it has {list(specs)}")
            elif wanted.datatype is not spec.datatype:
                problems.append(f"{kind} '{wanted.name}' is configured as {wanted.datatype}; it is {spec.datatype}")
            elif not _compatible(wanted.shape, spec.shape):
                problems.append(f"{kind} '{wanted.name}' is configured as {wanted.describe()}; it is {spec.describe()}")
    if source.max_batch_size:
        problems += [
            f"max_batch_size is {source.max_batch_size}, but '{spec.name}' has shape {list(spec.shape or ())}, without "
            "a leading dimension of any size"
            for spec, _ in chain(inputs, outputs)
            if (spec.shape or ())[:1] != (-1,)
        ]
    return problems


def _compatible(configured: tuple[int, ...] | None, found: tuple[int, ...] | None) -> bool:
    if configured is None or found is None:
        return True
    return len(configured) == len(found) and all(
        one == other or -1 in (one, other) for one, other in zip(configured, found, strict=True)
    )


def _with_configured(found: list[TensorSpec], configured: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    overrides = {spec.name: spec for spec in configured if spec.shape is not None}
    return tuple(overrides.get(spec.name, spec) for spec in found)


def _batching(
    program: Any,
    call: _Call,
    inputs: list[tuple[TensorSpec, tuple[str, ...]]],
    outputs: list[tuple[TensorSpec, tuple[str, ...]]],
    *,
    device: torch.device,
    served: tuple[TensorSpec, ...],
) -> tuple[int, tuple[str, ...]]:
    """How many rows may be merged, and why."""
    leading = {spec.name: symbols[0] if symbols else "" for spec, symbols in chain(inputs, outputs)}
    symbol = next(iter(leading.values()), "")
    fixed = [spec.name for spec in served if (spec.shape or ())[:1] != (-1,)]
    if not inputs or fixed or not symbol.isidentifier() or set(leading.values()) != {symbol}:
        return 0, (f"requests are not merged into batches: the leading dimensions are not one of any size: {leading}",)
    if any(symbol in rest for _, symbols in chain(inputs, outputs) for rest in symbols[1:]):
        return 0, ("requests are not merged into batches: the leading dimension's size is part of another's",)
    limit = DEFAULT_MAX_BATCH_SIZE
    for expression, bounds in program.range_constraints.items():
        if str(expression) == symbol and bounds.upper < limit:
            limit = int(bounds.upper)
    problem, note = _trial(call, device, inputs)
    if problem:
        return 0, (f"requests are not merged into batches: {problem}",)
    return limit, (note,) if note else ()


def _trial(
    call: _Call, device: torch.device, inputs: list[tuple[TensorSpec, tuple[str, ...]]]
) -> tuple[str | None, str | None]:
    """Whether three made-up rows give the same together as apart: why not, or else what is not certain.

    The symbols prove how many rows come out, but not that a row's answer is its own: ``x - x.mean(0)`` has them too.
    """
    generator = torch.Generator().manual_seed(20240229)
    sizes: dict[str, int] = {}
    rows = []
    for spec, symbols in inputs:
        shape = [3]
        for size, symbol in zip((spec.shape or ())[1:], symbols[1:], strict=True):
            shape.append(sizes.setdefault(symbol, 2 + len(sizes) % 7) if symbol else size)
        dtype = _TORCH_DTYPES[spec.datatype]
        made_up = torch.randn(shape, generator=generator) if dtype.is_floating_point else None
        rows.append((torch.randint(0, 2, shape, generator=generator) if made_up is None else made_up).to(device, dtype))
    try:
        with torch.inference_mode():
            alone = call([tensor[:1].clone() for tensor in rows])
            pair = call([tensor[1:].clone() for tensor in rows])
            together = call([tensor.clone() for tensor in rows])
    except (*_REFUSALS, MemoryError) as error:
        return None, f"batching could not be proved: the model refuses made-up inputs ({_gist(str(error))})"
    for one, two, joint in zip(alone, pair, together, strict=True):
        if not _same(torch.cat([one, two]), joint):
            return "rows that ran together and the same rows that ran apart give different answers", None
    return None, None


def _same(apart: torch.Tensor, together: torch.Tensor) -> bool:
    if apart.shape != together.shape:
        return False
    if not apart.dtype.is_floating_point:
        return torch.equal(apart, together)
    tolerance = 5e-2 if apart.itemsize == 2 else 1e-3  # half precision rounds at 1e-3 (FP16) and 1e-2 (BF16) already
    left, right = apart.double(), together.double()
    scale = max(1.0, float(left.nan_to_num(0, 0, 0).abs().max())) if left.numel() else 1.0
    return torch.allclose(left, right, rtol=tolerance, atol=tolerance / 10 * scale, equal_nan=True)


# TorchScript


def _read_torchscript(source: ModelSource, device: torch.device) -> _Model:
    if not source.inputs or not source.outputs:
        raise LoadError(
            f"model '{source.name}': TorchScript does not say what tensors it takes; write them in config.yaml, as\n"
            "inputs:  [{name: x, datatype: FP32, shape: [-1, 784]}]\n"
            "outputs: [{name: y, datatype: FP32, shape: [-1, 10]}]"
        )
    unserved = [spec.name for spec in (*source.inputs, *source.outputs) if spec.datatype not in _TORCH_DTYPES]
    if unserved:
        raise LoadError(f"model '{source.name}': torch has no strings, so {unserved} cannot be BYTES")
    if source.max_batch_size:
        fixed = [spec.describe() for spec in (*source.inputs, *source.outputs) if (spec.shape or (-1,))[:1] != (-1,)]
        if fixed or any(spec.shape == () for spec in (*source.inputs, *source.outputs)):
            raise LoadError(
                f"model '{source.name}': max_batch_size is {source.max_batch_size}, but {fixed} have no leading "
                "dimension of any size"
            )
    module = _load_torchscript(source, device)
    order = _argument_order(source, module)
    wanted = [spec.name for spec in source.outputs]

    def call(tensors: list[torch.Tensor]) -> list[Any]:
        result = module(**{name: tensors[index] for name, index in order.items()})
        if isinstance(result, torch.Tensor):
            return [result]
        if isinstance(result, dict):
            return [result.get(name) for name in wanted]
        return [result[index] for index in _positions(wanted)] if len(result) == len(wanted) else list(result)

    notes = () if source.max_batch_size is not None else (
        "requests are not merged into batches: TorchScript does not tell whether they may be; set max_batch_size",
    )  # fmt: skip
    return _Model(call, source.inputs, source.outputs, source.max_batch_size or 0, notes)


def _load_torchscript(source: ModelSource, device: torch.device) -> Any:
    if zipfile.is_zipfile(source.path):
        with zipfile.ZipFile(source.path) as archive:
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if not scripted:
            raise LoadError(
                f"model '{source.name}': '{source.path.name}' was made by torch.save: it is a pickle, which could run "
                "any code and is not opened; save the model with torch.export.save (model.pt2) or torch.jit.script"
            )
    try:
        with warnings.catch_warnings():  # torch calls all of TorchScript deprecated; that is the model owner's choice
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(source.path, map_location=device).eval()  # type: ignore[no-untyped-call] # unannotated
    except (RuntimeError, ValueError, OSError) as error:
        raise LoadError(
            f"model '{source.name}': '{source.path.name}' is no TorchScript archive: {_gist(str(error))[:300]}; "
            "save the model with torch.export.save (model.pt2) or torch.jit.script"
        ) from error


def _argument_order(source: ModelSource, module: Any) -> dict[str, int]:
    """For each of forward's arguments that is given, which configured input it is."""
    arguments = [argument for argument in module.forward.schema.arguments if argument.name != "self"]
    names = [argument.name for argument in arguments]
    needed = [argument.name for argument in arguments if not argument.has_default_value()]
    configured = [spec.name for spec in source.inputs]
    if set(configured) <= set(names) and set(needed) <= set(configured):
        return {name: index for index, name in enumerate(configured)}
    if set(configured) & set(names) or not len(needed) <= len(configured) <= len(names):
        raise LoadError(f"model '{source.name}': the inputs {configured} are configured, forward takes {names}")
    return {names[position]: index for index, position in enumerate(_positions(configured))}
