"""A step's options: read from what a form says, strictly."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from headrace_backends.optimize.steps.base import StepFailed

Options = TypeVar("Options")


def read(step: str, kind: type[Options], given: Mapping[str, Any]) -> Options:
    """The options as a struct that forbids unknown fields.

    Raises:
        StepFailed: there is no such option, or no such value.
    """
    try:
        return msgspec.convert(dict(given), kind)
    except msgspec.ValidationError as error:
        raise StepFailed(f"{step}: {error}") from error
