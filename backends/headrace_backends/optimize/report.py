"""The report of a search: report.json for programs, report.html for people, trace.json for Perfetto."""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec

from headrace_backends.optimize.findings import Findings
from headrace_backends.optimize.traceevents import trace

FORMAT = 1
JSON_FILE = "report.json"
PAGE_FILE = "report.html"
TRACE_FILE = "trace.json"
SCALARS_FILE = "scalars.tfevents"


class BadReport(Exception):
    """A report.json that cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """What was written. None is what there was nothing for, or what to write it with is not installed."""

    json: Path
    page: Path | None  # None without jinja2
    trace: Path | None  # None without profiles
    scalars: Path | None  # for TensorBoard; None where that is not installed

    @property
    def paths(self) -> list[Path]:
        """All that there are, the one for people first."""
        return [path for path in (self.page, self.json, self.trace, self.scalars) if path is not None]


def write_report(findings: Findings, folder: Path) -> ReportFiles:
    """Write the report into a folder, which is made where there is none; an older report in there is replaced.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = _finite({"format": FORMAT, **msgspec.to_builtins(findings)})
    json = _replaced(folder / JSON_FILE, _json(told))
    content = trace(findings.profiles)
    events = _replaced(folder / TRACE_FILE, _json(content)) if content["traceEvents"] else None
    page = _page(findings)
    return ReportFiles(
        json, _replaced(folder / PAGE_FILE, page) if page else None, events, _scalars(findings, folder / SCALARS_FILE)
    )


def read_report(path: Path) -> Findings:
    """The findings in a report.json.

    Raises:
        BadReport: it is none, or of another format.
    """
    try:
        told = msgspec.json.decode(path.read_bytes())
        if not isinstance(told, dict) or told.get("format") != FORMAT:
            found = told.get("format") if isinstance(told, dict) else type(told).__name__
            raise BadReport(f"'{path}' is of format {found}, this version reads {FORMAT}")
        return msgspec.convert(told, Findings, strict=False)  # not strict: numbers that JSON has none for are texts
    except (OSError, msgspec.MsgspecError) as error:
        raise BadReport(f"'{path}' cannot be read: {error}") from error


def _page(findings: Findings) -> bytes | None:
    try:
        from headrace_backends.optimize.report_page import render
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "markupsafe"):
            raise
        return None
    return render(findings).encode()


def _scalars(findings: Findings, path: Path) -> Path | None:
    try:
        from headrace_backends.optimize.scalars import write_scalars

        write_scalars(findings, path)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "tensorboard":
            raise
        return None
    return path


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are written as texts."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _json(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=1) + b"\n"


def _replaced(path: Path, content: bytes) -> Path:
    """Put a file in place whole: whoever reads the old one never sees half of the new one."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    new.replace(path)
    return path
