"""What there is for GPUs here, found out by using it: one thing at a time, each in a process of its own.

``python -m headrace_backends.gpu_probe NAME`` prints one JSON object. What breaks in a library ends that process and no
other, and a driver that does not go with it can break anything.
"""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from headrace_backends.onnxruntime_libraries import load_libraries

# y = x, for one float: what a session is made of that has to run somewhere. Serialised ONNX, because the package that
# writes it need not be installed.
TINY_MODEL = bytes.fromhex(
    "080812003a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a00100d"
)


def driver() -> dict[str, Any]:
    """The driver and its GPUs, by libcuda itself."""
    from headrace_backends.base import BackendUnavailable
    from headrace_backends.tensorrt.cuda import CudaDriver

    try:
        found = CudaDriver()
    except BackendUnavailable as error:
        return {"error": str(error)}
    gpus = [
        {
            "index": gpu.index,
            "name": gpu.name,
            "capability": f"{gpu.capability[0]}.{gpu.capability[1]}",
            "total_bytes": gpu.total_bytes,
            "uuid": gpu.uuid,
        }
        for gpu in found.gpus()
    ]
    return {"cuda": ".".join(map(str, found.version)), "gpus": gpus}


def nvml() -> dict[str, Any]:
    """The driver's version and MIG, by nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return {"missing": True}
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        gpus = [_nvml_gpu(pynvml, index) for index in range(count)]
        return {"driver": _text(pynvml.nvmlSystemGetDriverVersion()), "gpus": gpus}
    except pynvml.NVMLError as error:
        return {"error": str(error)}


def _nvml_gpu(pynvml: Any, index: int) -> dict[str, Any]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    gpu: dict[str, Any] = {
        "name": _text(pynvml.nvmlDeviceGetName(handle)),
        "uuid": _text(pynvml.nvmlDeviceGetUUID(handle)),
        "mig": [],
    }
    with suppress(pynvml.NVMLError):  # most GPUs have no MIG
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
        gpu["mig_mode"] = bool(current)
        for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) if current else 0):
            with suppress(pynvml.NVMLError):  # not every place is taken
                part = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
                gpu["mig"].append(_text(pynvml.nvmlDeviceGetUUID(part)))
    return gpu


def onnxruntime() -> dict[str, Any]:
    """Whether a session really runs on a GPU: ONNX Runtime lists providers that do not work."""
    installed = installed_into(None)
    try:
        import numpy as np
        import onnxruntime as library
    except (ImportError, OSError) as error:
        return {"installed": installed, "error": str(error)}
    installed = installed_into(Path(library.__file__).parent)
    load_libraries(library, tensorrt=True)
    offered = library.get_available_providers()
    working, reasons = [], {}
    for name in ("CUDAExecutionProvider", "TensorrtExecutionProvider"):
        if name in offered:
            options = library.SessionOptions()
            options.log_severity_level = 4
            try:
                session = library.InferenceSession(TINY_MODEL, options, providers=[name], enable_fallback=0)
                session.run(None, {"x": np.zeros(1, np.float32)})
            except Exception as error:  # noqa: BLE001 - it does not work, and says why
                reasons[name] = " ".join(str(error).split())
            else:
                if session.get_providers()[0] == name:
                    working.append(name)
    return {
        "installed": installed,
        "version": library.__version__,
        "offered": offered,
        "working": working,
        "reasons": reasons,
    }


def torch() -> dict[str, Any]:
    """PyTorch, its CUDA, and how many GPUs it sees."""
    try:
        import torch as library
    except (ImportError, OSError) as error:
        return {"missing": isinstance(error, ModuleNotFoundError), "error": str(error)}
    seen = library.cuda.device_count() if library.cuda.is_available() else 0
    return {"version": library.__version__, "cuda": library.version.cuda, "gpus": seen}


def tensorrt() -> dict[str, Any]:
    """The TensorRT that models would be given, and whether it can build."""
    from headrace_backends.base import BackendUnavailable
    from headrace_backends.tensorrt.library import find_library, make_logger

    try:
        library = find_library()
    except BackendUnavailable as error:
        return {"error": str(error)}
    log = make_logger(library)
    try:
        library.module.Builder(log)
    except Exception:  # noqa: BLE001 - whatever the binding makes of a null
        return {"library": str(library), "error": log.told()}
    return {"library": str(library), "without_gpu": library.is_rtx}


PROBES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "driver": driver,
    "nvml": nvml,
    "onnxruntime": onnxruntime,
    "torch": torch,
    "tensorrt": tensorrt,
}


def installed_into(folder: Path | None) -> dict[str, str]:
    """The versions of ONNX Runtime, by the packages' names, that were installed into one folder; None for any."""
    found = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with suppress(metadata.PackageNotFoundError):
            package = metadata.distribution(name)
            if folder is None or Path(str(package.locate_file("onnxruntime"))).resolve() == folder.resolve():
                found[name] = package.version
    return found


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]]()))  # noqa: T201 - this is the answer
