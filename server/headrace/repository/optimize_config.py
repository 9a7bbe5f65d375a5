"""What a model's owner may say about its optimisation."""

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from headrace.repository.config_fields import Finite, Section, Text
from headrace_backends.optimize.accuracy import Budget
from headrace_backends.optimize.form import Technique

_SHARES = ("cosine", "mean_cosine", "top1_agreement", "topk_agreement")  # 1 where nothing differs
_DISTANCES = ("max_abs", "max_rel")  # 0 where nothing differs
_MAX_TIME_LIMIT_S = 7 * 86400.0


class BudgetConfig(Section):
    """How far an optimised model's answers may be from the reference."""

    metric: Text  # one of those above, or a function of the owner's: module:function, or file.py:function
    min: Finite | None = None
    max: Finite | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> "BudgetConfig":
        if (self.min is None) == (self.max is None):
            raise ValueError("should have either min or max")
        if self.metric in _SHARES:
            if self.min is None or self.min > 1:
                raise ValueError(f"should have a min of at most 1, since {self.metric} is 1 where nothing differs")
        elif self.metric in _DISTANCES:
            if self.max is None or self.max < 0:
                raise ValueError(f"should have a max of at least 0, since {self.metric} is 0 where nothing differs")
        elif not re.fullmatch(r"[^:\s]+:[A-Za-z_]\w*", self.metric):
            raise ValueError(
                f"metric should be {', '.join((*_DISTANCES, *_SHARES))}, module:function or file.py:function, "
                f"got {self.metric!r}"
            )
        return self

    @property
    def file(self) -> str | None:
        """The file with the owner's metric; None where it is in none, or a module's."""
        place, _, function = self.metric.partition(":")
        return place if function and place.endswith(".py") else None

    def budget(self) -> Budget:
        """The budget in the optimiser's terms."""
        return Budget(self.metric, self.min, self.max)


class ObjectiveConfig(Section):
    """What an optimised model is chosen for. With ``p99_ms``: throughput, while latency stays under the bound."""

    goal: Literal["latency", "throughput"] = "throughput"
    p99_ms: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        if value in ("latency", "throughput"):
            return {"goal": value}
        if not isinstance(value, Mapping) or not value:
            raise ValueError(f"should be latency, throughput or {{p99_ms: N}}, got {reprlib.repr(value)}")
        return value

    def __str__(self) -> str:
        return self.goal if self.p99_ms is None else f"{self.goal} with p99 of at most {self.p99_ms:g} ms"


class OptimizeConfig(Section):
    """What the optimiser may try. Without a budget only changes that keep the answers as they are.

    Paths are relative to the model's folder, unless they begin with a slash.
    """

    budget: BudgetConfig | None = None
    calibration: Text | None = None  # real inputs: a file, or a folder of them
    allow: tuple[Technique, ...] = ()
    objective: ObjectiveConfig = ObjectiveConfig(goal="latency")
    training: Text | None = None  # the owner's training code, for what is trained again: a Python file
    time_limit_s: Annotated[float, Field(strict=True, gt=0, le=_MAX_TIME_LIMIT_S)] | None = None  # for the search

    @model_validator(mode="after")
    def _pairs(self) -> "OptimizeConfig":
        if self.allow and self.budget is None:
            raise ValueError(
                f"allows what changes answers ({', '.join(self.allow)}), so it needs a budget, for instance "
                "{metric: cosine, min: 0.99}"
            )
        return self

    def named_files(self) -> dict[str, str]:
        """The paths that are named, by key."""
        named = {
            "optimize.calibration": self.calibration,
            "optimize.training": self.training,
            "optimize.budget.metric": self.budget.file if self.budget is not None else None,
        }
        return {key: path for key, path in named.items() if path is not None}

    def problems(self, folder: Path) -> list[str]:
        """What is wrong with the files that are named, each led by its key; ``folder`` is the model's."""
        found = []
        for key, name in self.named_files().items():
            path = folder / name
            if not path.exists():
                found.append(f"{key}: '{name}' is not in {folder}")
            elif path.is_dir() and key != "optimize.calibration":
                found.append(f"{key}: '{name}' is a folder, expected a Python file")
        return found
