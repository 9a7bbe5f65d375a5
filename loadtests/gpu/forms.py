"""The forms in which a subject is served on the GPU, and what each may differ by."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.gpu.subjects import MAX_ROWS, Subject


@dataclass(frozen=True, slots=True)
class Form:
    """``budget`` is the error that is allowed, as a share of the norm, against double precision on the CPU."""

    name: str
    backend: str
    parameters: dict[str, Any]
    budget: float
    file: str = "model.onnx"
    device: str = "gpu:0"


FORMS = (
    Form("tensorrt-fp32", "tensorrt", {"precision": "fp32"}, 1e-5),
    Form("tensorrt-tf32", "tensorrt", {"precision": "tf32"}, 1e-3),
    Form("tensorrt-fp16", "tensorrt", {"precision": "fp16"}, 5e-3),
    Form("tensorrt-fp16-graphs", "tensorrt", {"precision": "fp16", "cuda_graphs": True}, 5e-3),
    Form("tensorrt-bf16", "tensorrt", {"precision": "bf16"}, 3e-2),
    Form("onnxruntime-cuda", "onnxruntime", {}, 1e-5),
    Form("onnxruntime-cuda-graphs", "onnxruntime", {"cuda_graphs": True}, 1e-5),
    Form("torch-cuda", "torch", {}, 1e-5, "model.pt2"),
    Form("torch-compiled", "torch", {"compile": True, "compile_mode": "reduce-overhead"}, 1e-4, "model.pt2"),
    Form("torch-autocast-fp16", "torch", {"autocast": "fp16", "channels_last": True}, 5e-3, "model.pt2"),
)


def place(form: Form, subject: Subject, files: Path, repository: Path) -> str:
    """Put one form into a repository; returns the model's name."""
    name = f"{subject.name}-{form.name}"
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (folder / form.file).hardlink_to(files / form.file)
    parameters = dict(form.parameters)
    if form.backend == "tensorrt":
        parameters |= subject.shapes
    if any(set(sizes) - {0} for sizes in subject.free.values()):
        parameters.pop("compile_mode", None)  # graphs are for sizes that are fixed but for the rows
    config = {
        "backend": form.backend,
        "max_batch_size": MAX_ROWS,
        "instances": [{"device": form.device}],
        "parameters": parameters,
    }
    (repository / name / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return name
