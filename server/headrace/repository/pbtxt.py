"""Triton's form of a model's configuration: ``config.pbtxt`` into ours, and ours into what clients are told."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from google.protobuf import json_format, text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from headrace.core.model import ModelInfo, TensorSpec
from headrace.core.tensor import DataType
from headrace.repository.model_config import (
    ConfigError,
    InstanceConfig,
    KeyPath,
    ModelConfig,
    build_config,
)
from headrace.wire import pb
from headrace_backends.registry import canonical, model_files

_NOT_OFFERED = "is not offered yet"

# What would change answers or behaviour if it were passed over, so it is refused wherever it is set.
REFUSED: dict[str, str] = {
    "ensemble_scheduling": _NOT_OFFERED,
    "sequence_batching": _NOT_OFFERED,
    "model_transaction_policy.decoupled": _NOT_OFFERED,
    "response_cache.enable": _NOT_OFFERED,
    "batch_input": _NOT_OFFERED,
    "batch_output": _NOT_OFFERED,
    "cc_model_filenames": "is not offered yet; name one file in default_model_filename",
    "model_operations": _NOT_OFFERED,
    "model_repository_agents": _NOT_OFFERED,
    "input.allow_ragged_batch": _NOT_OFFERED,
    "input.is_shape_tensor": _NOT_OFFERED,
    "input.is_non_linear_format_io": _NOT_OFFERED,
    "output.is_shape_tensor": _NOT_OFFERED,
    "output.is_non_linear_format_io": _NOT_OFFERED,
    "instance_group.passive": _NOT_OFFERED,
    "instance_group.profile": _NOT_OFFERED,
    "instance_group.secondary_devices": _NOT_OFFERED,
    "dynamic_batching.priority_queue_policy": "is not offered yet; default_queue_policy holds for every level",
    "dynamic_batching.default_queue_policy.timeout_action": (
        "is DELAY, which is not offered yet; expected REJECT, since a request whose time is up is dropped"
    ),
}

# What can be passed over: it names, measures, warms up or tunes, and leaves answers as they are.
IGNORED = frozenset({"metric_tags", "model_metrics", "model_warmup", "optimization", "runtime"})

# Our keys as the owner of a config.pbtxt wrote them.
_SPELLING: dict[str, tuple[str, ...]] = {
    "inputs": ("input",),
    "outputs": ("output",),
    "datatype": ("data_type",),
    "shape": ("dims",),
    "labels": ("label_filename",),
    "batching": ("dynamic_batching",),
    "max_queue_delay_us": ("max_queue_delay_microseconds",),
    "preferred_sizes": ("preferred_batch_size",),
    "max_queue_size": ("default_queue_policy", "max_queue_size"),
    "default_timeout_us": ("default_queue_policy", "default_timeout_microseconds"),
    "preserve_order": ("preserve_ordering",),
    "instances": ("instance_group",),
    "versions": ("version_policy",),
    "only": ("specific", "versions"),
    "latest": ("latest", "num_versions"),
    "model_file": ("default_model_filename",),
}


# Ours by Triton's name, where it has another.
_PARAMETER_NAMES = {
    "intra_op_thread_count": "intra_op_threads",
    "graph_optimization_level": "graph_optimization_level",
    "allow_spinning": "allow_spinning",
}


def parse_pbtxt(text: str, folder_name: str) -> ModelConfig:
    """The configuration that a ``config.pbtxt`` in the folder ``folder_name`` holds.

    Raises:
        ConfigError: with every problem that it has, of its grammar only the first.
    """
    message = pb.ModelConfig()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        where = re.match(r"(\d+):(\d+) : ", str(error))
        said = str(error)[where.end() :] if where else str(error)
        place = f"line {where[1]}, column {where[2]}: " if where else ""
        raise ConfigError([f"{place}{said}"]) from error
    except RecursionError:
        raise ConfigError(["is nested too deeply"]) from None
    return from_message(message, folder_name)


def from_message(message: pb.ModelConfig, folder_name: str) -> ModelConfig:
    """The configuration that Triton's message holds.

    Passed over: what ``IGNORED`` names, formats (NHWC, NCHW), rate limiters, host policies and names of instance
    groups, and ``allow_timeout_override``. A queue without a bound gets our default one.

    Raises:
        ConfigError: with every problem that it has.
    """
    problems = [*_name_problems(message, folder_name), *_refusals(message, (), ()), *_value_problems(message)]
    try:
        config = build_config(_plain(message), lambda path: _spell(path, message.max_batch_size > 0))
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return config


def _name_problems(message: pb.ModelConfig, folder_name: str) -> Iterator[str]:
    if message.name and message.name != folder_name:
        yield f"name: is '{message.name}', expected the folder's name, '{folder_name}', or none"
    if message.platform and message.backend and canonical(message.platform) != canonical(message.backend):
        yield f"backend: is '{message.backend}', and platform is '{message.platform}', which is another one"


def _refusals(message: Message, path: tuple[str, ...], shown: tuple[str, ...]) -> Iterator[str]:
    """Fields of ``REFUSED`` that are set. ``shown`` is ``path`` with the indexes that a user sees."""
    for field, value in message.ListFields():
        here, label = (*path, field.name), (*shown, field.name)
        if ".".join(here) in REFUSED:
            yield f"{'.'.join(label)}: {REFUSED['.'.join(here)]}"
        elif field.name in IGNORED or _is_map(field) or field.message_type is None:
            continue
        elif isinstance(value, Message):
            yield from _refusals(value, here, label)
        else:
            for index, item in enumerate(value):
                yield from _refusals(item, here, (*shown, f"{field.name}[{index}]"))


def _value_problems(message: pb.ModelConfig) -> Iterator[str]:
    """Values that have no place in our form, so that it cannot judge them."""
    sections: dict[str, Iterable[pb.ModelInput | pb.ModelOutput]] = {"input": message.input, "output": message.output}
    for section, tensors in sections.items():
        for index, tensor in enumerate(tensors):
            if tensor.HasField("reshape") and list(tensor.reshape.shape) != list(tensor.dims):
                yield (
                    f"{section}[{index}].reshape: to {list(tensor.reshape.shape)} from {list(tensor.dims)} "
                    "is not offered yet; dims should be what the model itself has"
                )
    for index, group in enumerate(message.instance_group):
        if group.kind == pb.ModelInstanceGroup.KIND_MODEL:
            yield f"instance_group[{index}].kind: KIND_MODEL is not offered yet; expected KIND_CPU or KIND_GPU"
        if group.kind == pb.ModelInstanceGroup.KIND_CPU and group.gpus:
            yield f"instance_group[{index}].gpus: should be empty for KIND_CPU, got {list(group.gpus)}"
    batching = message.dynamic_batching
    middle = _middle_level(batching.priority_levels)
    if batching.default_priority_level not in (0, middle):
        yield (
            f"dynamic_batching.default_priority_level: is {batching.default_priority_level}, which is not offered "
            f"yet; expected {middle}, the middle of the levels"
        )


def _middle_level(priority_levels: int) -> int:
    """The priority of requests that bring none: 1 is the highest, 0 says that there are no levels."""
    return (priority_levels + 1) // 2


def _parameters(message: pb.ModelConfig) -> dict[str, str]:
    """The backend's parameters under our names. Triton's others tune its own runtimes, so they are left out."""
    given = {key: value.string_value for key, value in message.parameters.items()}
    if canonical(message.backend or message.platform) not in ("", "onnxruntime", "torch"):
        return given  # a model's own code may look at them
    named = {_PARAMETER_NAMES.get(key, key): value for key, value in given.items()}
    return {key: value for key, value in named.items() if key in _PARAMETER_NAMES.values() and value != "0"}


def _plain(message: pb.ModelConfig) -> dict[str, object]:
    """The message laid out as ``build_config`` takes it; what is not set is left out."""
    declares = bool(message.input or message.output)
    batches = message.max_batch_size > 0
    plain: dict[str, object] = {
        "backend": canonical(message.backend or message.platform) or None,
        "max_batch_size": message.max_batch_size if message.max_batch_size or declares else None,
        "inputs": [{**_tensor(one, batches), "optional": one.optional} for one in message.input],
        "outputs": [{**_tensor(one, batches), "labels": one.label_filename or None} for one in message.output],
        "batching": _batching(message.dynamic_batching),
        "parameters": _parameters(message),
        "model_file": message.default_model_filename or None,
    }
    if message.instance_group:
        tensorrt = plain["backend"] == "tensorrt"
        plain["instances"] = [one for group in message.instance_group for one in _instances(group, tensorrt)]
    policy = message.version_policy.WhichOneof("policy_choice")
    if policy == "all":
        plain["versions"] = "all"
    elif policy == "specific":
        plain["versions"] = {"only": list(message.version_policy.specific.versions)}
    elif policy == "latest":
        plain["versions"] = {"latest": message.version_policy.latest.num_versions or 1}
    return plain


def _tensor(tensor: pb.ModelInput | pb.ModelOutput, batches: bool) -> dict[str, object]:
    plain: dict[str, object] = {"name": tensor.name, "shape": [-1] * batches + list(tensor.dims)}
    if tensor.data_type:
        name = pb.DataType.Name(tensor.data_type).removeprefix("TYPE_")
        plain["datatype"] = "BYTES" if name == "STRING" else name
    return plain


def _batching(batching: pb.ModelDynamicBatching) -> dict[str, object]:
    queue = batching.default_queue_policy
    plain: dict[str, object] = {
        "max_queue_delay_us": batching.max_queue_delay_microseconds,
        "preferred_sizes": list(batching.preferred_batch_size),
        "default_timeout_us": queue.default_timeout_microseconds,
        "priority_levels": batching.priority_levels,
        "preserve_order": batching.preserve_ordering,
    }
    if queue.max_queue_size:
        plain["max_queue_size"] = queue.max_queue_size
    return plain


def _instances(group: pb.ModelInstanceGroup, tensorrt: bool) -> Iterator[dict[str, object]]:
    """A group's instances: its count on each of its devices.

    AUTO is a GPU where one is named or cannot be done without, and GPU without a number is the first.
    """
    on_gpu = group.kind == pb.ModelInstanceGroup.KIND_GPU or (
        group.kind == pb.ModelInstanceGroup.KIND_AUTO and (group.gpus or tensorrt)
    )
    devices = [f"gpu:{number}" for number in group.gpus or (0,)] if on_gpu else ["cpu"]
    for device in devices:
        yield {"device": device, "count": group.count or 1}


def _spell(path: KeyPath, batches: bool) -> KeyPath:
    """Our path of a key as the path in the message; where the model batches, dims lack our first dimension."""
    spelled: list[str | int] = []
    for part in path:
        spelled += _SPELLING.get(part, (part,)) if isinstance(part, str) else (part,)
    if batches and len(path) == 4 and path[2] == "shape" and isinstance(spelled[-1], int):
        spelled[-1] -= 1
    return tuple(spelled)


def to_message(config: ModelConfig, info: ModelInfo) -> pb.ModelConfig:
    """What a configuration request is answered: as configured, with what the model file told filled in."""
    signature = info.signature
    batches = signature.max_batch_size > 0
    labels = {output.name: output.labels or "" for output in config.outputs}
    message = pb.ModelConfig(
        name=info.name,
        platform=info.platform,
        backend=info.backend,
        max_batch_size=signature.max_batch_size,
        version_policy=_version_policy(config),
        default_model_filename=config.model_file or next(iter(model_files(info.backend)), ""),
        input=[
            pb.ModelInput(
                name=spec.name, data_type=_data_type(spec.datatype), dims=_dims(spec, batches), optional=spec.optional
            )
            for spec in signature.inputs
        ],
        output=[
            pb.ModelOutput(
                name=spec.name,
                data_type=_data_type(spec.datatype),
                dims=_dims(spec, batches),
                label_filename=labels.get(spec.name, ""),
            )
            for spec in signature.outputs
        ],
        instance_group=[
            _instance_group(f"{info.name}_{index}", instance) for index, instance in enumerate(config.instances)
        ],
        parameters={key: pb.ModelParameter(string_value=_text(value)) for key, value in config.parameters.items()},
    )
    if batches:
        message.dynamic_batching.CopyFrom(_dynamic_batching(config))
    return message


def _version_policy(config: ModelConfig) -> pb.ModelVersionPolicy:
    policy = config.versions
    if policy.only is not None:
        return pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=policy.only))
    if policy.latest is not None:
        return pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=policy.latest))
    return pb.ModelVersionPolicy(all=pb.ModelVersionPolicy.All())


def _dynamic_batching(config: ModelConfig) -> pb.ModelDynamicBatching:
    batching = config.batching
    return pb.ModelDynamicBatching(
        preferred_batch_size=batching.preferred_sizes,
        max_queue_delay_microseconds=batching.max_queue_delay_us,
        preserve_ordering=batching.preserve_order,
        priority_levels=batching.priority_levels,
        default_priority_level=_middle_level(batching.priority_levels),
        default_queue_policy=pb.ModelQueuePolicy(
            default_timeout_microseconds=batching.default_timeout_us,
            allow_timeout_override=True,
            max_queue_size=batching.max_queue_size,
        ),
    )


def _instance_group(name: str, instance: InstanceConfig) -> pb.ModelInstanceGroup:
    kind, _, number = instance.device.partition(":")
    if kind == "gpu":
        return pb.ModelInstanceGroup(
            name=name, kind=pb.ModelInstanceGroup.KIND_GPU, count=instance.count, gpus=[int(number)]
        )
    return pb.ModelInstanceGroup(name=name, kind=pb.ModelInstanceGroup.KIND_CPU, count=instance.count)


def _data_type(datatype: DataType) -> str:
    return "TYPE_STRING" if datatype is DataType.BYTES else f"TYPE_{datatype}"


def _dims(spec: TensorSpec, batches: bool) -> tuple[int, ...]:
    if spec.shape is None:  # the message cannot say that the rank is free too
        return (-1,)
    return spec.shape[1:] if batches else spec.shape


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_json(message: Message) -> dict[str, Any]:
    """A message in Triton's JSON form.

    That is protobuf's own, with the fields' names as in the source and those that hold nothing given too, but with
    64-bit integers as numbers.
    """
    plain = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _restore_integers(plain, message.DESCRIPTOR)
    return plain


def _restore_integers(plain: dict[str, Any], descriptor: Any) -> None:
    for field in descriptor.fields:
        if field.name not in plain:
            continue
        value = plain[field.name]
        held = field.message_type.fields_by_name["value"] if _is_map(field) else field
        if held.message_type is not None:
            for one in value.values() if _is_map(field) else value if isinstance(value, list) else (value,):
                _restore_integers(one, held.message_type)
        elif held.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64):
            plain[field.name] = _integers(value)


def _integers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: int(one) for key, one in value.items()}
    return [int(one) for one in value] if isinstance(value, list) else int(value)


def _is_map(field: Any) -> bool:  # protobuf's two implementations have two classes of fields
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)
