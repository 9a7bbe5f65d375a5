"""The forms in which a subject is served on the GPU, and what each may differ by."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace_backends.base import Backend, ModelSource
from headrace_backends.registry import resolve
from loadtests.gpu.subjects import MAX_ROWS, Subject

COMPILED = "compiled"  # the folder beside a model's file in which compiled code is kept


@dataclass(frozen=True, slots=True)
class Form:
    """``budget`` is the error that is allowed, as a share of the norm, against double precision on the CPU."""

    name: str
    backend: str
    parameters: dict[str, Any]
    budget: float
    file: str = "model.onnx"
    device: str = "gpu:0"

    @property
    def takes_building(self) -> bool:
        """Whether something is made when it is loaded first, and kept for the next load."""
        return self.backend == "tensorrt" or "compile" in self.parameters

    def suits(self, subject: Subject) -> bool:
        """Whether it can be had: graphs of compiled code are for subjects whose sizes are fixed but for the rows."""
        return "compile_mode" not in self.parameters or all(set(sizes) <= {0} for sizes in subject.free.values())


# fp32 may lose a digit to convolutions by Winograd's method, and has two more than TF32 even so.
_FP32, _TF32, _FP16, _BF16 = 1e-4, 1e-3, 5e-3, 3e-2

# Those that a run is for come first, each measured in every way.
CHIEF = (
    Form("tensorrt-fp16", "tensorrt", {"precision": "fp16", "cuda_graphs": True}, _FP16),
    Form("onnxruntime-cuda", "onnxruntime", {}, _FP32),
    Form("torch-compiled", "torch", {"compile": True}, _FP32, "model.pt2"),
)
OTHERS = (
    Form("torch-cuda", "torch", {}, _FP32, "model.pt2"),
    Form("tensorrt-fp32", "tensorrt", {"precision": "fp32"}, _FP32),
    Form("torch-autocast-fp16", "torch", {"autocast": "fp16", "channels_last": True}, _FP16, "model.pt2"),
    Form("onnxruntime-cuda-graphs", "onnxruntime", {"cuda_graphs": True}, _FP32),
    Form("tensorrt-fp16-no-graphs", "tensorrt", {"precision": "fp16"}, _FP16),
    Form("torch-compiled-graphs", "torch", {"compile": True, "compile_mode": "reduce-overhead"}, _FP32, "model.pt2"),
    Form("tensorrt-bf16", "tensorrt", {"precision": "bf16"}, _BF16),
    Form("tensorrt-tf32", "tensorrt", {"precision": "tf32"}, _TF32),
)


def form_of(name: str) -> Form:
    """The form of that name."""
    return next(one for one in (*CHIEF, *OTHERS) if one.name == name)


def parameters_of(form: Form, subject: Subject, files: Path) -> dict[str, Any]:
    """A form's parameters with what this subject and this place add to them."""
    parameters = dict(form.parameters)
    if form.backend == "tensorrt":
        parameters |= subject.shapes
    if "compile" in parameters:
        parameters["compile_cache"] = str(files.absolute() / COMPILED)
    return parameters


def load(form: Form, subject: Subject, files: Path) -> Backend:
    """One form in this process, as a worker would load it.

    Raises:
        BackendUnavailable: what it needs is not here.
        LoadError: it cannot be served.
    """
    source = ModelSource(
        subject.name,
        "1",
        files / form.file,
        device=form.device,
        threads=4,
        max_batch_size=MAX_ROWS,
        parameters=parameters_of(form, subject, files),
    )
    return resolve(form.backend).load(source)


def place(form: Form, subject: Subject, files: Path, repository: Path, instances: int = 1) -> str:
    """Put one form into a repository; returns the model's name."""
    name = f"{subject.name}-{form.name}" + (f"-x{instances}" if instances > 1 else "")
    folder = repository / name / "1"
    folder.mkdir(parents=True)
    (folder / form.file).hardlink_to(files / form.file)
    config = {
        "backend": form.backend,
        "max_batch_size": MAX_ROWS,
        "instances": [{"device": form.device, "count": instances}],
        "parameters": parameters_of(form, subject, files),
    }
    (repository / name / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return name
