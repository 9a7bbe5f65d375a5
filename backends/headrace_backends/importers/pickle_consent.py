"""Files that run code when they are opened, and that their owner has to agree to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace_backends import parameters
from headrace_backends.base import LoadError

PICKLED = (".joblib", ".pkl", ".pickle")


def refuse_unagreed(path: Path, given: Mapping[str, Any]) -> None:
    """Raise LoadError where the file is a pickle and the configuration does not say that it may be opened."""
    if path.suffix.lower() in PICKLED and not parameters.flag(given, "allow_pickle"):
        raise LoadError(
            f"'{path.name}' is a pickle, which could run any code and is not opened; save the model with "
            "skops.io.dump (model.skops), or, if you trust where the file comes from, set parameters.allow_pickle: true"
        )
