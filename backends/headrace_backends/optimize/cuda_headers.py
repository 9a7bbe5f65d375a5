"""CUDA's headers, which PyTorch's compiler takes from an installation of CUDA or nowhere: they are in wheels as well.

Of the wheels, PyTorch's own come with a part of them only: what they include lies in two more.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

_USUAL = Path("/usr/local/cuda")
# What the code that is compiled includes, be it by way of others, and the wheels that these are in.
_HEADERS = {
    "cuda.h": "nvidia-cuda-runtime",
    "crt/host_defines.h": "nvidia-cuda-crt",
    "nv/target": "nvidia-cuda-cccl",
}


class NoCudaHeaders(Exception):
    """There are none, or not all of them; the message says what brings them."""


def cuda_home(cuda: str, environment: Mapping[str, str], wheels: Sequence[Path]) -> str:
    """What CUDA_HOME has to be for a compiler of PyTorch's with this version of CUDA; empty for what it is.

    ``wheels`` are the folders that the wheels of NVIDIA for that CUDA have put their files into.

    Raises:
        NoCudaHeaders: CUDA is not installed, and the wheels do not have all that is needed.
    """
    if any(environment.get(name) for name in ("CUDA_HOME", "CUDA_PATH")) or shutil.which("nvcc") or _USUAL.exists():
        return ""
    missing = list(_HEADERS.values())
    for home in wheels:
        missing = [wheel for header, wheel in _HEADERS.items() if not (home / "include" / header).is_file()]
        if not missing:
            return str(home)
    wanted = " ".join(f"'{wheel}=={cuda}.*'" for wheel in missing)
    raise NoCudaHeaders(f"it takes CUDA's headers: pip install {wanted}, or install CUDA and set CUDA_HOME")


def find_for(cuda: str) -> None:
    """Have this process's compiler find them, before it is used for the first time.

    Raises:
        NoCudaHeaders: there are none.
    """
    try:
        found = find_spec(f"nvidia.cu{cuda.partition('.')[0]}")
    except ModuleNotFoundError:  # no wheel of NVIDIA's at all
        found = None
    wheels = list(found.submodule_search_locations or ()) if found is not None else []
    home = cuda_home(cuda, os.environ, [Path(wheel) for wheel in wheels])
    if home:
        os.environ["CUDA_HOME"] = home
