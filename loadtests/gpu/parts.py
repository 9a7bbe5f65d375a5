"""Wheels that are too large to bring in one piece: cut here, joined and checked on the other side.

``python -m loadtests.gpu.parts FOLDER [REQUIREMENT...]`` fetches wheels for the other machine's Python and cuts them:
those that are named, or all that the run needs beside PyTorch, ONNX and ONNX Runtime.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

PART_BYTES = 55 * 1024 * 1024
MANIFEST = "manifest.json"
# What the run needs that Headrace itself does not.
_BESIDE = (
    "nvidia-ml-py",
    "psutil",
    "pytest",
    "pytest-asyncio",
    "pytest-randomly",
    "tensorrt-rtx-cu13-bindings",
    "tensorrt-rtx-cu13-libs",
)
# A machine with PyTorch has its own, and others would not go with that.
_THERE = frozenset({"numpy", "onnxruntime", "torch"})
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


class BadParts(Exception):
    """The parts do not make up what was cut; the message says which."""


def cut(files: list[Path], folder: Path, part_bytes: int = PART_BYTES) -> None:
    """Cut files into parts of at most so many bytes, with a manifest that has their hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {}
    for file in files:
        data = file.read_bytes()
        pieces = [data[start : start + part_bytes] for start in range(0, max(1, len(data)), part_bytes)]
        names = [f"{file.name}.{number:02}" for number in range(len(pieces))]
        for name, piece in zip(names, pieces, strict=True):
            (folder / name).write_bytes(piece)
        manifest[file.name] = {"parts": names, "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def join(folder: Path, target: Path) -> list[Path]:
    """The files again.

    Raises:
        BadParts: a part is missing, or the whole is not what was cut.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    target.mkdir(parents=True, exist_ok=True)
    files = []
    for name, facts in manifest.items():
        missing = [part for part in facts["parts"] if not (folder / part).exists()]
        if missing:
            raise BadParts(f"{name} lacks {', '.join(missing)}")
        data = b"".join((folder / part).read_bytes() for part in facts["parts"])
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise BadParts(f"{name} is not what was cut: its hash is another one")
        (target / name).write_bytes(data)
        files.append(target / name)
    return files


def install(folder: Path, target: Path) -> None:
    """Join the wheels of a folder and install them into another, from which ``sys.path`` can have them.

    Raises:
        BadParts: they are not whole.
        subprocess.CalledProcessError: pip refuses them.
    """
    with tempfile.TemporaryDirectory() as joined:
        wheels = [str(wheel) for wheel in join(folder, Path(joined))]
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(target)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)


def fetch(folder: Path, requirements: list[str], python: str) -> list[Path]:
    """Download wheels for another machine's Python, without what they need in turn.

    Raises:
        subprocess.CalledProcessError: pip finds none.
    """
    platforms = [word for one in _PLATFORMS for word in ("--platform", one)]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    command = [sys.executable, "-m", "pip", "download", *options, *platforms, "--dest", str(folder), *requirements]
    subprocess.run(command, check=True)
    return sorted(folder.glob("*.whl"))


def needed(names: Iterable[str]) -> list[str]:
    """These distributions and what they need in turn, in the versions that are installed here, as pip takes them."""
    found: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found or name in _THERE:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another system or another Python
        found[name] = distribution.version
        asked = [one for one in distribution.requires or () if "extra ==" not in one]
        waiting += [match[0] for one in asked if (match := re.match(r"[\w.-]+", one))]
    found.pop("headrace", None)
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def main() -> None:
    """Entry point."""
    target, *requirements = sys.argv[1:]
    requirements = requirements or needed(("headrace", *_BESIDE))
    with tempfile.TemporaryDirectory() as folder:
        wheels = fetch(Path(folder), requirements, "3.12")
        cut(wheels, Path(target))
        print(f"{len(wheels)} wheels in {target}, {sum(one.stat().st_size for one in wheels) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
