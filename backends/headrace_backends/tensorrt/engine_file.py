"""An engine file's header: which library wrote it, in which version, for which GPUs. Read before anything is loaded.

TensorRT has no call that says whether an engine will load, and what it makes of one from elsewhere is an error in its
log, at worst a crash. The header is 28 bytes that both libraries write alike: a tag, the format's version, the size
and the four parts of the library's version; TensorRT-RTX adds the compute capabilities as bits.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from headrace_backends.base import LoadError
from headrace_backends.tensorrt import capability
from headrace_backends.tensorrt.capability import RTX_TARGETS, Capability
from headrace_backends.tensorrt.library import Library

HEADER_BYTES = 64
UNKNOWN = (0, 0, 0, 0)  # in place of a version, where the header has a form of its own

_TAGS = {b"ftrt": "tensorrt", b"vtrt": "tensorrt-rtx"}
_SIZE_OFFSET, _VERSION_OFFSET, _TARGETS_OFFSET = 16, 24, 32


@dataclass(frozen=True, slots=True)
class EngineHeader:
    """What an engine says of itself. ``targets`` is empty where it does not say for which GPUs it was built.

    ``others``: it holds code that GPUs beyond its targets may be able to run.
    """

    library: str  # tensorrt | tensorrt-rtx
    version: tuple[int, int, int, int]
    nbytes: int
    targets: tuple[Capability, ...] = ()
    others: bool = False

    @property
    def version_text(self) -> str:
        """As ``10.13.3.9``."""
        return ".".join(map(str, self.version))


def read_header(data: bytes) -> EngineHeader | None:
    """The header of an engine, from its first bytes; None where there is none."""
    library = _TAGS.get(data[:4])
    if library is None or len(data) < _VERSION_OFFSET + 4:
        return None
    (nbytes,) = struct.unpack_from("<Q", data, _SIZE_OFFSET)
    if data[4:8] != bytes(4):  # the number of the header's form
        return EngineHeader(library, UNKNOWN, nbytes)
    major, minor, patch, build = data[_VERSION_OFFSET : _VERSION_OFFSET + 4]
    targets: tuple[Capability, ...] = ()
    others = False
    if library == "tensorrt-rtx" and len(data) >= _TARGETS_OFFSET + 4:
        (bits,) = struct.unpack_from("<I", data, _TARGETS_OFFSET)
        targets = tuple(one for position, one in enumerate(RTX_TARGETS) if bits >> position & 1)
        others = bool(bits >> len(RTX_TARGETS))
    return EngineHeader(library, (major, minor, patch, build), nbytes, targets, others)


def read_engine(path: Path) -> tuple[EngineHeader, bytes]:
    """An engine file's engine and what its header says.

    Raises:
        LoadError: it is no engine, or was cut short.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LoadError(f"cannot read '{path.name}': {error.strerror}") from error
    data = data[_engine_start(data) :]
    header = read_header(data[:HEADER_BYTES])
    if header is None:
        raise LoadError(
            f"'{path.name}' is no TensorRT engine (it begins with {data[:4]!r}); an engine is what trtexec, or "
            "TensorRT's build_serialized_network, writes"
        )
    if header.library == "tensorrt-rtx" and header.nbytes != len(data):
        raise LoadError(f"'{path.name}' has {len(data)} bytes, and its header speaks of {header.nbytes}: copy it anew")
    return header, data


def _engine_start(data: bytes) -> int:
    """Where the engine begins: Ultralytics' exporter puts a JSON text and its length before it."""
    if len(data) < 5 or data[4:5] != b"{":
        return 0
    (length,) = struct.unpack_from("<I", data)
    return 4 + length if data[4 + length : 8 + length] in _TAGS else 0


def misfit(header: EngineHeader, library: Library, gpu: Capability | None) -> str | None:
    """Why the engine cannot run on this library and GPU (None: not known), or None where nothing speaks against it.

    An engine of TensorRT that is older than the library may be one that was built to be compatible with later
    versions: only loading it tells.
    """
    if header.library != library.name:
        other = "TensorRT-RTX" if header.library == "tensorrt-rtx" else "TensorRT"
        return f"it was built by {other} {header.version_text}, and here is {library}"
    if header.version == UNKNOWN:
        return None
    here = (library.release + (0,) * 4)[:4]
    known = min(4, len(library.release))
    if header.library == "tensorrt-rtx":
        if header.version[:known] != here[:known]:
            return f"it was built by TensorRT-RTX {header.version_text}, and here is {library.version}"
    elif header.version[:known] > here[:known]:
        return f"it was built by TensorRT {header.version_text}, and here is only {library.version}"
    # Whether it can run on one of the others, TensorRT-RTX is asked before the engine is loaded.
    if gpu is not None and header.targets and gpu not in header.targets and not header.others:
        return (
            f"it was built for compute capability {capability.all_told(header.targets)}, and this GPU has "
            f"{capability.told(gpu)}"
        )
    return None


def rebuild_advice(library: Library) -> str:
    """How to come by an engine that fits."""
    return (
        f"build it anew with {library} (python -m headrace_backends.tensorrt model.onnx model.plan), or leave that to "
        "the server: put model.onnx in its place, with 'backend: tensorrt' in config.yaml"
    )
