"""Which backend serves what: names, aliases and file endings; a framework is imported only by ``resolve``."""

import re
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import PurePath
from typing import Any

from headrace_backends.base import Backend, BackendUnavailable, LoadError

BACKENDS: dict[str, str] = {
    "onnxruntime": "headrace_backends.onnxruntime:OnnxRuntimeBackend",
    "torch": "headrace_backends.torch:TorchBackend",
    "openvino": "headrace_backends.openvino:OpenVinoBackend",
    "ncnn": "headrace_backends.ncnn.backend:NcnnBackend",
    "python": "headrace_backends.python:PythonBackend",
    "tensorrt": "headrace_backends.tensorrt.backend:TensorRtBackend",
    "litert": "headrace_backends.litert:LiteRtBackend",
    "tensorflow": "headrace_backends.importers.backend:TensorFlowBackend",
    "sklearn": "headrace_backends.importers.backend:SklearnBackend",
    "xgboost": "headrace_backends.importers.backend:XgboostBackend",
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
    ".param": "ncnn",
    ".tflite": "litert",
    ".savedmodel": "tensorflow",
    ".keras": "tensorflow",
    ".h5": "tensorflow",
    ".skops": "sklearn",
    ".joblib": "sklearn",
    ".pkl": "sklearn",
    ".pickle": "sklearn",
    ".json": "xgboost",
    ".ubj": "xgboost",
    ".bst": "xgboost",
}

FOLDER_ENDINGS = frozenset({".savedmodel"})  # of models that are a folder

# What often lies beside a model and belongs to it. Taken for one itself only where there is no other, and of those that
# are named in ``TOLD_BY_CONTENT`` only where they begin as that backend's models do.
GIVES_WAY = frozenset(
    {".tflite", ".savedmodel", ".keras", ".h5", ".skops", ".joblib", ".pkl", ".pickle", ".json", ".ubj", ".bst"}
)
TOLD_BY_CONTENT: dict[str, re.Pattern[bytes]] = {
    ".json": re.compile(rb"\s*\{\s*\"learner\"\s*:\s*\{"),
    ".ubj": re.compile(rb"\{L\0{7}\x07learner\{"),
    ".bst": re.compile(rb"\{L\0{7}\x07learner\{|\s*\{\s*\"learner\"\s*:\s*\{"),
}
CONTENT_BYTES = 256  # that are looked at

# Files whose whole name says what they are.
NAMES: dict[str, str] = {"saved_model.pb": "tensorflow"}

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
    "ncnn": ("model.param", "model.ncnn.param"),
    "litert": ("model.tflite",),
    "tensorflow": ("model.savedmodel", "model.keras", "model.h5", "saved_model.pb"),
    "sklearn": ("model.skops", "model.joblib", "model.pkl", "model.pickle"),
    "xgboost": ("model.json", "model.ubj", "model.bst", "xgboost.json", "xgboost.ubj"),
}

# What Triton's configurations call them, as ``platform`` or as ``backend``.
ALIASES: dict[str, str] = {
    "onnx": "onnxruntime",
    "onnxruntime_onnx": "onnxruntime",
    "pytorch": "torch",
    "pytorch_libtorch": "torch",
    "torch_aoti": "torch",
    "libtorch": "torch",
    "tensorrt_plan": "tensorrt",
    "tensorflow_savedmodel": "tensorflow",
    "tflite": "litert",
    "scikit-learn": "sklearn",
}

# What the metadata calls a model's platform, in Triton's words where it has one.
PLATFORMS: dict[str, str] = {
    "onnxruntime": "onnxruntime_onnx",
    "torch": "pytorch_libtorch",
    "tensorrt": "tensorrt_plan",
    "tensorflow": "tensorflow_savedmodel",
}

# Backends of which many small models may share one process.
# Not those whose models may have to be converted: that would
# keep the others of the process waiting.
SHAREABLE = frozenset({"onnxruntime", "openvino", "litert", "ncnn"})

ENTRY_POINT_GROUP = "headrace.backends"

_INSTALL: dict[str, str] = {
    "onnxruntime": "onnxruntime",
    "torch": "'headrace[torch]'",
    "openvino": "'headrace[openvino]'",
    "ncnn": "'headrace[ncnn]'",
    "litert": "'headrace[litert]'",
}


def canonical(name: str) -> str:
    """Our name for the backend that ``name`` means, or ``name`` itself where it is nobody's alias."""
    return ALIASES.get(name, name)


def backend_names() -> list[str]:
    """Every backend that a configuration may name here, installed plugins included."""
    return sorted({*BACKENDS, *_plugins()})


def backend_of_file(path: PurePath) -> str:
    """The backend that a model file's name asks for.

    Raises:
        LoadError: no backend reads such files.
    """
    name = backend_by_name(path.name)
    if name is None:
        raise LoadError(f"'{path.name}' has none of the model file endings {', '.join(ENDINGS)}")
    return name


def backend_by_name(name: str) -> str | None:
    """The backend that a file of this name asks for; None where it asks for none."""
    return NAMES.get(name) or ENDINGS.get(PurePath(name).suffix.lower())


def model_files(name: str) -> tuple[str, ...]:
    """The file names that a version's folder is searched for, best first."""
    return MODEL_FILES.get(canonical(name), ())


def reads(name: str, path: PurePath) -> bool:
    """Whether the backend of this name reads files with such an ending."""
    ending = path.suffix.lower()
    return name in (NAMES.get(path.name), ENDINGS.get(ending)) or ending in ALSO_READS.get(name, ())


def gives_way(name: str) -> bool:
    """Whether a file of this name may well belong to another that is the model."""
    return name in NAMES or PurePath(name).suffix.lower() in GIVES_WAY


def content_fits(name: str, beginning: bytes) -> bool:
    """Whether a file that begins so may be what its ending says, where other files have that ending too."""
    pattern = TOLD_BY_CONTENT.get(PurePath(name).suffix.lower())
    return pattern is None or pattern.match(beginning) is not None


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
