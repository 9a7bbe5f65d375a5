"""What is measured: a network, its files, inputs that rotate, and what a CPU answers in double precision."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from headrace.core.tensor import Array
from loadtests.gpu.networks import MiniLm, ResNet50

SEED = 11
MAX_ROWS = 32
TOKENS = 32

Inputs = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Subject:
    """``inputs`` makes so many rows from a seed; ``shapes`` are parameters for TensorRT, of what is free but rows."""

    name: str
    network: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    output: str
    shapes: dict[str, str]
    free: dict[str, dict[int, str]]  # dimensions of any size, by input


def _image(rows: int, seed: int) -> Inputs:
    return {"data": np.random.default_rng(seed).standard_normal((rows, 3, 224, 224), dtype=np.float32)}


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
    Subject("resnet50", ResNet50, _image, "logits", {}, {"data": {0: "batch"}}),
    Subject(
        "minilm",
        MiniLm,
        _sentence,
        "sentence",
        _TEXT,
        {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "tokens"}},
    ),
)


def make_network(subject: Subject) -> nn.Module:
    """The network, with the same weights every time."""
    torch.manual_seed(SEED)
    return subject.network().eval()


def export(subject: Subject, folder: Path) -> tuple[Path, Path]:
    """The network as model.onnx and as model.pt2."""
    folder.mkdir(parents=True, exist_ok=True)
    network = make_network(subject)
    example = tuple(torch.from_numpy(array) for array in subject.inputs(4, 0).values())
    sizes = {
        name: {
            place: torch.export.Dim(size, min=1, max=MAX_ROWS if place == 0 else 128) for place, size in free.items()
        }
        for name, free in subject.free.items()
    }
    # A size of one name is one size.
    known: dict[str, Any] = {}
    shapes = {
        name: {place: known.setdefault(size.__name__, size) for place, size in places.items()}
        for name, places in sizes.items()
    }
    program = torch.export.export(network, example, dynamic_shapes=shapes)
    torch.export.save(program, folder / "model.pt2")
    torch.onnx.export(
        network,
        example,
        str(folder / "model.onnx"),
        input_names=list(subject.free),
        output_names=[subject.output],
        dynamic_shapes=shapes,
        dynamo=True,
        opset_version=18,
        external_data=False,
        verbose=False,
    )
    return folder / "model.onnx", folder / "model.pt2"


def reference(subject: Subject, inputs: Inputs) -> Array:
    """What the network answers on the CPU in double precision."""
    network = make_network(subject).double()
    tensors = [torch.from_numpy(array) for array in inputs.values()]
    with torch.inference_mode():
        answer: Array = network(*(one.double() if one.is_floating_point() else one for one in tensors)).numpy()
    return answer


def error(answer: Array, wanted: Array) -> float:
    """The norm of the difference, as a share of the norm of what was wanted."""
    return float(np.linalg.norm(answer.astype(np.float64) - wanted) / np.linalg.norm(wanted))
