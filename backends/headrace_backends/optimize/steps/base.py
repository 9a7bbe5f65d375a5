"""What every step is given, and how it says that it cannot be done."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.core.device import CPU
from headrace.core.model import Signature
from headrace_backends.optimize.examples import Examples


class StepFailed(Exception):
    """The step cannot be done with this model, or something is not installed; the message is for the report."""


@dataclass(frozen=True, slots=True)
class StepTask:
    """A model file, and what there is to make another of it.

    The step writes into ``folder``, which is its own and empty, and returns the path of the new model in there. Names,
    datatypes and shapes of inputs and outputs stay as they are in ``signature``. It runs in a process of its own, which
    may crash or be killed for taking too long, with ``threads`` to use.
    """

    source: Path
    folder: Path
    signature: Signature
    examples: Examples  # to calibrate with; the held-back half is not among them
    options: Mapping[str, Any] = field(default_factory=dict)
    training: str = ""  # the owner's training code: path of a Python file; empty where there is none
    threads: int = 1
    device: str = CPU  # where the form will run, for steps that make something for it alone
    seed: int = 20240229
    note: Callable[[str], None] = lambda _: None  # for the report: what was found out on the way


Apply = Callable[[StepTask], Path]
