"""What a served model takes and gives: its signature."""

from dataclasses import dataclass, field
from math import prod

import msgspec

from headrace.core.tensor import DataType


class TensorSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One input or output: -1 in ``shape`` is a dimension of any size, None is a shape nobody declared.

    Where the model batches, ``shape`` includes the leading batch dimension, as -1.
    """

    name: str
    datatype: DataType
    shape: tuple[int, ...] | None
    optional: bool = False

    @property
    def shape_or_any(self) -> list[int]:
        """For protocols that cannot say that a shape is not declared: then it is one dimension of any size."""
        return [-1] if self.shape is None else list(self.shape)

    def describe(self) -> str:
        """For messages and listings, as ``x FP32[-1, 784]``."""
        shape = "[...]" if self.shape is None else str(list(self.shape))
        return f"{self.name} {self.datatype}{shape}"


class ReshapeSpec(msgspec.Struct, frozen=True):
    """A tensor that is ``seen`` by clients in another shape than the model's ``own``. Both with the batch dimension."""

    name: str
    seen: tuple[int, ...]
    own: tuple[int, ...]

    @property
    def misfit(self) -> str:
        """Why one shape cannot stand for the other; empty where it can."""
        fixed = [prod(size for size in shape if size != -1) for shape in (self.seen, self.own)]
        if self.seen.count(-1) == self.own.count(-1) and fixed[0] == fixed[1]:
            return ""
        return (
            f"cannot be reshaped from {list(self.seen)} to {list(self.own)}: "
            "both must have as many elements, and as many dimensions of any size"
        )


class Signature(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model's inputs and outputs. ``max_batch_size`` is in rows; 0 means that requests are never merged.

    A ``decoupled`` model answers a request with any number of responses, also none.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int = 0
    decoupled: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What metadata and configuration requests tell about one version."""

    name: str
    version: str
    platform: str
    backend: str
    signature: Signature
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
