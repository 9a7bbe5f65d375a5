"""Model folders for ``loadtests.optimize``: a model as it is dropped in, one ``optimize`` block, real examples."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
CROPS = 160  # photographs cut out of larger ones
SENTENCES = 512  # as many as a search uses
TOKENS = 32
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()./\-]*[.!?]")  # no code, no tables


class Missing(Exception):
    """A package that has a model or its data is not installed; the message says which."""


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and what the optimiser is to bring: over the model as dropped in, and over ONNX Runtime in fp32."""

    name: str
    build: Callable[[Path], None]  # writes 1/model.*, calibration.npz and config.yaml into the folder
    goal: float
    goal_over_onnxruntime: float | None = None
    refused: tuple[str, ...] = ()  # parts of the names of forms that the search must refuse by itself
    seconds: int = 600


def mlp(folder: Path) -> None:
    """784-512-256-10, trained on MNIST, on one thread."""
    _mnist(folder, "mlp", "allow: [int8_dynamic, int8_static]", "parameters: {intra_op_threads: 1}\n")


def vgg_mnist(folder: Path) -> None:
    """VGG-16 with a quarter of the channels, trained on MNIST; pruned, distilled and quantised with training."""
    allow = "training: training.py\n  allow: [prune, distill, int8_static]"
    _mnist(folder, "vgg", allow, "", below=0.02)
    code = (ROOT / "loadtests" / "training_mnist.py").read_text()
    (folder / "training.py").write_text(code.replace("Path(__file__).parents[1]", f"Path({str(ROOT)!r})"))


def resnet50(folder: Path) -> None:
    """ResNet-50 with random weights, on photographs; what int8 costs one that was trained, ``resnet_mnist`` tells."""
    from loadtests.torch_nets import resnet50 as build

    photos = crops()
    _export(folder, build(photos[:32]), (photos[:2],), ["data"])
    # Fifty layers of random weights multiply every rounding: the budget only has to let everything through.
    _write(folder, "optimize:\n  budget: {metric: cosine, min: -1}\n  allow: [int8_static]\n", data=photos[:96])


def resnet_mnist(folder: Path) -> None:
    """ResNet-50 trained on MNIST."""
    _mnist(folder, "resnet", "allow: [int8_static]", "", below=0.01)


def vgg16(folder: Path) -> None:
    """VGG-16 with random weights, as it is."""
    _vgg16(folder, "optimize: {}\n")


def vgg16_channels(folder: Path) -> None:
    """VGG-16 with random weights; only pruned, with training code, whose accuracy ``vgg_mnist`` tells."""
    _vgg16_trained(folder, "prune")


def vgg16_pruned(folder: Path) -> None:
    """VGG-16 with random weights; pruned and quantised with training code, whose accuracy ``vgg_mnist`` tells."""
    _vgg16_trained(folder, "prune, int8_static")


def _vgg16_trained(folder: Path, allow: str) -> None:
    # Random weights have no accuracy that could be kept: the budget only has to let everything through.
    budget = "budget: {metric: cosine, min: -1}"
    _vgg16(folder, f"optimize:\n  {budget}\n  training: training.py\n  allow: [{allow}]\n")
    (folder / "training.py").write_text(_VGG_TRAINING.format(root=str(ROOT)))


_VGG_TRAINING = """import sys

sys.path.append({root!r})

import torch

from loadtests.optimize_models import crops
from loadtests.vgg import vgg16


def model():
    return vgg16()


def batches(training):
    photos = torch.from_numpy(crops(8))
    yield (photos[:4],), torch.arange(4)
"""


def minilm(folder: Path) -> None:
    """The sentence encoder all-MiniLM-L6-v2, pretrained, on English sentences."""
    from loadtests.torch_nets import minilm as build

    module, ids, mask = build(sentences(), TOKENS)
    _export(folder, module, (ids[:2], mask[:2]), ["input_ids", "attention_mask"])
    text = "optimize:\n  budget: {metric: cosine, min: 0.99}\n  allow: [int8_dynamic, int8_static]\n"
    _write(folder, text, input_ids=ids, attention_mask=mask)


def efficientnet(folder: Path) -> None:
    """EfficientNet-lite0, pretrained on ImageNet, on photographs."""
    from loadtests.torch_nets import efficientnet_lite0 as build

    photos = crops(2 * CROPS)
    _export(folder, build(), (photos[:2],), ["data"])
    text = "optimize:\n  budget: {metric: top1_agreement, min: 0.97}\n  allow: [int8_static]\n"
    _write(folder, text, data=photos)


def magika(folder: Path) -> None:
    """Google's file type model: static int8 ruins it, and nothing is faster than what it is."""
    try:
        import magika as package
    except ImportError as error:
        raise Missing(f"pip install magika ({error})") from error
    (found,) = Path(package.__file__).parent.rglob("model.onnx")
    (folder / "1").mkdir(parents=True)
    shutil.copy2(found, folder / "1" / "model.onnx")
    files = [
        file for file in sorted((ROOT / "server").rglob("*.*")) + sorted((ROOT / "docs").rglob("*.*")) if file.is_file()
    ]
    rows = []
    for file in files[:160]:
        data = file.read_bytes().strip()[:1024], file.read_bytes().strip()[-1024:]
        begin, end = (list(part) for part in data)
        rows.append(begin + [256] * (1024 - len(begin)) + [256] * (1024 - len(end)) + end)
    text = "optimize:\n  budget: {metric: top1_agreement, min: 0.98}\n  allow: [int8_static]\n"
    _write(folder, text, bytes=np.array(rows, np.int32))


def fragile(folder: Path) -> None:
    """A net whose activations have outliers: eight bits cannot hold both those and what matters."""
    import torch

    class Fragile(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.first = torch.nn.Linear(64, 256)
            self.second = torch.nn.Linear(256, 10)
            with torch.no_grad():
                self.first.weight[:4] *= 3000  # a few units that are thousands of times as large as the others
                self.second.weight[:, :4] /= 1e6  # and that hardly count

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.second(torch.relu(self.first(x)))
            return hidden

    x = np.random.default_rng(3).standard_normal((400, 64)).astype(np.float32)
    _export(folder, Fragile().eval(), (x[:2],), ["x"])
    text = "optimize:\n  budget: {metric: top1_agreement, min: 0.99}\n  allow: [int8_dynamic, int8_static]\n"
    _write(folder, text, x=x)


CASES = {
    case.name: case
    for case in (
        Case("mlp", mlp, 4.0),
        Case("resnet50", resnet50, 5.0, 2.0),
        Case("resnet_mnist", resnet_mnist, 2.0),
        Case("vgg16", vgg16, 2.0),
        Case("vgg16_channels", vgg16_channels, 5.0, seconds=900),
        Case("vgg16_pruned", vgg16_pruned, 20.0, seconds=1500),
        Case("vgg_mnist", vgg_mnist, 5.0, seconds=1500),
        Case("minilm", minilm, 3.0, refused=("onnxruntime + export_onnx + int8_static",)),
        Case("efficientnet", efficientnet, 3.0, 1.3, refused=("onnxruntime + export_onnx + int8_static",), seconds=900),
        Case("magika", magika, 1.0, refused=("onnxruntime + int8_static",)),
        Case("fragile", fragile, 1.0, refused=("int8_static",)),
    )
}

# Dropped into a running server instead; their goals are served.py's.
SERVED = Case("served", minilm, 1.0)
QUICK_SERVED = Case("served", fragile, 1.0)


def crops(count: int = CROPS) -> np.ndarray:
    """FP32 [count, 3, 224, 224]: crops of the photographs of scikit-learn and, where it is there, of scikit-image."""
    from PIL import Image

    files = _photographs()
    images = [Image.open(file).convert("RGB") for file in files]
    generator = np.random.default_rng(20240229)
    rows = np.empty((count, 3, 224, 224), np.float32)
    for place in range(count):
        image = images[generator.integers(len(images))]
        side = int(min(image.size) * generator.uniform(0.4, 1))
        left, top = (int(generator.integers(0, size - side + 1)) for size in image.size)
        cut = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
        pixels = np.asarray(cut, np.float32) / 255
        scaled = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        rows[place] = scaled.transpose(2, 0, 1)
    return rows


def _photographs() -> list[Path]:
    import sklearn.datasets

    found = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
    try:
        import skimage
    except ImportError:
        return found
    names = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg")
    folder = Path(skimage.__file__).parent / "data"
    return found + [folder / name for name in names if (folder / name).exists()]


def sentences(count: int = SENTENCES) -> list[str]:
    """Different English sentences: scikit-learn's descriptions of its datasets, then Python's own reference."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "descr"
    described = _sentences(" ".join(file.read_text() for file in sorted(folder.glob("*.rst"))))
    reference = [one for one in _sentences(_python_reference()) if _PROSE.fullmatch(one)]
    np.random.default_rng(20240229).shuffle(reference)
    found = list(dict.fromkeys([*described, *reference]))
    if len(found) < count:
        raise Missing(
            f"the installed packages have {len(found)} sentences, expected {count}: has Python no pydoc_data?"
        )
    return found[:count]


def _sentences(text: str) -> list[str]:
    parts = [part.strip().replace("\n", " ") for part in re.split(r"(?<=[.!?])\s+", text)]
    return [sentence for sentence in parts if 30 < len(sentence) < 300]


def _python_reference() -> str:
    """What ``help("...")`` shows, paragraph by paragraph, so that no sentence runs on into another topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return ""
    paragraphs = [part for name in sorted(topics) for part in re.split(r"\n\s*\n", topics[name])]
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _mnist(folder: Path, name: str, allow: str, more: str, below: float = 0.005) -> None:
    from loadtests import mnist

    model, examples = mnist.place(name, folder / "made")
    (folder / "1").mkdir(parents=True)
    model.replace(folder / "1" / "model.pt2")
    examples.replace(folder / "calibration.npz")
    shutil.rmtree(folder / "made")
    (folder / "judge.py").write_text(
        "import numpy as np\n\n\ndef accuracy(outputs, labels):\n"
        "    (answers,) = outputs.values()\n"
        "    return float(np.mean([row.argmax() == digit for row, digit in zip(answers, labels['digit'])]))\n"
    )
    least = mnist.accuracy(name, mnist.trained(name)) - below
    _config(folder, f"{more}optimize:\n  budget: {{metric: 'judge.py:accuracy', min: {least:.4f}}}\n  {allow}\n")


def _vgg16(folder: Path, text: str) -> None:
    from loadtests.vgg import vgg16 as build

    photos = crops(64)
    _export(folder, build(), (photos[:2],), ["data"])
    _write(folder, text, data=photos)


def _export(folder: Path, module: Any, examples: tuple[np.ndarray, ...], names: list[str]) -> None:
    """Write a module as ``1/model.pt2`` whose inputs have these names and as many rows as one likes."""
    import torch

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = module

    code = f"def forward(self, {', '.join(names)}):\n    return self.net({', '.join(names)})\n"
    scope: dict[str, Any] = {}
    exec(code, scope)
    Named.forward = scope["forward"]  # type: ignore[method-assign]
    rows = torch.export.Dim("batch", min=1, max=64)
    tensors = tuple(torch.from_numpy(one) for one in examples)
    shapes = tuple({0: rows} for _ in examples)
    with torch.no_grad():
        program = torch.export.export(Named().eval(), tensors, dynamic_shapes=shapes)
    (folder / "1").mkdir(parents=True)
    torch.export.save(program, folder / "1" / "model.pt2")


def _write(folder: Path, text: str, **examples: np.ndarray) -> None:
    np.savez(folder / "calibration.npz", **examples)  # type: ignore[arg-type] # its stub takes the names for options
    _config(folder, text)


def _config(folder: Path, text: str) -> None:
    if "optimize: {}" in text:
        text = "optimize: {calibration: calibration.npz}\n"
    else:
        text = text.replace("optimize:\n", "optimize:\n  calibration: calibration.npz\n")
    (folder / "config.yaml").write_text(text)


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the encoder's weights lie in its package
