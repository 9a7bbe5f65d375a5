"""The networks as files, and their answers in double precision. It needs PyTorch, and no GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from headrace.core.tensor import Array
from loadtests.gpu.networks import NETWORKS
from loadtests.gpu.subjects import CHECKED, MAX_ROWS, REFERENCE, Inputs, Subject

_SEED = 11


def make_network(subject: Subject) -> nn.Module:
    """The network, with the same weights every time."""
    torch.manual_seed(_SEED)
    return NETWORKS[subject.name]().eval()


def export(subject: Subject, folder: Path) -> None:
    """The network as model.pt2 and as model.onnx."""
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


def write_reference(subject: Subject, folder: Path, rows: int = MAX_ROWS) -> None:
    """The answers that every form's are compared with."""
    np.save(folder / REFERENCE, answer_exactly(subject, subject.inputs(rows, CHECKED)))


def answer_exactly(subject: Subject, inputs: Inputs) -> Array:
    """What the network answers on the CPU in double precision."""
    network = make_network(subject).double()
    with torch.inference_mode():
        answer: Array = network(*map(torch.from_numpy, inputs.values())).numpy()
    return answer
