"""In which form each version is served, and why: what the server says of its plans."""

from dataclasses import dataclass

from headrace.repository.plans import Plans
from headrace.repository.repository import Served
from headrace.repository.served import ServedVersion


@dataclass(frozen=True, slots=True)
class ServedForm:
    """How a version is served now."""

    version: str
    planned: bool
    form: str
    why: str


def served_form(served: Served, plans: Plans | None) -> ServedForm:
    """The form of a version that serves: by a plan, or as it was dropped in."""
    planned = served.planned if isinstance(served, ServedVersion) else None  # an ensemble has none
    if planned is not None:
        plan = planned.plan
        return ServedForm(
            served.version, True, planned.name, f"{plan.speedup:.2f} x as fast, as planned {plan.made_at}"
        )
    why_not = "plans are off" if plans is None else plans.choice(served.folder.name, served.version).why_not
    return ServedForm(served.version, False, f"{served.info.backend}, as it was dropped in", f"plan: {why_not}")
