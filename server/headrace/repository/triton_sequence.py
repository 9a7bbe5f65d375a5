"""Triton's section on sequences: into ours and back."""

from collections.abc import Iterator
from typing import Any

from headrace.core.sequence import ControlKind
from headrace.core.tensor import DataType
from headrace.repository.model_config import ModelConfig
from headrace.repository.sequence_config import ControlConfig, SequenceConfig, StateConfig
from headrace.repository.triton_types import data_type, datatype_name
from headrace.wire import pb

_KINDS: dict[int, ControlKind] = {
    pb.ModelSequenceBatching.Control.CONTROL_SEQUENCE_START: "start",
    pb.ModelSequenceBatching.Control.CONTROL_SEQUENCE_READY: "ready",
    pb.ModelSequenceBatching.Control.CONTROL_SEQUENCE_END: "end",
    pb.ModelSequenceBatching.Control.CONTROL_SEQUENCE_CORRID: "correlation_id",
}
_FLAGS: dict[DataType, str] = {
    DataType.INT32: "int32_false_true",
    DataType.FP32: "fp32_false_true",
    DataType.BOOL: "bool_false_true",
}

# ---- in ----


def sequence_problems(batching: pb.ModelSequenceBatching) -> Iterator[str]:
    """What has no place in our form, so that it cannot judge it."""
    for index, given in enumerate(batching.control_input):
        place = f"sequence_batching.control_input[{index}].control"
        if len(given.control) != 1:
            yield f"{place}: is given {len(given.control)} times, expected once"
        for control in given.control:
            yield from (f"{place}{problem}" for problem in _control_problems(control))
    for index, state in enumerate(batching.state):
        place = f"sequence_batching.state[{index}].initial_state"
        if len(state.initial_state) > 1:
            yield f"{place}: is given {len(state.initial_state)} times, expected once"
        for initial in state.initial_state:
            yield from (f"{place}{problem}" for problem in _initial_problems(state, initial))


def _control_problems(control: pb.ModelSequenceBatching.Control) -> Iterator[str]:
    flags = [name for name in _FLAGS.values() if getattr(control, name)]
    kind = _KINDS.get(control.kind)
    if kind is None:
        yield f".kind: is {control.kind}, which is no kind of control"
    elif kind == "correlation_id" and flags:
        yield f".{flags[0]}: is not for CONTROL_SEQUENCE_CORRID, which has a data_type"
    elif kind != "correlation_id" and len(flags) != 1:
        yield f": has {' and '.join(flags) or 'none'} of {', '.join(_FLAGS.values())}, expected one of them"


def _initial_problems(
    state: pb.ModelSequenceBatching.State, initial: pb.ModelSequenceBatching.InitialState
) -> Iterator[str]:
    if initial.data_type != state.data_type:
        given, wanted = datatype_name(initial.data_type), datatype_name(state.data_type)
        yield f".data_type: is {given}, and the state's is {wanted}"
    dims = [1 if size == -1 else size for size in state.dims]
    if list(initial.dims) != dims:
        yield f".dims: is {list(initial.dims)}, expected {dims}: the state's, with 1 for a dimension of any size"
    if initial.WhichOneof("state_data") is None:
        yield ": has neither zero_data nor data_file"


def plain_sequence(batching: pb.ModelSequenceBatching) -> dict[str, object]:
    """The section laid out as in ``config.yaml``; what is not set is left out."""
    plain: dict[str, object] = {
        "strategy": batching.WhichOneof("strategy_choice") or "direct",
        "controls": [
            _plain_control(given.name, control) for given in batching.control_input for control in given.control
        ],
        "states": [_plain_state(state) for state in batching.state],
    }
    if batching.max_sequence_idle_microseconds:
        plain["max_idle_us"] = batching.max_sequence_idle_microseconds
    if batching.HasField("oldest"):
        plain["max_candidates"] = batching.oldest.max_candidate_sequences
    else:
        plain["minimum_slot_utilization"] = batching.direct.minimum_slot_utilization
    return plain


def plain_sequence_queue(batching: pb.ModelSequenceBatching) -> dict[str, object]:
    """What the section says of the queue, as the section ``batching`` of ``config.yaml`` has it."""
    if not batching.HasField("oldest"):
        return {"max_queue_delay_us": batching.direct.max_queue_delay_microseconds}
    return {
        "max_queue_delay_us": batching.oldest.max_queue_delay_microseconds,
        "preferred_sizes": list(batching.oldest.preferred_batch_size),
        "preserve_order": batching.oldest.preserve_ordering,
    }


def _plain_control(name: str, control: pb.ModelSequenceBatching.Control) -> dict[str, object]:
    plain: dict[str, object] = {"input": name, "kind": _KINDS.get(control.kind, "start")}
    if plain["kind"] == "correlation_id":
        if control.data_type:
            plain["datatype"] = datatype_name(control.data_type)
        return plain
    for datatype, field in _FLAGS.items():
        values = getattr(control, field)
        if values:
            return {**plain, "datatype": str(datatype), "values": [float(value) for value in values]}
    return {**plain, "datatype": "INT32"}  # sequence_problems has told that there is none


def _plain_state(state: pb.ModelSequenceBatching.State) -> dict[str, object]:
    plain: dict[str, object] = {"input": state.input_name, "output": state.output_name, "shape": list(state.dims)}
    if state.data_type:
        plain["datatype"] = datatype_name(state.data_type)
    for initial in state.initial_state:
        if initial.HasField("data_file"):
            plain["initial"] = initial.data_file
    return plain


# ---- out ----


def sequence_message(config: ModelConfig, sequence: SequenceConfig) -> pb.ModelSequenceBatching:
    """Our section in Triton's form, with what ``batching`` says of the queue."""
    batching = config.batching
    message = pb.ModelSequenceBatching(
        max_sequence_idle_microseconds=sequence.max_idle_us,
        control_input=[_control_message(control) for control in sequence.controls],
        state=[_state_message(state) for state in sequence.states],
    )
    if sequence.strategy == "oldest":
        message.oldest.max_candidate_sequences = sequence.max_candidates
        message.oldest.preferred_batch_size.extend(batching.preferred_sizes)
        message.oldest.max_queue_delay_microseconds = batching.max_queue_delay_us
        message.oldest.preserve_ordering = batching.preserve_order
    else:
        message.direct.SetInParent()
        message.direct.max_queue_delay_microseconds = batching.max_queue_delay_us
        message.direct.minimum_slot_utilization = sequence.minimum_slot_utilization
    return message


def _control_message(config: ControlConfig) -> pb.ModelSequenceBatching.ControlInput:
    spec = config.spec()
    kind = next(number for number, kind in _KINDS.items() if kind == spec.kind)
    control = pb.ModelSequenceBatching.Control(kind=kind)
    if spec.kind == "correlation_id":
        control.data_type = pb.DataType.Value(data_type(spec.datatype))  # type: ignore[assignment]  # the stubs have int
    else:
        field = _FLAGS[spec.datatype]
        getattr(control, field).extend(_flag_values(spec.datatype, spec.values))
    return pb.ModelSequenceBatching.ControlInput(name=spec.input, control=[control])


def _flag_values(datatype: DataType, values: tuple[float, ...]) -> list[Any]:
    if datatype is DataType.BOOL:
        return [bool(value) for value in values]
    return [int(value) for value in values] if datatype is DataType.INT32 else list(values)


def _state_message(state: StateConfig) -> pb.ModelSequenceBatching.State:
    initial = pb.ModelSequenceBatching.InitialState(
        name=state.input, data_type=data_type(state.datatype), dims=state.initial_shape
    )
    if state.initial is None:
        initial.zero_data = True
    else:
        initial.data_file = state.initial
    return pb.ModelSequenceBatching.State(
        input_name=state.input,
        output_name=state.output,
        data_type=data_type(state.datatype),
        dims=state.shape,
        initial_state=[initial],
    )
