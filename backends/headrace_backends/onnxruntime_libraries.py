"""What ONNX Runtime's providers for GPUs are linked with, found where pip has put it.

The providers name CUDA, cuDNN and TensorRT and do not say where those are, and no loader looks into site-packages by
itself: from there they have to be loaded before the first session wants them.
"""

import logging
from contextlib import redirect_stdout, suppress
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

log = logging.getLogger("headrace.onnxruntime")


def load_libraries(onnxruntime: Any, *, tensorrt: bool = False) -> None:
    """Load CUDA's, and TensorRT's where that is wanted. ``onnxruntime`` is the module, that of a build for CPUs too.

    What is not there is no error here: it may come from elsewhere, and a session that lacks it says so.
    """
    preload = getattr(onnxruntime, "preload_dlls", None)  # since 1.21
    if preload is not None:
        for folder in _folders():  # by itself it looks beside its own package only, and in the system
            _quietly(preload, directory=folder)
        for line in _quietly(preload):
            log.info("%s", line)
    if tensorrt:
        with suppress(ImportError, OSError):  # its module loads the libraries that lie beside it
            import_module("tensorrt")


def _folders() -> list[str]:
    """Where NVIDIA's packages have their libraries; one name may stand for folders on several of Python's paths."""
    try:
        roots = import_module("nvidia").__path__
    except ImportError:
        return []
    return [str(folder) for root in roots for folder in sorted(Path(root).glob("*/lib"))]


def _quietly(preload: Any, **arguments: str) -> list[str]:
    """Call it, which prints what it does not find."""
    told = StringIO()
    with redirect_stdout(told):
        preload(**arguments)
    return told.getvalue().splitlines()
