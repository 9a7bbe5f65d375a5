"""A form of a model: the steps that make its file from the one that was dropped in, and how that is run."""

from enum import StrEnum
from hashlib import blake2b
from typing import Any

import msgspec


class Technique(StrEnum):
    """What changes answers, in the words of the configuration's ``allow``."""

    TF32 = "tf32"  # of GPUs: products of fp32 with 10 bits of each number
    BF16 = "bf16"
    FP16 = "fp16"
    INT8_DYNAMIC = "int8_dynamic"  # int8 weights; activations are quantised as they come, or not at all
    INT8_STATIC = "int8_static"  # int8 weights and activations, with scales from calibration
    PRUNE = "prune"
    SPARSE = "sparse"
    DISTILL = "distill"
    QAT = "qat"


TRAINED = frozenset({Technique.PRUNE, Technique.SPARSE, Technique.DISTILL, Technique.QAT})  # by the owner's code


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """One change of a model's file. ``kind`` is a name in ``steps/registry.py``, which says what it does."""

    kind: str
    options: dict[str, Any] = {}

    def __str__(self) -> str:
        told = ", ".join(f"{name}={_told(value)}" for name, value in self.options.items())
        return f"{self.kind}({told})" if told else self.kind


class Form(msgspec.Struct, frozen=True, omit_defaults=True):
    """A way to serve a model. Without steps the file is the one that was dropped in.

    ``parameters`` are the backend's, on top of the configured ones. ``max_batch_size`` None leaves it to the
    configuration and the file, and 1 has each row answered by itself; ``threads`` is what each of ``instances`` may
    keep busy, 0 for every CPU.
    """

    backend: str
    steps: tuple[Step, ...] = ()
    parameters: dict[str, Any] = {}
    threads: int = 0
    instances: int = 1
    max_batch_size: int | None = None
    techniques: tuple[Technique, ...] = ()  # what of it changes answers; empty: nothing beyond rounding

    @property
    def faithful(self) -> bool:
        """Whether answers may differ from the reference's only by the order in which floats are added."""
        return not self.techniques

    @property
    def name(self) -> str:
        """For tables and logs: unique among the forms of one search, but for the layout."""
        parts = [self.backend, *map(str, self.steps)]
        parts += [f"{name}={value}" for name, value in sorted(self.parameters.items())]
        if (self.max_batch_size or 0) > 1:  # what has no batches is there in one way only
            parts.append(f"max_batch_size={self.max_batch_size}")
        return " + ".join(parts)

    @property
    def layout(self) -> str:
        """For tables: how many instances on how many threads each."""
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}" if self.threads else "all threads"
        return f"{self.instances} x {threads}"


def steps_key(steps: tuple[Step, ...]) -> str:
    """A short name for what these steps make, the same in every run."""
    return blake2b(msgspec.json.encode(steps, order="sorted"), digest_size=8).hexdigest()


def _told(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{len(value)} named" if len(value) > 2 else ",".join(map(str, value))
    return str(value)
