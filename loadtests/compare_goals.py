"""What Headrace means to reach beside its peers, and whether a run shows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from loadtests.compare_report import Cell, Metric, Ratio
from loadtests.dialect import Wire

PYTHON_FRONTS = ("mlserver", "litserve", "bentoml")
RIVALS = ("triton", "mosec", *PYTHON_FRONTS)
MOST_UNDER_WAY = 256  # requests of an open loop
PART_LOAD = 0.7  # of what the slowest server can do


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound for Headrace's value over that of each rival; ``at_most`` False makes it a lower bound."""

    metric: Metric
    cell: Cell
    rivals: tuple[str, ...]
    bound: float
    at_most: bool

    def __str__(self) -> str:
        clients = f"{self.cell.clients} load" if self.cell.share else f"c={self.cell.clients}"
        where = f"{self.cell.model}, {self.cell.protocol}, {clients}"
        sign = "<=" if self.at_most else ">="
        return f"{self.metric.label}, {where}: {sign} {self.bound:g} x {' / '.join(self.rivals)}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The ratio beside the rival that came nearest; ``reached`` None where none of them was measured there."""

    goal: Goal
    reached: float | None
    rival: str | None
    missing: tuple[str, ...]

    @property
    def met(self) -> bool | None:
        """None is unknown: nobody to compare with."""
        if self.reached is None:
            return None
        return self.reached <= self.goal.bound if self.goal.at_most else self.reached >= self.goal.bound


def goals(doors: Mapping[str, Sequence[Wire]]) -> list[Goal]:
    """All goals. ``doors`` tells which wires each server has, so that none is compared where it cannot be asked."""

    def goal(
        metric: Metric, model: str, wire: Wire, c: int, rivals: Sequence[str], bound: float, at_most: bool
    ) -> None:
        there = tuple(rival for rival in rivals if wire in doors.get(rival, ()))
        if there:
            found.append(Goal(metric, Cell(model, wire.value, c), there, bound, at_most))

    found: list[Goal] = []
    goal(Metric.CPU, "identity", Wire.HTTP_BINARY, 64, ["triton"], 0.4, at_most=True)
    goal(Metric.CPU, "identity", Wire.HTTP_BINARY, 64, ["mosec"], 1.0, at_most=True)
    goal(Metric.CPU, "mlp", Wire.HTTP_BINARY, 32, ["mosec"], 1.0, at_most=True)
    for model, c in (("identity", 64), ("mlp", 32)):
        goal(Metric.CPU, model, Wire.HTTP_JSON, c, PYTHON_FRONTS, 0.3, at_most=True)
        goal(Metric.CPU, model, Wire.GRPC, c, ["triton"], 1.0, at_most=True)
    for model in ("identity", "mlp"):
        for wire in Wire:
            goal(Metric.THROUGHPUT, model, wire, 32, PYTHON_FRONTS, 5.0, at_most=False)
            goal(Metric.THROUGHPUT, model, wire, 32, ["triton"], 1.5, at_most=False)
            goal(Metric.THROUGHPUT, model, wire, 32, ["mosec"], 1.0, at_most=False)
    for model in ("minilm", "resnet50"):
        for wire in Wire:
            there = tuple(rival for rival in RIVALS if wire in doors.get(rival, ()))
            if there:
                cell = Cell(model, wire.value, MOST_UNDER_WAY, PART_LOAD)
                found.append(Goal(Metric.P99, cell, there, 1.0, at_most=True))
    return found


def judge(goal: Goal, ratios: Sequence[Ratio]) -> Verdict:
    """The rival that is hardest to beat decides."""
    seen = {
        ratio.rival: value
        for ratio in ratios
        if ratio.cell == goal.cell and ratio.rival in goal.rivals and (value := ratio.of(goal.metric)) is not None
    }
    missing = tuple(rival for rival in goal.rivals if rival not in seen)
    if not seen:
        return Verdict(goal, None, None, missing)
    rival = (max if goal.at_most else min)(seen, key=lambda name: seen[name])
    return Verdict(goal, seen[rival], rival, missing)


def goal_table(verdicts: Sequence[Verdict], drivers: Mapping[Cell, float]) -> Table:
    """``drivers`` is the driver's share of a core beside Headrace: where it nears 100 %, throughput is the driver's."""
    drawn = Table(title="Goals: Headrace over its rival")
    for heading in ("goal", "reached", "beside", "driver", "", "not measured"):
        drawn.add_column(heading, justify="right" if heading in ("reached", "driver") else "left")
    for verdict in verdicts:
        share = drivers.get(verdict.goal.cell)
        drawn.add_row(
            str(verdict.goal),
            "-" if verdict.reached is None else f"{verdict.reached:.2f}",
            verdict.rival or "-",
            "-" if share is None else f"{share:.0%}",
            {True: "met", False: "missed", None: "unknown"}[verdict.met],
            ", ".join(verdict.missing),
        )
    return drawn
