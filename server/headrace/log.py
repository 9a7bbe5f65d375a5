"""Log records as lines of text or of JSON, on standard error."""

import json
import logging
import sys
from datetime import UTC, datetime

import msgspec

_NOISY = ("uvicorn.error", "watchfiles.main", "asyncio")


class LogLevels(msgspec.Struct, frozen=True, array_like=True):
    """Which records a process writes and how their times look; travels to the workers when it changes.

    ``verbose_level`` 1 and more shows debug records. ``error`` stands for critical ones too. ``iso8601`` is for
    lines of text: the times of JSON lines have that form anyway.
    """

    info: bool = True
    warning: bool = True
    error: bool = True
    verbose_level: int = 0
    iso8601: bool = False

    def shows(self, level: int) -> bool:
        """Whether records of a level of ``logging`` are written."""
        if level < logging.INFO:
            return self.verbose_level > 0
        if level < logging.WARNING:
            return self.info
        return self.warning if level < logging.ERROR else self.error

    @property
    def least(self) -> int:
        """The least level of which anything is written; above all of them when nothing is."""
        levels = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
        return next((level for level in levels if self.shows(level)), logging.CRITICAL + 1)


def levels_from(level: str) -> LogLevels:
    """The levels from the one that ``--log-level`` names upwards."""
    least = logging.getLevelNamesMapping()[level.upper()]
    return LogLevels(
        info=least <= logging.INFO,
        warning=least <= logging.WARNING,
        error=least <= logging.ERROR,
        verbose_level=int(least < logging.INFO),
    )


class _Text(logging.Formatter):
    """``12:00:00.123 INFO front: message``, or with the date and in UTC, ``2026-01-31T12:00:00.123Z INFO ...``."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process.replace('%', '%%')}: %(message)s")
        self.iso8601 = False

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002, N802
        """The time of a record; the name is the base class's."""
        if self.iso8601:
            time = datetime.fromtimestamp(record.created, UTC).replace(tzinfo=None)
            return f"{time.isoformat(timespec='milliseconds')}Z"
        return datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]


class _Json(logging.Formatter):
    """One JSON object a line, times in UTC."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


class _Lines(logging.StreamHandler):  # type: ignore[type-arg] # generic for type checkers only
    """Writes the records of the levels that are on."""

    def __init__(self, formatter: _Text | _Json) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(formatter)
        self._text = formatter if isinstance(formatter, _Text) else None
        self._levels = LogLevels()
        self.addFilter(lambda record: self._levels.shows(record.levelno))

    def show(self, levels: LogLevels) -> None:
        """Write these from now on."""
        self._levels = levels
        if self._text is not None:
            self._text.iso8601 = levels.iso8601


def set_up_logging(log_format: str, level: str, process: str) -> None:
    """Send every record of this process to standard error, in the chosen form."""
    logging.getLogger().handlers[:] = [_Lines(_Json(process) if log_format == "json" else _Text(process))]
    apply(levels_from(level))


def apply(levels: LogLevels) -> None:
    """Have this process write these levels from now on. Does nothing before ``set_up_logging``."""
    root = logging.getLogger()
    lines = [handler for handler in root.handlers if isinstance(handler, _Lines)]
    if not lines:
        return
    for handler in lines:
        handler.show(levels)
    # Also for the loggers, so that a debug record that nobody wants costs no more than a comparison.
    root.setLevel(levels.least)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(max(logging.WARNING, levels.least))
