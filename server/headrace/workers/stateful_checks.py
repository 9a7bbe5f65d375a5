"""Whether what a model's owner says of its sequences goes together with the model. Pure."""

from collections.abc import Mapping, Sequence
from math import prod

from headrace.core.errors import InvalidRequest
from headrace.core.model import Signature, TensorSpec
from headrace.core.sequence import SequenceSpec, StateSpec
from headrace.core.tensor import ITEM_BYTES, DataType, bytes_offsets


def misfits(signature: Signature, spec: SequenceSpec) -> list[str]:
    """What of ``spec`` does not go together with the model."""
    lead = 1 if signature.max_batch_size else 0
    inputs = {one.name: one for one in signature.inputs}
    outputs = {one.name: one for one in signature.outputs}
    names = [one.input for one in spec.controls] + [one.input for one in spec.states]
    problems = [f"input '{name}' is named twice by the sequences" for name in _repeated(names)]
    results = [one.output for one in spec.states]
    problems += [f"output '{name}' is named twice by the sequences" for name in _repeated(results)]
    for control in spec.controls:
        found = inputs.get(control.input)
        problems += _tensor_misfits(f"{control.kind} control input", control.input, control.datatype, found, inputs)
        if found is not None and found.shape is not None and not _holds_one(found.shape, lead):
            expected = "[-1, 1]" if lead else "[1]"
            problems.append(f"control input '{found.name}' has shape {list(found.shape)}, expected {expected}")
    for state in spec.states:
        problems += _state_misfits(state, inputs.get(state.input), inputs, "input", lead)
        problems += _state_misfits(state, outputs.get(state.output), outputs, "output", lead)
        problems += _initial_misfits(state)
    return problems


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _tensor_misfits(
    what: str, name: str, datatype: DataType, found: TensorSpec | None, among: Mapping[str, TensorSpec]
) -> list[str]:
    if found is None:
        return [f"the model has no {what} '{name}'; it has {list(among)}"]
    if found.datatype is not datatype:
        return [f"{what} '{name}' is configured as {datatype}; the model has {found.datatype}"]
    return []


def _state_misfits(
    state: StateSpec, found: TensorSpec | None, among: Mapping[str, TensorSpec], side: str, lead: int
) -> list[str]:
    name = state.input if side == "input" else state.output
    problems = _tensor_misfits(f"state {side}", name, state.datatype, found, among)
    if found is None or found.shape is None:
        return problems
    shape = found.shape[lead:]
    # What goes in first has 1 where any size is allowed, and the model has to take that.
    wanted = initial_shape(state) if side == "input" else state.shape
    if len(found.shape) < lead or not agree(wanted, shape):
        problems.append(
            f"state {side} '{name}' is configured with shape {list(state.shape)}; the model has {list(shape)}"
        )
    return problems


def _initial_misfits(state: StateSpec) -> list[str]:
    if not state.initial:
        return []
    shape = initial_shape(state)
    problem = ""
    if state.datatype is DataType.BYTES:
        try:
            bytes_offsets(state.initial, prod(shape))
        except InvalidRequest as error:
            problem = str(error)
    elif len(state.initial) != prod(shape) * ITEM_BYTES[state.datatype]:
        problem = f"has {len(state.initial)} bytes, expected {prod(shape)} elements of {state.datatype}"
    return [f"the initial state of '{state.input}' {problem}"] if problem else []


def _holds_one(shape: tuple[int, ...], lead: int) -> bool:
    """Whether a control's value, one for each row, can have such a shape."""
    return len(shape) >= lead and all(size in (-1, 1) for size in shape)


def agree(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether a tensor can have both shapes, of which -1 is a dimension of any size."""
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def initial_shape(state: StateSpec) -> tuple[int, ...]:
    """A dimension of any size is 1 at first, as Triton has it."""
    return tuple(1 if size == -1 else size for size in state.shape)
