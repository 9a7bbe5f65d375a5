"""The model configuration in Triton's form, as a model's code reads it and may complete it."""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.core.model import Signature, TensorSpec
from headrace_backends.base import LoadError, ModelSource
from headrace_backends.triton_python.datatypes import config_datatype, config_name

_DEFAULTS: dict[str, Any] = {
    "name": "",
    "platform": "",
    "backend": "python",
    "max_batch_size": 0,
    "input": [],
    "output": [],
    "parameters": {},
}
_INPUT_KEYS = frozenset({"name", "data_type", "dims", "optional"})
_OUTPUT_KEYS = frozenset({"name", "data_type", "dims"})

Config = dict[str, Any]


class ModelConfig:
    """A configuration that ``auto_complete_config`` adds to. What its owner declared stays as it is."""

    def __init__(self, model_config: str) -> None:
        self._config: Config = json.loads(model_config)

    def as_dict(self) -> Config:
        """A copy of it, to look at."""
        return copy.deepcopy(self._config)

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """Say how many rows may be merged, 0 for none; not less than the owner allows.

        Raises:
            ValueError: the configuration says more already, or that is no such number.
        """
        configured = self._config["max_batch_size"]
        if isinstance(max_batch_size, bool) or not isinstance(max_batch_size, int) or max_batch_size < configured:
            raise ValueError(f"max_batch_size is {configured} in the configuration, got {max_batch_size!r}")
        self._config["max_batch_size"] = max_batch_size

    def set_dynamic_batching(self) -> None:
        """Have requests merged.

        Raises:
            ValueError: the configuration has another way of scheduling.
        """
        for other in ("sequence_batching", "ensemble_scheduling"):
            if other in self._config:
                raise ValueError(f"dynamic_batching does not go with the {other} of the configuration")
        self._config.setdefault("dynamic_batching", {})

    def set_model_transaction_policy(self, transaction_policy_dict: Mapping[str, bool]) -> None:
        """Say whether the model is decoupled.

        Raises:
            ValueError: the configuration makes it decoupled and this does not, or there is an unknown key.
        """
        unknown = sorted(set(transaction_policy_dict) - {"decoupled"})
        if unknown:
            raise ValueError(f"the transaction policy has the unknown keys {unknown}, expected decoupled")
        decoupled = bool(transaction_policy_dict.get("decoupled", False))
        if is_decoupled(self._config) and not decoupled:
            raise ValueError("the model is decoupled by its configuration, got decoupled False")
        self._config["model_transaction_policy"] = {"decoupled": decoupled}

    def add_input(self, input: Mapping[str, Any]) -> None:  # noqa: A002 - the name that models know
        """Declare an input, as a dict with name, data_type, dims and perhaps optional.

        Raises:
            ValueError: that is not what the dict has, or the configuration has it otherwise.
        """
        self._add("input", input, _INPUT_KEYS)

    def add_output(self, output: Mapping[str, Any]) -> None:
        """Declare an output, as a dict with name, data_type and dims.

        Raises:
            ValueError: that is not what the dict has, or the configuration has it otherwise.
        """
        self._add("output", output, _OUTPUT_KEYS)

    def _add(self, section: str, tensor: Mapping[str, Any], keys: frozenset[str]) -> None:
        needed = {"name", "data_type", "dims"}
        if not needed <= set(tensor) <= keys:
            raise ValueError(f"an {section} has the keys {sorted(tensor)}, expected {sorted(keys)}")
        for there in self._config[section]:
            if there["name"] == tensor["name"]:
                _agree(section, there, tensor)
                return
        self._config[section].append(dict(tensor))


def _agree(section: str, there: Config, tensor: Mapping[str, Any]) -> None:
    for key in ("data_type", "dims"):
        declared, given = there.get(key), tensor[key]
        if declared and (list(declared) != list(given) if key == "dims" else declared != given):
            raise ValueError(
                f"{section} '{tensor['name']}' has {key} {declared} in the configuration, and {given} here"
            )
        there[key] = given


def configuration(source: ModelSource) -> Config:
    """The configuration of a model, complete with the keys that models rely on."""
    config: Config = json.loads(source.config_json) if source.config_json else _from_source(source)
    config = {**copy.deepcopy(_DEFAULTS), **config}
    config["name"] = config["name"] or source.name
    if source.decoupled:
        config["model_transaction_policy"] = {"decoupled": True}
    return config


def is_decoupled(config: Mapping[str, Any]) -> bool:
    """Whether a configuration makes its model decoupled."""
    return bool(config.get("model_transaction_policy", {}).get("decoupled", False))


def tensor_config(tensors: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    """The configured tensor of that name, None where there is none."""
    return next((tensor for tensor in tensors if tensor["name"] == name), None)


def signature_of(config: Mapping[str, Any]) -> Signature:
    """What a configuration says that the model takes and gives.

    Raises:
        LoadError: with everything that is wrong or missing.
    """
    problems: list[str] = []
    size = config["max_batch_size"]
    specs: dict[str, tuple[TensorSpec, ...]] = {}
    for section in ("input", "output"):
        if not config[section]:
            problems.append(
                f"its {section}s are not declared: declare them in config.pbtxt or config.yaml, "
                "or add them in TritonPythonModel.auto_complete_config"
            )
        specs[section] = tuple(
            spec for entry in config[section] if (spec := _spec(section, entry, size > 0, problems)) is not None
        )
    if problems:
        raise LoadError("; ".join(problems))
    return Signature(specs["input"], specs["output"], size, is_decoupled(config))


def _spec(section: str, entry: Mapping[str, Any], batches: bool, problems: list[str]) -> TensorSpec | None:
    name, datatype, dims = entry["name"], config_datatype(entry.get("data_type")), entry.get("dims")
    if not isinstance(name, str) or not name:
        problems.append(f"an {section} has the name {name!r}, expected a text that is not empty")
        return None
    if datatype is None:
        problems.append(f"{section} '{name}' has the data_type {entry.get('data_type')!r}, expected one as TYPE_FP32")
    if not isinstance(dims, list | tuple) or not all(type(size) is int and size >= -1 for size in dims):
        problems.append(f"{section} '{name}' has the dims {dims!r}, expected a list of sizes, -1 for any")
        return None
    if datatype is None:
        return None
    return TensorSpec(name, datatype, (*((-1,) if batches else ()), *dims), bool(entry.get("optional", False)))


def _from_source(source: ModelSource) -> Config:
    batches = bool(source.max_batch_size)
    return {
        "max_batch_size": source.max_batch_size or 0,
        "input": [_entry(spec, batches) for spec in source.inputs],
        "output": [_entry(spec, batches) for spec in source.outputs],
        "parameters": {name: {"string_value": str(value)} for name, value in source.parameters.items()},
    }


def _entry(spec: TensorSpec, batches: bool) -> Config:
    dims = spec.shape_or_any[1 if batches else 0 :]
    entry = {"name": spec.name, "data_type": config_name(spec.datatype), "dims": dims}
    return {**entry, "optional": True} if spec.optional else entry
