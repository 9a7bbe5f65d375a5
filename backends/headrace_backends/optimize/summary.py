"""Findings in a few plain lines, for terminals: what ``headrace optimize`` ends with, and what explain tells."""

from math import isfinite

from headrace_backends.optimize import figures, reading
from headrace_backends.optimize.findings import Fate, Findings, Point, Row
from headrace_backends.optimize.reading import Candidate

_FATE_WORDS = {
    Fate.CHOSEN: "chosen",
    Fate.KEPT: "allowed but not clearly faster than what is served",
    Fate.REFUSED: "refused",
    Fate.SLOWER: "cut early as slower",
    Fate.FAILED: "failed",
    Fate.SKIPPED: "not tried",
}
_MOST_REFUSALS = 3
_LONGEST = 160  # characters of a name or a reason


def headline(findings: Findings) -> str:
    """What was found, in a few words."""
    served = reading.chosen(findings)
    if served.is_reference:
        return f"{findings.model} is served as it was dropped in"
    speedup = served.row.speedup
    if speedup is None or not isfinite(speedup):
        return f"{findings.model} is served in another form than it was dropped in"
    return f"{findings.model} runs {figures.number(speedup)} times as fast as it was dropped in"


def accuracy(findings: Findings) -> str:
    """What the chosen form's answers are like, and what decided that, in one sentence."""
    served = reading.chosen(findings)
    if served.is_reference:
        return "Nothing that was tried is both faster and allowed, so that no answer changes."
    label = reading.metric_label(findings.budget)
    value = figures.error(reading.decided_by(served.row, findings.budget))
    if served.row.held_back is None:
        return f"Its {label} is {value}; there was no held-back half to decide with."
    asked = "nothing beyond float noise was allowed" if findings.budget is None else f"the budget is {findings.budget}"
    examples = _counted(served.row.held_back.examples, "example")
    return f"On the held-back half ({examples}) its {label} is {value}; {asked}."


def lines(findings: Findings) -> list[str]:
    """Five to fifteen lines: the result, before and after, what became of the candidates, the notable refusals."""
    served, reference = reading.chosen(findings).row, findings.reference
    told = [headline(findings)]
    told += [f"  served as  {short(served.form.name)}; {served.form.layout}"]
    if findings.why:
        told.append(f"  why        {short(findings.why)}")
    told.append(f"  accuracy   {accuracy(findings)}")
    if served.form != reference.form:
        told += _before_and_after(reference, served)
    else:
        point = reading.smallest(reference)
        told += [f"  latency    {_latency(point)}"] if point else []
    told.append(f"  candidates {_tally(findings)}")
    told += [f"             {line}" for line in _refusals(findings)]
    told.append(f"  decided on {findings.examples}")
    told.append(f"  machine    {findings.hardware.cpu}, {_counted(findings.hardware.cpus, 'CPU')}{_gpu(findings)}")
    if not findings.complete:
        told.append("  The search ended before everything had been tried.")
    return told


def short(text: str, longest: int = _LONGEST) -> str:
    """A text on one line that is no longer than a terminal bears."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def _before_and_after(reference: Row, served: Row) -> list[str]:
    told = []
    before, after = reading.smallest(reference), reading.smallest(served)
    if before and after:
        told.append(f"  latency    {_latency(before)} before, {_latency(after)} now")
    before, after = reading.fullest(reference), reading.fullest(served)
    if before and after:
        told.append(f"  throughput {_throughput(before)} before, {_throughput(after)} now, from one instance")
    if served.file_bytes is not None and reference.file_bytes is not None:
        told.append(f"  file       {figures.size(reference.file_bytes)} before, {figures.size(served.file_bytes)} now")
    if served.memory_bytes is not None and reference.memory_bytes is not None:
        before_bytes, now_bytes = figures.size(reference.memory_bytes), figures.size(served.memory_bytes)
        told.append(f"  memory     {before_bytes} before, {now_bytes} now")
    return told


def _latency(point: Point) -> str:
    rows = "" if point.rows == 1 else f" for {point.rows} rows"
    return f"{figures.milliseconds(point.p50_ms)}{rows}"


def _throughput(point: Point) -> str:
    return f"{figures.number(point.rows_per_s)} rows/s at {_counted(point.rows, 'row')}"


def _tally(findings: Findings) -> str:
    others = [candidate.row for candidate in reading.candidates(findings)[1:]]
    if not others:
        return f"none besides the reference, in {figures.duration(findings.seconds)}"
    told = ", ".join(f"{count} {_FATE_WORDS[fate]}" for fate, count in reading.counts(others).items())
    return f"{len(others)} in {figures.duration(findings.seconds)}: {told}"


def _refusals(findings: Findings) -> list[str]:
    """The refused ones that would have been faster than the chosen one: what a larger budget would buy."""
    served = reading.chosen(findings)
    floor = 1.0 if served.is_reference or served.row.speedup is None else served.row.speedup
    groups = dict(reading.by_fate(findings))
    faster = [one for one in groups.get(Fate.REFUSED, []) if (one.row.speedup or 0.0) > floor]
    told = [_refusal(candidate) for candidate in faster[:_MOST_REFUSALS]]
    if len(faster) > _MOST_REFUSALS:
        told.append(f"and {len(faster) - _MOST_REFUSALS} more refused ones that are faster than the chosen form")
    return told


def _refusal(candidate: Candidate) -> str:
    row = candidate.row
    return f"refused at {figures.times(row.speedup)}: {short(reading.title(row.form), 80)}: {short(row.reason, 120)}"


def _gpu(findings: Findings) -> str:
    return f", {findings.hardware.gpu}" if findings.hardware.gpu else ""


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
