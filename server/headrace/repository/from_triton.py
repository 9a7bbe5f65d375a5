"""A configuration in Triton's form, as a message, into ours."""

from collections.abc import Iterator

from google.protobuf.message import Message

from headrace.repository.config_problems import ConfigError, KeyPath
from headrace.repository.message_json import is_map
from headrace.repository.model_config import BatchingConfig, ModelConfig, build_config
from headrace.repository.triton_ensemble import ensemble_problems, plain_steps
from headrace.repository.triton_sequence import plain_sequence, plain_sequence_queue, sequence_problems
from headrace.repository.triton_types import datatype_name
from headrace.wire import pb
from headrace_backends.registry import canonical

_NOT_OFFERED = "is not offered yet"

# What would change answers or behaviour if it were passed over, so it is refused wherever it is set.
REFUSED: dict[str, str] = {
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
    "sequence_batching.iterative_sequence": (
        "is not offered yet; a decoupled model answers one request with many responses"
    ),
    "sequence_batching.state.use_growable_memory": (
        "is not offered yet; a state of any size is declared with a dimension of -1"
    ),
    "ensemble_scheduling.step.model_namespace": "is not offered: this server has one repository, and so one namespace",
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
    "timeout_action": ("default_queue_policy", "timeout_action"),
    "allow_timeout_override": ("default_queue_policy", "allow_timeout_override"),
    "default_priority": ("default_priority_level",),
    "priorities": ("priority_queue_policy",),
    "rate_limit": ("rate_limiter",),
    "global_resources": ("resources",),
    "preserve_order": ("preserve_ordering",),
    "instances": ("instance_group",),
    "versions": ("version_policy",),
    "only": ("specific", "versions"),
    "latest": ("latest", "num_versions"),
    "model_file": ("default_model_filename",),
    "decoupled": ("model_transaction_policy", "decoupled"),
    "response_cache": ("response_cache", "enable"),
    "sequence": ("sequence_batching",),
    "max_idle_us": ("max_sequence_idle_microseconds",),
    "max_candidates": ("oldest", "max_candidate_sequences"),
    "minimum_slot_utilization": ("direct", "minimum_slot_utilization"),
    "controls": ("control_input",),
    "states": ("state",),
    "initial": ("initial_state", "data_file"),
    "ensemble": ("ensemble_scheduling", "step"),
}

# Those that are spelled otherwise within their section.
_SPELLING_IN: dict[tuple[str, str], tuple[str, ...]] = {
    ("controls", "input"): ("name",),
    ("controls", "kind"): ("control", "kind"),
    ("controls", "datatype"): ("control", "data_type"),
    ("states", "input"): ("input_name",),
    ("states", "output"): ("output_name",),
    ("priorities", "max_queue_size"): ("max_queue_size",),
    ("priorities", "default_timeout_us"): ("default_timeout_microseconds",),
    ("priorities", "timeout_action"): ("timeout_action",),
    ("priorities", "allow_timeout_override"): ("allow_timeout_override",),
    ("ensemble", "model"): ("model_name",),
    ("ensemble", "version"): ("model_version",),
    ("ensemble", "inputs"): ("input_map",),
    ("ensemble", "outputs"): ("output_map",),
}


# Ours by Triton's name, where it has another.
_PARAMETER_NAMES = {
    "intra_op_thread_count": "intra_op_threads",
    "INTRA_OP_THREAD_COUNT": "intra_op_threads",  # as the backend for PyTorch has it
    "graph_optimization_level": "graph_optimization_level",
    "allow_spinning": "allow_spinning",
    "allow_native_code": "allow_native_code",  # ours: what its owner agrees to has no name of Triton's
}
# Of backends whose own parameters Triton writes in capitals; those that are not here tune its runtimes.
_CAPITAL_NAMES: dict[str, dict[str, str]] = {
    "openvino": {"INFERENCE_NUM_THREADS": "intra_op_threads", "CPU_THREADS_NUM": "intra_op_threads"},
    "tensorflow": {
        "TF_NUM_INTRA_THREADS": "intra_op_threads",
        "TF_SIGNATURE_DEF": "signature",
        "TF_GRAPH_TAG": "tag",
    },
}
# Triton's backends that are none here, and what to do instead.
_OTHER_BACKENDS: dict[str, str] = {
    "fil": (
        "is Triton's for tree models; set backend: xgboost for a model of XGBoost (xgboost.json is found), which "
        "has the input 'features' and the outputs 'prediction', or 'label' and 'probabilities', and leave input, "
        "output and parameters away; convert others to ONNX"
    ),
    "tensorflow_graphdef": "is not offered: save the graph as a SavedModel (model.savedmodel), which has signatures",
}


def from_message(message: pb.ModelConfig, folder_name: str) -> ModelConfig:
    """The configuration that Triton's message holds.

    Passed over: what ``IGNORED`` names, host policies and names of instance groups, whether a state has one buffer
    or two, and an ensemble's ``max_inflight_requests``. A queue without a bound gets our default one.

    Raises:
        ConfigError: with every problem that it has.
    """
    problems = [
        *_name_problems(message, folder_name),
        *_backend_problems(message),
        *_refusals(message, (), ()),
        *_value_problems(message),
    ]
    try:
        config = build_config(_plain(message), lambda path: _spell(path, message))
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


def _backend_problems(message: pb.ModelConfig) -> Iterator[str]:
    for key, value in (("backend", message.backend), ("platform", message.platform)):
        if value in _OTHER_BACKENDS:
            yield f"{key}: '{value}' {_OTHER_BACKENDS[value]}"


def _refusals(message: Message, path: tuple[str, ...], shown: tuple[str, ...]) -> Iterator[str]:
    """Fields of ``REFUSED`` that are set. ``shown`` is ``path`` with the indexes that a user sees."""
    for field, value in message.ListFields():
        here, label = (*path, field.name), (*shown, field.name)
        if ".".join(here) in REFUSED:
            yield f"{'.'.join(label)}: {REFUSED['.'.join(here)]}"
        elif field.name in IGNORED or is_map(field) or field.message_type is None:
            continue
        elif isinstance(value, Message):
            yield from _refusals(value, here, label)
        else:
            for index, item in enumerate(value):
                yield from _refusals(item, here, (*shown, f"{field.name}[{index}]"))


def _value_problems(message: pb.ModelConfig) -> Iterator[str]:
    """Values that have no place in our form, so that it cannot judge them."""
    for index, group in enumerate(message.instance_group):
        if group.kind == pb.ModelInstanceGroup.KIND_MODEL:
            yield f"instance_group[{index}].kind: KIND_MODEL is not offered yet; expected KIND_CPU or KIND_GPU"
        if group.kind == pb.ModelInstanceGroup.KIND_CPU and group.gpus:
            yield f"instance_group[{index}].gpus: should be empty for KIND_CPU, got {list(group.gpus)}"
    if message.HasField("sequence_batching"):
        yield from sequence_problems(message.sequence_batching)
    if message.HasField("ensemble_scheduling"):
        yield from ensemble_problems(message.ensemble_scheduling)
    for level in message.dynamic_batching.priority_queue_policy:
        if not level:
            yield "dynamic_batching.priority_queue_policy[0]: is no level; expected 1, the first to be served, or more"


def _parameters(message: pb.ModelConfig) -> dict[str, str]:
    """The backend's parameters under our names. Triton's others tune its own runtimes, so they are left out."""
    given = {key: value.string_value for key, value in message.parameters.items()}
    backend = canonical(message.backend or message.platform)
    if backend in _CAPITAL_NAMES:
        named = {_CAPITAL_NAMES[backend].get(key, key): value for key, value in given.items()}
        unset = {"intra_op_threads": "0"}  # 0 threads are Triton's way to leave the number to the framework
        return {key: value for key, value in named.items() if not key.isupper() and unset.get(key) != value}
    if backend not in ("", "onnxruntime", "torch"):
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
        "inputs": [
            {**_tensor(one, batches), "optional": one.optional, "format": _format(one)} for one in message.input
        ],
        "outputs": [{**_tensor(one, batches), "labels": one.label_filename or None} for one in message.output],
        "parameters": _parameters(message),
        "decoupled": message.model_transaction_policy.decoupled,
        "response_cache": message.response_cache.enable,
        "model_file": message.default_model_filename or None,
    }
    if message.instance_group:
        tensorrt = plain["backend"] == "tensorrt"
        plain["instances"] = [one for group in message.instance_group for one in _instances(group, tensorrt)]
    scheduling = message.WhichOneof("scheduling_choice")
    if scheduling == "dynamic_batching":
        plain["batching"] = _batching(message.dynamic_batching)
    elif scheduling == "sequence_batching":
        plain["sequence"] = plain_sequence(message.sequence_batching)
        plain["batching"] = plain_sequence_queue(message.sequence_batching)
    elif scheduling == "ensemble_scheduling":
        plain["backend"] = plain["backend"] or "ensemble"
        plain["ensemble"] = plain_steps(message.ensemble_scheduling)
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
    if tensor.HasField("reshape") and list(tensor.reshape.shape) != list(tensor.dims):
        plain["reshape"] = [-1] * batches + list(tensor.reshape.shape)
    if tensor.data_type:
        plain["datatype"] = datatype_name(tensor.data_type)
    return plain


def _format(tensor: pb.ModelInput) -> str:
    known = tensor.format in pb.ModelInput.Format.values()
    return pb.ModelInput.Format.Name(tensor.format).removeprefix("FORMAT_") if known else str(tensor.format)


def _batching(batching: pb.ModelDynamicBatching) -> dict[str, object]:
    plain: dict[str, object] = {
        "max_queue_delay_us": batching.max_queue_delay_microseconds,
        "preferred_sizes": list(batching.preferred_batch_size),
        "priority_levels": batching.priority_levels,
        "preserve_order": batching.preserve_ordering,
    }
    if batching.HasField("default_queue_policy"):
        plain |= _queue_policy(batching.default_queue_policy)
    if batching.default_priority_level:
        plain["default_priority"] = batching.default_priority_level
    # A level's policy stands alone: what it does not say is not taken from the default one.
    levels = {level: _queue_policy(one) for level, one in sorted(batching.priority_queue_policy.items()) if level}
    if levels:
        plain["priorities"] = levels
    return plain


def _queue_policy(policy: pb.ModelQueuePolicy) -> dict[str, object]:
    return {
        "max_queue_size": policy.max_queue_size or BatchingConfig.model_fields["max_queue_size"].default,
        "default_timeout_us": policy.default_timeout_microseconds,
        "timeout_action": "delay" if policy.timeout_action == pb.ModelQueuePolicy.DELAY else "reject",
        "allow_timeout_override": policy.allow_timeout_override,
    }


def _instances(group: pb.ModelInstanceGroup, tensorrt: bool) -> Iterator[dict[str, object]]:
    """A group's instances: its count on each of its devices.

    AUTO is a GPU where one is named or cannot be done without, and GPU without a number is the first.
    """
    on_gpu = group.kind == pb.ModelInstanceGroup.KIND_GPU or (
        group.kind == pb.ModelInstanceGroup.KIND_AUTO and (group.gpus or tensorrt)
    )
    devices = [f"gpu:{number}" for number in group.gpus or (0,)] if on_gpu else ["cpu"]
    limited = {"rate_limit": _rate_limit(group.rate_limiter)} if group.HasField("rate_limiter") else {}
    for device in devices:
        yield {"device": device, "count": group.count or 1, **limited}


def _rate_limit(limiter: pb.ModelRateLimiter) -> dict[str, object]:
    wanted = [one for one in limiter.resources if one.count]
    return {
        "resources": {one.name: one.count for one in wanted if not getattr(one, "global")},
        "global_resources": {one.name: one.count for one in wanted if getattr(one, "global")},
        "priority": limiter.priority or 1,
    }


def _spell(path: KeyPath, message: pb.ModelConfig) -> KeyPath:
    """Our path of a key as the path in the message; where the model batches, dims lack our first dimension."""
    spelled: list[str | int] = []
    section = ""
    for part in path:
        if isinstance(part, int):
            spelled.append(part)
            continue
        if part == "batching" and message.HasField("sequence_batching"):
            spelled += "sequence_batching", message.sequence_batching.WhichOneof("strategy_choice") or "direct"
        else:
            spelled += _SPELLING_IN.get((section, part)) or _SPELLING.get(part, (part,))
        section = part
    if (
        message.max_batch_size > 0
        and len(path) == 4
        and path[2] in ("shape", "reshape")
        and isinstance(spelled[-1], int)
    ):
        spelled[-1] -= 1
    return tuple(spelled)
