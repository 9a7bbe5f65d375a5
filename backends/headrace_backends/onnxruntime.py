"""ONNX models on ONNX Runtime, with its results exactly; whether rows may be merged is proved at load."""

import ctypes
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import NUMPY_DTYPES, DataType
from headrace_backends import parameters, threads
from headrace_backends.base import Array, Backend, InputError, LoadError, ModelSource, RequestInfo
from headrace_backends.failures import blamed
from headrace_backends.made_up import made_up
from headrace_backends.onnx_file import declared_shapes, indexes, operators
from headrace_backends.onnxruntime_bound import BoundSession
from headrace_backends.onnxruntime_libraries import load_libraries
from headrace_backends.onnxruntime_providers import (
    CPU,
    GPU_PARAMETERS,
    ON_CPU,
    TENSORRT,
    ProviderChoice,
    choose_providers,
    not_working,
    on_cpu_instead,
)
from headrace_backends.row_trial import MIXES, REFUSALS, inferred_batching
from headrace_backends.specs import FoundTensor, agreed, signature_of

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
PARAMETERS = ("intra_op_threads", "graph_optimization_level", "allow_spinning", *GPU_PARAMETERS)
_LOAD_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)),
)
# With a model that loaded, these say that its input does not suit it. The others are about the model or the device.
_REFUSALS = (state.InvalidArgument, state.Fail, state.RuntimeException, state.NotImplemented)
_DEVICE_ERRORS = (state.EPFail,)  # an execution provider's, on a GPU
_STATUS = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
# "/onnxruntime_src/x.h:91 onnxruntime::Y::Z(const A&, bool) const [with T = float] ": for ONNX Runtime's developers.
_CPP_LOCATION = re.compile(
    r"\S+\.(?:h|hpp|cc|cpp|cu|cuh):\d+ "
    r"(?:[^()\n]*::[\w~<>]+\((?:[^()]|\([^()]*\))*\)(?: const)?(?: \[with [^\]]*\])? )?"
)
# tf2onnx numbers every dimension that has no name, the batch's of an input and of its output alike: no names at all.
_PLACEHOLDER = re.compile(r"unk__\d+")
_SCALED_TOGETHER = (
    "; the model is quantised dynamically (DynamicQuantizeLinear), with one scale for the whole batch, so that every "
    "row is rounded by what the others hold; quantise it statically to have rows merged, or set max_batch_size if "
    "such differences do not matter"
)
_EXTERNAL_DATA = re.compile(r"external data.*?\"([^\"]+)\"", re.IGNORECASE | re.DOTALL)
_NOT_WHOLE = ("Protobuf parsing failed", "No graph")  # of a file that is cut short, or not ONNX at all


class OnnxRuntimeBackend(Backend):
    """One inference session."""

    warms_up = True
    reads_only = True

    def __init__(self, session: Any, signature: Signature) -> None:
        self._session = session
        self._signature = signature
        self._notes: list[str] = []
        self._options = onnxruntime.RunOptions()
        self._options.log_severity_level = 4  # a refused input is told to its client; it is no line in the log
        self._output_names = [spec.name for spec in signature.outputs]
        self._strings = [spec.name for spec in signature.inputs if spec.datatype is DataType.BYTES]
        self._bfloats = [spec.name for spec in signature.inputs if spec.datatype is DataType.BF16]
        self._binds = any(spec.datatype is DataType.BF16 for spec in signature.outputs)
        self._plain = not (self._strings or self._bfloats or self._binds)
        self._bound: BoundSession | None = None  # on a GPU

    @classmethod
    def load(cls, source: ModelSource) -> Self:
        """Open the file and settle what its tensors are, whether rows may be merged, and how many threads it gets."""
        parameters.refuse_unknown("onnxruntime", source.parameters, PARAMETERS)
        asked = parameters.intra_op_threads(source.parameters)
        if source.gpu is not None:
            load_libraries(onnxruntime, tensorrt=source.parameters.get("provider") == "tensorrt")
        choice = choose_providers(source, onnxruntime.get_available_providers())
        on_cpu = choice.wanted == CPU
        count = threads.first_choice(source.threads, asked if on_cpu else asked or source.threads)
        session, choice = _open(source, count, choice)
        on_cpu = choice.wanted == CPU
        found_inputs, found_outputs = _file_tensors(source, session)
        inputs, outputs = agreed(source, found_inputs, found_outputs)
        signature = signature_of(source, inputs, outputs)
        backend = cls(session, signature)
        if choice.note is not None:
            backend._notes.append(choice.note)
        if not on_cpu:
            backend._bind(source.gpu or 0, choice)
        if source.max_batch_size is None:
            backend._infer_batching(source.path, inputs, outputs, checks_indices=on_cpu or not indexes(source.path))
        if on_cpu:
            backend._settle_threads(source, asked, inputs)
        elif choice.wanted == TENSORRT:
            backend._build_for_all_rows(inputs)
        return backend

    @property
    def signature(self) -> Signature:
        """The file's tensors, with what the configuration overrides."""
        return self._signature

    def notes(self) -> list[str]:
        """How batching and threads were decided."""
        return list(self._notes)

    def execute(self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> Mapping[str, Array]:
        """Run the session; what it says of an input goes to the client."""
        del requests
        try:
            if self._bound is not None:
                values = self._bound.run(inputs)
            elif self._plain:
                feed = inputs if type(inputs) is dict else dict(inputs)
                values = self._session.run(self._output_names, feed, self._options)
            else:
                values = self._run_converted(dict(inputs))
        except _REFUSALS as error:
            raise blamed(str(error), _trimmed(str(error))) from error
        except _DEVICE_ERRORS as error:
            raise blamed(f"CUDA: {error}", _trimmed(str(error))) from error
        return dict(zip(self._output_names, values, strict=True))

    def begin_profile(self, source: ModelSource, prefix: Path) -> None:
        """Open the session again, with as many threads, so that it notes what each operator takes from now on."""
        count = self._session.get_session_options().intra_op_num_threads
        self._session = None
        self._session, _ = _open(source, count, ON_CPU, str(prefix))

    def end_profile(self) -> Path:
        """The file with what was noted since ``begin_profile``: ``prefix`` and a time. It is the caller's."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Let go of the session, and with it of the weights."""
        self._bound = None  # its memory is the session's
        self._session = None

    def _bind(self, gpu: int, choice: ProviderChoice) -> None:
        """Have inputs and outputs keep their memory on the GPU, where their types allow it."""
        names = [spec.name for spec in self._signature.inputs]
        if self._plain and names:
            graphs = choice.cuda_graphs
            self._bound = BoundSession(self._session, names, self._output_names, "cuda", gpu, cuda_graphs=graphs)
        elif choice.cuda_graphs:
            raise LoadError(
                "parameters.cuda_graphs: not for models with inputs or outputs of BYTES or BF16, or no inputs"
            )

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
                    f"input '{name}' has an element (number {index}) that is not UTF-8 "
                    f"({error}), expected text: the model's tensor holds strings"
                ) from None
        return decoded.reshape(array.shape)

    def _infer_batching(
        self, path: Path, inputs: list[FoundTensor], outputs: list[FoundTensor], *, checks_indices: bool
    ) -> None:
        size, note = inferred_batching(self._run_made_up, inputs, outputs, checks_indices=checks_indices)
        self._signature = msgspec.structs.replace(self._signature, max_batch_size=size)
        if note is not None:
            scaled = MIXES in note and any(name.startswith("DynamicQuantize") for name in operators(path))
            self._notes.append(note + _SCALED_TOGETHER if scaled else note)

    def _build_for_all_rows(self, inputs: list[FoundTensor]) -> None:
        """Have TensorRT meet the largest batch: it builds again whenever one is beyond all that it has seen."""
        most = self._signature.max_batch_size
        for rows in (1, most) if most else ():
            arrays = made_up(inputs, rows)
            if arrays is not None:
                with suppress(*REFUSALS):  # it may have good reasons; then it builds in requests
                    self._run_made_up(arrays)

    def _settle_threads(self, source: ModelSource, asked: int | None, inputs: list[FoundTensor]) -> None:
        """Give a model that turns out to be heavy a session with all its threads."""
        row_ms = threads.time_row(self._run_made_up, inputs, batches=self._signature.max_batch_size > 0)
        choice = threads.choose(source.threads, asked, row_ms)
        if choice.count != threads.first_choice(source.threads, asked):
            self._session = None  # before the other is opened: the weights need not be there twice
            self._session, _ = _open(source, choice.count, ON_CPU)
        self.cpu_threads = choice.busy
        if choice.note is not None:
            self._notes.append(choice.note)

    def _run_made_up(self, inputs: dict[str, Array]) -> Mapping[str, Array]:
        return self.execute(inputs, ())


def _open(source: ModelSource, count: int, choice: ProviderChoice, profile: str = "") -> tuple[Any, ProviderChoice]:
    """A session, and what it runs on: not what was chosen, where that does not work and the CPU will do."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = bool(profile)
    options.profile_file_prefix = profile
    options.intra_op_num_threads = count
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = _graph_level(source)
    options.log_severity_level = 3
    options.logid = source.name
    # Threads that wait for their share of an operator by spinning are quicker than those that have to be woken: MiniLM
    # on two by 4 to 15 %, and by half where it was idle before. Those that go on spinning after a run take CPUs from
    # other models and the front process: two busy models have half the speed then.
    spins = parameters.flag(source.parameters, "allow_spinning", default=None)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if spins is False else "1")
    options.add_session_config_entry("session.force_spinning_stop", "0" if spins else "1")
    try:
        # By itself it would swap a provider that cannot be made for another, and tell nobody but standard output why.
        session = onnxruntime.InferenceSession(
            str(source.path), options, providers=list(choice.providers), enable_fallback=0
        )
    except _LOAD_ERRORS as error:
        if choice.fallback:
            problem = f"device '{source.device}' does not work here: {_trimmed(str(error))}"
            return _open(source, count, on_cpu_instead(problem), profile)
        missing = _EXTERNAL_DATA.search(str(error))
        if missing and not Path(missing[1]).exists():
            raise LoadError(
                f"'{source.path.name}' keeps weights in a file of its own, '{Path(missing[1]).name}', "
                "and there is no such file beside it"
            ) from error
        message = _trimmed(str(error))
        whole = not any(sign in message for sign in _NOT_WHOLE)
        problem = message if whole else f"it is not a whole ONNX file: {message}"
        raise LoadError(f"cannot load '{source.path.name}': {problem}") from error
    running_on = session.get_providers()[0]
    if running_on == choice.wanted:
        return session, choice
    problem = not_working(source, choice, running_on)
    if not choice.fallback or running_on != CPU:
        raise LoadError(problem)
    return session, on_cpu_instead(problem)


def _graph_level(source: ModelSource) -> Any:
    return _GRAPH_LEVELS[parameters.one_of(source.parameters, "graph_optimization_level", _GRAPH_LEVELS, "all")]


def _trimmed(message: str) -> str:
    """ONNX Runtime's message on one line, without its status code and C++ locations."""
    return " ".join(_CPP_LOCATION.sub("", _STATUS.sub("", message)).split())


def _file_tensors(source: ModelSource, session: Any) -> tuple[list[FoundTensor], list[FoundTensor]]:
    arguments = [*session.get_inputs(), *session.get_outputs()]
    try:
        names = [(argument.name, argument.shape) for argument in arguments]
    except UnicodeDecodeError as error:
        raise LoadError(f"cannot load '{source.path.name}': a name in it is no text ({error})") from error
    problems = [
        f"'{argument.name}' is a {argument.type}, which the protocol has no datatype for"
        for argument in arguments
        if argument.type not in _DATATYPES
    ]
    types = [{argument.type for argument in group} for group in (session.get_inputs(), session.get_outputs())]
    if "tensor(string)" in types[0] and "tensor(bfloat16)" in types[1]:
        problems.append("ONNX Runtime's Python interface cannot both take strings and give bfloat16")
    if problems:
        raise LoadError(f"cannot serve '{source.path.name}': {'; '.join(problems)}")
    # ONNX Runtime reports [] both for a scalar and for a shape that is not known.
    declared = declared_shapes(source.path) if any(not shape for _, shape in names) else frozenset()
    inputs = [_file_tensor(argument, declared) for argument in session.get_inputs()]
    return inputs, [_file_tensor(argument, declared) for argument in session.get_outputs()]


def _file_tensor(argument: Any, declared: frozenset[str]) -> FoundTensor:
    dimensions = argument.shape
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in dimensions)
    symbols = tuple(size if isinstance(size, str) and not _PLACEHOLDER.fullmatch(size) else "" for size in dimensions)
    known = bool(dimensions) or argument.name in declared
    return FoundTensor(TensorSpec(argument.name, _DATATYPES[argument.type], shape if known else None), symbols)


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
