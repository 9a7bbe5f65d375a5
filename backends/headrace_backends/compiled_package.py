"""What lies in a compiled package (.pt2 by AOTInductor), and whether it can run here: read before it is loaded."""

import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from headrace_backends.base import LoadError
from headrace_backends.compiled_source import DeclaredInput, compiled_threads, declared_inputs

MODEL = "model"  # what torch calls the only model of a package
CONSENT = "allow_native_code"  # the parameter by which an owner agrees to a package's code
INPUTS = "HEADRACE_INPUTS"  # in its metadata: the names of its inputs as JSON, of which positional ones have none else
HOW = "torch._inductor.aoti_compile_and_package"

_CODE = re.compile(r"(?:[^/]+/)?data/aotinductor/(?P<model>[^/]+)/(?P<file>[^/]+)")
_MOST_SOURCE_BYTES = 64 << 20  # of one file: weights are not in there
# What CPUs call the instructions that the compiler was told of.
_INSTRUCTIONS = {"avx2": "avx2", "avx512": "avx512f", "avx512_vnni": "avx512_vnni", "amx_tile": "amx_tile"}
_DEVICES = {"cpu": "device: cpu", "cuda": 'device: "gpu:0"'}
# What the module zipfile raises of an archive that is not whole.
_DAMAGED = (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError)


@dataclass(frozen=True, slots=True)
class Package:
    """What a package says of itself. ``inputs`` is None where its source does not tell."""

    metadata: Mapping[str, str]
    inputs: list[DeclaredInput] | None = None
    threads: int = 1  # that its kernels start
    own_kernels: bool = False  # machine code for GPUs of one kind lies beside it

    @property
    def device(self) -> str:
        """What it was compiled for, in torch's words: cpu, cuda."""
        return self.metadata["AOTI_DEVICE_KEY"]

    @property
    def names(self) -> tuple[str, ...]:
        """What its inputs are called, where the package was made with their names; else empty."""
        try:
            return tuple(msgspec.json.decode(self.metadata.get(INPUTS, "[]"), type=list[str]))
        except msgspec.DecodeError:
            return ()


@dataclass(frozen=True, slots=True)
class Here:
    """The machine that it is to run on. ``capability`` is the GPU's, None for the CPU."""

    platform: str
    machine: str
    instructions: frozenset[str] = field(default_factory=frozenset)  # as /proc/cpuinfo has them; empty: not known
    capability: tuple[int, int] | None = None


def is_package(path: Path) -> bool:
    """Whether the file holds compiled code, told by what lies in it."""
    try:
        return any(map(_CODE.fullmatch, names_in(path)))
    except LoadError:
        return False


def names_in(path: Path) -> list[str]:
    """What a zip archive of PyTorch's holds.

    Raises:
        LoadError: it is damaged, or no archive at all.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except _DAMAGED as error:
        raise LoadError(f"'{path.name}' is damaged: {error}; copy it anew") from error


def opened(path: Path) -> Package:
    """What lies in a package.

    Raises:
        LoadError: it is damaged, or is not what the compiler writes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            held = {name: match for name in archive.namelist() if (match := _CODE.fullmatch(name))}
            models = sorted({match["model"] for match in held.values()})
            if MODEL not in models:
                raise LoadError(
                    f"'{path.name}' holds {models}, expected one model called '{MODEL}', as {HOW} writes it"
                )
            files = {match["file"]: name for name, match in held.items() if match["model"] == MODEL}
            sources = [archive.getinfo(name) for file, name in files.items() if file.endswith(".cpp")]
            source = "\n".join(
                archive.read(one).decode(errors="replace") for one in sources if one.file_size <= _MOST_SOURCE_BYTES
            )
            told = [json.loads(archive.read(name)) for file, name in files.items() if file.endswith("_metadata.json")]
    except _DAMAGED as error:
        raise LoadError(f"'{path.name}' is damaged: {error}; copy it anew") from error
    if not any(file.endswith(".so") for file in files):
        raise LoadError(f"'{path.name}' holds source code alone: compile it, without package_cpp_only")
    metadata = next((one for one in told if isinstance(one, dict) and "AOTI_DEVICE_KEY" in one), None)
    if metadata is None:
        raise LoadError(f"'{path.name}' does not say for which device it was compiled: make it anew with {HOW}")
    return Package(
        {str(key): str(value) for key, value in metadata.items()},
        declared_inputs(source),
        compiled_threads(source),
        any(file.endswith(".cubin") for file in files),
    )


def misfit(package: Package, device: str, here: Here) -> str | None:
    """Why the package cannot run on this device (cpu, cuda) of this machine; None where nothing speaks against it.

    Code is compiled for the very CPU that compiles it, and a package tells only the widest of its instructions: whether
    all others are here is found out by running it.
    """
    if package.device != device:
        return (
            f"it was compiled for {package.device}, and its instances are on {device}: "
            + (f"set instances: [{{{_DEVICES[package.device]}}}], or " if package.device in _DEVICES else "")
            + f"compile it anew from a program that is on {device}"
        )
    told = package.metadata
    for what, key, mine in (("system", "AOTI_PLATFORM", here.platform), ("CPU", "AOTI_MACHINE", here.machine)):
        if told.get(key, mine) != mine:
            return f"it was compiled for the {what} {told[key]}, and this one is {mine}"
    wanted = told.get("AOTI_CPU_ISA", "").lower().split()
    lacking = [one for one in wanted if one in _INSTRUCTIONS and _INSTRUCTIONS[one] not in here.instructions]
    if here.instructions and lacking:
        return f"it was compiled for CPUs with {', '.join(lacking)}, which this one has not: compile it anew here"
    return _gpu_misfit(package, here.capability)


def _gpu_misfit(package: Package, here: tuple[int, int] | None) -> str | None:
    """Kernels run on GPUs of the same generation that are no older; what is packed for several lies elsewhere."""
    text = package.metadata.get("AOTI_COMPUTE_CAPABILITY", "")
    if here is None or not package.own_kernels or not text.isdecimal():
        return None
    major, minor = divmod(int(text), 10)
    if here[0] == major and here[1] >= minor:
        return None
    return (
        f"it was compiled for GPUs of compute capability {major}.{minor}, and this one has {here[0]}.{here[1]}: "
        "compile it anew here, or with aot_inductor.emit_multi_arch_kernel"
    )
