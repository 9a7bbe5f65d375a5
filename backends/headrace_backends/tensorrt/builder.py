"""ONNX files built to engines: the same way with TensorRT 10, 11 and TensorRT-RTX, always strongly typed."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.core.model import TensorSpec
from headrace_backends.base import LoadError
from headrace_backends.specs import FoundTensor
from headrace_backends.tensorrt import typed_onnx
from headrace_backends.tensorrt.capability import Capability, all_told
from headrace_backends.tensorrt.capability import parse as parse_capabilities
from headrace_backends.tensorrt.datatypes import datatype_of
from headrace_backends.tensorrt.library import Library, make_logger, register_plugins
from headrace_backends.tensorrt.profiles import Profile

PRECISIONS = ("fp32", "tf32", *typed_onnx.HALVES)

_MAX_MESSAGES = 5  # of the parser's, in one reason
_DEFAULT_LEVEL, _HIGHEST_LEVEL = 3, 5


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How to build. Layers that the file quantises (QuantizeLinear, DequantizeLinear) run so at every precision.

    ``capabilities`` are the GPUs to build for, where that is not the one that is here: TensorRT-RTX only.
    """

    precision: str = "fp32"
    level: int = _DEFAULT_LEVEL
    workspace_bytes: int | None = None
    capabilities: tuple[Capability, ...] = ()


def read_options(parameters: Mapping[str, Any], library: Library) -> BuildOptions:
    """What the configuration asks for.

    Raises:
        LoadError: with everything that is wrong.
    """
    problems = []
    precision = str(parameters.get("precision", "fp32"))
    if precision not in PRECISIONS:
        problems.append(
            f"parameters.precision is {precision!r}, expected one of {', '.join(PRECISIONS)}; int8 and fp8 come from "
            "a file with QuantizeLinear and DequantizeLinear, at any of them"
        )
    level = _whole(parameters, "builder_level", _DEFAULT_LEVEL)
    if level is None or level > _HIGHEST_LEVEL:
        problems.append(f"parameters.builder_level is {parameters['builder_level']!r}, expected 0 to {_HIGHEST_LEVEL}")
    workspace = _whole(parameters, "workspace_bytes", 0)
    if workspace is None:
        problems.append(f"parameters.workspace_bytes is {parameters['workspace_bytes']!r}, expected a number of bytes")
    capabilities: tuple[Capability, ...] = ()
    if "compute_capability" in parameters:
        if library.is_rtx:
            capabilities = parse_capabilities(parameters["compute_capability"])
            _targets(library, capabilities)
        else:
            problems.append(
                "parameters.compute_capability is for TensorRT-RTX; TensorRT builds for the GPU that it builds on"
            )
    if problems:
        raise LoadError("; ".join(problems))
    return BuildOptions(precision, level or 0, workspace or None, capabilities)


@dataclass(frozen=True, slots=True)
class Parsed:
    """An ONNX file as the library has read it. ``keeps`` are objects that must live as long as ``network``."""

    network: Any
    builder: Any
    inputs: tuple[FoundTensor, ...]
    outputs: tuple[FoundTensor, ...]
    log: Any
    keeps: tuple[Any, ...] = ()


def parse_onnx(library: Library, path: Path, precision: str) -> Parsed:
    """Read an ONNX file into a network.

    Raises:
        BackendUnavailable: the library cannot make a builder here.
        LoadError: the parser's own words of what is wrong with the file, or a tensor that cannot be served.
    """
    module, log = library.module, make_logger(library)
    register_plugins(library, log)
    try:
        builder = module.Builder(log)
    except TypeError as error:  # its constructor gave null
        raise LoadError(f"{library} cannot build here: {log.told()}") from error
    # Where the flag is not offered any more there are no other networks.
    typed = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = module.OnnxParser(network, log)
    if precision in typed_onnx.HALVES:
        parsed = _parse_converted(parser, path, precision)
    else:
        parsed = parser.parse_from_file(str(path))
    if not parsed or not network.num_outputs:
        raise LoadError(f"{library} cannot read '{path.name}': {_parser_says(parser, network) or log.told()}")
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    shaping = [tensor.name for tensor in inputs if tensor.is_shape_tensor]
    if shaping:
        raise LoadError(
            f"the values of {shaping} decide about shapes, and engines are built here for shapes of inputs only; make "
            "them constants of the model, or build the engine with trtexec and serve that"
        )
    return Parsed(
        network,
        builder,
        tuple(_found(tensor, path) for tensor in inputs),
        tuple(_found(tensor, path) for tensor in outputs),
        log,
        (parser,),
    )


def build(
    library: Library,
    parsed: Parsed,
    options: BuildOptions,
    profiles: Sequence[Profile],
    timing_cache: bytes | None = None,
) -> tuple[bytes, bytes | None]:
    """The engine, and the timing cache with what was measured; None where the library keeps none.

    Raises:
        LoadError: the library refuses to build, in its own words.
    """
    module, builder = library.module, parsed.builder
    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    if options.precision != "tf32":
        config.clear_flag(module.BuilderFlag.TF32)  # on unless told otherwise, and it changes answers
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.capabilities:
        targets = _targets(library, options.capabilities)
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(target, index)
    for profile in profiles:
        _add_profile(library, parsed, config, profile)
    cache = None
    if not library.is_rtx:  # RTX measures nothing, and with a timing cache it wants a GPU
        cache = config.create_timing_cache(timing_cache or b"")
        if cache is not None:
            config.set_timing_cache(cache, ignore_mismatch=False)
    engine = builder.build_serialized_network(parsed.network, config)
    if engine is None:
        raise LoadError(
            f"{library} cannot build an engine ({options.precision}, {'; '.join(map(told, profiles))}): "
            f"{parsed.log.told()}"
        )
    measured = config.get_timing_cache() if cache is not None else None
    return bytes(engine), bytes(measured.serialize()) if measured is not None else None


def _add_profile(library: Library, parsed: Parsed, config: Any, profile: Profile) -> None:
    one = parsed.builder.create_optimization_profile()
    for name, shapes in profile.items():
        one.set_shape(name, shapes.min, shapes.opt, shapes.max)
    if config.add_optimization_profile(one) < 0:
        raise LoadError(f"{library} refuses the shapes {told(profile)}: {parsed.log.told()}")


def told(profile: Profile) -> str:
    """As ``x [1, 784] to [32, 784]``."""
    return ", ".join(f"{name} {shapes}" for name, shapes in profile.items())


def _targets(library: Library, capabilities: Sequence[Capability]) -> list[Any]:
    known = library.module.ComputeCapability
    found = [getattr(known, f"SM{major}{minor}", None) for major, minor in capabilities]
    if None in found:
        there = [name[2:] for name in known.__members__ if name.startswith("SM")]
        raise LoadError(
            f"{library} cannot build for compute capability {all_told(tuple(capabilities))}; it can for "
            f"{', '.join(f'{name[:-1]}.{name[-1]}' for name in there)}"
        )
    return found


def _parse_converted(parser: Any, path: Path, precision: str) -> bool:
    import onnx

    model = typed_onnx.convert(path, precision)
    if model.ByteSize() < onnx.checker.MAXIMUM_PROTOBUF:
        return bool(parser.parse(model.SerializeToString()))
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:  # more than one protobuf can hold
        converted = Path(folder) / path.name
        onnx.save(model, str(converted), save_as_external_data=True, location="weights")
        return bool(parser.parse_from_file(str(converted)))


def _parser_says(parser: Any, network: Any) -> str:
    if not parser.num_errors and not network.num_outputs:
        return "it has no graph with outputs"
    errors = [parser.get_error(index) for index in range(min(_MAX_MESSAGES, parser.num_errors))]
    return "; ".join(_parser_line(error) for error in errors)


def _parser_line(error: Any) -> str:
    node = error.node_name() or error.node()
    where = f"node {node}" + (f" '{error.node_operator()}'" if error.node_operator() else "") + ": "
    return (where if error.node_operator() else "") + " ".join(error.desc().split())


def _found(tensor: Any, path: Path) -> FoundTensor:
    shape = _shape(tensor)
    symbols = tuple((tensor.get_dimension_name(index) or "") for index in range(len(shape or ())))
    datatype = datatype_of(tensor.dtype, f"'{tensor.name}' of '{path.name}'")
    return FoundTensor(TensorSpec(tensor.name, datatype, shape), symbols)


def _shape(tensor: Any) -> tuple[int, ...] | None:
    try:
        return tuple(tensor.shape)
    except ValueError:  # a length below 0: not even the number of dimensions is known
        return None


def _whole(parameters: Mapping[str, Any], name: str, default: int) -> int | None:
    value = parameters.get(name, default)
    if isinstance(value, bool) or not str(value).isdecimal():
        return None
    return int(value)
