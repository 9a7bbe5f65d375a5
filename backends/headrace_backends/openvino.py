"""Models on OpenVINO: its own IR, and ONNX and TensorFlow Lite files where the configuration asks for this backend."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from headrace.core.model import Signature
from headrace.core.tensor import NUMPY_DTYPES, DataType
from headrace_backends import parameters, threads
from headrace_backends.base import Array, Backend, InputError, LoadError, ModelSource, RequestInfo
from headrace_backends.failures import blamed
from headrace_backends.openvino_model import found_tensors, most_rows, read_model, trimmed
from headrace_backends.openvino_quietly import ov
from headrace_backends.row_trial import inferred_batching
from headrace_backends.specs import FoundTensor, agreed, signature_of, usual_rows

_PARAMETERS = ("intra_op_threads", "precision", "dynamic_quantization", "profiling")
_PRECISIONS = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}  # and what OpenVINO calls the CPU's ability to do so
_NARROWED = {DataType.INT64: "INT32", DataType.UINT64: "INT32", DataType.FP64: "FP32"}


class OpenVinoBackend(Backend):
    """One compiled model with one inference request.

    It is compiled for any number of rows: measured, each size costs a few milliseconds the first time it comes and is
    then as quick, within 5 %, as in a model compiled for that size alone.
    """

    warms_up = True
    reads_only = True

    def __init__(self, request: Any, signature: Signature) -> None:
        self._request = request
        self._signature = signature
        self._notes: list[str] = []

    @classmethod
    def load(cls, source: ModelSource) -> "OpenVinoBackend":
        """Open the file and settle what its tensors are, whether rows may be merged, and how many threads it gets."""
        parameters.refuse_unknown("openvino", source.parameters, _PARAMETERS)
        parameters.refuse_gpu("openvino", source)
        asked = parameters.intra_op_threads(source.parameters)
        core = ov.Core()
        core.set_property({"ENABLE_MMAP": False})  # a mapped .bin that is written over in place ends the process
        properties = _properties(source, core)
        model = read_model(source, core)
        inputs, outputs = agreed(source, *found_tensors(source, model))
        most = usual_rows(source, most_rows(model), f"'{source.path.name}' takes")
        signature = signature_of(source, inputs, outputs)
        first = threads.first_choice(source.threads, asked)
        backend = cls(_compiled(source, core, model, first, properties), signature)
        if source.max_batch_size is None:
            backend._infer_batching(inputs, outputs, most)
        row_ms = threads.time_row(backend._run_made_up, inputs, batches=backend._signature.max_batch_size > 0)
        choice = threads.choose(source.threads, asked, row_ms)
        if choice.count != first:
            backend._request = None  # before the other is made: the weights need not be there twice
            backend._request = _compiled(source, core, model, choice.count, properties)
        backend.cpu_threads = choice.busy
        backend._tell(choice.note, _narrowing(signature))
        return backend

    @property
    def signature(self) -> Signature:
        """The file's tensors, with what the configuration overrides."""
        return self._signature

    def notes(self) -> list[str]:
        """How batching and threads were decided, and what is computed with fewer bits than the file says."""
        return list(self._notes)

    def execute(self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> Mapping[str, Array]:
        """Run the model. Outputs are views of its own memory, good until the next call."""
        del requests
        request = self._request
        held = []  # an input tensor is no more than a pointer to what it was made of
        for index, spec in enumerate(self._signature.inputs):
            array = _readable(inputs[spec.name])
            held.append(array)
            try:
                request.set_input_tensor(index, _tensor(array))
            except RuntimeError as error:
                raise InputError(f"input '{spec.name}' does not suit the model: {trimmed(str(error))}") from error
        try:
            request.infer()
        except RuntimeError as error:
            raise blamed(str(error), trimmed(str(error))) from error
        return {
            spec.name: request.get_output_tensor(index).data.view(NUMPY_DTYPES[spec.datatype])
            for index, spec in enumerate(self._signature.outputs)
        }

    def operator_times(self, inputs: Mapping[str, Array]) -> list[tuple[str, str, float]]:
        """Run the model, and tell what each operator takes: its name, its kind, microseconds; in order of execution.

        Operators are those that OpenVINO runs, so after it has merged some; times are means over all runs since the
        model was loaded. Needs the parameter ``profiling``.
        """
        self.execute(inputs, ())
        return [
            (one.node_name, one.node_type, one.real_time.total_seconds() * 1e6)
            for one in self._request.profiling_info
            if one.status == ov.ProfilingInfo.Status.EXECUTED
        ]

    def close(self) -> None:
        """Let go of the request, and with it of the compiled model and the weights."""
        self._request = None

    def _infer_batching(self, inputs: list[FoundTensor], outputs: list[FoundTensor], limit: int) -> None:
        size, note = inferred_batching(self._run_made_up, inputs, outputs, limit)
        self._signature = msgspec.structs.replace(self._signature, max_batch_size=size)
        self._tell(note)

    def _run_made_up(self, inputs: dict[str, Array]) -> Mapping[str, Array]:
        return self.execute(inputs, ())

    def _tell(self, *notes: str | None) -> None:
        self._notes += [note for note in notes if note is not None]


def _properties(source: ModelSource, core: Any) -> dict[str, Any]:
    """What the model is compiled with, but for its threads."""
    precision = parameters.one_of(source.parameters, "precision", _PRECISIONS, "f32")
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if _PRECISIONS[precision] not in able:
        offered = ", ".join(name for name, ability in _PRECISIONS.items() if ability in able)
        raise LoadError(f"parameters.precision is '{precision}', and OpenVINO offers {offered} on this CPU")
    properties = {
        "INFERENCE_PRECISION_HINT": precision,  # else it takes bf16 where the CPU has it
        "ENABLE_CPU_PINNING": False,  # other models' threads are on the same CPUs
        "ENABLE_HYPER_THREADING": True,  # the number of threads is settled already
        "PERF_COUNT": parameters.flag(source.parameters, "profiling"),
    }
    if not parameters.flag(source.parameters, "dynamic_quantization"):
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    return properties


def _compiled(source: ModelSource, core: Any, model: Any, count: int, properties: dict[str, Any]) -> Any:
    """An inference request of the model, compiled for so many threads. It keeps all it needs."""
    try:
        return core.compile_model(model, "CPU", {**properties, **_threading(count)}).create_infer_request()
    except RuntimeError as error:
        raise LoadError(f"OpenVINO cannot compile '{source.path.name}': {trimmed(str(error))}") from error


def _threading(count: int) -> dict[str, int]:
    """How OpenVINO is to use so many threads, of which it takes no more than there are CPUs.

    Without a stream the model runs on the calling thread alone. A stream of one thread would cost 15 us a run; and in
    OpenVINO 2026.4 its ``infer`` loses exceptions, so that a refused input would get an empty answer.
    """
    count = min(count, len(os.sched_getaffinity(0)))
    return {"NUM_STREAMS": 0} if count == 1 else {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": count}


def _narrowing(signature: Signature) -> str | None:
    found = {spec.datatype for spec in (*signature.inputs, *signature.outputs)} & _NARROWED.keys()
    if not found:
        return None
    told = ", ".join(f"{datatype} as {_NARROWED[datatype]}" for datatype in sorted(found))
    return f"OpenVINO computes {told}: larger or finer numbers are not kept"


def _readable(array: Array) -> Array:
    """The array, or a copy where OpenVINO takes no view of it: of memory that may only be read, or with gaps."""
    flags = array.flags
    return array if flags.c_contiguous and flags.writeable else np.array(array, order="C")


def _tensor(array: Array) -> Any:
    """A view of the array. The request that it is set in does not keep the array alive."""
    if array.dtype == NUMPY_DTYPES[DataType.BF16]:  # numpy has no such type of its own
        return ov.Tensor(array.view(np.uint16), ov.Shape(array.shape), ov.Type.bf16)
    return ov.Tensor(array, shared_memory=True)
