"""A virtual environment for each peer: made on demand from pinned versions, outside the repository, and kept."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "headrace-loadtests"
_REQUIREMENTS = Path(__file__).parent / "peers" / "requirements"
_INSTALL_TIMEOUT_S = 1800.0
_DONE = ".complete"  # written last, so that an interrupted install is not taken for a whole one


class EnvironmentFailure(Exception):
    """A peer could not be installed; the message has the reason that pip gave."""


def requirements(peer: str) -> str:
    """The pinned packages of one peer, as pip reads them."""
    return (_REQUIREMENTS / f"{peer}.txt").read_text()


def folder_of(peer: str, pinned: str, cache: Path) -> Path:
    """Where the environment of these versions lies. Other versions, or another Python, have another folder."""
    key = hashlib.sha256(f"{sys.version_info[:2]}\n{pinned}".encode()).hexdigest()[:12]
    return cache / "environments" / f"{peer}-{key}"


def environment(peer: str, cache: Path = CACHE) -> Path:
    """The folder of the peer's environment, installed if it is not there yet.

    Raises:
        EnvironmentFailure: it cannot be.
    """
    pinned = requirements(peer)
    folder = folder_of(peer, pinned, cache)
    if (folder / _DONE).exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run(peer, [sys.executable, "-m", "venv", str(folder)])
    listed = folder / "requirements.txt"
    listed.write_text(pinned)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run(peer, [*pip, "--requirement", str(listed)])
    (folder / _DONE).touch()
    return folder


def _run(peer: str, command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_INSTALL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise EnvironmentFailure(f"the environment of {peer} was not there after {_INSTALL_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise EnvironmentFailure(f"the environment of {peer} could not be made: {' '.join(told)[-400:]}")
