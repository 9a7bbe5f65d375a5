"""What a model's owner may configure: every key with its type, default and bounds, read from ``config.yaml``."""

import difflib
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    ValidationError,
    model_validator,
)

from headrace.core.errors import InvalidRequest
from headrace.core.model import TensorSpec
from headrace.core.request import Parameter
from headrace.core.tensor import DataType

KeyPath = tuple[str | int, ...]  # ("batching", "preferred_sizes", 1)
Problem = tuple[KeyPath, str]

_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1
_MAX_INSTANCES = 1024  # processes: far past any machine, and a typing error does not take one down


class ConfigError(InvalidRequest):
    """A configuration that cannot be used. ``problems`` has all of them, each led by the path of its key."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


def _file_name(value: str) -> str:
    if value in ("", ".", "..") or "/" in value or "\\" in value or "\0" in value:
        raise ValueError(f"should be a file name without a path, got {value!r}")
    return value


def _device(value: str) -> str:
    if not re.fullmatch(r"cpu|gpu:(0|[1-9][0-9]{0,2})", value):
        raise ValueError(f"should be 'cpu' or 'gpu:N', got {value!r}")
    return value


def _scalar(value: object) -> object:
    if not isinstance(value, bool | int | float | str):
        raise ValueError(f"should be a string, a number or a boolean, got {reprlib.repr(value)}")  # noqa: TRY004 - pydantic collects ValueError only
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"should be an integer of at most 64 bits, got {reprlib.repr(value)}")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"should be text, got half a surrogate pair in {reprlib.repr(value)}")
    return value


Text = Annotated[str, Field(strict=True, min_length=1)]
FileName = Annotated[str, Field(strict=True), AfterValidator(_file_name)]
Device = Annotated[str, Field(strict=True), AfterValidator(_device)]
Scalar = Annotated[Parameter, PlainValidator(_scalar)]
Rows = Annotated[int, Field(strict=True, ge=0, le=_INT32_MAX)]
Dimension = Annotated[int, Field(strict=True, ge=-1, le=_INT64_MAX)]
Count = Annotated[int, Field(strict=True, ge=1, le=_INT32_MAX)]
DurationUs = Annotated[int, Field(strict=True, ge=0, le=_INT64_MAX // 1000)]  # holds as nanoseconds too
Version = Annotated[int, Field(strict=True, ge=1, le=_INT64_MAX)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class _Section(BaseModel):
    """A group of keys: nothing unknown is accepted, nothing changes later."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorConfig(_Section):
    """One input or output, where it is to differ from what the model file says. -1 is a dimension of any size."""

    name: Text
    datatype: DataType
    shape: tuple[Dimension, ...]  # with the batch dimension, as -1, where the model batches

    def spec(self) -> TensorSpec:
        """The tensor in the core's terms."""
        return TensorSpec(self.name, self.datatype, self.shape)


class InputConfig(TensorConfig):
    """One input. A request may leave out an optional one."""

    optional: StrictBool = False

    def spec(self) -> TensorSpec:
        """The tensor in the core's terms."""
        return TensorSpec(self.name, self.datatype, self.shape, self.optional)


class OutputConfig(TensorConfig):
    """One output. ``labels`` names a file in the model's folder, one label a line."""

    labels: FileName | None = None


class BatchingConfig(_Section):
    """How requests are queued and merged."""

    max_queue_delay_us: DurationUs = 0  # how long a batch may wait for company
    preferred_sizes: tuple[Count, ...] = ()  # rows; such a batch does not wait
    max_queue_size: Count = 1024  # requests waiting; one more is refused as overload
    default_timeout_us: DurationUs = 0  # for requests that bring no timeout; 0 is none
    priority_levels: Annotated[int, Field(strict=True, ge=0, le=_INT32_MAX)] = 0  # 0: all are equal
    preserve_order: StrictBool = False  # answers leave in the order in which requests came


class InstanceConfig(_Section):
    """So many copies of the model on one device."""

    device: Device = "cpu"
    count: Annotated[int, Field(strict=True, ge=1, le=_MAX_INSTANCES)] = 1


class VersionPolicy(_Section):
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


class BudgetConfig(_Section):
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


class ObjectiveConfig(_Section):
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


class OptimizeConfig(_Section):
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


class ModelConfig(_Section):
    """Everything that the owner of a model can say about it. Made by ``parse_config`` and ``build_config``."""

    backend: Text | None = None  # None: told by the model file
    max_batch_size: Rows | None = None  # None: told by the model file; 0: requests are never merged
    inputs: tuple[InputConfig, ...] = ()  # empty: told by the model file
    outputs: tuple[OutputConfig, ...] = ()
    batching: BatchingConfig = BatchingConfig()
    instances: Annotated[tuple[InstanceConfig, ...], Field(min_length=1)] = (InstanceConfig(),)
    versions: VersionPolicy = VersionPolicy(latest=1)
    warmup: StrictBool = True  # run once before the first request
    parameters: dict[Annotated[str, Field(strict=True)], Scalar] = Field(default_factory=dict)  # for the backend
    optimize: OptimizeConfig | None = None
    model_file: FileName | None = None  # in the version's folder; None: found by its ending
    execution_timeout_s: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] = 300.0
    """A worker that takes longer for one batch is killed and started anew; 0 for never."""


_SECTIONS: dict[KeyPath, type[_Section]] = {
    (): ModelConfig,
    ("inputs",): InputConfig,
    ("outputs",): OutputConfig,
    ("batching",): BatchingConfig,
    ("instances",): InstanceConfig,
    ("versions",): VersionPolicy,
    ("optimize",): OptimizeConfig,
    ("optimize", "budget"): BudgetConfig,
    ("optimize", "objective"): ObjectiveConfig,
}


def parse_config(text: str) -> ModelConfig:
    """The configuration that a ``config.yaml`` holds; an empty one is all defaults.

    Raises:
        ConfigError: with every problem that the file has.
    """
    raw, duplicates = _read_yaml(text)
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
    problems = list(_pair_problems(raw))
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


def format_path(path: KeyPath) -> str:
    """As a user would point at it: ``batching.preferred_sizes[1]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _describe(error: Mapping[str, Any]) -> Problem:
    """One of pydantic's findings in the words of the other problems."""
    path: KeyPath = error["loc"]
    got = reprlib.repr(error["input"])
    if path and path[-1] == "[key]":
        return path[:-2], f"keys should be strings, got {path[-2]!r}"
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


def _pair_problems(raw: Mapping[str, object]) -> Iterator[Problem]:
    """What single keys cannot show. Looks at plain values, so that other problems do not hide these."""
    for section in ("inputs", "outputs"):
        first: dict[str, int] = {}
        for index, tensor in enumerate(_items(raw.get(section))):
            name = _get(tensor, "name")
            if isinstance(name, str) and first.setdefault(name, index) != index:
                yield (section, index, "name"), f"{name!r} is already the name of the one at [{first[name]}]"
    max_batch_size = raw.get("max_batch_size")
    if not isinstance(max_batch_size, int) or isinstance(max_batch_size, bool):
        return
    for index, size in enumerate(_items(_get(raw.get("batching"), "preferred_sizes"))):
        if isinstance(size, int) and size > max_batch_size >= 0:
            reason = "nothing is merged with max_batch_size 0" if not max_batch_size else "expected no more"
            yield (
                ("batching", "preferred_sizes", index),
                f"is {size}, and max_batch_size is {max_batch_size}: {reason}",
            )
    if max_batch_size > 0:
        yield from _batch_dimension_problems(raw, max_batch_size)


def _batch_dimension_problems(raw: Mapping[str, object], max_batch_size: int) -> Iterator[Problem]:
    for section in ("inputs", "outputs"):
        for index, tensor in enumerate(_items(raw.get(section))):
            shape = _get(tensor, "shape")
            if isinstance(shape, list | tuple) and (not shape or (isinstance(shape[0], int) and shape[0] != -1)):
                got = f"is {reprlib.repr(list(shape))}, and max_batch_size is {max_batch_size}"
                yield (section, index, "shape"), f"{got}: expected -1, the batch, as the first dimension"


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else ()


def _get(value: object, key: str) -> object:
    return value.get(key) if isinstance(value, Mapping) else None


def _read_yaml(text: str) -> tuple[object, list[str]]:
    """The plain values of a YAML document, and a problem for each key that it has twice.

    Raises:
        ConfigError: it is not YAML.
    """
    loader: yaml.SafeLoader | None = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return {}, []
        duplicates = list(_duplicates(node, (), set()))
        raw = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError([f"{where}{said}"]) from error
    except (yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
        raise ConfigError([f"is not YAML: {error}"]) from error
    except RecursionError:
        raise ConfigError(["is nested too deeply"]) from None
    finally:
        if loader is not None:
            loader.dispose()
    return {} if raw is None else raw, duplicates


def _duplicates(node: yaml.Node, path: KeyPath, seen: set[int]) -> Iterator[str]:
    if id(node) in seen:  # an alias: looked at already, and perhaps part of itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicates(item, (*path, index), seen)
    elif isinstance(node, yaml.MappingNode):
        marks: dict[str, yaml.Mark] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else reprlib.repr(key.value)
            first = marks.setdefault(name, key.start_mark)
            if first is not key.start_mark:
                lines = f"line {first.line + 1} and line {key.start_mark.line + 1}"
                yield f"{format_path((*path, name))}: is given twice, in {lines}"
            yield from _duplicates(value, (*path, name), seen)
