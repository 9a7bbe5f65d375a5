"""A request against a signature: either it fits, or one clear error says why not."""

from math import prod

import msgspec

from headrace.core.errors import InvalidRequest
from headrace.core.model import Signature, TensorSpec
from headrace.core.request import InferRequest
from headrace.core.tensor import ITEM_BYTES, MAX_DIMENSIONS, DataType, Tensor, check_bytes

MAX_ELEMENTS = 1 << 48

# Requests with equal keys may share a batch; None says that shapes cannot differ.
BatchKey = tuple[tuple[int, ...] | None, ...] | None


class ModelInputs(msgspec.Struct, frozen=True, gc=False):
    """Inputs that fit: one for each of the signature's, in its order; None for an optional one left out.

    ``rows`` is the size of the batch dimension, or 1 for a model that does not batch.
    """

    tensors: tuple[Tensor | None, ...]
    rows: int
    key: BatchKey


class InputChecker:
    """Checks requests against one model version's signature, with what can be computed beforehand kept."""

    def __init__(self, model: str, signature: Signature) -> None:
        self._model = model
        self._signature = signature
        self._batches = signature.max_batch_size > 0
        self._names = {spec.name: index for index, spec in enumerate(signature.inputs)}
        self._outputs = frozenset(spec.name for spec in signature.outputs)
        self._item_bytes = [ITEM_BYTES[spec.datatype] for spec in signature.inputs]
        self._tails = [_fixed_tail(spec) if self._batches else None for spec in signature.inputs]
        self._row_bytes = [
            prod(tail) * size if tail is not None and size else 0
            for tail, size in zip(self._tails, self._item_bytes, strict=True)
        ]
        self._keyed = any(spec.optional or spec.shape is None or -1 in spec.shape[1:] for spec in signature.inputs)

    def check(self, request: InferRequest) -> ModelInputs:
        """The request's inputs in the signature's order.

        Raises:
            InvalidRequest: naming the model, the tensor, what was wrong and what was expected.
        """
        specs = self._signature.inputs
        given = request.inputs
        if len(given) == len(specs) and all(map(_same_name, given, specs)):
            tensors: tuple[Tensor | None, ...] = given
        else:
            tensors = self._in_order(given)
        rows = 0
        for index, tensor in enumerate(tensors):
            if tensor is None:
                continue
            if not self._fits(index, tensor):
                self._check_tensor(tensor, specs[index], self._item_bytes[index])
            if self._batches:
                rows = self._count_rows(tensor, rows)
        for output in request.outputs:
            if output.name not in self._outputs:
                raise InvalidRequest(
                    f"model '{self._model}' has no output '{output.name}'; its outputs are {sorted(self._outputs)}"
                )
        return ModelInputs(tensors, rows or 1, self._key(tensors))

    def _count_rows(self, tensor: Tensor, rows: int) -> int:
        """The tensor's rows, which must be as many as the inputs before it had, if any."""
        own = tensor.shape[0]
        if not own:  # runtimes are rarely tried on nothing: some kernels abort their process
            raise self._invalid(tensor, "has 0 rows, expected at least 1")
        if rows and own != rows:
            raise self._invalid(tensor, f"has {own} rows, and another input of the request has {rows}")
        return own

    def _fits(self, index: int, tensor: Tensor) -> bool:
        """Whether the tensor is what most are: rows of a fixed size. The long way round tells what is wrong."""
        row_bytes = self._row_bytes[index]
        shape = tensor.shape
        return (
            row_bytes > 0
            and len(shape) > 0
            and tensor.datatype is self._signature.inputs[index].datatype
            and shape[1:] == self._tails[index]
            and shape[0] > 0
            and len(tensor.data) == shape[0] * row_bytes
        )

    def _key(self, tensors: tuple[Tensor | None, ...]) -> BatchKey:
        if not self._keyed:
            return None
        return tuple(None if tensor is None else tensor.shape[1:] for tensor in tensors)

    def _in_order(self, given: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        ordered: list[Tensor | None] = [None] * len(self._names)
        for tensor in given:
            index = self._names.get(tensor.name)
            if index is None:
                raise InvalidRequest(
                    f"model '{self._model}' has no input '{tensor.name}'; its inputs are {self._described()}"
                )
            if ordered[index] is not None:
                raise InvalidRequest(f"model '{self._model}': input '{tensor.name}' is given twice")
            ordered[index] = tensor
        missing = [
            spec.name
            for spec, tensor in zip(self._signature.inputs, ordered, strict=True)
            if tensor is None and not spec.optional
        ]
        if missing:
            raise InvalidRequest(
                f"model '{self._model}' needs {len(self._names)} input(s), {self._described()}; "
                f"the request has {len(given)}, without {missing}"
            )
        if all(tensor is None for tensor in ordered) and ordered:
            raise InvalidRequest(f"model '{self._model}': the request has no inputs; it takes {self._described()}")
        return tuple(ordered)

    def _check_tensor(self, tensor: Tensor, spec: TensorSpec, item_bytes: int) -> None:
        if tensor.datatype is not spec.datatype:
            raise self._invalid(tensor, f"has datatype {tensor.datatype}, expected {spec.datatype}")
        shape = tensor.shape
        if shape != spec.shape or -1 in shape:
            self._check_shape(tensor, spec)
        if len(shape) > MAX_DIMENSIONS or prod(size or 1 for size in shape) > MAX_ELEMENTS:
            raise self._invalid(
                tensor,
                f"has a shape of {len(shape)} dimensions, {list(shape[:8])}...: "
                f"more than {MAX_DIMENSIONS} or more than {MAX_ELEMENTS} elements",
            )
        elements = prod(shape)
        if item_bytes:
            expected = elements * item_bytes
            if len(tensor.data) != expected:
                raise self._invalid(
                    tensor,
                    f"has {len(tensor.data)} bytes of data, expected {expected} for {spec.datatype}{list(shape)}",
                )
        elif tensor.datatype is DataType.BYTES:
            try:
                check_bytes(tensor.data, elements)
            except InvalidRequest as error:
                raise self._invalid(tensor, str(error)) from None

    def _check_shape(self, tensor: Tensor, spec: TensorSpec) -> None:
        shape = tensor.shape
        if any(size < 0 for size in shape):
            raise self._invalid(tensor, f"has shape {list(shape)}: a request's dimensions cannot be negative")
        if spec.shape is None:
            if self._batches and not shape:
                raise self._invalid(tensor, "has shape [], expected a leading batch dimension")
            return
        if len(shape) != len(spec.shape) or any(
            wanted not in (-1, size) for size, wanted in zip(shape, spec.shape, strict=True)
        ):
            raise self._invalid(tensor, f"has shape {list(shape)}, expected {list(spec.shape)}")

    def _invalid(self, tensor: Tensor, problem: str) -> InvalidRequest:
        return InvalidRequest(f"model '{self._model}': input '{tensor.name}' {problem}")

    def _described(self) -> str:
        return "[" + ", ".join(spec.describe() for spec in self._signature.inputs) + "]"


def _fixed_tail(spec: TensorSpec) -> tuple[int, ...] | None:
    """The dimensions behind the batch's, where all of them are fixed."""
    return spec.shape[1:] if spec.shape and -1 not in spec.shape[1:] else None


def _same_name(tensor: Tensor, spec: TensorSpec) -> bool:
    return tensor.name == spec.name
