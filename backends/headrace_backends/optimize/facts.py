"""What decides which forms of a model there are, and what one such form is."""

from dataclasses import dataclass
from typing import Literal

from headrace_backends.optimize.form import Form, Step, Technique

Kind = Literal["convolutional", "transformer", "dense"]
TORCH_ENDINGS = (".pt2", ".pt")


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides which forms there are."""

    ending: str  # of the file that was dropped in
    backend: str
    kind: Kind
    allow: frozenset[Technique] = frozenset()
    real_examples: bool = True
    trains: bool = False  # there is training code
    exhaustive: bool = False
    on_gpu: bool = False  # where all forms run; else all run on the CPU


@dataclass(frozen=True, slots=True)
class Candidate:
    """A form, and how many times as fast as PyTorch eager such forms have been."""

    form: Form
    gain: float


def steps_to_onnx(ending: str) -> tuple[Step, ...] | None:
    """The steps from a file to ONNX; None where there is no way to it."""
    if ending == ".onnx":
        return ()
    return (Step("export_onnx"),) if ending in TORCH_ENDINGS else None
