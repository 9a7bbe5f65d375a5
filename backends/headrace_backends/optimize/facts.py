"""What decides which forms of a model there are, and what one such form is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headrace_backends.compiled_package import CONSENT, is_package
from headrace_backends.optimize.form import Form, Step, Technique

Kind = Literal["convolutional", "transformer", "dense"]
TORCH_ENDINGS = (".pt2", ".pt")
COMPILED = ".pt2 of machine code"  # in place of the ending: nothing can be made of such a file


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides which forms there are."""

    ending: str  # of the file that was dropped in, as ``ending_of`` has it
    backend: str
    kind: Kind
    allow: frozenset[Technique] = frozenset()
    trains: bool = False  # there is training code
    exhaustive: bool = False
    on_gpu: bool = False  # where all forms run; else all run on the CPU
    native_code: bool = True  # the owner has not forbidden machine code


@dataclass(frozen=True, slots=True)
class Candidate:
    """A form, and how many times as fast as PyTorch eager such forms have been."""

    form: Form
    gain: float


def ending_of(path: Path) -> str:
    """The ending of a model file, as far as it decides what can be made of it."""
    return COMPILED if path.suffix == ".pt2" and is_package(path) else path.suffix


def packaged(facts: Facts) -> Form | None:
    """The program compiled ahead of its loads; None where it cannot be, or may not.

    Consent to machine code is asked for because nobody knows what is in a file of unknown origin. This one is made
    here, of the owner's own program, so the form gives it by itself, to its own file alone.
    """
    if facts.ending != ".pt2" or not facts.native_code:
        return None
    return Form("torch", (Step("aot_inductor"),), {CONSENT: True})


def steps_to_onnx(ending: str) -> tuple[Step, ...] | None:
    """The steps from a file to ONNX; None where there is no way to it."""
    if ending == ".onnx":
        return ()
    return (Step("export_onnx"),) if ending in TORCH_ENDINGS else None
