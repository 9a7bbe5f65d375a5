"""The log settings of Triton's logging extension, as they are now and as a request changes them."""

from collections.abc import Callable, Mapping

import msgspec

from headrace.core.errors import InvalidRequest, Unsupported
from headrace.log import LogLevels, apply

LogValue = bool | int | str

MAX_VERBOSE_LEVEL = 2**32 - 1  # what the protocol's uint32 holds
_FORMATS = {"default": False, "ISO8601": True}
_SWITCHES = {"log_info": "info", "log_warning": "warning", "log_error": "error"}
_KEYS = ("log_file", *_SWITCHES, "log_verbose_level", "log_format")


class LogSettings:
    """What the front process logs. Changes hold at once, and each is told to every callback in ``on_change``.

    Belongs to the event loop. ``json_lines`` says that lines are JSON objects (--log-format json), whose form no
    request changes.
    """

    def __init__(self, levels: LogLevels, *, json_lines: bool) -> None:
        self.levels = levels
        self.on_change: list[Callable[[LogLevels], None]] = []
        self._json_lines = json_lines

    def values(self) -> dict[str, LogValue]:
        """Every setting, by its name on the wire."""
        levels = self.levels
        return {
            "log_file": "",  # standard error, always
            "log_info": levels.info,
            "log_warning": levels.warning,
            "log_error": levels.error,
            "log_verbose_level": levels.verbose_level,
            "log_format": "ISO8601" if levels.iso8601 else "default",
        }

    def change(self, given: Mapping[str, object]) -> None:
        """Change the settings that are given, all of them or, when one is wrong, none. None leaves one as it is.

        Raises:
            InvalidRequest: there is no such setting, or the value is not one of its values.
            Unsupported: the setting cannot be changed while the server runs.
        """
        fields: dict[str, LogValue] = {}
        for key, value in given.items():
            if key not in _KEYS:
                raise InvalidRequest(f"there is no log setting '{key[:100]}', expected one of {', '.join(_KEYS)}")
            if value is not None:
                name, read = self._read(key, value)
                fields[name] = read
        levels = msgspec.structs.replace(self.levels, **fields)
        if levels == self.levels:
            return
        self.levels = levels
        apply(levels)
        for tell in self.on_change:
            tell(levels)

    def _read(self, key: str, value: object) -> tuple[str, LogValue]:
        """A setting's field in LogLevels, and the value for it."""
        if key == "log_file":
            raise Unsupported("log setting 'log_file' cannot be changed by request: the server logs to standard error")
        if key == "log_verbose_level":
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_VERBOSE_LEVEL:
                raise _wrong(key, value, f"a whole number from 0 to {MAX_VERBOSE_LEVEL}")
            return "verbose_level", value
        if key == "log_format":
            if not isinstance(value, str) or value not in _FORMATS:
                raise _wrong(key, value, "'default' or 'ISO8601'")
            if self._json_lines and _FORMATS[value]:
                raise Unsupported(
                    "log setting 'log_format' is for lines of text; this server writes JSON (--log-format json), "
                    "with times in ISO 8601 already"
                )
            return "iso8601", _FORMATS[value]
        if not isinstance(value, bool):
            raise _wrong(key, value, "true or false")
        return _SWITCHES[key], value


def _wrong(key: str, value: object, expected: str) -> InvalidRequest:
    # Only plain values are shown: one made of thousands of nested lists cannot be.
    shown = f"{str(value)[:100]!r}" if isinstance(value, bool | int | float | str) else "a list or an object"
    return InvalidRequest(f"log setting '{key}' is {shown}, expected {expected}")
