"""What a model's owner may configure: every key with its type, default and bounds, read from ``config.yaml``."""

import difflib
import reprlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, ValidationError, model_validator

from headrace.batching.queue_policy import QueuePolicy
from headrace.core.device import CPU
from headrace.core.ensemble import Step
from headrace.core.model import ReshapeSpec, TensorSpec
from headrace.core.tensor import DataType
from headrace.repository.config_fields import (
    Count,
    Device,
    Dimension,
    DurationUs,
    FileName,
    Scalar,
    Section,
    SizeBytes,
    Text,
    Version,
    Whole,
)
from headrace.repository.config_problems import ConfigError, KeyPath, Problem, format_path, pair_problems
from headrace.repository.optimize_config import BudgetConfig, ObjectiveConfig, OptimizeConfig
from headrace.repository.sequence_config import ControlConfig, SequenceConfig, StateConfig
from headrace.repository.yaml_text import read_yaml

TensorName = Annotated[str, Field(strict=True)]
TimeoutAction = Literal["reject", "delay"]
ResourceName = Annotated[str, Field(strict=True, min_length=1)]

_MAX_INSTANCES = 1024  # processes: far past any machine, and a typing error does not take one down
_MAX_STEPS = 1024
_MAX_OBJECTIVE_MS = 3_600_000.0


class TensorConfig(Section):
    """One input or output, where it is to differ from what the model file says. -1 is a dimension of any size."""

    name: Text
    datatype: DataType
    shape: tuple[Dimension, ...]  # with the batch dimension, as -1, where the model batches
    reshape: tuple[Dimension, ...] | None = None  # the model's own shape, where clients see ``shape`` instead

    @model_validator(mode="after")
    def _reshape_fits(self) -> "TensorConfig":
        misfit = "" if self.reshape is None else ReshapeSpec(self.name, self.shape, self.reshape).misfit
        if misfit:
            raise ValueError(misfit)
        return self

    def spec(self) -> TensorSpec:
        """The tensor in the core's terms."""
        return TensorSpec(self.name, self.datatype, self.shape)


class InputConfig(TensorConfig):
    """One input. A request may leave out an optional one."""

    optional: StrictBool = False
    format: Literal["NONE", "NHWC", "NCHW"] = "NONE"  # for image clients, which read it; nothing else does

    def spec(self) -> TensorSpec:
        """The tensor in the core's terms."""
        return TensorSpec(self.name, self.datatype, self.shape, self.optional)


class OutputConfig(TensorConfig):
    """One output. ``labels`` names a file in the model's folder, one label a line."""

    labels: FileName | None = None


class LevelConfig(Section):
    """How requests of one priority level are queued, where that is to differ from the others."""

    max_queue_size: Count | None = None
    default_timeout_us: DurationUs | None = None
    timeout_action: TimeoutAction | None = None
    allow_timeout_override: StrictBool | None = None


class BatchingConfig(Section):
    """How requests are queued and merged."""

    max_queue_delay_us: DurationUs = 0  # how long a batch may wait for company
    preferred_sizes: tuple[Count, ...] = ()  # rows; such a batch does not wait
    max_queue_size: Count = 1024  # requests waiting, of each level; one more is refused as overload
    default_timeout_us: DurationUs = 0  # for requests that bring no timeout; 0 is none
    timeout_action: TimeoutAction = "reject"  # a request whose timeout is over is refused, or goes behind all others
    allow_timeout_override: StrictBool = True  # a request's own timeout counts; it can shorten the default
    priority_levels: Whole = 0  # 0: all are equal
    default_priority: Count | None = None  # of requests that bring none; None: the middle level
    priorities: dict[Annotated[int, Field(strict=True, ge=1)], LevelConfig] = Field(default_factory=dict)
    preserve_order: StrictBool = False  # answers leave in the order in which requests came
    refuse_late: StrictBool = True  # at arrival, what cannot be answered by its deadline any more

    @property
    def default_level(self) -> int:
        """The priority of requests that bring none; 0 where there are no levels."""
        return self.default_priority or middle_level(self.priority_levels)

    def policy(self) -> QueuePolicy:
        """What requests of levels without a policy of their own may expect."""
        return QueuePolicy(
            self.max_queue_size,
            self.default_timeout_us,
            self.timeout_action == "delay",
            self.allow_timeout_override,
        )

    def level_policies(self) -> dict[int, QueuePolicy]:
        """The policies of those levels that have one of their own."""
        own = self.policy()
        return {
            level: QueuePolicy(
                own.max_size if one.max_queue_size is None else one.max_queue_size,
                own.default_timeout_us if one.default_timeout_us is None else one.default_timeout_us,
                own.delays if one.timeout_action is None else one.timeout_action == "delay",
                own.allow_timeout_override if one.allow_timeout_override is None else one.allow_timeout_override,
            )
            for level, one in self.priorities.items()
        }

    p99_objective_ms: Annotated[float, Field(strict=True, gt=0, le=_MAX_OBJECTIVE_MS)] | None = None
    """From a request's arrival to its answer. What cannot meet it is refused, and batches are sized for it."""

    @property
    def adaptive(self) -> bool:
        """Whether sizes and delays are chosen by the objective: there is one, and the owner has said neither."""
        explicit = self.model_fields_set & {"max_queue_delay_us", "preferred_sizes"}
        return self.p99_objective_ms is not None and not explicit


def middle_level(priority_levels: int) -> int:
    """The priority of requests that bring none: 1 is the highest, 0 says that there are no levels."""
    return (priority_levels + 1) // 2


class RateLimitConfig(Section):
    """What an instance needs for as long as it runs a batch. It counts only with ``--rate-limit execution_count``."""

    resources: dict[ResourceName, Count] = Field(default_factory=dict)  # so many of each, of those of its device
    global_resources: dict[ResourceName, Count] = Field(default_factory=dict)  # of those that the server has once
    priority: Count = 1  # 2 gets half as many batches as 1 where they compete


class InstanceConfig(Section):
    """So many copies of the model on one device."""

    device: Device = "cpu"
    count: Annotated[int, Field(strict=True, ge=1, le=_MAX_INSTANCES)] = 1
    rate_limit: RateLimitConfig = RateLimitConfig()
    gpu_memory_bytes: SizeBytes = 0
    """What one copy takes of its GPU's memory at most, where the server bounds that; 0: it is measured at load."""

    @model_validator(mode="after")
    def _memory_is_of_a_gpu(self) -> "InstanceConfig":
        if self.gpu_memory_bytes and self.device == CPU:
            raise ValueError(f"gpu_memory_bytes is {self.gpu_memory_bytes}, and the device is cpu, expected a GPU")
        return self


class VersionPolicy(Section):
    """Which versions of those on disk are served: the newest ``latest``, or ``only`` these, or (neither) all."""

    latest: Count | None = None
    only: Annotated[tuple[Version, ...], Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_policy(cls, value: object) -> object:
        if value == "all":
            return {}
        if not isinstance(value, Mapping) or len(value) != 1:
            raise ValueError(f"should be all, {{latest: N}} or {{only: [N, ...]}}, got {reprlib.repr(value)}")
        return value


class ResidencyConfig(Section):
    """Whether the model may leave the memory, where the server has a limit for that (``--resident-bytes``)."""

    pinned: StrictBool = False  # it is loaded at start and stays


class StepConfig(Section):
    """One step of an ensemble: a model, and for each of its tensors the ensemble's tensor that it takes or makes."""

    model: Text
    version: Version | None = None  # None: the newest that serves
    inputs: dict[TensorName, Text] = Field(default_factory=dict)
    outputs: Annotated[dict[TensorName, Text], Field(min_length=1)]

    def step(self) -> Step:
        """The step in the core's terms."""
        return Step(self.model, str(self.version or ""), dict(self.inputs), dict(self.outputs))


class ModelConfig(Section):
    """Everything that the owner of a model can say about it. Made by ``parse_config`` and ``build_config``."""

    backend: Text | None = None  # None: told by the model file
    max_batch_size: Whole | None = None  # None: told by the model file; 0: requests are never merged
    inputs: tuple[InputConfig, ...] = ()  # empty: told by the model file
    outputs: tuple[OutputConfig, ...] = ()
    batching: BatchingConfig = BatchingConfig()
    instances: Annotated[tuple[InstanceConfig, ...], Field(min_length=1)] = (InstanceConfig(),)
    versions: VersionPolicy = VersionPolicy(latest=1)
    warmup: StrictBool = True  # run once before the first request
    parameters: dict[Annotated[str, Field(strict=True)], Scalar] = Field(default_factory=dict)  # for the backend
    optimize: OptimizeConfig | None = None
    model_file: FileName | None = None  # in the version's folder; None: found by its ending
    decoupled: StrictBool = False  # a request is answered with any number of responses
    response_cache: StrictBool = False  # equal requests may be given the answer of the first
    sequence: SequenceConfig | None = None  # requests belong together, and to one instance
    ensemble: Annotated[
        tuple[StepConfig, ...], Field(max_length=_MAX_STEPS)
    ] = ()  # the model is nothing but these models, run one after the other
    """The models that this one is made of; it runs nothing itself."""
    execution_timeout_s: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] = 300.0
    """A worker that takes longer for one batch is killed and started anew; 0 for never."""
    residency: ResidencyConfig = ResidencyConfig()
    memory_limit_bytes: SizeBytes = 0
    """A worker of the model that holds more is replaced by another; 0 for no bound. It is shared with nobody then."""
    cpu_weight: Annotated[float, Field(strict=True, gt=0, le=1000, allow_inf_nan=False)] = 1.0
    """Its share of CPU time beside other heavy models: with 2 it gets twice as much as one with 1."""


_SECTIONS: dict[KeyPath, type[Section]] = {
    (): ModelConfig,
    ("inputs",): InputConfig,
    ("outputs",): OutputConfig,
    ("batching",): BatchingConfig,
    ("batching", "priorities"): LevelConfig,
    ("instances",): InstanceConfig,
    ("instances", "rate_limit"): RateLimitConfig,
    ("versions",): VersionPolicy,
    ("optimize",): OptimizeConfig,
    ("optimize", "budget"): BudgetConfig,
    ("optimize", "objective"): ObjectiveConfig,
    ("sequence",): SequenceConfig,
    ("sequence", "controls"): ControlConfig,
    ("sequence", "states"): StateConfig,
    ("ensemble",): StepConfig,
    ("residency",): ResidencyConfig,
}


def parse_config(text: str) -> ModelConfig:
    """The configuration that a ``config.yaml`` holds; an empty one is all defaults.

    Raises:
        ConfigError: with every problem that the file has.
    """
    raw, duplicates = read_yaml(text)
    if not isinstance(raw, dict):
        raise ConfigError([f"should be a mapping of keys to values, got {reprlib.repr(raw)}"])
    try:
        config = build_config(raw)
    except ConfigError as error:
        raise ConfigError([*duplicates, *error.problems]) from None
    if duplicates:
        raise ConfigError(duplicates)
    return config


def build_config(raw: Mapping[str, object], spell: Callable[[KeyPath], KeyPath] = tuple) -> ModelConfig:
    """The configuration that plain values hold, laid out as in ``config.yaml``.

    ``spell`` turns the path of a key into the one that the owner wrote, for configurations of another form.

    Raises:
        ConfigError: with every problem that they have.
    """
    problems = list(pair_problems(raw))
    try:
        config = ModelConfig.model_validate(raw)
    except ValidationError as error:
        problems = [
            _describe(one)
            for one in error.errors(include_url=False)
            if not (one["type"] == "too_short" and one["input"])  # its items have problems, told by themselves
        ] + problems
    if problems:
        raise ConfigError([f"{format_path(spell(path))}: {text}" for path, text in problems])
    return config


def _describe(error: Mapping[str, Any]) -> Problem:
    """One of pydantic's findings in the words of the other problems."""
    path: KeyPath = error["loc"]
    got = reprlib.repr(error["input"])
    if path and path[-1] == "[key]":
        wanted = "whole numbers from 1" if path[-3:-2] == ("priorities",) else "strings"
        return path[:-2], f"keys should be {wanted}, got {path[-2]!r}"
    match error["type"]:
        case "missing":
            said = "is required"
        case "extra_forbidden":
            said = _unknown_key(path)
        case "value_error":
            said = str(error["ctx"]["error"])
        case "model_type" | "dict_type":
            said = f"should be a mapping, got {got}"
        case "invalid_key":
            said = "keys should be strings"
        case "too_short":
            said = "should not be empty"
        case "tuple_type":
            said = f"should be a list, got {got}"
        case _:
            said = f"{error['msg'].removeprefix('Input ')}, got {got}"
    return path, said


def _unknown_key(path: KeyPath) -> str:
    section = _SECTIONS[tuple(part for part in path[:-1] if isinstance(part, str))]
    known = list(section.model_fields)
    close = difflib.get_close_matches(str(path[-1]), known, n=1)
    return f"unknown key; did you mean {close[0]}?" if close else f"unknown key; known are {', '.join(known)}"
