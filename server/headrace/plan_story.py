"""What ``explain`` tells of a version's plan: which it is and what was proved of it, or why there is none."""

from collections.abc import Iterator

import msgspec

from headrace.repository.planned import Planned
from headrace.repository.plans import Choice
from headrace_backends.optimize.accuracy import Errors
from headrace_backends.optimize.findings import Point

REPORT = "report.html"


def tell_plan(planned: Planned | None, choice: Choice) -> Iterator[str]:
    """Lines for people."""
    if planned is None:
        yield f"plan: none ({choice.why_not}); it is served as it was dropped in"
        return
    plan = planned.plan
    yield f"plan: {plan.form.backend}, {plan.form.layout}, {plan.speedup:.3g} x as fast as it was dropped in"
    steps = ", ".join(map(str, plan.form.steps))
    yield f"  steps: {steps or 'none'}"
    if plan.form.parameters:
        yield f"  parameters: {', '.join(f'{name}={value}' for name, value in sorted(plan.form.parameters.items()))}"
    allowed = f", allowed: {', '.join(plan.allow)}" if plan.allow else ""
    yield f"  budget: {plan.budget or 'none, so only what changes no answers'}{allowed}; objective: {plan.objective}"
    yield f"  answers: {_told(plan.errors)}"
    yield f"  judged on: {plan.examples}"
    reference = {point.rows: point for point in plan.reference_curve}
    for point in plan.curve:
        yield f"  batch of {point.rows}: {point.p50_ms:.3g} ms{_beside(reference.get(point.rows), point)}"
    yield f"  made {plan.made_at} on {plan.basis.hardware.cpu or 'this CPU'}; lies in {planned.folder}"
    report = planned.folder / REPORT
    if report.exists():
        yield f"  report: {report}"


def _told(errors: Errors) -> str:
    values = msgspec.structs.asdict(errors)
    examples = values.pop("examples")
    if not values["mismatches"]:
        del values["mismatches"]
    told = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
    return f"{told or 'no different'} beside the model as it was dropped in, on {examples} held-back example(s)"


def _beside(reference: Point | None, point: Point) -> str:
    if reference is None:
        return ""
    return f", as it was dropped in {reference.p50_ms:.3g} ms ({reference.p50_ms / point.p50_ms:.3g} x)"
