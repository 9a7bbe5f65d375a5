"""What lies in a repository's folder now, and why something that does not is not followed."""

from enum import Enum
from pathlib import Path

from headrace.repository.layout import ModelFolder, has_model, list_models, read_folder


class Absent(Enum):
    """Why there is no folder to be followed."""

    MODEL = "model"
    REPOSITORY = "repository"  # all of it is away, as a network file system may be for a while


class Disk:
    """The folder at ``path``; it may be away and come back. Nothing is remembered."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """The models that lie there, sorted; none while it is away."""
        try:
            return list_models(self.path)
        except OSError:  # away for a while; what serves is known all the same
            return []

    def has(self, name: str) -> bool:
        """Whether that model lies there."""
        return has_model(self.path, name)

    def read(self, name: str) -> ModelFolder | Absent:
        """That model's folder as it is now; it takes its time, so not for the event loop."""
        if not self.path.is_dir():
            return Absent.REPOSITORY
        return read_folder(self.path / name) if has_model(self.path, name) else Absent.MODEL
