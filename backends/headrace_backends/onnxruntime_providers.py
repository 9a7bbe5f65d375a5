"""Which of ONNX Runtime's execution providers a model gets, with which options. Pure."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from headrace_backends.base import LoadError, ModelSource
from headrace_backends.parameters import flag

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
PROVIDERS = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
GPU_PARAMETERS = (
    "provider",
    "allow_cpu_fallback",
    "gpu_mem_limit",
    "cuda_graphs",
    "tf32",
    "precision",
    "engine_cache",
)

_TENSORRT_ONLY = ("precision", "engine_cache")
# ONNX Runtime launches the one that it has captured first, whatever the shapes and the addresses are by then.
_ONE_GRAPH = (
    "parameters.cuda_graphs is for 'provider: cuda': with TensorRT, ONNX Runtime keeps one graph for all shapes; "
    "'backend: tensorrt' has one for each"
)
_TF32_UNASKED = (
    "TensorRT may compute matrix products and convolutions in TF32, which ONNX Runtime has no option against: "
    "parameters.tf32 true says that this is meant, and 'backend: tensorrt' does without"
)
_PRECISIONS = {"fp32": {}, "fp16": {"trt_fp16_enable": "1"}, "bf16": {"trt_bf16_enable": "1"}}
INSTALL = "pip uninstall -y onnxruntime && pip install --force-reinstall onnxruntime-gpu"


@dataclass(frozen=True, slots=True)
class ProviderChoice:
    """Providers as a session takes them, the first one first. ``note`` says what the owner has to know of it."""

    providers: tuple[str | tuple[str, Mapping[str, str]], ...]
    fallback: bool = False  # whether the CPU will do where the GPU does not work
    cuda_graphs: bool = False
    note: str | None = None

    @property
    def wanted(self) -> str:
        """The one that is to run the model."""
        first = self.providers[0]
        return first if isinstance(first, str) else first[0]


ON_CPU = ProviderChoice((CPU,))


def choose_providers(source: ModelSource, available: Collection[str]) -> ProviderChoice:
    """What the configuration asks for, of what this build of ONNX Runtime has.

    Raises:
        LoadError: it has not what is asked for, or that makes no sense; with everything that does not.
    """
    asked = source.parameters.get("provider", "cpu" if source.gpu is None else "cuda")
    if asked not in PROVIDERS:
        raise LoadError(f"parameters.provider is {asked!r}, expected one of {', '.join(PROVIDERS)}")
    problems = _contradictions(source, asked)
    limit = _memory_limit(source.parameters, problems)
    precision = source.parameters.get("precision", "fp32")
    if precision not in _PRECISIONS:
        problems.append(f"parameters.precision is {precision!r}, expected one of {', '.join(_PRECISIONS)}")
    if problems:
        raise LoadError("; ".join(problems))
    if source.gpu is None:
        return ON_CPU
    fallback = flag(source.parameters, "allow_cpu_fallback")
    wanted = PROVIDERS[asked]
    if wanted not in available:
        missing = (
            f"device '{source.device}' needs an onnxruntime with {'TensorRT' if asked == 'tensorrt' else 'CUDA'}, "
            f"and this one has none; replace it with: {INSTALL}"
        )
        if not fallback:
            raise LoadError(missing)
        return on_cpu_instead(missing)
    graphs, tf32 = flag(source.parameters, "cuda_graphs"), flag(source.parameters, "tf32")
    cuda = {"device_id": str(source.gpu), "use_tf32": "1" if tf32 else "0", **limit}
    if graphs:
        cuda["enable_cuda_graph"] = "1"
    providers: list[str | tuple[str, Mapping[str, str]]] = [(CUDA, cuda), CPU]
    if asked == "tensorrt":
        providers.insert(0, (TENSORRT, _tensorrt(source, precision)))
    note = _TF32_UNASKED if asked == "tensorrt" and precision == "fp32" and not tf32 else None
    return ProviderChoice(tuple(providers), fallback, graphs, note)


def on_cpu_instead(problem: str) -> ProviderChoice:
    """What is left where the GPU does not work and the CPU will do."""
    return ProviderChoice((CPU,), note=f"runs on the CPU, as parameters.allow_cpu_fallback allows: {problem}")


def not_working(source: ModelSource, choice: ProviderChoice, running_on: str) -> str:
    """What is said where ONNX Runtime offers a provider and then does not use it."""
    return (
        f"device '{source.device}' does not work here: onnxruntime offers {choice.wanted} and then runs on "
        f"{running_on}; check the NVIDIA driver, CUDA and cuDNN (headrace check --gpu)"
    )


def _contradictions(source: ModelSource, asked: str) -> list[str]:
    given = [name for name in GPU_PARAMETERS if name in source.parameters and name != "provider"]
    if source.gpu is None:
        problems = [f"parameters.provider is {asked!r}, and the device is cpu; set instances: [{{device: gpu:0}}]"]
        return (problems if asked != "cpu" else []) + [
            f"parameters.{name} is for GPUs, and the device is cpu" for name in given
        ]
    if asked == "cpu":
        return [f"parameters.provider is 'cpu', and the device is {source.device}"]
    if asked == "tensorrt" and flag(source.parameters, "cuda_graphs"):
        return [_ONE_GRAPH]
    if asked != "tensorrt":
        return [
            f"parameters.{name} is for 'provider: tensorrt', and here it is {asked!r}"
            for name in given
            if name in _TENSORRT_ONLY
        ]
    return []


def _memory_limit(parameters: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
    """Options that bound the memory which the session keeps; it then asks for what it needs, not for twice as much."""
    limit = parameters.get("gpu_mem_limit")
    if limit is None:
        return {}
    if isinstance(limit, bool) or not re.fullmatch(r"[1-9]\d*", str(limit)):
        problems.append(f"parameters.gpu_mem_limit is {limit!r}, expected a number of bytes from 1")
    return {"gpu_mem_limit": str(limit), "arena_extend_strategy": "kSameAsRequested"}


def _tensorrt(source: ModelSource, precision: str) -> dict[str, str]:
    options = {"device_id": str(source.gpu), **_PRECISIONS[precision]}
    folder = source.parameters.get("engine_cache")
    if folder is not None:
        options |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder),
        }
    return options
