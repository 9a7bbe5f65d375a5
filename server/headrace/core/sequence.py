"""What a stateful model asks for: how its sequences are scheduled, told apart and remembered."""

from typing import Literal

import msgspec

from headrace.core.tensor import DataType

ControlKind = Literal["start", "end", "ready", "correlation_id"]
Strategy = Literal["direct", "oldest"]


class ControlSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """An input that the server fills in for each row: a flag about its request, or the sequence's id.

    A flag is ``values[0]`` where it is false and ``values[1]`` where it is true.
    """

    input: str
    kind: ControlKind
    datatype: DataType
    values: tuple[float, ...] = ()


class StateSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tensor that the server keeps between the requests of a sequence: what came out goes in again.

    ``shape`` is that of one row, without the batch dimension. ``initial`` is the first request's state in wire form;
    empty stands for zeros.
    """

    input: str
    output: str
    datatype: DataType
    shape: tuple[int, ...]
    initial: bytes = b""


class SequenceSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the sequences of a model are served.

    With ``direct`` each live sequence has a row of an instance's batches to itself. With ``oldest`` an instance holds
    up to ``max_candidates`` sequences and batches whatever waits of them.
    """

    strategy: Strategy = "direct"
    max_idle_us: int = 1_000_000  # without a request for so long, a sequence has ended
    max_candidates: int = 0  # 0: as many as a batch has rows
    minimum_slot_utilization: float = 0.0  # direct: share of the rows that lets a batch go before its delay is over
    controls: tuple[ControlSpec, ...] = ()
    states: tuple[StateSpec, ...] = ()

    @property
    def hidden_inputs(self) -> frozenset[str]:
        """The model's inputs that clients do not give."""
        return frozenset({*(one.input for one in self.controls), *(one.input for one in self.states)})

    @property
    def hidden_outputs(self) -> frozenset[str]:
        """The model's outputs that clients are not given."""
        return frozenset(one.output for one in self.states)
