"""The tensors that a model file declares, and how they go together with the configured ones."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from headrace.core.model import Signature, TensorSpec
from headrace_backends.base import DEFAULT_MAX_BATCH_SIZE, LoadError, ModelSource


@dataclass(frozen=True, slots=True)
class FoundTensor:
    """An input or output as the file has it; ``symbols`` names the dimensions of any size, "" where nameless."""

    spec: TensorSpec
    symbols: tuple[str, ...] = ()


def agreed(
    source: ModelSource, found_inputs: Sequence[FoundTensor], found_outputs: Sequence[FoundTensor]
) -> tuple[list[FoundTensor], list[FoundTensor]]:
    """The file's inputs and outputs, as the configuration wants them.

    Raises:
        LoadError: with everything that does not go together.
    """
    inputs, input_problems = merged("input", found_inputs, source.inputs)
    outputs, output_problems = merged("output", found_outputs, source.outputs)
    specs = [tensor.spec for tensor in (*inputs, *outputs, *found_inputs, *found_outputs)]
    problems = [*input_problems, *output_problems, *leading_problems(source.max_batch_size or 0, specs)]
    if problems:
        raise LoadError("; ".join(problems))
    return inputs, outputs


def signature_of(source: ModelSource, inputs: Sequence[FoundTensor], outputs: Sequence[FoundTensor]) -> Signature:
    """What is served: these tensors, in batches as large as the configuration says; 0 where it says nothing."""
    return Signature(
        tuple(tensor.spec for tensor in inputs),
        tuple(tensor.spec for tensor in outputs),
        source.max_batch_size or 0,
    )


def merged(
    kind: str, found: Sequence[FoundTensor], configured: Sequence[TensorSpec]
) -> tuple[list[FoundTensor], list[str]]:
    """The file's tensors, with their configured shapes in place of their own; and what does not agree."""
    overrides = {spec.name: spec for spec in configured}
    names = [tensor.spec.name for tensor in found]
    problems = [f"the file has no {kind} '{name}'; it has {names}" for name in overrides if name not in names]
    tensors = []
    for tensor in found:
        wanted = overrides.get(tensor.spec.name)
        if wanted is None:
            tensors.append(tensor)
            continue
        problems += _disagreements(kind, wanted, tensor.spec)
        shape = tensor.spec.shape if wanted.shape is None else wanted.shape
        tensors.append(FoundTensor(msgspec.structs.replace(tensor.spec, shape=shape), tensor.symbols))
    return tensors, problems


def _disagreements(kind: str, wanted: TensorSpec, found: TensorSpec) -> list[str]:
    problems = []
    if wanted.datatype is not found.datatype:
        problems.append(f"{kind} '{wanted.name}' is configured as {wanted.datatype}; the file has {found.datatype}")
    if wanted.optional:
        problems.append(f"{kind} '{wanted.name}' is configured as optional; the file needs it")
    if not _compatible(wanted.shape, found.shape):
        problems.append(
            f"{kind} '{wanted.name}' is configured with shape {list(wanted.shape or ())}; "
            f"the file has {list(found.shape or ())}"
        )
    return problems


def _compatible(configured: tuple[int, ...] | None, found: tuple[int, ...] | None) -> bool:
    if configured is None or found is None:
        return True
    return len(configured) == len(found) and all(
        one == other or -1 in (one, other) for one, other in zip(configured, found, strict=True)
    )


def usual_rows(source: ModelSource, bound: int | None, what: str) -> int:
    """How many rows may be merged where that is not configured: so many as usual, within the bound of a file, if any.

    Raises:
        LoadError: more are configured. ``what`` begins the reason, as "'model.pt2' was exported for".
    """
    if bound is not None and (source.max_batch_size or 0) > bound:
        raise LoadError(f"max_batch_size is {source.max_batch_size}, and {what} at most {bound} rows")
    return DEFAULT_MAX_BATCH_SIZE if bound is None else min(DEFAULT_MAX_BATCH_SIZE, bound)


def leading_problems(max_batch_size: int, specs: Sequence[TensorSpec]) -> list[str]:
    """Why requests cannot be merged up to a configured ``max_batch_size``, a line for each tensor at fault."""
    problems = {}
    for spec in specs:
        if max_batch_size and spec.shape is not None and spec.shape[:1] != (-1,):
            problems[spec.name] = (
                f"max_batch_size is {max_batch_size}, but the first dimension of '{spec.name}' {list(spec.shape)} is "
                "not of any size, so requests cannot be merged; set max_batch_size to 0, or export the model with a "
                "batch dimension"
            )
    return list(problems.values())


def not_batchable(inputs: Sequence[FoundTensor], outputs: Sequence[FoundTensor]) -> str | None:
    """Why the shapes alone forbid to merge requests, or None."""
    if not inputs:
        return "the model has no inputs"
    tensors = [*inputs, *outputs]
    for tensor in tensors:
        shape = tensor.spec.shape
        if not shape or shape[0] != -1:
            declared = "no declared shape" if shape is None else f"shape {list(shape)}"
            return f"'{tensor.spec.name}' has {declared}, without a leading dimension of any size"
    leading = {tensor.spec.name: tensor.symbols[0] if tensor.symbols else "" for tensor in tensors}
    if len(set(leading.values())) != 1:
        return f"the leading dimensions are not one of any size: they have different names, {leading}"
    symbol = next(iter(leading.values()))
    for tensor in tensors:
        if symbol and any(_speaks_of(symbol, other) for other in tensor.symbols[1:]):
            return f"the leading dimension '{symbol}' is part of another dimension of '{tensor.spec.name}' too"
    return None


def _speaks_of(symbol: str, expression: str) -> bool:
    """Whether a dimension's expression, as ``2*n + 1``, has ``symbol`` in it as a word."""
    return re.search(rf"(?<!\w){re.escape(symbol)}(?!\w)", expression) is not None
