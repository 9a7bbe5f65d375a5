"""Log records as lines of text or of JSON, on standard error."""

import json
import logging
import sys
from datetime import UTC, datetime


class _Text(logging.Formatter):
    """``12:00:00.123 INFO front: message``."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)s {process}: %(message)s", "%H:%M:%S")


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


def set_up_logging(log_format: str, level: str, process: str) -> None:
    """Send every record of this process to standard error, in the chosen form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process) if log_format == "json" else _Text(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("uvicorn.error", "watchfiles.main", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
