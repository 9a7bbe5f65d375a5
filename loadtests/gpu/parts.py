"""Wheels that are too large to bring in one piece: cut here, joined and checked on the other side.

``python -m loadtests.gpu.parts FOLDER [REQUIREMENT...]`` fetches wheels for the other machine's Python and cuts them:
those that are named, or all that the run needs beside PyTorch and ONNX. Each of the folders that it makes, FOLDER/1 and
so on, is one trip; all of them together go to ``loadtests.gpu.run --parts``.
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
from typing import Any

TRIP_BYTES = 52 * 1024 * 1024  # with the project itself, 10 MB, it has to fit into 64 MiB
MANIFEST = "manifest.json"
# What the run needs that Headrace itself does not.
_BESIDE = ("nvidia-ml-py", "psutil", "pytest", "pytest-asyncio", "pytest-randomly", "tensorrt-rtx-cu13")
# A machine with PyTorch has its own, and others would not go with that.
_THERE = frozenset({"numpy", "onnxruntime", "torch"})
_EXTRA = ("onnxruntime-gpu",)  # in the newest version that there is: no machine without a GPU has it
_FROM_SOURCE = frozenset({"tensorrt-rtx-cu13"})  # a few lines of Python around its libraries; no wheel is offered
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def cut(files: list[Path], folder: Path, trip_bytes: int = TRIP_BYTES) -> int:
    """Cut files for trips of at most so many bytes, the small ones first. Each has the manifest; returns how many."""
    manifest: dict[str, Any] = {}
    trip, room = 1, trip_bytes
    for file in sorted(files, key=lambda one: one.stat().st_size):
        data = file.read_bytes()
        names = []
        position = 0
        while position < len(data) or not names:
            if not room:
                trip, room = trip + 1, trip_bytes
            piece = data[position : position + room]
            names.append(f"{file.name}.{len(names):02}")
            (folder / str(trip)).mkdir(parents=True, exist_ok=True)
            (folder / str(trip) / names[-1]).write_bytes(piece)
            position += len(piece)
            room -= len(piece)
        manifest[file.name] = {"parts": names, "sha256": hashlib.sha256(data).hexdigest()}
    for number in range(1, trip + 1):
        (folder / str(number) / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return trip


def join(folder: Path, target: Path) -> tuple[list[Path], list[str]]:
    """The files again, of parts that lie anywhere below a folder; and what is wrong with those that are not whole."""
    there = {path.name: path for path in folder.rglob("*") if path.is_file()}
    manifest: dict[str, Any] = {}
    for path in sorted(folder.rglob(MANIFEST)):
        manifest |= json.loads(path.read_text())
    if not manifest:
        return [], [f"{folder} has no {MANIFEST}"]
    target.mkdir(parents=True, exist_ok=True)
    files, problems = [], []
    for name, facts in manifest.items():
        missing = [part for part in facts["parts"] if part not in there]
        if missing:
            problems.append(f"{name} lacks {', '.join(missing)}")
            continue
        data = b"".join(there[part].read_bytes() for part in facts["parts"])
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            problems.append(f"{name} is not what was cut: its hash is another one")
            continue
        (target / name).write_bytes(data)
        files.append(target / name)
    return files, problems


def install(folder: Path, target: Path) -> tuple[list[str], list[str]]:
    """Join the wheels of a folder and install them into another, from which ``sys.path`` can have them.

    Returns the names of those that are there, and what is wrong with the others: those that are whole do without them.
    """
    with tempfile.TemporaryDirectory() as joined:
        wheels, problems = join(folder, Path(joined))
        refused = _pip(wheels, target)
        if refused and len(wheels) > 1:  # one of them, and not all
            each = {wheel: _pip([wheel], target) for wheel in wheels}
            problems += [f"{wheel.name}: {said}" for wheel, said in each.items() if said]
            wheels = [wheel for wheel, said in each.items() if not said]
        elif refused:
            return [], [*problems, refused]
        return [wheel.name for wheel in wheels], problems


def _pip(wheels: list[Path], target: Path) -> str:
    """Install them; empty, or what pip says."""
    if not wheels:
        return ""
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *map(str, wheels)],
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else " ".join(done.stderr.split())[-300:]


def fetch(folder: Path, requirements: list[str], python: str) -> list[Path]:
    """Download wheels for another machine's Python, without what they need in turn.

    Raises:
        subprocess.CalledProcessError: pip finds none.
    """
    pip = [sys.executable, "-m", "pip"]
    made = [one for one in requirements if re.split(r"[=<>~!]", one)[0] in _FROM_SOURCE]
    found = [one for one in requirements if one not in made]
    platforms = [word for one in _PLATFORMS for word in ("--platform", one)]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    if found:
        subprocess.run([*pip, "download", *options, *platforms, "--dest", str(folder), *found], check=True)
    if made:
        subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *made], check=True)
    return sorted(folder.glob("*.whl"))


def needed(names: Iterable[str]) -> list[str]:
    """These distributions and what they need in turn, in the versions that are installed here, as pip takes them.

    One of these that is not installed is taken in its newest version, without what it needs.
    """
    asked = {_plain(name) for name in names}
    found: dict[str, str] = {}
    waiting = list(asked)
    while waiting:
        name = _plain(waiting.pop())
        if name in found or name in _THERE:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if name in asked:
                found[name] = ""
            continue  # else it is for another system or another Python
        found[name] = f"=={distribution.version}"
        needs = [one for one in distribution.requires or () if "extra ==" not in one]
        waiting += [match[0] for one in needs if (match := re.match(r"[\w.-]+", one))]
    found.pop("headrace", None)
    return [f"{name}{version}" for name, version in sorted(found.items())]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Entry point."""
    target, *requirements = sys.argv[1:]
    requirements = requirements or needed(("headrace", *_BESIDE, *_EXTRA))
    with tempfile.TemporaryDirectory() as folder:
        wheels = fetch(Path(folder), requirements, "3.12")
        trips = cut(wheels, Path(target))
        total = sum(one.stat().st_size for one in wheels)
        print(f"{len(wheels)} wheels of {total / 1e6:.0f} MB in {target}, for {trips} trips")


if __name__ == "__main__":
    main()
