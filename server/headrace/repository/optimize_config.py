"""What a model's owner may say about its optimisation."""

import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from headrace.repository.config_fields import Finite, Section, Text


class BudgetConfig(Section):
    """How far an optimised model's answers may be from the reference."""

    metric: Text  # top1_agreement | cosine | max_abs | module:function
    min: Finite | None = None
    max: Finite | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> "BudgetConfig":
        if (self.min is None) == (self.max is None):
            raise ValueError("should have either min or max")
        if self.metric in ("top1_agreement", "cosine"):
            if self.min is None or self.min > 1:
                raise ValueError(f"should have a min of at most 1, since {self.metric} is 1 where nothing differs")
        elif self.metric == "max_abs":
            if self.max is None or self.max < 0:
                raise ValueError("should have a max of at least 0, since max_abs is 0 where nothing differs")
        elif not re.fullmatch(r"[^:\s]+:[A-Za-z_]\w*", self.metric):
            raise ValueError(
                f"metric should be top1_agreement, cosine, max_abs or module:function, got {self.metric!r}"
            )
        return self


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


Technique = Literal["bf16", "int8_dynamic", "int8_static", "prune", "distill"]


class OptimizeConfig(Section):
    """What the optimiser may try. Without a budget only changes that keep the answers as they are."""

    budget: BudgetConfig | None = None
    calibration: Text | None = None  # real inputs, as .npz
    allow: tuple[Technique, ...] = ()
    objective: ObjectiveConfig = ObjectiveConfig(goal="latency")

    @model_validator(mode="after")
    def _lossy_needs_budget(self) -> "OptimizeConfig":
        if self.allow and self.budget is None:
            raise ValueError(f"allows what changes answers ({', '.join(self.allow)}), so a budget is needed")
        return self
