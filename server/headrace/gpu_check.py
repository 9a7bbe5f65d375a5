"""``headrace check --gpu``: what a GPU needs, what of it is here, and the command that brings the rest."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headrace.workers import gpu_probing
from headrace.workers.gpu_probing import Facts

PROBES = ("driver", "nvml", "onnxruntime", "torch", "tensorrt")

OK, MISSING, OPTIONAL = "ok", "no", "--"

_OLDEST_CUDA = (12, 0)
_ONNXRUNTIME = "pip uninstall -y onnxruntime && pip install --force-reinstall onnxruntime-gpu"
_TORCH = "pip install torch (from PyPI it comes with CUDA), or pip install 'headrace[torch]'"
_TENSORRT = "pip install 'headrace[tensorrt]' or 'headrace[tensorrt-rtx]'"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: whether it is there, what it is, and what to do if it is not."""

    mark: str  # OK | MISSING | OPTIONAL
    subject: str
    text: str
    advice: str = ""
    serves: bool = False  # whether models can run on a GPU with this

    def __str__(self) -> str:
        return f"{self.mark}  {self.subject}: {self.text}" + (f"\n      {self.advice}" if self.advice else "")


async def check_gpu(say: Say) -> int:
    """Look, and say what there is, a line each. Returns 1 where no model could be served on a GPU."""
    facts = dict(zip(PROBES, await asyncio.gather(*map(gpu_probing.ask, PROBES)), strict=True))
    found = findings(facts)
    for finding in found:
        say(str(finding))
    if any(finding.serves for finding in found):
        say("models can be served on a GPU here: set instances: [{device: gpu:0}]")
        return 0
    say("no model can be served on a GPU here; docs/gpu.md says what has to be installed")
    return 1


def findings(facts: Mapping[str, Facts]) -> list[Finding]:
    """What the probes' answers mean, by themselves."""
    driver = _driver(facts["driver"])
    there = driver[-1].mark == OK  # a GPU: without one nothing serves, whatever is installed
    return [
        *driver,
        *_nvml(facts["nvml"]),
        _onnxruntime(facts["onnxruntime"], there),
        _torch(facts["torch"], there),
        _tensorrt(facts["tensorrt"], there),
    ]


def _driver(facts: Facts) -> list[Finding]:
    if "error" in facts:
        return [
            Finding(MISSING, "driver", facts["error"]),
            Finding(MISSING, "GPUs", "none can be seen without a driver"),
        ]
    version = tuple(int(part) for part in str(facts["cuda"]).split("."))
    old = version < _OLDEST_CUDA
    driver = Finding(
        MISSING if old else OK,
        "driver",
        f"takes programs made with CUDA up to {facts['cuda']}",
        "a newer driver is needed: today's libraries are made with CUDA 12 and 13" if old else "",
    )
    gpus = facts["gpus"]
    if not gpus:
        advice = "CUDA_VISIBLE_DEVICES may hide them; a container needs --gpus all"
        return [driver, Finding(MISSING, "GPUs", "the driver shows none", advice)]
    told = ", ".join(map(_gpu, gpus))
    return [driver, Finding(OK, "GPUs", told)]


def _gpu(gpu: Facts) -> str:
    size = f"{gpu['total_bytes'] / 2**30:.0f} GiB, compute capability {gpu['capability']}"
    return f"gpu:{gpu['index']} {gpu['name']} ({size})"


def _nvml(facts: Facts) -> list[Finding]:
    if facts.get("missing"):
        return [Finding(OPTIONAL, "GPU metrics", "nvidia-ml-py is not installed", "pip install 'headrace[gpu]'")]
    if "error" in facts:
        return [Finding(OPTIONAL, "GPU metrics", f"there are none: {facts['error']}")]
    found = [Finding(OK, "GPU metrics", f"nvidia-ml-py works, driver {facts['driver']}")]
    for index, gpu in enumerate(facts["gpus"]):
        if gpu.get("mig_mode"):
            parts = ", ".join(gpu["mig"]) or "no parts yet"
            advice = "choose one by its UUID: instances: [{device: gpu:UUID}]"
            found.append(Finding(OK, "MIG", f"on for GPU {index} {gpu['name']}: {parts}", advice))
    return found


def _onnxruntime(facts: Facts, there: bool) -> Finding:
    name = "ONNX Runtime"
    if len(facts.get("installed", ())) > 1:
        # Both put their files into the same folder, so that which of the two runs is chance.
        return Finding(
            MISSING, name, "both onnxruntime and onnxruntime-gpu are installed, one over the other", _ONNXRUNTIME
        )
    if "version" not in facts:
        return Finding(MISSING, name, f"does not import: {facts.get('error')}", _ONNXRUNTIME)
    if "CUDAExecutionProvider" not in facts["offered"]:
        return Finding(MISSING, name, f"{facts['version']} is the build for CPUs", _ONNXRUNTIME)
    working = [one.removesuffix("ExecutionProvider") for one in facts["working"]]
    if not working:
        reason = facts.get("reasons", {}).get("CUDAExecutionProvider")
        advice = "it needs the CUDA and cuDNN that it was made with: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        text = f"offers CUDA, which fails: {reason}" if reason else "offers CUDA, and then runs on the CPU"
        return Finding(MISSING, name, f"{facts['version']} {text}", advice if there else "")
    return Finding(OK, name, f"{facts['version']} runs on {' and '.join(working)}", serves=there)


def _torch(facts: Facts, there: bool) -> Finding:
    if facts.get("missing"):
        return Finding(OPTIONAL, "PyTorch", "is not installed", _TORCH)
    if "version" not in facts:
        return Finding(MISSING, "PyTorch", f"does not import: {facts.get('error')}", _TORCH)
    if facts["cuda"] is None:
        return Finding(MISSING, "PyTorch", f"{facts['version']} is the build for CPUs", _TORCH)
    if not facts["gpus"]:
        return Finding(MISSING, "PyTorch", f"{facts['version']} with CUDA {facts['cuda']} sees no GPU")
    text = f"{facts['version']} with CUDA {facts['cuda']} sees {facts['gpus']} GPU{'s' if facts['gpus'] > 1 else ''}"
    return Finding(OK, "PyTorch", text, serves=there)


def _tensorrt(facts: Facts, there: bool) -> Finding:
    if "library" not in facts:
        return Finding(OPTIONAL, "TensorRT", "is not installed, nor is TensorRT-RTX", _TENSORRT)
    if "error" in facts:
        return Finding(MISSING, "TensorRT", f"{facts['library']} does not work: {facts['error']}")
    if not there:
        builds = (
            "can build engines, and there is no GPU to run them" if facts.get("without_gpu") else "has no GPU to run on"
        )
        return Finding(OPTIONAL, "TensorRT", f"{facts['library']} {builds}")
    return Finding(OK, "TensorRT", str(facts["library"]), serves=True)
