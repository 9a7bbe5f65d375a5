"""The libraries that are installed here, by the names that pip knows them by."""

from importlib.metadata import PackageNotFoundError, version

# Any of these may bring the library.
_ALTERNATIVES = {
    "ai-edge-litert": ("ai-edge-litert", "tflite-runtime"),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "tensorrt": ("tensorrt", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    "xgboost": ("xgboost", "xgboost-cpu"),
}


def installed(library: str) -> tuple[str, str]:
    """The distribution that brings a library, and its version; the library's own name and "" where none is there."""
    for name in _ALTERNATIVES.get(library, (library,)):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return library, ""
