"""Engines that were built, kept in a folder: a model that comes again is not built again."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

from headrace_backends.cache_folder import cache_folder, one_at_a_time
from headrace_backends.registry import ENDINGS
from headrace_backends.tensorrt.builder import BuildOptions
from headrace_backends.tensorrt.library import Library
from headrace_backends.tensorrt.profiles import Profile

LIMIT_BYTES = 32 * 1024**3  # of all engines of a folder; those used longest ago go first

_CHUNK_BYTES = 1 << 20
FORMAT = 1


def default_folder() -> Path:
    """Where engines are kept unless the configuration says where."""
    return cache_folder("engines")


def model_hash(path: Path) -> str:
    """A hash of a model file and of what lies beside it, but other models: weights may be in files of their own."""
    digest = blake2b(digest_size=16)
    beside = (one for one in path.parent.iterdir() if one.is_file() and one.suffix.lower() not in ENDINGS)
    for file in (path, *sorted(beside)):
        digest.update(f"{file.name}\0".encode(errors="replace"))
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def engine_key(model: str, library: Library, hardware: str, options: BuildOptions, profiles: Sequence[Profile]) -> str:
    """A name for the engine that comes of all these: whatever else changes, it changes with it.

    ``hardware`` is the GPU's name and compute capability, or what the engine is built for instead.
    """
    parts = {
        "format": FORMAT,
        "model": model,
        "library": [library.name, library.version],
        "hardware": hardware,
        "options": asdict(options),
        "profiles": [{name: asdict(one) for name, one in profile.items()} for profile in profiles],
    }
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class EngineCache:
    """Engines by key, each with a note of its own hash; one that is not what the note says is not there."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    @contextmanager
    def building(self, key: str) -> Iterator[None]:
        """Hold the others off that would build the same engine at the same time: they find it when it is there.

        Raises:
            OSError: the folder cannot be written to.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(self._folder, key):
            yield

    def get(self, key: str) -> tuple[bytes | None, str | None]:
        """The engine, or None; and what was wrong with the one that is there, if there is."""
        engine, note = self._paths(key)
        if not note.exists():
            return None, None
        try:
            facts = json.loads(note.read_bytes())
            data = engine.read_bytes()
        except (OSError, ValueError) as error:
            return None, f"the cached engine {engine.name} cannot be read ({error})"
        if not isinstance(facts, dict) or facts.get("hash") != _hash(data):
            return None, f"the cached engine {engine.name} is damaged"
        with suppress(OSError):
            os.utime(engine)  # it was used now
        return data, None

    def put(self, key: str, data: bytes, facts: dict[str, Any]) -> None:
        """Keep an engine; make room for it. Whole or not at all: the note comes last.

        Raises:
            OSError: it cannot be written.
        """
        engine, note = self._paths(key)
        self._make_room(len(data))
        note.unlink(missing_ok=True)
        _write(engine, data)
        _write(note, json.dumps({**facts, "hash": _hash(data)}, indent=1).encode())

    def timing(self, library: Library, hardware: str) -> bytes | None:
        """What earlier builds measured on such a GPU."""
        with suppress(OSError):
            return self._timing_path(library, hardware).read_bytes()
        return None

    def put_timing(self, library: Library, hardware: str, data: bytes) -> None:
        """Keep that.

        Raises:
            OSError: it cannot be written.
        """
        _write(self._timing_path(library, hardware), data)

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self._folder / f"{key}.plan", self._folder / f"{key}.json"

    def _timing_path(self, library: Library, hardware: str) -> Path:
        name = blake2b(f"{library.name} {library.version} {hardware}".encode(), digest_size=8).hexdigest()
        return self._folder / f"{name}.timing"

    def _make_room(self, nbytes: int) -> None:
        engines = []
        for one in self._folder.glob("*.plan"):
            with suppress(FileNotFoundError):  # another process may remove it meanwhile
                status = one.stat()
                engines.append((status.st_mtime, status.st_size, one))
        used = sum(size for _, size, _ in engines)
        for _, size, path in sorted(engines):
            if used + nbytes <= self._limit_bytes:
                break
            for other in (path.with_suffix(".json"), path, path.with_suffix(".lock")):
                other.unlink(missing_ok=True)
            used -= size


def _hash(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def _write(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_bytes(data)
    new.replace(path)
