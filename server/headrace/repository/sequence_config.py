"""What a model's owner may say about its sequences."""

import reprlib
from collections.abc import Mapping
from math import prod
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from headrace.core.errors import InvalidRequest
from headrace.core.sequence import ControlKind, ControlSpec, SequenceSpec, StateSpec, Strategy
from headrace.core.tensor import ITEM_BYTES, DataType, bytes_offsets
from headrace.repository.config_fields import Dimension, FileName, Finite, Section, Text, Whole

_INT64_MAX = 2**63 - 1
MAX_STATE_BYTES = 1 << 30  # of one row, far past any model
_FLAG_DATATYPES = (DataType.BOOL, DataType.INT32, DataType.FP32)
_ID_DATATYPES = (DataType.UINT64, DataType.INT64, DataType.UINT32, DataType.INT32, DataType.BYTES)


def _number(value: object) -> object:
    return float(value) if isinstance(value, bool) else value


FlagValue = Annotated[Finite, BeforeValidator(_number)]


class ControlConfig(Section):
    """An input that the server fills in for each row. A flag is the first of ``values`` where it is false."""

    input: Text
    kind: ControlKind
    datatype: Literal[
        DataType.BOOL, DataType.INT32, DataType.FP32, DataType.UINT64, DataType.INT64, DataType.UINT32, DataType.BYTES
    ]
    values: tuple[FlagValue, ...] = ()  # of a flag; empty: 0 and 1

    @model_validator(mode="after")
    def _fits_kind(self) -> "ControlConfig":
        expected = _ID_DATATYPES if self.kind == "correlation_id" else _FLAG_DATATYPES
        if self.datatype not in expected:
            raise ValueError(f"has datatype {self.datatype}, and a {self.kind} is one of {', '.join(expected)}")
        if self.kind == "correlation_id" and self.values:
            raise ValueError(f"has values {list(self.values)}, and a correlation_id has none")
        if self.kind != "correlation_id" and len(self.values) not in (0, 2):
            raise ValueError(f"has {len(self.values)} values, expected two: for false and for true")
        for value in self.values:
            if not _fits(value, self.datatype):
                raise ValueError(f"has the value {value:g}, which {self.datatype} cannot hold")
        return self

    def spec(self) -> ControlSpec:
        """The control in the core's terms."""
        values = () if self.kind == "correlation_id" else self.values or (0.0, 1.0)
        return ControlSpec(self.input, self.kind, self.datatype, values)


def _fits(value: float, datatype: DataType) -> bool:
    if datatype is DataType.BOOL:
        return value in (0.0, 1.0)
    if datatype is DataType.INT32:
        return value.is_integer() and -(2**31) <= value < 2**31
    return abs(value) <= 3.4028234663852886e38  # the largest FP32


class StateConfig(Section):
    """A tensor that the server keeps from one request of a sequence to the next."""

    input: Text
    output: Text
    datatype: DataType
    shape: tuple[Dimension, ...]  # of one row, without the batch dimension
    initial: FileName | None = None  # raw elements, in the model's folder or its initial_state/; None: zeros

    @model_validator(mode="after")
    def _bounded(self) -> "StateConfig":
        if prod(self.initial_shape) * max(1, ITEM_BYTES[self.datatype]) > MAX_STATE_BYTES:
            raise ValueError(f"has a shape of more than {MAX_STATE_BYTES} bytes, {reprlib.repr(list(self.shape))}")
        return self

    @property
    def initial_shape(self) -> tuple[int, ...]:
        """The shape of a sequence's first state: a dimension of any size is 1 in it."""
        return tuple(1 if size == -1 else size for size in self.shape)

    def check_initial(self, data: bytes) -> None:
        """Whether a file holds such a state.

        Raises:
            InvalidRequest: what it holds instead.
        """
        elements = prod(self.initial_shape)
        if self.datatype is DataType.BYTES:
            bytes_offsets(data, elements)
            return
        expected = elements * ITEM_BYTES[self.datatype]
        if len(data) != expected:
            raise InvalidRequest(
                f"has {len(data)} bytes, expected {expected} for {self.datatype}{list(self.initial_shape)}"
            )

    def spec(self, initial: bytes) -> StateSpec:
        """The state in the core's terms; ``initial`` is what its file holds, empty for zeros."""
        return StateSpec(self.input, self.output, self.datatype, self.shape, initial)


class SequenceConfig(Section):
    """How sequences are served: with ``direct`` each has a row to itself, with ``oldest`` batches take what waits."""

    strategy: Strategy = "direct"
    max_idle_us: Annotated[int, Field(strict=True, ge=1, le=_INT64_MAX // 1000)] = 1_000_000
    max_candidates: Whole = 0  # an instance; 0: max_batch_size
    minimum_slot_utilization: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] = 0.0
    controls: tuple[ControlConfig, ...] = ()
    states: tuple[StateConfig, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _fits_strategy(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        strategy = value.get("strategy", "direct")
        if strategy == "direct" and value.get("max_candidates"):
            raise ValueError(
                f"max_candidates is {reprlib.repr(value['max_candidates'])}, which only the strategy oldest has"
            )
        if strategy == "oldest" and value.get("minimum_slot_utilization"):
            given = reprlib.repr(value["minimum_slot_utilization"])
            raise ValueError(f"minimum_slot_utilization is {given}, which only the strategy direct has")
        return value

    def spec(self, initials: Mapping[str, bytes]) -> SequenceSpec:
        """The sequences in the core's terms; ``initials`` has the contents of the files that states begin with."""
        return SequenceSpec(
            strategy=self.strategy,
            max_idle_us=self.max_idle_us,
            max_candidates=self.max_candidates,
            minimum_slot_utilization=self.minimum_slot_utilization,
            controls=tuple(control.spec() for control in self.controls),
            states=tuple(
                state.spec(initials.get(state.initial, b"") if state.initial else b"") for state in self.states
            ),
        )
