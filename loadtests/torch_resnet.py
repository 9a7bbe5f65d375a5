"""ResNet-50 as a PyTorch module, with random weights."""

import torch
from torch import nn

_STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))


def resnet50(colours: int = 3, classes: int = 1000) -> nn.Sequential:
    """FP32 [N, colours, H, W] to [N, classes]; the last layer is a ``Linear``."""
    layers: list[nn.Module] = [_convolution(colours, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for blocks, width, stride in _STAGES:
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, stride if block == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1, and the way around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            _convolution(channels, width, 1),
            nn.ReLU(),
            _convolution(width, width, 3, stride),
            nn.ReLU(),
            _convolution(width, 4 * width, 1),
        )
        same = channels == 4 * width and stride == 1
        self.around = nn.Identity() if same else _convolution(channels, 4 * width, 1, stride)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """FP32 [N, channels, H, W] to [N, 4 * width, H / stride, W / stride]."""
        return torch.relu(self.inner(value) + self.around(value))


def _convolution(channels: int, filters: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, filters, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(filters))
