"""VGG-16 as PyTorch modules: for images of 224 x 224, and with a quarter of the channels for those of MNIST."""

import torch
from torch import nn

from loadtests.inputs import SEED

# Channels of the convolutions, each followed by a ReLU; 0 halves the image.
_LAYERS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
_HIDDEN = 4096
_MNIST_PADDING = 2  # to 32 x 32, which can be halved five times


def vgg16(classes: int = 1000) -> nn.Module:
    """The original, for images of 224 x 224, with random weights that keep activations of one size."""
    torch.manual_seed(SEED)
    module = nn.Sequential(
        *_convolutions(3, divisor=1, normalized=False),
        nn.Flatten(),
        *_dense(512 * 7 * 7, _HIDDEN),
        *_dense(_HIDDEN, _HIDDEN),
        nn.Linear(_HIDDEN, classes),
    )
    for layer in module:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type] # torch says None may be, and these have biases
    return module.eval()


def vgg16_mnist() -> nn.Module:
    """With batch normalisation and a quarter of the channels, for images of 28 x 28 in one colour and ten classes."""
    return nn.Sequential(
        nn.ZeroPad2d(_MNIST_PADDING),
        *_convolutions(1, divisor=4, normalized=True),
        nn.Flatten(),
        *_dense(512 // 4, 512 // 4),
        nn.Linear(512 // 4, 10),
    )


def _convolutions(channels: int, *, divisor: int, normalized: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for wanted in _LAYERS:
        if not wanted:
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, wanted // divisor, 3, padding=1))
        channels = wanted // divisor
        if normalized:
            layers.append(nn.BatchNorm2d(channels))
        layers.append(nn.ReLU())
    return layers


def _dense(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout()]
