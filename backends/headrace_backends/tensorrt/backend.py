"""The TensorRT backend: engines (.plan, .engine) as they are, ONNX files built to engines when they are loaded."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.model import Signature, TensorSpec
from headrace_backends import parameters
from headrace_backends.base import Array, Backend, LoadError, ModelSource, RequestInfo
from headrace_backends.row_trial import inferred_batching
from headrace_backends.specs import FoundTensor, agreed, signature_of, usual_rows
from headrace_backends.tensorrt import capability
from headrace_backends.tensorrt.builder import BuildOptions, Parsed, build, parse_onnx, read_options
from headrace_backends.tensorrt.cuda import CudaDriver, Device
from headrace_backends.tensorrt.engine_cache import EngineCache, default_folder, engine_key, model_hash
from headrace_backends.tensorrt.engine_file import EngineHeader, misfit, read_engine, read_header, rebuild_advice
from headrace_backends.tensorrt.execution import Execution, read_profiles, read_tensors
from headrace_backends.tensorrt.library import Library, find_library, make_logger, register_plugins
from headrace_backends.tensorrt.profiles import Profile, asked_batches, asked_ranges, derive, least_rows, most_rows

BUILD_PARAMETERS = (
    "precision",
    "min_shapes",
    "opt_shapes",
    "max_shapes",
    "batch_profiles",
    "builder_level",
    "workspace_bytes",
    "compute_capability",
    "engine_cache",
)
_PARAMETERS = ("library", "cuda_graphs", "allow_engine_host_code", *BUILD_PARAMETERS)
_NO_CACHE = "off"

_Stored = tuple[EngineHeader, bytes]


@dataclass(frozen=True, slots=True)
class _Order:
    """A model that is to be served, by which library, and how an engine of it would be built; ``notes`` grow."""

    source: ModelSource
    library: Library
    options: BuildOptions
    notes: list[str]


class TensorRtBackend(Backend):
    """One engine on one GPU, with a stream of its own."""

    warms_up = True
    reads_only = True

    def __init__(self, execution: Execution, device: Device, signature: Signature, notes: list[str]) -> None:
        self._execution = execution
        self._device = device
        self._signature = signature
        self._names = [spec.name for spec in signature.outputs]
        self._notes = notes

    @classmethod
    def load(cls, source: ModelSource) -> "TensorRtBackend":
        """Take the GPU, get the engine (from the file, the cache or the builder) and settle what may be merged."""
        parameters.refuse_unknown("tensorrt", source.parameters, _PARAMETERS)
        library = find_library(_text(source.parameters, "library"))
        order = _Order(source, library, read_options(source.parameters, library), [])
        if source.gpu is None:
            order.notes.append("TensorRT runs on GPUs only, so on gpu:0; set instances to choose another")
        stored = _stored(order)  # before the GPU: what is wrong with a file is told also where there is none
        return _load_on(CudaDriver().open(source.gpu or 0), order, stored)

    @property
    def signature(self) -> Signature:
        """The engine's tensors, with what the configuration says of them."""
        return self._signature

    def notes(self) -> list[str]:
        """Where the engine came from, and how batching was decided."""
        return list(self._notes)

    def execute(self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> Mapping[str, Array]:
        """Run the engine. The arrays are the execution's memory, until the next call."""
        del requests
        return self._execution.run(inputs)

    def close(self) -> None:
        """Give the GPU's memory back."""
        self._execution.close()
        self._device.close()


def _load_on(device: Device, order: _Order, stored: _Stored | None) -> TensorRtBackend:
    """Load a model on a GPU that is in use already. ``stored`` is the engine in its file, None if it is to be built.

    Raises:
        LoadError: it cannot be served; nothing of it is left on the GPU.
    """
    source, library = order.source, order.library
    with ExitStack() as undo:
        undo.callback(device.close)
        ready = _engine(order, stored, device)
        runtime = _Runtime(library, allow_host_code=parameters.flag(source.parameters, "allow_engine_host_code"))
        advice = rebuild_advice(library) if ready.declared is None else _built_advice(device)
        engine = runtime.load(ready.data, source.path.name, advice)
        tensors = read_tensors(engine)
        found = [_as_declared(tensor.spec, ready.declared or {}) for tensor in tensors]
        inputs, outputs = agreed(
            source,
            [one for one, tensor in zip(found, tensors, strict=True) if tensor.is_input],
            [one for one, tensor in zip(found, tensors, strict=True) if not tensor.is_input],
        )
        profiles = read_profiles(engine, tensors)
        cuda_graphs = parameters.flag(source.parameters, "cuda_graphs")
        execution = Execution(library, engine, runtime, device, tensors, profiles, cuda_graphs=cuda_graphs)
        undo.callback(execution.close)
        try:
            execution.make_ready()
        except (MemoryError, RuntimeError) as error:
            raise LoadError(str(error)) from error
        signature = signature_of(source, inputs, outputs)
        signature = _batched(source, signature, execution, profiles, inputs, outputs, order.notes)
        undo.pop_all()
        return TensorRtBackend(execution, device, signature, order.notes)


@dataclass(frozen=True, slots=True)
class _Ready:
    """An engine's bytes, and what the ONNX file says of its tensors: None for an engine file."""

    data: bytes
    declared: Mapping[str, FoundTensor] | None = None


class _Runtime:
    """The library's runtime with its log, which must outlive the engine."""

    def __init__(self, library: Library, *, allow_host_code: bool) -> None:
        self._library = library
        self._log = make_logger(library)
        register_plugins(library, self._log)
        try:
            self._runtime = library.module.Runtime(self._log)
        except TypeError as error:  # its constructor gave null
            raise LoadError(f"{library} cannot run here: {self.told()}") from error
        # Engines that work with later versions hold code for this machine's CPU.
        self._runtime.engine_host_code_allowed = allow_host_code

    def load(self, data: bytes, name: str, advice: str) -> Any:
        """The engine, on the GPU that this thread uses. ``advice`` is what may help where it cannot be there."""
        self._check(data, name, advice)
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            header = read_header(data)
            version = f" (it was built by version {header.version_text})" if header else ""
            raise LoadError(f"{self._library} cannot load '{name}'{version}: {self.told()}; {advice}")
        return engine

    def told(self) -> str:
        """The library's errors since the last call."""
        text: str = self._log.told()
        return text

    def _check(self, data: bytes, name: str, advice: str) -> None:
        """Ask TensorRT-RTX, which tells before it loads anything; TensorRT has no such call."""
        ask = getattr(self._runtime, "get_engine_validity", None)
        if ask is None:
            return
        validity, diagnostics = ask(data)
        if validity == self._library.module.EngineValidity.INVALID:
            reasons = self._library.module.EngineInvalidityDiagnostics.__members__.items()
            told = [reason.replace("_", " ").lower() for reason, bit in reasons if int(diagnostics) & int(bit)]
            raise LoadError(
                f"{self._library} says that '{name}' cannot run here: {', '.join(told) or self.told()}; {advice}"
            )


# -- the engine -------------------------------------------------------------------------------------------


def _stored(order: _Order) -> _Stored | None:
    """The engine in the model's file; None if that is ONNX.

    Raises:
        LoadError: it is no engine, or none that this library can load, and there is no ONNX file to build one of.
    """
    if order.source.path.suffix.lower() == ".onnx":
        return None
    header, data = read_engine(order.source.path)
    reason = misfit(header, order.library, None)
    if reason is not None and not _origin(order).exists():
        raise _unfit(order, reason)
    return header, data


def _engine(order: _Order, stored: _Stored | None, device: Device) -> _Ready:
    path = order.source.path
    if stored is None:
        return _built(order, path, device)
    header, data = stored
    reason = misfit(header, order.library, device.gpu.capability)
    if reason is None:
        unused = sorted(set(order.source.parameters) & set(BUILD_PARAMETERS))
        if unused:
            raise LoadError(f"parameters {', '.join(unused)} are for building, and '{path.name}' is built already")
        return _Ready(data)
    origin = _origin(order)
    if origin.exists():
        order.notes.append(f"'{path.name}' is stale: {reason}; '{origin.name}' beside it is built instead")
        return _built(order, origin, device)
    raise _unfit(order, reason)


def _origin(order: _Order) -> Path:
    """Where the ONNX file of an engine lies, if it was kept."""
    return order.source.path.with_suffix(".onnx")


def _unfit(order: _Order, reason: str) -> LoadError:
    return LoadError(f"'{order.source.path.name}' does not fit: {reason}; {rebuild_advice(order.library)}")


def _built(order: _Order, path: Path, device: Device) -> _Ready:
    """The engine of an ONNX file, from the cache if it is there."""
    library, notes, gpu = order.library, order.notes, device.gpu
    parsed = parse_onnx(library, path, "fp32")
    profiles = derive_profiles(order.source, parsed, notes)
    declared = _declared(parsed)
    options = order.options
    if library.is_rtx and not options.capabilities and gpu.capability < capability.OLDEST_OF_RTX_BY_ITSELF:
        options = replace(options, capabilities=(gpu.capability,))
    # An engine of TensorRT is for one model of GPU: its kernels were the quickest on that.
    hardware = f"{gpu.name} {capability.told(gpu.capability)}"
    if options.capabilities:
        hardware = f"for {capability.all_told(options.capabilities)}"
    asked = _text(order.source.parameters, "engine_cache")
    try:
        cache = None if asked == _NO_CACHE else EngineCache(Path(asked) if asked else default_folder())
        if cache is None:
            return _Ready(build_engine(library, path, parsed, options, profiles)[0], declared)
        key = engine_key(model_hash(path), library, hardware, options, profiles)
        with cache.building(key):
            data, wrong = cache.get(key)
            if wrong is not None:
                notes.append(f"{wrong}: built anew")
            if data is None:
                data = _build_and_keep(replace(order, options=options), path, parsed, profiles, cache, key, hardware)
            else:
                notes.append(f"engine {key} from the cache, {options.precision}")
            return _Ready(data, declared)
    except OSError as error:
        notes.append(_not_cached(error))
        return _Ready(build_engine(library, path, parsed, options, profiles)[0], declared)


def _build_and_keep(
    order: _Order,
    path: Path,
    parsed: Parsed,
    profiles: Sequence[Profile],
    cache: EngineCache,
    key: str,
    hardware: str,
) -> bytes:
    library, options = order.library, order.options
    data, measured = build_engine(library, path, parsed, options, profiles, cache.timing(library, hardware))
    order.notes.append(f"built by {library}, {options.precision}")
    facts = {"library": str(library), "hardware": hardware, "precision": options.precision, "model": path.name}
    try:
        cache.put(key, data, facts)
        if measured is not None:
            cache.put_timing(library, hardware, measured)
    except OSError as error:  # a full disk: it need not be built twice for that
        order.notes.append(_not_cached(error))
    return data


def _built_advice(device: Device) -> str:
    gpu = device.gpu
    return (
        f"the engine was built here, on {gpu.name} (compute capability {capability.told(gpu.capability)}): another "
        "library may do (parameters.library), or a newer driver"
    )


def _not_cached(error: OSError) -> str:
    return f"engines cannot be cached ({error}); set parameters.engine_cache to a folder that can be written"


def build_engine(
    library: Library,
    path: Path,
    parsed: Parsed,
    options: BuildOptions,
    profiles: Sequence[Profile],
    timing_cache: bytes | None = None,
) -> tuple[bytes, bytes | None]:
    """Build; with a half precision the file is read once more, with other types."""
    if options.precision in ("fp16", "bf16"):
        parsed = parse_onnx(library, path, options.precision)
    return build(library, parsed, options, profiles, timing_cache)


def derive_profiles(source: ModelSource, parsed: Parsed, notes: list[str]) -> tuple[Profile, ...]:
    """What to build for, by the configuration and the file."""
    inputs, _ = agreed(source, parsed.inputs, parsed.outputs)
    ranges, batches = asked_ranges(source.parameters), asked_batches(source.parameters)
    derived = derive(inputs, source.max_batch_size, ranges, batches)
    notes += derived.guesses
    return derived.profiles


def _declared(parsed: Parsed) -> dict[str, FoundTensor]:
    """The file's tensors. The parser drops the names of outputs' dimensions; their rows are taken for the inputs'."""
    leading = {one.symbols[0] for one in parsed.inputs if one.symbols}
    rows = leading.pop() if len(leading) == 1 else ""
    declared = {one.spec.name: one for one in parsed.inputs}
    for one in parsed.outputs:
        symbols = (one.symbols[0] or rows, *one.symbols[1:]) if one.symbols else ()
        declared[one.spec.name] = FoundTensor(one.spec, symbols)
    return declared


def _as_declared(spec: TensorSpec, declared: Mapping[str, FoundTensor]) -> FoundTensor:
    """An engine's tensor with what it does not keep of the file's.

    That is names of dimensions, and that rows are of any number where the engine is for one number of them.
    """
    one = declared.get(spec.name)
    if one is None:
        return FoundTensor(spec, ())
    if spec.shape and one.spec.shape and one.spec.shape[0] == -1:
        spec = msgspec.structs.replace(spec, shape=(-1, *spec.shape[1:]))
    return FoundTensor(spec, one.symbols)


# -- the signature ----------------------------------------------------------------------------------------


def _batched(
    source: ModelSource,
    signature: Signature,
    execution: Execution,
    profiles: Sequence[Profile],
    inputs: Sequence[FoundTensor],
    outputs: Sequence[FoundTensor],
    notes: list[str],
) -> Signature:
    """The signature with the rows that may be merged: as configured if the engine takes so many, else by trial."""
    most = most_rows(profiles)
    usual = usual_rows(source, most, "the engine was built for")
    if source.max_batch_size is not None:
        return signature
    least = least_rows(profiles)
    if least > 1:
        notes.append(f"requests are not merged into batches: the engine takes no fewer than {least} rows")
        return signature
    trial_inputs = [_at_best(one, profiles) for one in inputs]
    limit = usual if source.path.suffix.lower() == ".onnx" else most
    with execution.steady():
        size, note = inferred_batching(execution.run, trial_inputs, outputs, limit, checks_indices=False)
    if note is not None:
        notes.append(note)
    return msgspec.structs.replace(signature, max_batch_size=size)


def _at_best(tensor: FoundTensor, profiles: Sequence[Profile]) -> FoundTensor:
    """The input with sizes that the engine takes, for made-up rows; its rows stay free."""
    shape, best = tensor.spec.shape, profiles[0][tensor.spec.name].opt
    if not shape:
        return tensor
    sizes = (shape[0], *(best[index] if size == -1 else size for index, size in enumerate(shape[1:], 1)))
    return FoundTensor(msgspec.structs.replace(tensor.spec, shape=sizes), tensor.symbols)


def _text(given: Mapping[str, Any], name: str) -> str | None:
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise LoadError(f"parameters.{name} is {value!r}, expected text")
    return value or None
