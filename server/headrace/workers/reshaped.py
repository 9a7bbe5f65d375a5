"""A model whose tensors clients see in other shapes than it has: Triton's ``reshape``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from headrace.core.model import ReshapeSpec, TensorSpec
from headrace.core.tensor import Array
from headrace.workers.wrapped import Wrapped
from headrace_backends.base import Answer, Backend, LoadError, RequestInfo


class Reshaped(Wrapped):
    """Another backend, its inputs and outputs in the shapes of ``reshapes``. No element moves in memory."""

    def __init__(self, backend: Backend, reshapes: Sequence[ReshapeSpec]) -> None:
        signature = backend.signature
        names = {spec.name for spec in (*signature.inputs, *signature.outputs)}
        problems = [f"there is no tensor '{one.name}' to reshape" for one in reshapes if one.name not in names]
        problems += [f"'{one.name}' {one.misfit}" for one in reshapes if one.misfit]
        if signature.decoupled:
            problems.append("a decoupled model's tensors are not reshaped")
        if problems:
            raise LoadError("; ".join(problems))
        self._reshapes = {one.name: one for one in reshapes}
        seen = msgspec.structs.replace(
            signature,
            inputs=tuple(map(self._seen, signature.inputs)),
            outputs=tuple(map(self._seen, signature.outputs)),
        )
        super().__init__(backend, seen)
        self.wants_requests = backend.wants_requests
        self.reads_only = backend.reads_only

    def execute(
        self, inputs: Mapping[str, Array], requests: Sequence[RequestInfo]
    ) -> Mapping[str, Array] | Sequence[Answer]:
        """Run one batch in the model's own shapes."""
        result = self._backend.execute(self._given(inputs), requests)
        if isinstance(result, Mapping):
            return self._shown(result)
        return [replace(answer, outputs=self._shown(answer.outputs)) for answer in result]

    def _seen(self, spec: TensorSpec) -> TensorSpec:
        reshape = self._reshapes.get(spec.name)
        return spec if reshape is None else msgspec.structs.replace(spec, shape=reshape.seen)

    def _given(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {
            name: array if (one := self._reshapes.get(name)) is None else array.reshape(sizes(array, one.seen, one.own))
            for name, array in inputs.items()
        }

    def _shown(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        return {
            name: array if (one := self._reshapes.get(name)) is None else array.reshape(sizes(array, one.own, one.seen))
            for name, array in outputs.items()
        }


def sizes(array: Array, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions of ``after``, those of any size taken in their order from the array's, which are ``before``'s.

    Raises:
        RuntimeError: the array does not have the dimensions of ``before``.
    """
    if len(array.shape) != len(before):
        raise RuntimeError(f"a tensor has shape {list(array.shape)}, expected {list(before)}")
    free = iter([size for size, wanted in zip(array.shape, before, strict=True) if wanted == -1])
    return tuple(next(free) if size == -1 else size for size in after)
