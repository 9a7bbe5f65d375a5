"""In which form each version is served, and why: what the server says of its plans."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from headrace.repository.repository import Served


class Choice(Protocol):
    """What was chosen for a version: a plan, or none and why."""

    @property
    def planned(self) -> Any: ...  # noqa: D102 - None, or it has the form's ``name`` and the ``plan``
    @property
    def why_not(self) -> str: ...  # noqa: D102


class PlanChoices(Protocol):
    """The plans of a server's models; ``on_refused`` is told of each that was found to be wrong."""

    on_refused: Callable[[str, str, str], None]

    def choice(self, model: str, version: str) -> Choice:
        """What was chosen last for a version."""


@dataclass(frozen=True, slots=True)
class ServedForm:
    """How a version is served now."""

    version: str
    planned: bool
    form: str
    why: str


def served_form(served: Served, plans: PlanChoices | None) -> ServedForm:
    """The form of a version that serves: by a plan, or as it was dropped in."""
    planned = getattr(served, "planned", None)
    if planned is not None:
        plan = planned.plan
        return ServedForm(
            served.version, True, planned.name, f"{plan.speedup:.2f} x as fast, as planned {plan.made_at}"
        )
    why_not = "plans are off" if plans is None else plans.choice(served.folder.name, served.version).why_not
    return ServedForm(served.version, False, f"{served.info.backend}, as it was dropped in", f"plan: {why_not}")
