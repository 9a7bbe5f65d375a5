"""PyTorch files with engines of Torch-TensorRT inside: told from others, for the reason why they are not served."""

import zipfile
import zlib
from pathlib import Path

_NOT_OFFERED = (
    "holds engines of Torch-TensorRT, which is not offered: its newest version, 2.14.0, needs torch 2.14, and Headrace "
    "has torch 2.13; export the model to ONNX and set backend: tensorrt"
)
_MARKS = (b"ops.tensorrt.", b"classes.tensorrt.", b"tensorrt::")  # its operators and its class, as archives name them
_ENDINGS = (".json", ".py")  # of graphs and of TorchScript's code
_MOST_BYTES = 64 << 20  # of one file: weights are not in there


def refusal(path: Path) -> str:
    """What is said of a file that could not be loaded because of its engines; empty where it has none."""
    return f"'{path.name}' {_NOT_OFFERED}" if _holds_engines(path) else ""


def _holds_engines(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            told = [
                one for one in archive.infolist() if one.filename.endswith(_ENDINGS) and one.file_size <= _MOST_BYTES
            ]
            return any(mark in archive.read(one) for one in told for mark in _MARKS)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError):
        return False
