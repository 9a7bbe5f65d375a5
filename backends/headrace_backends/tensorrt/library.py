"""Which TensorRT there is: the full library (10 or 11) or TensorRT-RTX, whose Python interface is the same."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from headrace_backends.base import BackendUnavailable, LoadError

log = logging.getLogger("headrace.tensorrt")

MODULES: Mapping[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # the one to prefer first
OLDEST = {"tensorrt": (10, 1), "tensorrt-rtx": (1, 0)}
INSTALL = "pip install 'headrace[tensorrt]' or, for engines that need not be built on a GPU, 'headrace[tensorrt-rtx]'"

_MAX_LINES = 20  # of what the library says during one task; the first errors tell the cause


@dataclass(frozen=True, slots=True)
class Library:
    """A TensorRT that imports here."""

    name: str  # tensorrt | tensorrt-rtx
    module: Any
    version: str

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.name == "tensorrt-rtx"

    @property
    def release(self) -> tuple[int, ...]:
        """The version as numbers, as far as they go."""
        return version_numbers(self.version)

    def __str__(self) -> str:
        return f"{'TensorRT-RTX' if self.is_rtx else 'TensorRT'} {self.version}"


def find_library(wanted: str | None = None) -> Library:
    """The library to use, ``wanted`` by name or else the first that imports.

    Raises:
        BackendUnavailable: there is none, or it is too old.
        LoadError: ``wanted`` is no name of one.
    """
    if wanted is not None and wanted not in MODULES:
        raise LoadError(f"parameters.library is {wanted!r}, expected one of {', '.join(MODULES)}")
    missing = []
    for name in [wanted] if wanted else MODULES:
        try:
            module = import_module(MODULES[name])
        except (ImportError, OSError) as error:  # OSError: its own shared library, or one that that needs
            missing.append(f"{name}: {error}")
            continue
        version = str(getattr(module, "__version__", ""))
        if version_numbers(version) < OLDEST[name]:
            missing.append(
                f"{name}: version {version or 'unknown'} is too old, {'.'.join(map(str, OLDEST[name]))} is the oldest"
            )
            continue
        return Library(name, module, version)
    raise BackendUnavailable(
        f"{wanted or 'neither TensorRT nor TensorRT-RTX'} {'does not import' if wanted else 'imports'} here "
        f"({'; '.join(missing)}); install it with: {INSTALL}"
    )


def version_numbers(text: str) -> tuple[int, ...]:
    """As ``(10, 13, 3)``, up to the first part that is no number."""
    numbers: list[int] = []
    for part in text.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def register_plugins(library: Library, log: Any) -> None:
    """Make the library's own plugins known, which ONNX files and engines may have as layers. Any number of times."""
    register = getattr(library.module, "init_libnvinfer_plugins", None)
    if register is not None:
        register(log, "")  # one that is missing is told by whoever asks for it


def make_logger(library: Library) -> Any:
    """What the library is to log to: its errors are kept in ``errors`` for messages, its warnings go to the log.

    It must outlive every object that was made with it.
    """
    module = library.module

    class Log(module.ILogger):  # type: ignore[misc, name-defined] # the class is the library's
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR):
                if len(self.errors) < _MAX_LINES:
                    self.errors.append(" ".join(message.split()))
            elif severity == module.ILogger.Severity.WARNING:
                log.info("%s: %s", library, message)

        def told(self) -> str:
            """The errors since the last call, on one line."""
            text = "; ".join(self.errors) or "it does not say why"
            self.errors.clear()
            return text

    return Log()
