"""Which backend serves what: names, aliases and file endings; a framework is imported only by ``resolve``."""

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import PurePath
from typing import Any

from headrace_backends.base import Backend, BackendUnavailable, LoadError

BACKENDS: dict[str, str] = {
    "onnxruntime": "headrace_backends.onnxruntime:OnnxRuntimeBackend",
    "torch": "headrace_backends.torch:TorchBackend",
    "openvino": "headrace_backends.openvino:OpenVinoBackend",
    "python": "headrace_backends.python:PythonBackend",
    "tensorrt": "headrace_backends.tensorrt.backend:TensorRtBackend",
    "fake": "headrace_backends.fake:FakeBackend",
}

ENDINGS: dict[str, str] = {
    ".onnx": "onnxruntime",
    ".pt2": "torch",
    ".pt": "torch",
    ".py": "python",
    ".plan": "tensorrt",
    ".engine": "tensorrt",
    ".xml": "openvino",
}

# What a backend reads besides the endings that are its own, where the configuration names it.
ALSO_READS: dict[str, tuple[str, ...]] = {"openvino": (".onnx", ".tflite"), "tensorrt": (".onnx",)}

# The first that exists is the model. A fake model needs no file.
MODEL_FILES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("model.onnx",),
    "torch": ("model.pt2", "model.pt"),
    "python": ("model.py",),
    "fake": (),
    "tensorrt": ("model.plan", "model.engine", "model.onnx"),
    "openvino": ("model.xml", "model.onnx", "model.tflite"),
}

# What Triton's configurations call them, as ``platform`` or as ``backend``.
ALIASES: dict[str, str] = {
    "onnx": "onnxruntime",
    "onnxruntime_onnx": "onnxruntime",
    "pytorch": "torch",
    "pytorch_libtorch": "torch",
    "libtorch": "torch",
    "tensorrt_plan": "tensorrt",
}

# What the metadata calls a model's platform, in Triton's words where it has one.
PLATFORMS: dict[str, str] = {
    "onnxruntime": "onnxruntime_onnx",
    "torch": "pytorch_libtorch",
    "tensorrt": "tensorrt_plan",
}

# Backends of which many small models may share one process.
SHAREABLE = frozenset({"onnxruntime", "openvino"})

ENTRY_POINT_GROUP = "headrace.backends"

_INSTALL: dict[str, str] = {
    "onnxruntime": "onnxruntime",
    "torch": "'headrace[torch]'",
    "openvino": "'headrace[openvino]'",
}


def canonical(name: str) -> str:
    """Our name for the backend that ``name`` means, or ``name`` itself where it is nobody's alias."""
    return ALIASES.get(name, name)


def backend_names() -> list[str]:
    """Every backend that a configuration may name here, installed plugins included."""
    return sorted({*BACKENDS, *_plugins()})


def backend_of_file(path: PurePath) -> str:
    """The backend that a model file's ending asks for.

    Raises:
        LoadError: no backend reads such files.
    """
    name = ENDINGS.get(path.suffix.lower())
    if name is None:
        raise LoadError(f"'{path.name}' has none of the model file endings {', '.join(ENDINGS)}")
    return name


def model_files(name: str) -> tuple[str, ...]:
    """The file names that a version's folder is searched for, best first."""
    return MODEL_FILES.get(canonical(name), ())


def reads(name: str, path: PurePath) -> bool:
    """Whether the backend of this name reads files with such an ending."""
    ending = path.suffix.lower()
    return ENDINGS.get(ending) == name or ending in ALSO_READS.get(name, ())


def resolve(name: str) -> type[Backend]:
    """The backend's class: this imports its framework, so only a worker process may ask.

    Raises:
        BackendUnavailable: there is no such backend, or its framework does not import here.
    """
    name = canonical(name)
    target = BACKENDS.get(name)
    plugin = None if target else _plugins().get(name)
    if target is None and plugin is None:
        raise BackendUnavailable(f"there is no backend '{name}'; there are {', '.join(backend_names())}")
    try:
        found = plugin.load() if plugin else _attribute(target or "")
    except (ImportError, OSError, AttributeError) as error:  # OSError: a shared library of the framework is missing
        hint = _INSTALL.get(name)
        advice = f"; install it with: pip install {hint}" if hint else ""
        raise BackendUnavailable(f"the backend '{name}' does not import here: {error}{advice}") from error
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise BackendUnavailable(f"the backend '{name}' is {found!r}, expected a class derived from Backend")
    return found


def _attribute(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def _plugins() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
