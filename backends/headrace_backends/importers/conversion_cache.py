"""Files that were converted to ONNX, kept in a folder: a model that comes again is not converted again."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from headrace_backends.cache_folder import cache_folder, one_at_a_time
from headrace_backends.optimize.basis import file_digest

LIMIT_BYTES = 16 * 1024**3  # of all models of a folder; those used longest ago go first
MODEL_FILE, NOTE_FILE = "model.onnx", "conversion.json"  # of a conversion
FORMAT = 2  # of what is kept; another has other keys

_NEW = ".new-"


def default_folder() -> Path:
    """Where conversions are kept unless the configuration says where."""
    return cache_folder("conversions")


def conversion_key(source: str, versions: Mapping[str, str], options: Mapping[str, Any]) -> str:
    """A name for what comes of all these: whatever else changes, it changes with it. ``source`` is a hash."""
    parts = {"format": FORMAT, "source": source, "versions": dict(versions), "options": dict(options)}
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class ConversionCache:
    """Folders by key, each with a model and a note of its hash; one that is not what the note says is not there.

    Any number of processes may use one folder. A model's folder takes its place in one step, whole: whoever is killed
    while converting leaves nothing but a folder that the next one for the same key empties.
    """

    def __init__(self, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    @contextmanager
    def converting(self, key: str) -> Iterator[Path]:
        """An empty folder to convert in. The others who would convert the same wait: they find it when it is there.

        Raises:
            OSError: the cache cannot be written to.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with one_at_a_time(self._folder, key):
            building = self._folder / f"{_NEW}{key}"
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            try:
                yield building
            finally:
                shutil.rmtree(building, ignore_errors=True)

    def get(self, key: str) -> tuple[Path | None, list[str], str | None]:
        """The model, or None; what was noted of it; and what was wrong with the one that is there, if there is."""
        place = self._folder / key
        try:
            note = json.loads((place / NOTE_FILE).read_bytes())
            whole = {name: file_digest(place / name) for name in note["files"]} == note["files"]
            notes = [str(line) for line in note["notes"]]
        except FileNotFoundError:
            return None, [], f"the cached conversion {key} is not whole" if place.exists() else None
        except (OSError, ValueError, TypeError, KeyError) as error:
            return None, [], f"the cached conversion {key} cannot be read ({error})"
        if not whole or MODEL_FILE not in note["files"]:
            return None, [], f"the cached conversion {key} is damaged"
        with suppress(OSError):
            os.utime(place)  # it was used now
        return place / MODEL_FILE, notes, None

    def put(self, key: str, made_in: Path, notes: list[str]) -> Path:
        """Keep what was made in a folder that ``converting`` gave, and make room for it. Returns the model.

        Raises:
            OSError: it cannot be written.
        """
        files = sorted(file for file in made_in.iterdir() if file.is_file())
        self._make_room(key, sum(file.stat().st_size for file in files))
        note = {"files": {file.name: file_digest(file) for file in files}, "notes": notes}
        (made_in / NOTE_FILE).write_text(json.dumps(note, indent=1))
        place = self._folder / key
        shutil.rmtree(place, ignore_errors=True)
        made_in.rename(place)
        return place / MODEL_FILE

    def _make_room(self, key: str, nbytes: int) -> None:
        kept = [one for one in self._folder.iterdir() if one.is_dir() and not one.name.startswith(_NEW)]
        aged = []
        for one in kept:
            with suppress(OSError):  # another process may remove it meanwhile
                size = sum(file.stat().st_size for file in one.iterdir())
                aged.append((one.stat().st_mtime, size, one))
        used = sum(size for _, size, _ in aged)
        for _, size, place in sorted(aged):
            if used + nbytes <= self._limit_bytes:
                break
            if place.name != key:
                shutil.rmtree(place, ignore_errors=True)
                used -= size
