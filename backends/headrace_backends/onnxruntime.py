"""ONNX models on ONNX Runtime, with its results exactly; whether rows may be merged is proved at load."""

import ctypes
import mmap
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import NUMPY_DTYPES, DataType
from headrace_backends.base import Array, Backend, InputError, LoadError, ModelSource, RequestInfo

DEFAULT_MAX_BATCH_SIZE = 32
TRIAL_ELEMENTS = 1 << 25  # an input made up to prove batching is at most this large

_DATATYPES = {
    "tensor(bool)": DataType.BOOL,
    "tensor(uint8)": DataType.UINT8,
    "tensor(uint16)": DataType.UINT16,
    "tensor(uint32)": DataType.UINT32,
    "tensor(uint64)": DataType.UINT64,
    "tensor(int8)": DataType.INT8,
    "tensor(int16)": DataType.INT16,
    "tensor(int32)": DataType.INT32,
    "tensor(int64)": DataType.INT64,
    "tensor(float16)": DataType.FP16,
    "tensor(bfloat16)": DataType.BF16,
    "tensor(float)": DataType.FP32,
    "tensor(double)": DataType.FP64,
    "tensor(string)": DataType.BYTES,
}
_ONNX_BFLOAT16 = 16  # TensorProto.DataType of the ONNX specification
_GRAPH_LEVELS = {
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_PARAMETERS = ("intra_op_threads", "graph_optimization_level")
_LOAD_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)),
)
# With a model that loaded, these say that its input does not suit it. The others are about the model or the device.
_REFUSALS = (state.InvalidArgument, state.Fail, state.RuntimeException, state.NotImplemented)
_OUT_OF_MEMORY = re.compile(r"allocate memory|out of memory|bad_alloc|ALLOC_FAILED|bad allocation", re.IGNORECASE)
_DEVICE_FAILURE = re.compile(r"\bCUDA|\bCUDNN|\bCUBLAS|\bCUFFT")
_STATUS = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
# "/onnxruntime_src/x.h:91 onnxruntime::Y::Z(const A&, bool) const [with T = float] ": for ONNX Runtime's developers.
_CPP_LOCATION = re.compile(
    r"\S+\.(?:h|hpp|cc|cpp|cu|cuh):\d+ "
    r"(?:[^()\n]*::[\w~<>]+\((?:[^()]|\([^()]*\))*\)(?: const)?(?: \[with [^\]]*\])? )?"
)
# tf2onnx numbers every dimension that has no name, the batch's of an input and of its output alike: no names at all.
_PLACEHOLDER = re.compile(r"unk__\d+")
_EXTERNAL_DATA = re.compile(r"external data.*?\"([^\"]+)\"", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class _FileTensor:
    """An input or output as the file has it; ``symbols`` names the dimensions of any size, "" where nameless."""

    spec: TensorSpec
    symbols: tuple[str, ...]


class OnnxRuntimeBackend(Backend):
    """One inference session."""

    shareable = True

    def __init__(self, name: str, session: Any, signature: Signature, notes: list[str]) -> None:
        self._name = name
        self._session = session
        self._signature = signature
        self._notes = notes
        self._options = onnxruntime.RunOptions()
        self._options.log_severity_level = 4  # a refused input is told to its client; it is no line in the log
        self._output_names = [spec.name for spec in signature.outputs]
        self._strings = [spec.name for spec in signature.inputs if spec.datatype is DataType.BYTES]
        self._bfloats = [spec.name for spec in signature.inputs if spec.datatype is DataType.BF16]
        self._binds = any(spec.datatype is DataType.BF16 for spec in signature.outputs)
        self._plain = not (self._strings or self._bfloats or self._binds)

    @classmethod
    def load(cls, source: ModelSource) -> "OnnxRuntimeBackend":
        """Open the file and settle what its tensors are and whether its rows may be merged."""
        session = _open(source)
        found_inputs, found_outputs = _file_tensors(source, session)
        inputs, input_problems = _merged("input", found_inputs, source.inputs)
        outputs, output_problems = _merged("output", found_outputs, source.outputs)
        problems = [*input_problems, *output_problems]
        if source.max_batch_size:
            problems += _leading_problems(source.max_batch_size, [*found_inputs, *found_outputs], [*inputs, *outputs])
        if problems:
            raise LoadError(f"model '{source.name}': {'; '.join(problems)}")
        signature = Signature(
            tuple(tensor.spec for tensor in inputs),
            tuple(tensor.spec for tensor in outputs),
            source.max_batch_size or 0,
        )
        backend = cls(source.name, session, signature, [])
        if source.max_batch_size is None:
            backend._infer_batching(inputs, outputs)
        return backend

    @property
    def signature(self) -> Signature:
        """The file's tensors, with what the configuration overrides."""
        return self._signature

    def notes(self) -> list[str]:
        """How batching was decided."""
        return list(self._notes)

    def execute(self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> Mapping[str, Array]:
        """Run the session; what it says of an input goes to the client."""
        del requests
        try:
            if self._plain:
                feed = inputs if type(inputs) is dict else dict(inputs)
                values = self._session.run(self._output_names, feed, self._options)
            else:
                values = self._run_converted(dict(inputs))
        except _REFUSALS as error:
            raise self._translated(error) from error
        return dict(zip(self._output_names, values, strict=True))

    def close(self) -> None:
        """Let go of the session, and with it of the weights."""
        self._session = None

    def _run_converted(self, feed: dict[str, Any]) -> list[Any]:
        for name in self._strings:
            if name in feed:
                feed[name] = self._decoded(name, feed[name])
        for name in self._bfloats:
            if name in feed:
                feed[name] = _bfloat_value(feed[name])
        if not self._binds:
            values: list[Any] = self._session.run(self._output_names, feed, self._options)
            return values
        binding = self._session.io_binding()
        for name, value in feed.items():
            if not isinstance(value, onnxruntime.OrtValue):
                value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value).reshape(value.shape))  # noqa: PLW2901
            binding.bind_ortvalue_input(name, value)
        for name in self._output_names:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding, self._options)
        return [_array_of(value) for value in binding.get_outputs()]

    def _decoded(self, name: str, array: Array) -> Array:
        """ONNX strings are text: ONNX Runtime would take bytes b"a" for the string "b'a'"."""
        decoded = np.empty(array.size, dtype=np.object_)
        for index, element in enumerate(array.reshape(-1).tolist()):
            try:
                decoded[index] = element.decode() if isinstance(element, bytes) else element
            except UnicodeDecodeError as error:
                raise InputError(
                    f"model '{self._name}': input '{name}' has an element (number {index}) that is not UTF-8 "
                    f"({error}), expected text: the model's tensor holds strings"
                ) from None
        return decoded.reshape(array.shape)

    def _translated(self, error: Exception) -> Exception:
        text = str(error)
        message = f"model '{self._name}': {_trimmed(text)}"
        if _OUT_OF_MEMORY.search(text):
            return MemoryError(message)
        if _DEVICE_FAILURE.search(text):
            return RuntimeError(message)
        return InputError(message)

    def _infer_batching(self, inputs: list[_FileTensor], outputs: list[_FileTensor]) -> None:
        reason = _not_batchable(inputs, outputs)
        note = None
        if reason is None:
            reason, note = _trial(lambda arrays: self.execute(arrays, ()), inputs, outputs)
        if reason is not None:
            self._notes.append(f"requests are not merged into batches: {reason}")
            return
        self._signature = msgspec.structs.replace(self._signature, max_batch_size=DEFAULT_MAX_BATCH_SIZE)
        if note is not None:
            self._notes.append(note)


def _open(source: ModelSource) -> Any:
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.logid = source.name
    options.intra_op_num_threads, options.graph_optimization_level = _settings(source)
    providers = _providers(source)
    try:
        session = onnxruntime.InferenceSession(str(source.path), options, providers=providers)
    except _LOAD_ERRORS as error:
        missing = _EXTERNAL_DATA.search(str(error))
        if missing and not Path(missing[1]).exists():
            data = Path(missing[1]).name
            raise LoadError(
                f"model '{source.name}': '{source.path.name}' keeps weights in a file of its own, '{data}', "
                "and there is no such file beside it"
            ) from error
        raise LoadError(f"model '{source.name}': cannot load '{source.path.name}': {_trimmed(str(error))}") from error
    session.disable_fallback()  # else a failing GPU is swapped for the CPU with no word said
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != wanted:
        raise LoadError(
            f"model '{source.name}': device '{source.device}' does not work here: onnxruntime offers {wanted} and then "
            f"runs on {session.get_providers()[0]}; check the NVIDIA driver, CUDA and cuDNN"
        )
    return session


def _settings(source: ModelSource) -> tuple[int, Any]:
    unknown = sorted(set(source.parameters) - set(_PARAMETERS))
    if unknown:
        raise LoadError(
            f"model '{source.name}': the backend onnxruntime has no parameter {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(_PARAMETERS)}"
        )
    asked = source.parameters.get("intra_op_threads", source.threads)
    if isinstance(asked, bool) or not re.fullmatch(r"[1-9]\d{0,3}", str(asked)):
        raise LoadError(
            f"model '{source.name}': parameters.intra_op_threads is {asked!r}, expected a whole number from 1"
        )
    level = source.parameters.get("graph_optimization_level", "all")
    if level not in _GRAPH_LEVELS:
        raise LoadError(
            f"model '{source.name}': parameters.graph_optimization_level is {level!r}, "
            f"expected one of {', '.join(_GRAPH_LEVELS)}"
        )
    return min(int(asked), source.threads), _GRAPH_LEVELS[level]


def _providers(source: ModelSource) -> list[Any]:
    if source.device == "cpu":
        return ["CPUExecutionProvider"]
    match = re.fullmatch(r"gpu:(\d+)", source.device)
    if match is None:
        raise LoadError(f"model '{source.name}': device '{source.device}' is unknown, expected cpu or gpu:N")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise LoadError(
            f"model '{source.name}': device '{source.device}' needs an onnxruntime with CUDA, and this one has none; "
            "install it with: pip uninstall onnxruntime; pip install 'headrace[gpu]'"
        )
    return [("CUDAExecutionProvider", {"device_id": match[1]}), "CPUExecutionProvider"]


def _trimmed(message: str) -> str:
    """ONNX Runtime's message on one line, without its status code and C++ locations."""
    return " ".join(_CPP_LOCATION.sub("", _STATUS.sub("", message)).split())


def _file_tensors(source: ModelSource, session: Any) -> tuple[list[_FileTensor], list[_FileTensor]]:
    arguments = [*session.get_inputs(), *session.get_outputs()]
    problems = [
        f"'{argument.name}' is a {argument.type}, which the protocol has no datatype for"
        for argument in arguments
        if argument.type not in _DATATYPES
    ]
    types = [{argument.type for argument in group} for group in (session.get_inputs(), session.get_outputs())]
    if "tensor(string)" in types[0] and "tensor(bfloat16)" in types[1]:
        problems.append("ONNX Runtime's Python interface cannot both take strings and give bfloat16")
    if problems:
        raise LoadError(f"model '{source.name}': cannot serve '{source.path.name}': {'; '.join(problems)}")
    # ONNX Runtime reports [] both for a scalar and for a shape that is not known.
    declared = _declared_shapes(source.path) if any(not argument.shape for argument in arguments) else frozenset()
    inputs = [_file_tensor(argument, declared) for argument in session.get_inputs()]
    return inputs, [_file_tensor(argument, declared) for argument in session.get_outputs()]


def _file_tensor(argument: Any, declared: frozenset[str]) -> _FileTensor:
    dimensions = argument.shape
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in dimensions)
    symbols = tuple(size if isinstance(size, str) and not _PLACEHOLDER.fullmatch(size) else "" for size in dimensions)
    known = bool(dimensions) or argument.name in declared
    return _FileTensor(TensorSpec(argument.name, _DATATYPES[argument.type], shape if known else None), symbols)


def _declared_shapes(path: Path) -> frozenset[str]:
    """The names of the graph's inputs and outputs whose shape the file declares.

    Walks ModelProto.graph (7) -> input (11), output (12) -> type (2) -> tensor_type (1) -> shape (2), and steps
    over everything else, weights included, without reading it.
    """
    names: set[str] = set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for start, end in _messages(data, 0, len(data), 7):
            for first, last in chain(_messages(data, start, end, 11), _messages(data, start, end, 12)):
                ranges = [(first, last)]
                for field in (2, 1, 2):
                    ranges = [inner for outer in ranges for inner in _messages(data, *outer, field)]
                if ranges:
                    names.update(data[at:to].decode() for at, to in _messages(data, first, last, 1))
    return frozenset(names)


def _messages(data: mmap.mmap, position: int, end: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Where each length-delimited field of number ``wanted`` begins and ends, in a protobuf message."""
    while position < end:
        key, position = _varint(data, position)
        match key & 7:
            case 0:
                _, position = _varint(data, position)
            case 1:
                position += 8
            case 2:
                length, position = _varint(data, position)
                if key >> 3 == wanted:
                    yield position, position + length
                position += length
            case _:  # 5; the file was parsed before, so there are no others
                position += 4


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _merged(
    kind: str, found: list[_FileTensor], configured: Sequence[TensorSpec]
) -> tuple[list[_FileTensor], list[str]]:
    """The file's tensors, with their configured shapes in place of their own; and what does not agree."""
    overrides = {spec.name: spec for spec in configured}
    names = [tensor.spec.name for tensor in found]
    problems = [f"the file has no {kind} '{name}'; it has {names}" for name in overrides if name not in names]
    merged = []
    for tensor in found:
        wanted = overrides.get(tensor.spec.name)
        if wanted is None:
            merged.append(tensor)
            continue
        if wanted.datatype is not tensor.spec.datatype:
            problems.append(
                f"{kind} '{wanted.name}' is configured as {wanted.datatype}; the file has {tensor.spec.datatype}"
            )
        if wanted.optional:
            problems.append(f"{kind} '{wanted.name}' is configured as optional; the file needs it")
        shape = tensor.spec.shape if wanted.shape is None else wanted.shape
        if not _compatible(shape, tensor.spec.shape):
            problems.append(
                f"{kind} '{wanted.name}' is configured with shape {list(shape or ())}; "
                f"the file has {list(tensor.spec.shape or ())}"
            )
        merged.append(_FileTensor(msgspec.structs.replace(tensor.spec, shape=shape), tensor.symbols))
    return merged, problems


def _compatible(configured: tuple[int, ...] | None, found: tuple[int, ...] | None) -> bool:
    if configured is None or found is None:
        return True
    return len(configured) == len(found) and all(
        one == other or -1 in (one, other) for one, other in zip(configured, found, strict=True)
    )


def _leading_problems(size: int, found: list[_FileTensor], merged: list[_FileTensor]) -> list[str]:
    problems = {}
    for tensor in chain(merged, found):
        shape = tensor.spec.shape
        if shape is not None and shape[:1] != (-1,):
            problems[tensor.spec.name] = (
                f"max_batch_size is {size}, but the first dimension of '{tensor.spec.name}' {list(shape)} is "
                "not of any size, so requests cannot be merged; set max_batch_size to 0, or export the model with a "
                "batch dimension"
            )
    return list(problems.values())


def _not_batchable(inputs: list[_FileTensor], outputs: list[_FileTensor]) -> str | None:
    """Why the shapes alone forbid to merge requests, or None."""
    if not inputs:
        return "the model has no inputs"
    leading = {}
    for tensor in chain(inputs, outputs):
        shape = tensor.spec.shape
        if not shape or shape[0] != -1:
            declared = "no declared shape" if shape is None else f"shape {list(shape)}"
            return f"'{tensor.spec.name}' has {declared}, without a leading dimension of any size"
        leading[tensor.spec.name] = tensor.symbols[0] if tensor.symbols else ""
    if len(set(leading.values())) != 1:
        return f"the leading dimensions have different names: {leading}"
    symbol = next(iter(leading.values()))
    for tensor in chain(inputs, outputs):
        if symbol and symbol in tensor.symbols[1:]:
            return f"the leading dimension '{symbol}' is another dimension of '{tensor.spec.name}' too"
    return None


def _trial(
    run: Callable[[dict[str, Array]], Mapping[str, Array]], inputs: list[_FileTensor], outputs: list[_FileTensor]
) -> tuple[str | None, str | None]:
    """Whether three made-up rows give the same together as apart: why not, or else what is not certain.

    A model that mixes rows (a mean over the batch, a scale taken from all of it) can have the very shapes of one
    that does not, and merging would then give one client's data to another.
    """
    failure: Exception | None = None
    for uniform_size in (None, 8):  # sizes that differ find more; equal ones please models that tie them together
        rows = _made_up(inputs, uniform_size)
        if rows is None:
            return None, "batching could not be proved: the model's inputs are too large to be made up"
        first = {name: array[:1] for name, array in rows.items()}
        others = {name: array[1:] for name, array in rows.items()}
        try:
            alone = run(first)
        except (InputError, MemoryError, RuntimeError) as error:
            failure = error
            continue
        try:
            pair, together = run(others), run(rows)
        except (InputError, MemoryError, RuntimeError) as error:
            return f"one made-up row runs, several fail: {error}", None
        for tensor in outputs:
            name = tensor.spec.name
            problem = _row_problem(alone[name], pair[name], together[name])
            if problem:
                return f"output '{name}' {problem}", None
        return None, None
    return None, f"batching could not be proved: the model refuses made-up inputs ({failure})"


def _made_up(inputs: list[_FileTensor], uniform_size: int | None) -> dict[str, Array] | None:
    generator = np.random.default_rng(20240229)
    sizes: dict[str, int] = {}
    arrays: dict[str, Array] = {}
    for tensor in inputs:
        shape = [3]
        for size, symbol in zip((tensor.spec.shape or ())[1:], tensor.symbols[1:] or (), strict=False):
            made_up = uniform_size or (sizes.setdefault(symbol, 2 + len(sizes) % 7) if symbol else 4)
            shape.append(made_up if size == -1 else size)
        if prod(shape) > TRIAL_ELEMENTS:
            return None
        match tensor.spec.datatype:
            case DataType.BYTES:
                array: Array = generator.choice(np.array([b"a", b"b"], dtype=np.object_), shape)
            case DataType.FP16 | DataType.BF16 | DataType.FP32 | DataType.FP64:
                array = generator.standard_normal(shape).astype(NUMPY_DTYPES[tensor.spec.datatype])
            case datatype:
                array = generator.integers(0, 2, shape).astype(NUMPY_DTYPES[datatype])
        arrays[tensor.spec.name] = array
    return arrays


def _row_problem(alone: Array, pair: Array, together: Array) -> str | None:
    counts = [len(array) if array.ndim else 0 for array in (alone, pair, together)]
    if counts != [1, 2, 3]:
        return f"has {counts[0]}, {counts[1]} and {counts[2]} rows for 1, 2 and 3 rows of input"
    if alone.shape[1:] != pair.shape[1:] or alone.shape[1:] != together.shape[1:]:
        return "has a shape that depends on how many rows the input has"
    apart = np.concatenate([alone, pair])
    if together.dtype.kind in "OUSbiu":
        same = bool((apart == together).all())
    else:
        coarse = together.dtype.itemsize == 2  # half precision rounds at 1e-3 (FP16) and 1e-2 (BF16) already
        left, right = apart.astype(np.float64), together.astype(np.float64)
        scale = max(1.0, float(np.abs(left, where=np.isfinite(left), out=np.zeros_like(left)).max(initial=0.0)))
        tolerance = 5e-2 if coarse else 1e-3
        same = np.allclose(left, right, rtol=tolerance, atol=tolerance / 10 * scale, equal_nan=True)
    return None if same else "differs between rows that ran together and the same rows that ran apart"


def _bfloat_value(array: Array) -> Any:
    """An OrtValue of a bfloat16 array. Shares its memory, and keeps it alive."""
    bits = np.ascontiguousarray(array).reshape(array.shape).view(np.uint16)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_BFLOAT16)


def _array_of(value: Any) -> Array:
    """A numpy array of an OrtValue on the CPU: a copy where numpy has no such type of its own."""
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    shape = tuple(value.shape())
    size = value.tensor_size_in_bytes()
    if not size:
        return np.empty(shape, dtype=NUMPY_DTYPES[DataType.BF16])
    memory = (ctypes.c_char * size).from_address(value.data_ptr())
    return np.frombuffer(memory, dtype=NUMPY_DTYPES[DataType.BF16]).reshape(shape).copy()
