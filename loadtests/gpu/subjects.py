"""What is measured: two networks' inputs, and what their files are told. networks.py has the networks, with PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headrace.core.tensor import Array

MAX_ROWS = 64
TOKENS = 32
REFERENCE = "reference.npy"  # in double precision: the answers to CHECKED
CHECKED = 100  # the seed of inputs whose answers are compared

Inputs = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Subject:
    """``inputs`` makes so many rows from a seed; ``shapes`` are parameters for TensorRT, of what is free but rows."""

    name: str
    inputs: Callable[[int, int], Inputs]
    output: str
    shapes: dict[str, str]
    free: dict[str, dict[int, str]]  # dimensions of any size, by input


def _image(rows: int, seed: int) -> Inputs:
    """Pixels as a camera gives them, and 150 KB a row; noise of one strength would look the same to every filter."""
    generator = np.random.default_rng(seed)
    brightest = generator.integers(32, 257, (rows, 3, 1, 1))
    return {"data": generator.integers(0, brightest, (rows, 3, 224, 224)).astype(np.uint8)}


def _sentence(rows: int, seed: int) -> Inputs:
    generator = np.random.default_rng(seed)
    mask = (np.arange(TOKENS) < generator.integers(4, TOKENS + 1, (rows, 1))).astype(np.int64)
    return {"input_ids": generator.integers(0, 8192, (rows, TOKENS)), "attention_mask": mask}


def _both(sizes: str) -> str:
    return f"input_ids:{sizes},attention_mask:{sizes}"


_TEXT = {
    "min_shapes": _both("1x1"),
    "opt_shapes": _both(f"{MAX_ROWS}x{TOKENS}"),
    "max_shapes": _both(f"{MAX_ROWS}x128"),
}
SUBJECTS = (
    Subject("resnet50", _image, "logits", {}, {"data": {0: "batch"}}),
    Subject(
        "minilm",
        _sentence,
        "sentence",
        _TEXT,
        {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "tokens"}},
    ),
)


def subject_of(name: str) -> Subject:
    """The subject of that name."""
    return next(one for one in SUBJECTS if one.name == name)


def first_rows(inputs: Inputs, rows: int) -> Inputs:
    """The first of them."""
    return {name: array[:rows] for name, array in inputs.items()}


def reference(files: Path) -> Array:
    """What the network answers on the CPU in double precision to the inputs CHECKED, a row each."""
    answers: Array = np.load(files / REFERENCE)
    return answers


def compare(answer: Array, wanted: Array) -> dict[str, float]:
    """How far the first rows are off.

    ``error`` is the norm of the difference as a share of the norm of what was wanted; ``top1`` how many rows have
    their largest value in the same place; ``cosine`` that of the worst row.
    """
    got, right = answer.astype(np.float64), wanted[: len(answer)]
    cosines = (got * right).sum(1) / (np.linalg.norm(got, axis=1) * np.linalg.norm(right, axis=1))
    return {
        "error": float(np.linalg.norm(got - right) / np.linalg.norm(right)),
        "top1": float((got.argmax(1) == right.argmax(1)).mean()),
        "cosine": float(cosines.min()),
    }
