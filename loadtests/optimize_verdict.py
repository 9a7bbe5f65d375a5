"""What a search's findings say of a case's goals."""

from collections.abc import Sequence
from dataclasses import dataclass

from headrace_backends.optimize.findings import Fate, Findings, Row
from loadtests.optimize_models import Case


@dataclass(frozen=True, slots=True)
class Verdict:
    """One case. ``over_onnxruntime`` is the chosen form's speed over the faithful ONNX file's in ONNX Runtime."""

    case: str
    form: str
    speedup: float
    over_onnxruntime: float | None
    held_back: str
    seconds: float
    missed: tuple[str, ...]


def judge(case: Case, findings: Findings, everything: Findings | None = None) -> Verdict:
    """Whether the goals are met, by the rows of the report.

    ``everything`` is of an exhaustive search, which has tried what the first one had no reason to.
    """
    (chosen,) = [row for row in findings.rows if row.fate is Fate.CHOSEN]
    speedup = chosen.speedup or 0.0
    plain = _plain_onnxruntime(findings)
    over = speedup / plain if plain else None
    missed = []
    if speedup < case.goal * (0.95 if case.goal == 1.0 else 1.0):
        missed.append(f"{speedup:.2f} x, the goal is {case.goal:g} x")
    if case.goal_over_onnxruntime is not None and (over is None or over < case.goal_over_onnxruntime):
        told = "unknown" if over is None else f"{over:.2f} x"
        missed.append(f"{told} over ONNX Runtime in fp32, the goal is {case.goal_over_onnxruntime:g} x")
    if findings.budget is not None and (chosen.held_back is None or findings.budget.problem(chosen.held_back)):
        missed.append("the chosen form is beyond the budget")
    tried = (everything or findings).rows
    missed += [f"'{part}' was not refused" for part in case.refused if not _all_refused(part, tried)]
    return Verdict(
        case.name,
        f"{chosen.form.name}; {chosen.form.layout}",
        speedup,
        over,
        _told(findings, chosen),
        findings.seconds,
        tuple(missed),
    )


def passed_over(case: Case, findings: Findings) -> bool:
    """Whether the search has not even tried a form that it would have to refuse."""
    return any(row.fate is Fate.SKIPPED and part in row.form.name for row in findings.rows for part in case.refused)


def _plain_onnxruntime(findings: Findings) -> float | None:
    """The speed-up of the faithful model in ONNX Runtime; 1 where that is what was dropped in."""
    if findings.reference.form.backend == "onnxruntime":
        return 1.0
    plain = [
        row.speedup
        for row in findings.rows
        if row.form.backend == "onnxruntime" and row.form.faithful and row.form.steps and row.speedup
    ]
    return max(plain, default=None)


def _all_refused(part: str, rows: Sequence[Row]) -> bool:
    """Whether every form with that in its name was beyond the budget, those with layers left as they are aside."""
    found = [row for row in rows if part in row.form.name and "keep" not in row.form.name]
    return bool(found) and all(row.fate is Fate.REFUSED for row in found)


def _told(findings: Findings, row: Row) -> str:
    errors = row.held_back
    if errors is None:
        return "-"
    if findings.budget is None:
        return f"max_rel {errors.max_rel:.1e}" if errors.max_rel is not None else "-"
    value = errors.own if findings.budget.is_own else getattr(errors, findings.budget.metric)
    return f"{findings.budget.metric} {value:.4f}, asked for {findings.budget}"
