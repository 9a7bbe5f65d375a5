"""What a request says of its sequence. Pure."""

import msgspec

from headrace.batching.pending import Pending
from headrace.core.errors import InvalidRequest
from headrace.core.request import Parameters
from headrace.core.sequence import ControlSpec, SequenceSpec
from headrace.core.tensor import DataType

MAX_ID = 2**64 - 1
MAX_ID_BYTES = 128

SequenceId = int | str

_LARGEST = {DataType.INT64: 2**63 - 1, DataType.UINT32: 2**32 - 1, DataType.INT32: 2**31 - 1}


class SequenceMarks(msgspec.Struct, frozen=True, gc=False):
    """What a request says of its sequence: which it is, and whether it is the first or the last of it."""

    id: SequenceId
    start: bool
    end: bool


def id_control(spec: SequenceSpec) -> ControlSpec | None:
    """The input in which the model is told the sequence's id, if it is."""
    return next((control for control in spec.controls if control.kind == "correlation_id"), None)


def read_marks(model: str, parameters: Parameters, told: ControlSpec | None = None) -> SequenceMarks:
    """What the parameters of a request to a stateful model say, which is ``told`` the id in that input.

    Raises:
        InvalidRequest: they name no sequence, or say something that is none of this, or the model cannot take the id.
    """
    identity = parameters.get("sequence_id", 0)
    if identity in (0, "") and not isinstance(identity, bool):
        raise InvalidRequest(
            f"inference request to model '{model}' must specify a non-zero or non-empty correlation ID: "
            "its parameter sequence_id"
        )
    if isinstance(identity, bool) or not isinstance(identity, int | str):
        raise _unfit(model, "sequence_id", identity, "a whole number or a string")
    if isinstance(identity, int) and not 0 < identity <= MAX_ID:
        raise _unfit(model, "sequence_id", identity, f"1 to {MAX_ID}")
    if isinstance(identity, str) and len(identity.encode(errors="surrogatepass")) > MAX_ID_BYTES:
        raise _unfit(model, "sequence_id", f"{identity[:16]}...", f"at most {MAX_ID_BYTES} bytes")
    if told is not None:
        _check_told(model, identity, told)
    return SequenceMarks(identity, _flag(model, parameters, "sequence_start"), _flag(model, parameters, "sequence_end"))


def _check_told(model: str, identity: SequenceId, told: ControlSpec) -> None:
    """Whether the input can hold the id. Found out in the worker, it would be the fault of a whole batch."""
    where = f"the model is told ids in its input '{told.input}' of {told.datatype}"
    if told.datatype is DataType.BYTES:
        if isinstance(identity, int):
            raise _unfit(model, "sequence_id", identity, f"a string: {where}")
    elif isinstance(identity, str):
        raise _unfit(model, "sequence_id", identity, f"a number: {where}")
    elif identity > _LARGEST.get(told.datatype, MAX_ID):
        raise _unfit(model, "sequence_id", identity, f"1 to {_LARGEST[told.datatype]}: {where}")


def _flag(model: str, parameters: Parameters, name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise _unfit(model, name, value, "true or false")
    return value


def _unfit(model: str, name: str, value: object, expected: str) -> InvalidRequest:
    return InvalidRequest(f"model '{model}': parameter '{name}' is {value!r}, expected {expected}")


def begins(pending: Pending) -> bool:
    """Whether the request is the first of its sequence."""
    return pending.request.parameters.get("sequence_start") is True
