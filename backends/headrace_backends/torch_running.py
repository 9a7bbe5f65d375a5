"""How a PyTorch module is run, as its parameters ask: compiled, with channels last, under autocast."""

import atexit
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headrace_backends import parameters
from headrace_backends.base import DeviceLost, LoadError
from headrace_backends.torch_model import gist

NAMES = ("compile", "compile_mode", "compile_cache", "channels_last", "autocast")
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # torch.compile's own names
_LAUNCHING = ("reduce-overhead", "max-autotune")  # those that launch whole graphs on a GPU
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_IMAGES = 4  # dimensions of a batch of images, which channels may come last in
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # where compiled code goes


@dataclass(frozen=True, slots=True)
class Running:
    """What the parameters ask for. ``compile_cache`` is where compiled code is kept for the next load."""

    compile: bool = False
    mode: str = "default"
    compile_cache: Path | None = None
    channels_last: bool = False
    autocast: torch.dtype | None = None

    @classmethod
    def asked(cls, given: Mapping[str, Any]) -> "Running":
        """Read the parameters.

        Raises:
            LoadError: one has a value that it cannot have.
        """
        autocast = given.get("autocast")
        if autocast is not None and str(autocast) not in _AUTOCAST:
            raise LoadError(f"parameters.autocast is {autocast!r}, expected {' or '.join(_AUTOCAST)}")
        compiles = parameters.flag(given, "compile")
        cache = given.get("compile_cache")
        if cache is not None and not Path(str(cache)).is_absolute():  # the model's own folder is watched for changes
            raise LoadError(f"parameters.compile_cache is {cache!r}, expected the absolute path of a folder")
        if cache is not None and not compiles:
            raise LoadError("parameters.compile_cache is set and parameters.compile is not, so nothing is compiled")
        mode = parameters.one_of(given, "compile_mode", _MODES, "default")
        if "compile_mode" in given and not compiles:
            raise LoadError("parameters.compile_mode is set and parameters.compile is not, so nothing is compiled")
        return cls(
            compiles,
            str(mode),
            None if cache is None else Path(str(cache)),
            parameters.flag(given, "channels_last"),
            None if autocast is None else _AUTOCAST[str(autocast)],
        )

    @property
    def launches_graphs(self) -> bool:
        """Whether it is run as CUDA graphs where it is on a GPU: one for each size that comes."""
        return self.mode in _LAUNCHING

    def laid_out(self, module: Any) -> Any:
        """The module with its weights in the layout that is asked for."""
        return module.to(memory_format=torch.channels_last) if self.channels_last else module

    def inputs(self, tensors: list[Any]) -> list[Any]:
        """The inputs in that layout: a copy of those that are images. One that is optional may be None."""
        if not self.channels_last:
            return tensors
        return [
            tensor.contiguous(memory_format=torch.channels_last)
            if tensor is not None and tensor.ndim == _IMAGES
            else tensor
            for tensor in tensors
        ]

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """What a run happens in."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, dtype=self.autocast)

    def outputs(self, values: Sequence[Any], dtypes: Sequence[torch.dtype]) -> list[Any]:
        """The outputs in the model's own datatypes, where autocast has left them in its own."""
        if self.autocast is None:
            return list(values)
        return [
            value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype is self.autocast else value
            for value, dtype in zip(values, dtypes, strict=False)
        ] + list(values[len(dtypes) :])


@contextmanager
def compile_folder(cache: Path | None) -> Iterator[Path]:
    """Where compiled code goes: machine code that is loaded, so it must be a folder that nobody else can write to.

    Without ``cache`` it is one that is gone afterwards, since processes may be killed: what was loaded stays loaded. It
    comes back where something is compiled later, and goes with the process then.
    """
    if cache is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LoadError(f"parameters.compile_cache '{cache}' cannot be made: {error}") from error
        yield cache
        return
    own = Path(tempfile.mkdtemp(prefix="headrace-compiled-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def compiled(module: Any, folder: Path, *, any_size: bool, mode: str = "default") -> Callable[..., Any]:
    """The module compiled by inductor at its first call; ``any_size`` where batches of every size will come.

    On a GPU the modes but the default launch whole graphs, one of each size that comes.
    """
    os.environ[CACHE_VARIABLE] = str(folder)
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # no pool of processes, which would outlive the load
    function: Callable[..., Any] = torch.compile(
        module, dynamic=True if any_size else None, mode=None if mode == "default" else mode
    )
    return function


def warmed(run: Callable[[], Any], what: str) -> None:
    """Run once, which compiles.

    Raises:
        LoadError: it cannot be compiled here, or does not run that way.
    """
    try:
        with warnings.catch_warnings():  # inductor's are for people who tune it
            warnings.simplefilter("ignore")
            run()
    except DeviceLost:
        raise
    except Exception as error:
        text = str(error)
        if lacks_compiler(text):
            raise LoadError(
                "parameters.compile needs a C++ compiler, and there is none: install g++, or set CXX and CC "
                f"({gist(text)})"
            ) from error
        raise LoadError(f"it does not run {what}: {gist(text)}") from error


def lacks_compiler(text: str) -> bool:
    """Whether an error of inductor's says that there is no compiler: for C++, or for the C of what launches kernels."""
    return any(told in text for told in ("InvalidCxxCompiler", "No working C++ compiler", "Failed to find C compiler"))
