"""A version's model.py: how its code is imported, what it finds when it imports, and how that is undone."""

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

from headrace_backends.base import LoadError

_PREFIX = "headrace_model_"


class ModelCode:
    """The code in one version's folder.

    While it is open, it can import what lies beside it and in the model's folder, and what it is offered. No bytecode
    is written meanwhile, because the repository is watched.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.folder = file.parent
        # Kept in sys.modules, because pickle and dataclasses look there; never under a name that was used before.
        self._name = f"{_PREFIX}{uuid4().hex}"
        self._locations = [str(self.folder), str(self.folder.parent)]
        self._offered: dict[str, ModuleType] = {}
        self._before: set[str] | None = None  # the modules that there were when it was opened; None while shut
        self._wrote_bytecode = True

    @classmethod
    def of(cls, path: Path) -> "ModelCode":
        """The code that a version's folder, or the file itself, means.

        Raises:
            LoadError: there is no such file.
        """
        file = path / "model.py" if path.is_dir() else path
        if not file.is_file():
            raise LoadError(f"there is no file '{file.name}' in '{file.parent}'")
        return cls(file)

    def open(self) -> ModuleType:
        """Import model.py.

        Raises:
            LoadError: it does not import.
        """
        self._before = set(sys.modules)
        self._wrote_bytecode = not sys.dont_write_bytecode
        sys.dont_write_bytecode = True
        sys.path[:0] = self._locations[:1]
        sys.path += self._locations[1:]
        sys.modules.update(self._offered)
        importlib.invalidate_caches()
        module: ModuleType = guarded(self.folder, "does not import", self._imported)
        return module

    def offer(self, name: str, module: ModuleType) -> None:
        """Let the code import ``module`` under that name, now and later."""
        self._offered[name] = module
        if self._before is not None:
            sys.modules[name] = module

    def shut(self) -> None:
        """Leave no trace of it but the module.

        Another version's ``helper.py`` must not be taken for this one's, so what came from the folder is forgotten
        too; the model keeps what it imported.
        """
        before, self._before = self._before, None
        if before is None:
            return
        for location in self._locations:
            if location in sys.path:  # the user's code may have changed the path itself
                sys.path.remove(location)
        sys.dont_write_bytecode = not self._wrote_bytecode
        for name, module in self._offered.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(self.folder.parent) and not name.startswith(_PREFIX):
                del sys.modules[name]

    def forget(self) -> None:
        """Shut it, and drop the module as well."""
        self.shut()
        for name in [name for name in sys.modules if name == self._name or name.startswith(f"{self._name}.")]:
            del sys.modules[name]

    def _imported(self) -> ModuleType:
        # As a package whose parts are the files beside it, so that ``from . import helper`` works too.
        spec = importlib.util.spec_from_file_location(
            self._name, self.file, submodule_search_locations=[str(self.folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[self._name] = module
        spec.loader.exec_module(module)
        return module


def guarded(folder: Path, what: str, call: Callable[[], Any]) -> Any:
    """The result of the user's code, whose every failure is a LoadError that says where it happened."""
    try:
        return call()
    except BaseException as error:
        said = error.msg if isinstance(error, SyntaxError) else error
        missing = isinstance(error, ModuleNotFoundError)
        advice = "; install what it needs into the server's environment" if missing else ""
        raise LoadError(f"model.py {what}: {type(error).__name__}: {said} ({_place(error, folder)}){advice}") from error


def _place(error: BaseException, folder: Path) -> str:
    """The file and line of the user's code that were last on the way to ``error``."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(folder)]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}"
