"""The report as one HTML page: what it says, in the order in which it is read. How that looks is in the template."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from headrace_backends.optimize import figures, plots, reading, summary
from headrace_backends.optimize.accuracy import Budget, Errors
from headrace_backends.optimize.findings import Fate, Findings, LayerSensitivity, OperatorTime, Profile, Row
from headrace_backends.optimize.reading import Candidate

_TEMPLATE = "report.html.jinja"
_EN_DASH = "\N{EN DASH}"
_FATE_WORDS = {
    Fate.CHOSEN: "what is served",
    Fate.KEPT: "allowed, and slower than what is served, or not clearly faster",
    Fate.REFUSED: "beyond the budget on the held-back half, or not faithful where nothing else is allowed",
    Fate.SLOWER: "cut early: clearly slower than another",
    Fate.FAILED: "could not be made, loaded or run",
    Fate.SKIPPED: "never tried",
}
_MOST_LAYERS = 16  # in view; the others unfold
_MOST_TYPES = 9
_MOST_OPERATORS = 12
_MOST_COUNTS = 18


@dataclass(frozen=True, slots=True)
class Bar:
    """A line of a bar chart: ``share`` of the width, from 0 to 1."""

    name: str
    detail: str
    value: str
    share: float


@dataclass(frozen=True, slots=True)
class ProfileView:
    """Where one form's time goes."""

    title: str
    form: str
    total: str
    types: list[Bar]
    slowest: list[Bar]


def render(findings: Findings) -> str:
    """The page. It loads nothing from anywhere."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_typeset,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    reference, served = reading.candidates(findings)[0], reading.chosen(findings)
    return environment.get_template(_TEMPLATE).render(
        findings=findings,
        headline=summary.headline(findings),
        accuracy=summary.accuracy(findings),
        started=_started(findings.started_at),
        served=served,
        chosen=_line(served, findings),
        tiles=_tiles(findings, reference, served),
        metric=reading.metric_label(findings.budget),
        reference=_line(reference, findings),
        groups=[
            {"fate": fate, "words": _FATE_WORDS[fate], "lines": [_line(one, findings) for one in group]}
            for fate, group in reading.by_fate(findings)
        ],
        counts=reading.counts(one.row for one in reading.candidates(findings)[1:]),
        layers=_layers(findings.sensitivities),
        most_layers=_MOST_LAYERS,
        profiles=_profiles(findings.profiles),
        graph=_graph(findings.graphs),
        duration=figures.duration(findings.seconds),
        **_drawn(findings),
    )


def _drawn(findings: Findings) -> dict[str, object]:
    try:
        pareto, curves = plots.pareto(findings), plots.curves(findings)
    except plots.NoPlots as error:
        return {"pareto": None, "curves": None, "left_out": 0, "no_plots": str(error)}
    return {
        # Markup: plots.py made these, and matplotlib escaped the names in them.
        "pareto": pareto and Markup(pareto.svg),  # noqa: S704
        "curves": curves and [Markup(plot.svg) for plot in curves],  # noqa: S704
        "left_out": pareto.left_out if pareto else 0,
        "no_plots": "",
    }


def _tiles(findings: Findings, reference: Candidate, served: Candidate) -> list[dict[str, str]]:
    """The figures that one looks for first, as they are now and as they were."""
    now, before = served.row, reference.row
    small, full = reading.smallest(now), reading.fullest(now)
    old_small, old_full = reading.smallest(before), reading.fullest(before)
    changed = not served.is_reference
    tiles = []
    if changed:
        tiles.append(_tile("Speed-up", _multiple(now.speedup), f"objective: {findings.objective}"))
    if small:
        rows = "1 row" if small.rows == 1 else f"{small.rows} rows"
        was = _latency(old_small.p50_ms) if old_small and changed else ""
        tiles.append(_tile(f"Latency, {rows}, p50", _latency(small.p50_ms), was and f"was {was}"))
    if full:
        was = figures.per_second(old_full.rows_per_s) if old_full and changed else ""
        at = f"rows, in batches of {full.rows}"
        tiles.append(_tile("Throughput", figures.per_second(full.rows_per_s), f"{at}; was {was}" if was else at))
    if changed:
        limit = _bound(findings.budget) if findings.budget else "float noise alone is allowed"
        value = figures.error(reading.decided_by(now, findings.budget))
        tiles.append(_tile(_capital(reading.metric_label(findings.budget)), value, limit))
    for name, held, held_before in (
        ("File", now.file_bytes, before.file_bytes),
        ("Memory", now.memory_bytes, before.memory_bytes),
    ):
        if held is not None:
            was = f"was {figures.size(held_before)}" if held_before is not None and changed else ""
            tiles.append(_tile(name, figures.size(held), was))
    return tiles


def _tile(name: str, value: str, detail: str) -> dict[str, str]:
    return {"name": name, "value": value, "detail": detail}


def _line(one: Candidate, findings: Findings) -> dict[str, object]:
    """A candidate's line of the table, and what unfolds below it."""
    row = one.row
    small, full = reading.smallest(row), reading.fullest(row)
    top = max(
        (other.row.speedup or 0.0 for other in reading.candidates(findings) if _finite(other.row.speedup)), default=0
    )
    return {
        "number": one.number,
        "row": row,
        "steps": [str(step) for step in row.form.steps],
        "parameters": [f"{name}={value}" for name, value in sorted(row.form.parameters.items())],
        "layout": row.form.layout if reading.has_own_layout(row.form) else "",
        "speedup": _multiple(row.speedup),
        "share": _share(row.speedup, top),
        "p50": figures.number(small.p50_ms) if small else figures.NOTHING,
        "p50_rows": small.rows if small and small.rows != 1 else None,
        "rows_per_s": figures.number(full.rows_per_s) if full else figures.NOTHING,
        "full_rows": full.rows if full else None,
        "error": figures.error(reading.decided_by(row, findings.budget)),
        "held_back": reading.deciding(row.held_back, findings.budget) is not None,
        "max_rel": figures.error((row.held_back or row.errors or Errors(0)).max_rel),
        "file": figures.size(row.file_bytes),
        "memory": figures.size(row.memory_bytes),
        "build": figures.duration(row.build_s) if row.build_s else figures.NOTHING,
        "load": figures.duration(row.load_s),
        "errors": _errors(row),
        "curve": [
            (
                point.rows,
                figures.number(point.p50_ms),
                figures.number(point.p99_ms),
                figures.number(point.rows_per_s if point.p50_ms else None),
            )
            for point in row.curve
        ],
        "options": [(step.kind, _json(step.options)) for step in row.form.steps if step.options],
    }


def _errors(row: Row) -> list[tuple[str, str, str]]:
    """Every error of a row by name: on the calibration half, and on the half that was held back."""
    halves = (row.errors, row.held_back)
    if not any(halves):
        return []
    told = []
    for field in msgspec.structs.fields(Errors):
        values = [None if half is None else getattr(half, field.name) for half in halves]
        if any(value is not None for value in values) and (field.name != "mismatches" or any(values)):
            name = reading.metric_name(field.name)
            told.append((name, figures.error(values[0]), figures.error(values[1])))
    return told


def _layers(sensitivities: Sequence[LayerSensitivity]) -> list[Bar]:
    most = max((one.error for one in sensitivities if isfinite(one.error)), default=0.0)
    ordered = sorted(sensitivities, key=lambda one: -one.error if isfinite(one.error) else -float("inf"))
    return [Bar(one.layer, one.operator, figures.number(one.error), _share(one.error, most)) for one in ordered]


def _profiles(profiles: Iterable[Profile]) -> list[ProfileView]:
    """All on one scale, so that bars can be compared between forms."""
    usable = [
        (profile, [one for one in profile.operators if isfinite(one.duration_us) and one.duration_us >= 0])
        for profile in profiles
    ]
    usable = [(profile, operators) for profile, operators in usable if operators]
    sums = [_by_type(operators) for _, operators in usable]
    most_of_type = max((took for types in sums for took, _ in types.values()), default=0.0)
    slowest = max((one.duration_us for _, operators in usable for one in operators), default=0.0)
    views = []
    for place, ((profile, operators), types) in enumerate(zip(usable, sums, strict=True)):
        total = sum(one.duration_us for one in operators)
        title = "After" if place else "Before" if len(usable) > 1 else "Where the time goes"
        views.append(
            ProfileView(
                title,
                profile.form,
                f"{_micros(total)} in {len(operators)} operator{'s' if len(operators) != 1 else ''}",
                _type_bars(types, most_of_type, total),
                [
                    Bar(one.name, one.operator, _micros(one.duration_us), _share(one.duration_us, slowest))
                    for one in sorted(operators, key=lambda one: -one.duration_us)[:_MOST_OPERATORS]
                ],
            )
        )
    return views


def _by_type(operators: Iterable[OperatorTime]) -> dict[str, tuple[float, int]]:
    """Microseconds and number of operators of each type, the most time first."""
    took: defaultdict[str, float] = defaultdict(float)
    count: defaultdict[str, int] = defaultdict(int)
    for one in operators:
        took[one.operator] += one.duration_us
        count[one.operator] += 1
    return {name: (took[name], count[name]) for name in sorted(took, key=lambda name: (-took[name], name))}


def _type_bars(types: Mapping[str, tuple[float, int]], most: float, total: float) -> list[Bar]:
    bars = [
        Bar(name, f"{count} x", f"{_micros(took)}, {_percent(took, total)}", _share(took, most))
        for name, (took, count) in list(types.items())[:_MOST_TYPES]
    ]
    rest = list(types.values())[_MOST_TYPES:]
    if rest:
        took, count = sum(took for took, _ in rest), sum(count for _, count in rest)
        bars.append(
            Bar(
                f"{len(rest)} other types",
                f"{count} x",
                f"{_micros(took)}, {_percent(took, total)}",
                _share(took, most),
            )
        )
    return bars


def _graph(graphs: Mapping[str, Mapping[str, int]]) -> dict[str, object] | None:
    """Operator counts, a column for each form, the most frequent operators first."""
    if not graphs:
        return None
    names = sorted(
        {name for counts in graphs.values() for name in counts},
        key=lambda name: (-max(counts.get(name, 0) for counts in graphs.values()), name),
    )
    return {
        "forms": list(graphs),
        "totals": [sum(counts.values()) for counts in graphs.values()],
        "lines": [(name, [counts.get(name, 0) for counts in graphs.values()]) for name in names],
        "most": _MOST_COUNTS,
    }


def _started(iso: str) -> str:
    try:
        return datetime.fromisoformat(iso).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
    except ValueError:
        return iso


def _typeset(value: Any) -> Any:
    """What is ASCII elsewhere, as print has it."""
    return _EN_DASH if value == figures.NOTHING else value


def _micros(value: float) -> str:
    return f"{figures.number(value)} \N{MICRO SIGN}s" if value < 999.5 else f"{figures.number(value / 1e3)} ms"


def _latency(milliseconds: float) -> str:
    return figures.milliseconds(milliseconds).replace(" us", " \N{MICRO SIGN}s")


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def _multiple(value: float | None) -> str:
    if not _finite(value):
        return _EN_DASH
    return figures.times(value).replace(" x", "\N{NO-BREAK SPACE}\N{MULTIPLICATION SIGN}")


def _bound(budget: Budget) -> str:
    return f"budget: {budget.min:g} at least" if budget.min is not None else f"budget: {budget.max:g} at most"


def _share(value: float | None, most: float) -> float:
    """Of the longest bar; nothing where there is nothing to show."""
    if value is None or not isfinite(value) or value <= 0 or most <= 0:
        return 0.0
    return round(min(1.0, value / most), 4)


def _finite(value: float | None) -> bool:
    return value is not None and isfinite(value)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _json(value: object) -> str:
    return msgspec.json.encode(value, enc_hook=str).decode()
