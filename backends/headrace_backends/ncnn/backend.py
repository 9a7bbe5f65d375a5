"""Models on ncnn, whose convolutions by Winograd's method take fewer multiplications than those of other runtimes."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import ncnn
import numpy as np

from headrace.core.model import Signature, TensorSpec
from headrace.core.tensor import DataType
from headrace_backends import parameters, threads
from headrace_backends.base import Array, Backend, InputError, LoadError, ModelSource, RequestInfo
from headrace_backends.ncnn.graph import Layer, NcnnGraph, NotNcnn
from headrace_backends.ncnn.rule import MOST_NUMBERS
from headrace_backends.ncnn.sizes import is_checked, refusal, unserved
from headrace_backends.ncnn.weights import missing
from headrace_backends.ncnn.windows import fails_in_16_bits
from headrace_backends.specs import FoundTensor, agreed, signature_of

_PARAMETERS = ("intra_op_threads", "precision")
_PRECISIONS = ("f32", "bf16")
_NO_TENSOR = -100  # ncnn's code where it could not make one
_MOST_DIMENSIONS = 5  # with that of the rows
_MOST_SHAPES = 1024  # that are remembered


class NcnnBackend(Backend):
    """One net. ncnn knows no batches: rows run one after the other, each on all threads.

    So a row's answer is its own whatever the model does, and merging requests brings nothing but a wait for the first
    of them. They are merged only where the configuration says so. All numbers are FP32.

    ncnn looks at few sizes: given others than its weights are for, it computes with whatever lies behind them in
    memory, or dies. So files are looked at before it reads them, and layers' inputs before rows of new shapes are run.
    """

    warms_up = True
    reads_only = True

    def __init__(self, net: Any, layers: Sequence[Layer], signature: Signature) -> None:
        self._net = net
        self._checked = [layer for layer in layers if is_checked(layer)]
        self._signature = signature
        self._fitting: set[tuple[tuple[int, ...], ...]] = set()  # shapes of rows that all layers can be given
        self._notes: list[str] = []

    @classmethod
    def load(cls, source: ModelSource) -> "NcnnBackend":
        """Read both files; what the first does not say of its inputs must be configured."""
        parameters.refuse_unknown("ncnn", source.parameters, _PARAMETERS)
        parameters.refuse_gpu("ncnn", source)
        asked = parameters.intra_op_threads(source.parameters)
        first = threads.first_choice(source.threads, asked)
        graph = _read(source.path)
        precision = parameters.one_of(source.parameters, "precision", _PRECISIONS, "f32")
        for layer in filter(fails_in_16_bits, graph.layers if precision == "bf16" else ()):
            raise LoadError(
                f"layer '{layer.name}' ({layer.kind}) is one that ncnn computes wrongly in bf16: leave precision away"
            )
        inputs, outputs = agreed(source, [_found(*one) for one in graph.inputs.items()], _any_shapes(graph.outputs))
        _refuse_untold(source, inputs)
        backend = cls(
            _opened(source.path, graph, first, precision), graph.layers, signature_of(source, inputs, outputs)
        )
        backend._learn_shapes()
        row_ms = threads.time_row(backend._run_made_up, inputs, batches=True)
        choice = threads.choose(source.threads, asked, row_ms)
        if choice.count != first:  # weights are laid out for a number of threads
            backend._net = None  # before the other is made: the weights need not be there twice
            backend._net = _opened(source.path, graph, choice.count, precision)
        backend.cpu_threads = choice.busy
        if source.max_batch_size is None:
            backend._notes.append("requests are not merged into batches: ncnn runs one row after the other anyway")
        if choice.note is not None:
            backend._notes.append(choice.note)
        return backend

    @property
    def signature(self) -> Signature:
        """The files' tensors, with what the configuration overrides."""
        return self._signature

    def notes(self) -> list[str]:
        """How threads were decided."""
        return list(self._notes)

    def execute(self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]) -> Mapping[str, Array]:
        """Run the rows, FP32 each, and put their answers together."""
        del requests
        given = {spec.name: np.ascontiguousarray(inputs[spec.name]) for spec in self._signature.inputs}
        counts = {name: len(array) for name, array in given.items()}
        (rows, *others) = set(counts.values())
        if others:
            raise InputError(f"inputs have different numbers of rows: {counts}")
        if not rows:
            raise InputError("there are no rows, and ncnn does not say how an answer of none would look")
        self._refuse_unfit({name: array[0] for name, array in given.items()})
        answers = [self._run_row({name: array[row] for name, array in given.items()}) for row in range(rows)]
        return {
            spec.name: np.stack([answer[place] for answer in answers])
            for place, spec in enumerate(self._signature.outputs)
        }

    def close(self) -> None:
        """Let go of the net, and with it of the weights."""
        self._net = None

    def _refuse_unfit(self, row: Mapping[str, Array]) -> None:
        """Refuse shapes of rows that a layer cannot be given. Others are remembered: looking costs a run of the net."""
        shapes = tuple(array.shape for array in row.values())
        if shapes in self._fitting:
            return
        for name, array in row.items():
            if not array.size:
                raise InputError(f"input '{name}' has rows of shape {list(array.shape)}; ncnn takes no empty ones")
        extractor = self._extractor(row)
        extractor.set_light_mode(False)  # else it forgets what has been read by all its readers
        for layer in self._checked:
            # In the order of execution: what is computed here has been looked at before.
            problem = refusal(layer, [_shape(self._extracted(extractor, name)) for name in layer.reads])
            if problem is not None:
                raise InputError(problem)
        if len(self._fitting) >= _MOST_SHAPES:
            self._fitting.clear()
        self._fitting.add(shapes)

    def _run_row(self, row: Mapping[str, Array]) -> list[Array]:
        extractor = self._extractor(row)
        # Copies: the memory is the extractor's.
        return [np.array(self._extracted(extractor, spec.name)) for spec in self._signature.outputs]

    def _extractor(self, row: Mapping[str, Array]) -> Any:
        extractor = self._net.create_extractor()
        for name, array in row.items():
            # A copy, in memory of its own: layers may write to what they are given.
            extractor.input(name, ncnn.Mat(array).clone())
        return extractor

    def _extracted(self, extractor: Any, name: str) -> Any:
        code, answer = extractor.extract(name)
        if code:
            # It tells no lack of memory from a size that comes to nothing, as of an image smaller than the kernel.
            why = "nothing is left of them, or memory is short" if code == _NO_TENSOR else f"code {code}"
            raise InputError(f"ncnn cannot compute '{name}' of such inputs: {why}; its own words are in the log")
        return answer

    def _learn_shapes(self) -> None:
        """Give the outputs the shapes that come of the inputs' own, where none of those is free and none configured."""
        signature = self._signature
        shapes = [(spec.shape or ())[1:] for spec in signature.inputs]
        if any(-1 in shape for shape in shapes):
            return
        row = {
            spec.name: np.zeros((1, *shape), np.float32) for spec, shape in zip(signature.inputs, shapes, strict=True)
        }
        try:
            answers = self.execute(row, ())
        except InputError as error:
            raise LoadError(f"the model does not take its own shapes: {error}") from error
        # All inputs of a request have as many rows.
        count = 1 if any((spec.shape or ())[:1] == (1,) for spec in signature.inputs) else -1
        outputs = []
        for spec in signature.outputs:
            shape = (count, *answers[spec.name].shape[1:])
            if spec.shape is not None and not _fits(spec.shape, shape):
                raise LoadError(f"output '{spec.name}' is configured as {list(spec.shape)}; it is {list(shape)}")
            outputs.append(TensorSpec(spec.name, spec.datatype, spec.shape or shape))
        self._signature = Signature(signature.inputs, tuple(outputs), signature.max_batch_size)

    def _run_made_up(self, inputs: dict[str, Array]) -> Mapping[str, Array]:
        return self.execute(inputs, ())


def _read(path: Path) -> NcnnGraph:
    """The layers, once it is clear that all of them are served and that their weights are there."""
    weights = path.with_suffix(".bin")
    try:
        graph = NcnnGraph.parse(path.read_text(encoding="utf-8"))
        counts = (len(graph.inputs), len(graph.outputs))
        if not all(counts):
            raise LoadError(f"'{path.name}' has {counts[0]} inputs and {counts[1]} outputs")
        for problem in filter(None, map(unserved, graph.layers)):
            raise LoadError(f"'{path.name}' is not served: {problem}")
        if not weights.is_file():
            raise LoadError(f"'{path.name}' needs its weights beside it, in '{weights.name}', which is not there")
        lacking = missing(graph.layers, weights)
    except OSError as error:
        raise LoadError(f"cannot read '{path.name}': {error.strerror or error}") from error
    except ValueError as error:  # also where it is no text at all
        why = str(error) if isinstance(error, NotNcnn) else "it is no text"
        raise LoadError(f"'{path.name}' is no ncnn model: {why}") from error
    if lacking:
        raise LoadError(f"'{weights.name}' does not have the weights of '{path.name}': {lacking}")
    return graph


def _opened(path: Path, graph: NcnnGraph, count: int, precision: str) -> Any:
    """The net, ready to run on so many threads."""
    net = ncnn.Net()
    options = net.opt
    options.num_threads = count
    # By default it computes with 16 bits wherever the CPU can.
    options.use_fp16_packed = options.use_fp16_storage = options.use_fp16_arithmetic = False
    options.use_bf16_packed = options.use_bf16_storage = precision == "bf16"
    weights = path.with_suffix(".bin")
    # What was looked at, not what the file may have become.
    for what, code in (("layers", net.load_param_mem(str(graph))), ("weights", net.load_model(str(weights)))):
        if code:
            raise LoadError(f"ncnn does not take the {what} of '{path.name}'; its own words are in the log")
    return net


def _shape(mat: Any) -> tuple[int, ...]:
    sizes = (mat.c, mat.d, mat.h, mat.w)
    return (mat.c, mat.h, mat.w) if mat.dims == 3 else sizes[4 - mat.dims :]


def _refuse_untold(source: ModelSource, inputs: Sequence[FoundTensor]) -> None:
    """The first dimension is that of the rows, which ncnn knows nothing of."""
    for spec in (tensor.spec for tensor in inputs):
        if spec.shape is None:
            raise LoadError(
                f"'{source.path.name}' does not tell the shape of '{spec.name}'; configure it under inputs, with -1 "
                "for the rows as its first dimension"
            )
        if spec.shape[:1] not in {(-1,), (1,)} or not 2 <= len(spec.shape) <= _MOST_DIMENSIONS:
            raise LoadError(
                f"input '{spec.name}' is configured with shape {list(spec.shape)}; its first dimension is to be that "
                "of the rows, -1 or 1, and the others the shape of one, of one to four dimensions"
            )
        if prod(spec.shape[1:]) > MOST_NUMBERS:
            raise LoadError(
                f"input '{spec.name}' has the shape {list(spec.shape)}; a row has {MOST_NUMBERS} numbers at most"
            )


def _found(name: str, shape: tuple[int, ...] | None) -> FoundTensor:
    return FoundTensor(TensorSpec(name, DataType.FP32, shape))


def _any_shapes(names: Sequence[str]) -> list[FoundTensor]:
    return [FoundTensor(TensorSpec(name, DataType.FP32, None)) for name in names]


def _fits(configured: tuple[int, ...], found: tuple[int, ...]) -> bool:
    return len(configured) == len(found) and all(
        one in (other, -1) for one, other in zip(configured, found, strict=True)
    )
