"""TensorFlow Lite models on LiteRT: float and quantised, their tensors as the file has them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from ai_edge_litert.interpreter import Interpreter

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import NUMPY_DTYPES, DataType
from headrace_backends import parameters, threads
from headrace_backends.base import Array, Backend, InputError, LoadError, ModelSource, RequestInfo
from headrace_backends.failures import blamed
from headrace_backends.litert_signature import FileSignature, chosen
from headrace_backends.row_trial import inferred_batching
from headrace_backends.specs import FoundTensor, agreed, signature_of

_PARAMETERS = ("intra_op_threads", "signature")
_IDENTIFIER = b"TFL3"  # of the flatbuffer schema, at byte 4
_ERRORS = (RuntimeError, ValueError, TypeError, SystemError)  # what the interpreter raises
# They keep something in the interpreter that would go from one client's request into the next one's answer.
_KEEPERS = frozenset({"VAR_HANDLE", "ASSIGN_VARIABLE", "READ_VARIABLE", "CALL_ONCE", "HASHTABLE"})


class LiteRtBackend(Backend):
    """One interpreter.

    Its memory is laid out anew whenever a batch has another size than the one before.
    """

    warms_up = True
    reads_only = True

    def __init__(self, runner: Any, interpreter: Any, signature: Signature, file: FileSignature) -> None:
        self._runner = runner
        self._interpreter = interpreter
        self._signature = signature
        self._file = file
        self._notes: list[str] = []

    @classmethod
    def load(cls, source: ModelSource) -> "LiteRtBackend":
        """Open the file and settle what its tensors are, whether rows may be merged, and how many threads it gets."""
        parameters.refuse_unknown("litert", source.parameters, _PARAMETERS)
        parameters.refuse_gpu("litert", source)
        asked = parameters.intra_op_threads(source.parameters)
        content = _read(source.path)
        first = threads.first_choice(source.threads, asked)
        interpreter = _opened(source.path.name, content, first)
        file = chosen(interpreter, source.parameters.get("signature"), source.path.name)
        inputs, outputs = agreed(source, file.inputs, file.outputs)
        signature = signature_of(source, inputs, outputs)
        backend = cls(file.runner(interpreter), interpreter, signature, file)
        if source.max_batch_size is None:
            backend._infer_batching(inputs, outputs)
        row_ms = threads.time_row(backend._run_made_up, inputs, batches=backend._signature.max_batch_size > 0)
        choice = threads.choose(source.threads, asked, row_ms)
        if choice.count != first:
            backend._interpreter = _opened(source.path.name, content, choice.count)
            backend._runner = file.runner(backend._interpreter)
        backend.cpu_threads = choice.busy
        backend._notes += [note for note in (choice.note, *file.notes) if note is not None]
        return backend

    @property
    def signature(self) -> Signature:
        """The file's tensors, with what the configuration overrides."""
        return self._signature

    def notes(self) -> list[str]:
        """How batching and threads were decided, and what quantised numbers mean."""
        return list(self._notes)

    def execute(self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> Mapping[str, Array]:
        """Run the model; what it says of an input goes to the client."""
        del requests
        given = {spec.name: self._readable(spec, inputs[spec.name]) for spec in self._signature.inputs}
        try:
            self._interpreter.reset_all_variables()  # recurrent layers keep their state in the interpreter
            answered = self._runner(**given)
        except _ERRORS as error:
            raise blamed(str(error), " ".join(str(error).split())) from error
        return {
            spec.name: np.asarray(answered[spec.name]).astype(NUMPY_DTYPES[spec.datatype], copy=False)
            for spec in self._signature.outputs
        }

    def close(self) -> None:
        """Let go of the interpreter, and with it of the weights."""
        self._runner = self._interpreter = None

    def _readable(self, spec: TensorSpec, array: Array) -> Array:
        if not array.size:  # of which some of its operators die, as its Softmax does
            raise InputError(f"input '{spec.name}' has the shape {list(array.shape)}; LiteRT takes no empty ones")
        if spec.datatype is DataType.BYTES:
            return np.asarray(array, dtype=np.object_)
        return np.ascontiguousarray(array).reshape(array.shape)

    def _infer_batching(self, inputs: list[FoundTensor], outputs: list[FoundTensor]) -> None:
        size, note = inferred_batching(self._run_made_up, inputs, outputs)
        self._signature = msgspec.structs.replace(self._signature, max_batch_size=size)
        if note is not None:
            self._notes.append(note)

    def _run_made_up(self, inputs: dict[str, Array]) -> Mapping[str, Array]:
        return self.execute(inputs, ())


def tensor_names(path: Path) -> dict[str, str]:
    """What the graph calls the tensors of the file's signature, by the names that clients use.

    Raises:
        LoadError: the file cannot be opened, or several signatures could be meant.
    """
    return chosen(_opened(path.name, _read(path), 1), None, path.name).tensor_names


def _read(path: Path) -> bytes:
    """The file's content: a mapped file that is written over in place would end the process."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LoadError(f"cannot read '{path.name}': {error.strerror or error}") from error
    if content[4:8] != _IDENTIFIER:
        raise LoadError(f"'{path.name}' is no TensorFlow Lite model: it does not have the mark {_IDENTIFIER.decode()}")
    return content


def _opened(name: str, content: bytes, count: int) -> Any:
    """An interpreter that is ready to be asked.

    Raises:
        LoadError: it cannot be made, or the model keeps something between requests.
    """
    try:
        interpreter = Interpreter(model_content=content, num_threads=count)
        kept = sorted({one["op_name"] for one in interpreter._get_ops_details()} & _KEEPERS)  # noqa: SLF001 - no other way
        if not kept:
            interpreter.allocate_tensors()
    except _ERRORS as error:
        raise LoadError(f"cannot load '{name}': {' '.join(str(error).split())}") from error
    if kept:
        raise LoadError(
            f"'{name}' keeps variables from one request to the next ({', '.join(kept)}), which would be other clients' "
            "requests; convert the model with frozen variables"
        )
    return interpreter
