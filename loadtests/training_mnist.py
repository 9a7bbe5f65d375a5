"""Training code as ``optimize.training`` names it: a quarter of VGG-16, on real digits."""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))  # it is run as a file, from anywhere

from loadtests import mnist

_NAME = "vgg"


def model() -> nn.Module:
    return mnist.trained(_NAME)


def student() -> nn.Module:
    return mnist.NETWORKS[_NAME].student()


def batches(training: bool) -> Iterator[tuple[tuple[torch.Tensor], torch.Tensor]]:
    return mnist.batches(_NAME, training=training)


def score(module: nn.Module) -> float:
    return mnist.accuracy(_NAME, module)
