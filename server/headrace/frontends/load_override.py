"""The parameters of load and unload requests, of whichever protocol."""

import base64
import binascii
from collections.abc import Mapping

from headrace.core.errors import InvalidRequest

_FILE = "file:"
_DEPENDENTS = "unload_dependents"


def load_override(model: str, parameters: Mapping[str, object]) -> tuple[str, dict[str, bytes]]:
    """The configuration, and the files by ``version/path``, that a load request brings; both may be empty.

    Files are base64 text in HTTP and bytes in gRPC.

    Raises:
        InvalidRequest: a parameter is unknown, or has a value that it cannot have.
    """
    config = ""
    files: dict[str, bytes] = {}
    for name, value in parameters.items():
        if name == "config" and isinstance(value, str):
            config = value
        elif name.startswith(_FILE) and isinstance(value, str | bytes):
            files[name.removeprefix(_FILE)] = _content(model, name, value)
        elif name == "config" or name.startswith(_FILE):
            raise InvalidRequest(
                f"model '{model}': load parameter '{name}' is {type(value).__name__}, expected a string"
            )
        else:
            raise InvalidRequest(
                f"model '{model}': load parameter '{name}' is unknown, expected config or file:VERSION/NAME"
            )
    if files and not config:
        raise InvalidRequest(f"model '{model}': load parameters with files need the parameter config too")
    return config, files


def unload_dependents(model: str, parameters: Mapping[str, object]) -> bool:
    """Whether models go too that were only loaded as parts of this one.

    Raises:
        InvalidRequest: a parameter is unknown, or has a value that it cannot have.
    """
    unknown = sorted(parameters.keys() - {_DEPENDENTS})
    if unknown:
        raise InvalidRequest(f"model '{model}': unload parameter '{unknown[0]}' is unknown, expected {_DEPENDENTS}")
    value = parameters.get(_DEPENDENTS, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"model '{model}': {_DEPENDENTS} is {value!r}, expected true or false")
    return value


def _content(model: str, name: str, value: str | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"model '{model}': load parameter '{name}' is not base64: {error}") from None
