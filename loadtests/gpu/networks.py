"""The networks that are measured, in plain PyTorch with random weights: ResNet-50 and an encoder like MiniLM-L6.

One module is the reference, is measured in eager mode, and is exported to the files that are served.
"""

import torch
from torch import nn
from torch.nn import functional

_MEAN, _DEVIATION = 114.0, 57.0  # of pixels in photographs, roughly
_STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))
_HIDDEN, _HEADS, _INNER, _LAYERS, _VOCABULARY, _POSITIONS = 384, 12, 1536, 6, 8192, 512


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width * 4, 1, bias=False),
            nn.BatchNorm2d(width * 4),
        )
        nn.init.constant_(self.inner[-1].weight, 0.3)  # else the sum over sixteen blocks grows
        same = channels == width * 4 and stride == 1
        self.around = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels, width * 4, 1, stride, bias=False), nn.BatchNorm2d(width * 4))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.inner(x) + self.around(x))


class ResNet50(nn.Module):
    """``data`` [batch, 3, size, size], pixels of a byte each, to ``logits`` [batch, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]
        channels = 64
        for blocks, width, stride in _STAGES:
            for block in range(blocks):
                layers.append(_Bottleneck(channels, width, stride if block == 0 else 1))
                channels = width * 4
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(channels, 1000)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        """Class scores."""
        x = (data.to(self.classifier.weight.dtype) - _MEAN) / _DEVIATION
        logits: torch.Tensor = self.classifier(self.features(x))
        return logits


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.joined = (nn.Linear(_HIDDEN, _HIDDEN) for _ in range(4))
        self.inner, self.outer = nn.Linear(_HIDDEN, _INNER), nn.Linear(_INNER, _HIDDEN)
        self.first, self.second = nn.LayerNorm(_HIDDEN), nn.LayerNorm(_HIDDEN)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape

        def heads(layer: nn.Linear) -> torch.Tensor:
            split: torch.Tensor = layer(x).view(batch, length, _HEADS, _HIDDEN // _HEADS)
            return split.transpose(1, 2)

        scores = heads(self.query) @ heads(self.key).transpose(2, 3) / (_HIDDEN // _HEADS) ** 0.5 + bias
        mixed = (torch.softmax(scores, -1) @ heads(self.value)).transpose(1, 2).reshape(batch, length, _HIDDEN)
        x = self.first(x + self.joined(mixed))
        out: torch.Tensor = self.second(x + self.outer(functional.gelu(self.inner(x))))
        return out


class MiniLm(nn.Module):
    """``input_ids`` and ``attention_mask`` [batch, tokens] to ``sentence`` [batch, 384], mean pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(_VOCABULARY, _HIDDEN), nn.Embedding(_POSITIONS, _HIDDEN)
        self.norm = nn.LayerNorm(_HIDDEN)
        self.layers = nn.ModuleList(_Layer() for _ in range(_LAYERS))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Sentence embeddings."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.positions(places))
        weights = attention_mask.to(x.dtype)
        bias = (1 - weights)[:, None, None, :] * -10_000.0
        for layer in self.layers:
            x = layer(x, bias)
        pooled: torch.Tensor = (x * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
        return pooled


NETWORKS = {"resnet50": ResNet50, "minilm": MiniLm}
