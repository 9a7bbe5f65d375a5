"""Our configuration of a model in Triton's form: what clients and models are told of it."""

from headrace.batching.queue_policy import QueuePolicy
from headrace.core.device import gpu_number, gpu_uuid
from headrace.core.model import ModelInfo, TensorSpec
from headrace.repository.model_config import InstanceConfig, ModelConfig, RateLimitConfig
from headrace.repository.triton_ensemble import ensemble_message
from headrace.repository.triton_sequence import sequence_message
from headrace.repository.triton_types import data_type
from headrace.wire import pb
from headrace_backends.registry import model_files


def to_message(config: ModelConfig, info: ModelInfo) -> pb.ModelConfig:
    """What a configuration request is answered: as configured, with what the model file told filled in."""
    signature = info.signature
    batches = signature.max_batch_size > 0
    labels = {output.name: output.labels or "" for output in config.outputs}
    formats = {tensor.name: tensor.format for tensor in config.inputs}
    reshapes = {tensor.name: tensor.reshape for tensor in (*config.inputs, *config.outputs)}
    message = pb.ModelConfig(
        name=info.name,
        platform=info.platform,
        backend="" if config.ensemble else info.backend,
        max_batch_size=signature.max_batch_size,
        version_policy=_version_policy(config),
        default_model_filename=config.model_file or next(iter(model_files(info.backend)), ""),
        input=[
            pb.ModelInput(
                name=spec.name,
                data_type=data_type(spec.datatype),
                format=pb.ModelInput.Format.Value(f"FORMAT_{formats.get(spec.name, 'NONE')}"),
                dims=_dims(spec, batches),
                reshape=_reshape(reshapes.get(spec.name), batches),
                optional=spec.optional,
            )
            for spec in signature.inputs
        ],
        output=[
            pb.ModelOutput(
                name=spec.name,
                data_type=data_type(spec.datatype),
                dims=_dims(spec, batches),
                reshape=_reshape(reshapes.get(spec.name), batches),
                label_filename=labels.get(spec.name, ""),
            )
            for spec in signature.outputs
        ],
        parameters={key: pb.ModelParameter(string_value=_text(value)) for key, value in config.parameters.items()},
    )
    if config.response_cache:
        message.response_cache.enable = True
    if signature.decoupled or config.decoupled:
        message.model_transaction_policy.decoupled = True
    if config.ensemble:
        message.ensemble_scheduling.CopyFrom(ensemble_message(config.ensemble))
        return message
    message.instance_group.extend(
        _instance_group(f"{info.name}_{index}", instance) for index, instance in enumerate(config.instances)
    )
    if config.sequence is not None:
        message.sequence_batching.CopyFrom(sequence_message(config, config.sequence))
    elif batches:
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
        default_priority_level=batching.default_level,
        default_queue_policy=_queue_policy(batching.policy()),
        priority_queue_policy={level: _queue_policy(one) for level, one in batching.level_policies().items()},
    )


def _queue_policy(policy: QueuePolicy) -> pb.ModelQueuePolicy:
    return pb.ModelQueuePolicy(
        timeout_action=pb.ModelQueuePolicy.DELAY if policy.delays else pb.ModelQueuePolicy.REJECT,
        default_timeout_microseconds=policy.default_timeout_us,
        allow_timeout_override=policy.allow_timeout_override,
        max_queue_size=policy.max_size,
    )


def _instance_group(name: str, instance: InstanceConfig) -> pb.ModelInstanceGroup:
    """One group. The message has numbers only, so that a GPU named by its UUID is one without a number there."""
    limiter = _rate_limiter(instance.rate_limit)
    number = gpu_number(instance.device)
    if number is not None:
        return pb.ModelInstanceGroup(
            name=name,
            kind=pb.ModelInstanceGroup.KIND_GPU,
            count=instance.count,
            gpus=[] if gpu_uuid(instance.device) else [number],
            rate_limiter=limiter,
        )
    return pb.ModelInstanceGroup(
        name=name, kind=pb.ModelInstanceGroup.KIND_CPU, count=instance.count, rate_limiter=limiter
    )


def _rate_limiter(config: RateLimitConfig) -> pb.ModelRateLimiter | None:
    if config == RateLimitConfig():
        return None
    limiter = pb.ModelRateLimiter(priority=config.priority)
    for is_global, resources in ((False, config.resources), (True, config.global_resources)):
        for name, count in resources.items():
            limiter.resources.add(**{"name": name, "global": is_global, "count": count})
    return limiter


def _dims(spec: TensorSpec, batches: bool) -> tuple[int, ...]:
    if spec.shape is None:  # the message cannot say that the rank is free too
        return (-1,)
    return spec.shape[1:] if batches else spec.shape


def _reshape(own: tuple[int, ...] | None, batches: bool) -> pb.ModelTensorReshape | None:
    return None if own is None else pb.ModelTensorReshape(shape=own[1:] if batches else own)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
